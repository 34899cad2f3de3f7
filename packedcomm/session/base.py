"""What both ends of a session have in common: their state, and their supervisor."""

from __future__ import annotations

import abc
import os
import socket
import threading
import time
import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from packedcomm.communicators import Communicator
from packedcomm.completion import wait_for_device
from packedcomm.errors import (
    ContextLost,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    RendezvousTimeout,
    SessionStateError,
    summary,
)
from packedcomm.planning.chunks import WireFormat
from packedcomm.session.ending import Ending
from packedcomm.session.flight import write_json
from packedcomm.session.messages import Beat, Transport
from packedcomm.session.phases import Phase
from packedcomm.session.states import AT_REST, SyncState
from packedcomm.session.supervisor import Supervisor
from packedcomm.settings import Settings

__all__ = ["SCHEMA_VERSION", "SessionEnd"]

# Of the description that `write_description` writes.
SCHEMA_VERSION = 2

# After a pause of this process as long as this, its peers are given time to be heard again.
_ASLEEP_S = 1.0

_WORTH_A_RECORD = (ContextLost, DeadlineExceeded, PeerLost, RendezvousTimeout)


@dataclass(frozen=True, weakref_slot=True, slots=True)
class _Use:
    """What a thread has a session for."""

    thread: threading.Thread
    operation: str


class SessionEnd(Ending):
    """One end of a session.

    Belongs to one thread at a time; `abort`, `failure`, `state` and `describe` are for any. A
    supervisor thread takes messages and notices failures while that thread does something else.
    """

    epoch: str
    """Random name of the session, new at every `Session.listen`."""

    rank: int
    """0 is the sender. A receiver's may change when the members do."""

    world_size: int
    """The sender and all receivers of the present communicator; before the first one, those that
    are expected."""

    wire_format: WireFormat

    buffer_size_bytes: int
    """Size at which packed chunks are cut; may be changed on the sender between syncs."""

    address: str
    """Where the sender listens, "host:port"."""

    generation: int
    """How many communicators this end has connected."""

    chunk: int
    """Chunks of the present transfer that were handed to the communicator, for messages."""

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Use `Session.listen` or `Session.connect`."""
        super().__init__(settings, device)
        self.epoch = ""
        self.generation = 0
        self.chunk = 0
        self._transport: Transport | None = None
        # Held by whichever thread takes what has come, so that the order of messages is kept.
        self._pumping = threading.Lock()
        # Which thread is in the middle of which operation.
        self._use: weakref.ref[_Use] | None = None
        self._using = threading.RLock()
        self._last_look = time.monotonic()
        self._next_beat = 0.0

    @property
    def state(self) -> SyncState:
        """Where this end is. Any thread may ask."""
        return self.phases.present.state

    @property
    @abc.abstractmethod
    def communicator(self) -> Communicator:
        """The communicator of all ranks; the sender is rank 0. The session ends it."""

    @property
    @abc.abstractmethod
    def transport(self) -> Transport:
        """What the data travels over: `"nccl"` or `"gloo"`."""

    def failure(self) -> PackedCommError | None:
        """What has gone wrong elsewhere, or None; looks and doesn't wait. Any thread may ask.

        Returns:
            What has interrupted the transfer that is under way; a receiver's failure or loss, the
            sender's `Cancel` or loss; a `SessionStateError` if this end has ended.
        """
        if self._ended is not None:
            return SessionStateError(f"{self._role}: {self._ended}")
        # By a `with`, which no interrupt leaves locked. An end that is being closed hears no more.
        if not self._pumping.locked():
            with suppress(SessionStateError), self._pumping:
                self._take_and_beat(0.0)
        return self.phases.interruption or self._failed()

    @abc.abstractmethod
    def _failed(self) -> PackedCommError | None:
        """What those messages say has gone wrong elsewhere that have come already."""

    @abc.abstractmethod
    def _take(self, timeout_s: float, *, soon: bool = False) -> None:
        """Wait for at most 50 ms, and sort what has come. `_pumping` is held."""

    def _check_silence(self) -> None:
        """Give up peers that haven't been heard for too long; a receiver looks when it waits."""

    @contextmanager
    def exclusive(self, operation: str) -> Iterator[None]:
        """Have the session for one operation. Others within it, of the same thread, are its own.

        Raises:
            SessionStateError: another thread is in the middle of one.
        """
        mine = _Use(threading.current_thread(), operation)
        with self._using:
            user = None if self._use is None else self._use()
            if user is not None and not user.thread.is_alive():
                user = None
            if user is not None and user.thread is not mine.thread:
                raise SessionStateError(
                    f"{operation} on {self._role}: thread {user.thread.name!r} is in the middle of "
                    f"{user.operation}: a session belongs to one thread at a time"
                )
            claim = weakref.ref(mine)
            if user is None:
                self._use = claim
        try:
            yield
        finally:
            # Frees the session already, wherever an interrupt comes.
            del mine
            with self._using:
                if self._use is claim:
                    self._use = None

    @abc.abstractmethod
    def _give_more_time(self, seconds: float) -> None:
        """Let the silence of peers count from so much later, from now at the latest."""

    def _interrupt(self, phase: Phase, error: PackedCommError) -> bool:
        """Mark a phase as over, if it is still the present one, and tell everybody why, off the
        thread that may be blocked; whether it was."""
        return self.phases.interrupt(phase, error)

    def _give_up_silent_peers(self, error: PackedCommError) -> None:
        """A deadline has passed: whoever hasn't been heard lately is the sender's reason."""

    @abc.abstractmethod
    def _peers(self) -> list[dict[str, Any]]:
        """What is known of the other ranks, as JSON values."""

    @abc.abstractmethod
    def _waited_for(self) -> list[dict[str, Any]]:
        """Those of `_peers` whom this end waits for."""

    def start_supervisor(self) -> None:
        """Begin to look after this end."""
        self._supervisor = Supervisor(self._look, f"packedcomm-{self._role.split()[-1]}-session")

    def _look(self) -> None:
        """One look of the supervisor's."""
        phase = self.phases.present
        trouble = self.failure()
        if self._ended is not None or phase.state is not SyncState.MOVING:
            return
        trouble = trouble or self._trouble(phase)
        # Before the phase is marked: its thread may have another one soon.
        communicator = self._communicator
        if trouble is not None and self._interrupt(phase, trouble):
            self._release(communicator, str(trouble))

    def _trouble(self, phase: Phase) -> PackedCommError | None:
        """Why a transfer can't come to its end, although nobody has said so."""
        quiet_s = 2 * self.settings.heartbeat_interval_s
        found: PackedCommError | None = self.phases.overdue(phase, self._waited_for(), quiet_s)
        if found is not None:
            self._give_up_silent_peers(found)
        elif (communicator := self._communicator) is not None:
            try:
                communicator.check()
            except SessionStateError:
                pass  # somebody else is ending it
            except PackedCommError as error:
                found = error
        return found

    def _release(self, communicator: Communicator | None, reason: str) -> None:
        """Let go whoever is blocked in the communicator, off the thread that is."""
        if communicator is not None:
            try:
                communicator.abort(reason)
            except ContextLost as error:
                self.flight.note("context lost", text=str(error)[:500])

    def _pump(self, timeout_s: float, *, soon: bool = False) -> None:
        """Take what has come, waiting for at most 50 ms for something.

        Args:
            timeout_s: may be shorter, in seconds.
            soon: whether the other side is about to say something.
        """
        with self._pumping:
            self._take_and_beat(timeout_s, soon=soon)

    def _drop_first(self) -> None:
        """Take out what came first, while nobody sorts what has come."""
        with self._pumping:
            self._channel.received.popleft()

    def _take_and_beat(self, timeout_s: float, *, soon: bool = False) -> None:
        self._take(timeout_s, soon=soon)
        now = time.monotonic()
        # Also where it was in the middle of that wait that this process slept.
        if (gap := now - self._last_look) > _ASLEEP_S:
            self._give_more_time(gap)
        self._last_look = now
        if now >= self._next_beat:
            self._next_beat = now + self.settings.heartbeat_interval_s
            self._check_silence()
            waited_for = ", ".join(str(peer["name"]) for peer in self._waited_for())
            self._say_to_all(Beat(str(self.state), waited_for[:200]))

    def record_failure(self, error: BaseException) -> None:
        """Write the flight record of a sync that has failed, and say in the error where it is.

        An offer that doesn't fit, which harms nobody, isn't recorded.
        """
        harmless = self.state in AT_REST or self.state is SyncState.AGREED
        if harmless and not isinstance(error, _WORTH_A_RECORD):
            return
        path = self.flight.write(self.facts(), error, self._waited_for())
        notes = getattr(error, "__notes__", ())
        if path is not None and not any("flight record" in note for note in notes):
            error.add_note(f"flight record: {path}")

    def facts(self) -> dict[str, Any]:
        """What a flight record says of this end, as JSON values."""
        return {
            **self.describe(),
            "role": self._role,
            "pid": os.getpid(),
            "host": socket.gethostname(),
            "device": str(self.device),
            "chunk": self.chunk,
            "peers": self._peers(),
        }

    def _warm_up(self, communicator: Communicator, deadline: float) -> Communicator:
        """Let NCCL open its connections now, which it otherwise does in the first broadcast, where
        a peer that has failed meanwhile would be waited for."""
        if self.device.type == "cuda":
            try:
                communicator.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device), 0)
                remaining = max(0.1, deadline - time.monotonic())
                wait_for_device(self.device, remaining, self.failure, "NCCL's first broadcast")
            except BaseException as error:
                communicator.abort(summary(error))
                communicator.close()
                raise
        return communicator

    def _adopt(self, communicator: Communicator) -> None:
        """Have a communicator that was just connected."""
        with self._ending:
            self._communicator = communicator
            aborted = self._ended
        self.generation += 1
        self.flight.note("connected", generation=self.generation, world_size=self.world_size)
        if aborted is not None:
            communicator.abort(aborted)
        self._check_open("connect")

    def _check_failure(self) -> None:
        """Raise what has gone wrong elsewhere, while this end connects."""
        self._check_open("connect")
        failed = self.failure()
        if failed is not None:
            raise failed

    def describe(self) -> dict[str, Any]:
        """What others may want to know of the session, as JSON values; never the secret.

        `transport` is None on a sender that no receiver has come to yet.
        """
        from packedcomm import __version__

        return {
            "schema_version": SCHEMA_VERSION,
            "address": self.address,
            "epoch": self.epoch,
            "rank": self.rank,
            "world_size": self.world_size,
            "generation": self.generation,
            "state": str(self.state),
            "transport": self._transport,
            "wire_format": self.wire_format,
            "buffer_size_bytes": self.buffer_size_bytes,
            "package_version": __version__,
        }

    def write_description(self, path: str | os.PathLike[str]) -> None:
        """Write `describe()` as JSON. A reader sees the whole file or none, never a part.

        Raises:
            OSError: the file can't be written.
        """
        write_json(Path(path), self.describe())

    def __repr__(self) -> str:
        state = "" if self._ended is None else f", ended: {self._ended}"
        return (
            f"{type(self).__name__}({self.address!r}, rank={self.rank}, "
            f"world_size={self.world_size}, device='{self.device}', {self.state}{state})"
        )
