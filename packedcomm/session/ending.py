"""How one end of a session ends: at once or in order, and in the process where it is."""

from __future__ import annotations

import abc
import contextlib
import os
import threading
import warnings
import weakref
from typing import ClassVar, Self

import torch

from packedcomm.communicators import Communicator
from packedcomm.errors import SessionStateError, summary
from packedcomm.session.flight import FlightRecord
from packedcomm.session.messages import Close, Message
from packedcomm.session.phases import Phases
from packedcomm.session.receiver_channel import ReceiverChannel
from packedcomm.session.remote_errors import valid_text
from packedcomm.session.sender_channel import SenderChannel
from packedcomm.session.states import SyncState
from packedcomm.session.supervisor import Supervisor
from packedcomm.settings import Settings
from packedcomm.transports.slots import release_buffers

__all__ = ["Ending"]

# The sessions of this process; and those of its parent, which are never collected here.
_sessions: weakref.WeakSet[Ending] = weakref.WeakSet()
_parents: list[Ending] = []


class Ending(abc.ABC):
    """What an end of a session has to give up when it ends: the base of `SessionEnd`."""

    device: torch.device
    settings: Settings

    _role: ClassVar[str]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        self.settings = settings
        self.device = device
        self.flight = FlightRecord(settings)
        self.phases = Phases(self._role, self.flight)
        self._channel: SenderChannel | ReceiverChannel
        self._communicator: Communicator | None = None
        self._supervisor: Supervisor | None = None
        self._ended: str | None = None
        self._ending = threading.RLock()
        self._closed = False
        _sessions.add(self)

    @abc.abstractmethod
    def _say_to_all(self, message: Message) -> None:
        """Say something that isn't answered to whoever is still there; never raises."""

    def drop_communicator(self, reason: str, *, in_order: bool = False) -> None:
        """Give the communicator up, with its buffers; the next sync connects another. Where it is
        idle, `in_order`, nothing is aborted. Then nothing of it touches any tensor any more.

        Raises:
            ContextLost: it can't be given up: this process must restart.
        """
        with self._ending:
            communicator, self._communicator = self._communicator, None
        if communicator is None:
            return
        self.flight.note("communicator given up", reason=reason[:500])
        try:
            if not in_order:
                communicator.abort(reason)
        finally:
            communicator.close()
            release_buffers(communicator)

    def abort(self, reason: str) -> None:
        """End the session now, and tell the other side; may be called from any thread.

        What is under way and what is called later raises `SessionStateError` with the reason here.
        `close` still has to be called.
        """
        if not self._end(SyncState.FAILED, f"aborted: {reason}", in_order=False):
            return
        if (communicator := self._communicator) is not None:
            communicator.abort(reason)

    def close(self) -> None:
        """Leave the session, tell the other side, and release everything. Idempotent; one that was
        interrupted can be called again."""
        if self._closed:
            return
        try:
            with contextlib.ExitStack() as stack:
                stack.callback(self._channel.close)
                # NCCL's order would be to wait for other ranks, which may not be about to close.
                quiet = self.device.type != "cuda"
                stack.callback(self.drop_communicator, "the session is closed", in_order=quiet)
                self._end(SyncState.CLOSED, "the session is closed", in_order=True)
                if self._supervisor is not None:
                    self._supervisor.stop(self.settings.close_timeout_s)
        except Exception:
            self._closed = True
            raise
        self._closed = True

    def _end(self, state: SyncState, reason: str, *, in_order: bool) -> bool:
        """Mark this end as over, unless it is already, and say so; whether it wasn't.

        Nobody reads the channel from then on, so strangers must not be able to fill it.
        """
        with self._ending:
            if self._ended is not None:
                return False
            self._ended = reason
        with contextlib.suppress(SessionStateError):
            self.phases.enter(state)
        self._say_to_all(Close("closed" if in_order else valid_text(reason), in_order))
        self._channel.hang_up()
        return True

    def _leave_to_parent(self) -> None:
        """In a process that was forked: a session has one process. What threads of the parent held
        at that moment is held for ever here."""
        _parents.append(self)
        self._ending = threading.RLock()
        self._ended = self._ended or "it belongs to the process that this one was forked from"
        self._closed = True
        if (channel := getattr(self, "_channel", None)) is not None:
            channel.leave_to_parent()

    def _check_open(self, operation: str) -> None:
        if self._ended is not None:
            raise SessionStateError(f"{operation} on {self._role}: {self._ended}")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        try:
            if error is not None:
                # Receivers that wait for data must not wait for this end to close in order.
                self.abort(summary(error)[:1000])
        finally:
            self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)


def _leave_sessions_to_parent() -> None:
    for session in list(_sessions):
        session._leave_to_parent()
    _sessions.clear()


os.register_at_fork(after_in_child=_leave_sessions_to_parent)
