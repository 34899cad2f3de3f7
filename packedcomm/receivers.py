"""`WeightReceiver`: takes what a sender sends into a target or a callback, version by version."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any

import torch

from packedcomm.endpoints import Target, TargetChooser, is_target
from packedcomm.errors import (
    ArgumentError,
    ContextLost,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    ProtocolError,
    SessionStateError,
)
from packedcomm.following import Following, Update
from packedcomm.holding import Holding
from packedcomm.results import ReceiverStatus, SyncResult
from packedcomm.session import ReceiverSession
from packedcomm.session.messages import Cancel, Close, Commit, Message, NoChange, Offer
from packedcomm.session.phases import deadline_after
from packedcomm.session.remote_errors import remote_error
from packedcomm.session.states import AT_END, AT_REST, SyncState
from packedcomm.threads import Thread

__all__ = ["OnWeights", "WeightReceiver"]

logger = logging.getLogger("packedcomm")

OnWeights = Callable[[int, list[tuple[str, torch.Tensor]]], Any]
"""Called with the version and named tensors, once per chunk."""

# How often the background thread looks whether it is to end.
_LOOK_S = 0.2


class WeightReceiver:
    """Receives syncs, either one by one (`receive`) or in a thread of its own (`start`).

    `receive` belongs to one thread at a time; `status` and `close` may be called from any.

    Args:
        target: a target, such as `TensorTarget`, `StagedTarget` or `FusedTarget`; or a callback
            `(version, [(name, tensor), ...])`, called once per chunk on the receiving thread, on a
            GPU with a stream current on which the tensors are ready. It may keep tensors. It is
            called before the sync is verified and committed. Or an object with
            `choose(manifest)`, which is asked for one of these at every sync.
        session: the receiver's session.

    Raises:
        ArgumentError: the target is neither, or the session isn't a receiver's.
    """

    def __init__(
        self, target: Target | TargetChooser | OnWeights, session: ReceiverSession
    ) -> None:
        if not (is_target(target) or callable(target) or isinstance(target, TargetChooser)):
            raise ArgumentError(
                f"target must have place and commit, or be callable, got {type(target).__name__}"
            )
        if isinstance(target, torch.nn.Module):
            raise ArgumentError("target is a module: wrap it, as in TensorTarget(module)")
        if not isinstance(session, ReceiverSession):
            raise ArgumentError(
                f"session must be a receiver's, from Session.connect, not {type(session).__name__}"
            )
        self.session = session
        self._following = Following(target, session)
        # A signal handler may close what it interrupts.
        self._lock = threading.RLock()
        self._end: SyncState | None = None
        # The last error, and the number of updates when it came: the next one is its end.
        self._error: BaseException | None = None
        self._error_at = 0
        self._told = False
        self._thread: threading.Thread | None = None
        self._ending = False

    def receive(
        self, timeout_s: float | None = None, *, since: int | None = None
    ) -> SyncResult | None:
        """Take part in one sync; returns when it is committed.

        On a GPU the data is there for every stream, since the host has waited for it.

        Args:
            timeout_s: how long to wait for a sync to begin; None is for ever.
            since: the sender's `SenderSession.said` when it told this end, by other means, to
                receive. What it had said by then is of earlier syncs, and a failure of its own that
                it reports after that, before it offers anything, ends the wait.

        Returns:
            What was received; None if the sender has closed the session.

        Raises:
            DeadlineExceeded: no sync began in time; or one that began didn't end.
            ManifestError, TensorError: the target can't take what is offered. The sender gets the
                same error; the session goes on.
            IntegrityError: what arrived isn't what was sent; nothing was committed.
            RemoteError: the sender or another receiver failed; an error of one of packedcomm's
                classes is raised as that class.
            PeerLost, NcclError, CapacityError, ...: the transfer failed. The session goes on unless
                it was the sender that was lost (`session.lasts`).
            ContextLost: this process must restart.
            SessionStateError: the receiver is closed, or runs in a thread; or another thread uses
                the session.
        """
        if self._end is SyncState.CLOSED:
            raise SessionStateError("receive: the receiver is closed")
        if (thread := self._thread) is not None:
            how = "is receiving already" if thread.is_alive() else "has ended: see status().error"
            raise SessionStateError(f"receive: a thread of this receiver {how}")
        with self.session.exclusive("receive"), self._answering():
            self._following.clear_up()
            message = self._next(timeout_s, since)
            if message is None:
                raise DeadlineExceeded(f"no sync has begun within {timeout_s:.3g} s")
            return self._take(message)

    def reconnect(self, session: ReceiverSession) -> int | None:
        """Go on in a new session, after the sender was lost or has restarted; ends the old one.

        Target, version and torn weights stay what they are. If this receiver had voted for a sync
        and lost the sender before it heard the decision, it learns it now, provided that the sender
        is still the same one (by its epoch): a staged sync is then committed, weights that were
        written in place are no longer torn.

        Args:
            session: from `Session.connect`.

        Returns:
            The version that was committed by this; else None.

        Raises:
            SessionStateError: a thread of this receiver is still receiving.
        """
        thread = self._thread
        if thread is not None and thread.is_alive():
            raise SessionStateError("reconnect: a thread of this receiver is receiving")
        self.session.close()
        self.session = session
        decided = self._following.attach(session)
        with self._lock:
            self._thread = None
            self._ending = False
            self._end = self._error = None
        session.phases.settle(self._holding.state)
        return decided

    def lose_weights(self) -> None:
        """Something else has overwritten or discarded what was received, such as an engine that
        sleeps: it is torn until a sync for which the target says that it is `whole` (see `Target`).
        To be called between syncs, on the receiving thread."""
        self._following.decisions.lose()

    def start(self, on_update: Callable[[int], Any] | None = None) -> None:
        """Receive in a background thread until the sender closes the session.

        A sync that fails is logged, shown by `status()` until the next commit, and told to the
        sender; the thread goes on for as long as the session does. Other errors end it.

        Args:
            on_update: called there with the version, an integer, after each commit. What it raises
                ends the receiver.

        Raises:
            SessionStateError: it was started already, or is closed.
        """
        with self._lock:
            if self._end is not None:
                raise SessionStateError(f"start: the receiver is {self._end}")
            if self._thread is not None:
                raise SessionStateError("start: the receiver was started already")
            self._thread = Thread(self._run, "packedcomm-receiver", (on_update,))
        self._thread.start()

    def status(self) -> ReceiverStatus:
        """The receiver at this moment. Any thread may ask."""
        with self._lock:
            connected = self._end is None and self.session.lasts
            state = self._end or self.session.state
            if not connected and state not in AT_END:
                state = SyncState.FAILED
            holding = self._holding
            if state in AT_REST or not (state in AT_END or self._following.under_way):
                # The session's may be of another receiver that uses it.
                state = holding.state
            torn = holding.torn and state in AT_REST | AT_END
            return ReceiverStatus(
                state=str(SyncState.TORN if torn else state),
                version=None if holding.torn else holding.version,
                epoch=holding.epoch or self.session.epoch,
                update_count=holding.update_count,
                last_update_time=holding.last_update_time,
                error=self._last_error(),
                connected=connected,
            )

    def close(self) -> None:
        """End the thread, if there is one, and close the session. Idempotent.

        Raises:
            Exception: what ended the thread, at the first call.
        """
        self._ending = True
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join(self.session.settings.close_timeout_s)
            if thread.is_alive():
                self.session.abort("the receiver is being closed")
                thread.join(self.session.settings.close_timeout_s)
        self.session.close()
        with self._lock:
            self._end = self._end or SyncState.CLOSED
            error, told = self._last_error(), self._told
            self._told = True
        if error is not None and not told:
            raise error

    def __enter__(self) -> WeightReceiver:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def _run(self, on_update: Callable[[int], Any] | None) -> None:
        try:
            if self.session.device.type == "cuda":
                torch.cuda.set_device(self.session.device)
            while not self._ending:
                if not self._take_in_background(on_update):
                    return
        except BaseException as error:
            if self._ending and isinstance(error, (PeerLost, SessionStateError)):
                return  # what closing looks like from here
            logger.exception("the receiver's thread ended")
            self._note_error(error)
            self._end_as(SyncState.FAILED)
            # Nobody receives any more: the sender must know before its next sync.
            self.session.fail(error, ended=True)

    def _take_in_background(self, on_update: Callable[[int], Any] | None) -> bool:
        """Wait a little for a message and act on it; whether the thread goes on. A sync that fails
        doesn't end it while the session lasts."""
        try:
            with self.session.exclusive("receive"), self._answering():
                self._following.clear_up()
                message = self._next(_LOOK_S)
                if message is None:
                    return True
                result = self._take(message)
        except ContextLost:
            raise
        except PackedCommError as error:
            if not self.session.lasts:
                raise
            # Its frames hold buffers, and status() may hold it for long.
            traceback.clear_frames(error.__traceback__)
            again = type(self._error) is type(error) and isinstance(
                error, (DeadlineExceeded, SessionStateError)
            )
            self._note_error(error)
            if not again:
                logger.warning("a sync failed, the receiver goes on: %s", error)
            if isinstance(error, SessionStateError):
                # Another thread may have the session for long.
                time.sleep(_LOOK_S)
            return True
        if result is None:
            return False
        if on_update is not None and self.status().ready:
            on_update(result.version)
        return True

    def _next(self, timeout_s: float | None, since: int | None = None) -> Message | None:
        """What the sender says next that concerns a receiver between syncs; None if nothing came in
        time."""
        session, decisions = self.session, self._following.decisions
        deadline = deadline_after(timeout_s)
        try:
            while True:
                message = session.poll(max(0.0, deadline - time.monotonic()))
                if message is None or isinstance(message, Close):
                    return message
                late = since is not None and session.number <= since
                if isinstance(message, (Offer, NoChange)) and not (late or session.withdrawn):
                    return message
                if isinstance(message, Commit) and decisions.in_doubt_of(message):
                    if not late:
                        return message
                    self._take(message)
                if isinstance(message, Cancel) and since is not None and not late:
                    raise remote_error(message, "cancelled by the sender")
                # Of a sync that this end has left: the sender hadn't heard of that yet, or this is
                # its answer.
                logger.debug("skipped %s", type(message).__name__)
        except PeerLost:
            # Of another receiver's loss the session doesn't end.
            if not session.lasts:
                self._end_as(SyncState.FAILED)
            raise

    def _take(self, message: Message) -> SyncResult | None:
        """Act on what the sender has just said."""
        begin = time.perf_counter()
        match message:
            case Close(in_order=True):
                self._end_as(SyncState.CLOSED)
                return None
            case Close():
                self._end_as(SyncState.FAILED)
                raise PeerLost(f"the sender has ended the session here: {message.reason}")
            case Offer() | NoChange() | Commit():
                return self._result(self._update(message), begin)
        raise ProtocolError(f"the sender sent {type(message).__name__}, expected an offer")

    def _update(self, message: Offer | NoChange | Commit) -> Update:
        update = self._following.receive(message)
        if isinstance(message, Offer):
            self._following.plan_ahead(message)
        return update

    def _note_error(self, error: BaseException) -> None:
        with self._lock:
            self._error, self._error_at = error, self._holding.update_count
            self._told = False

    def _last_error(self) -> BaseException | None:
        return self._error if self._error_at == self._holding.update_count else None

    @property
    def _holding(self) -> Holding:
        return self._following.decisions.holding

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """Whoever fails here, also where it only looks what has come, tells a sender that waits for
        its answer."""
        try:
            yield
        except BaseException as error:
            if self.session.owes:
                self.session.fail(error)
            raise

    def _end_as(self, state: SyncState) -> None:
        with self._lock:
            self._end = self._end or state

    def _result(self, update: Update, begin: float) -> SyncResult:
        return SyncResult(
            version=update.version,
            epoch=self.session.epoch,
            transport=self.session.transport,
            tensors=update.tensors,
            bytes=update.nbytes,
            seconds={**update.seconds, "total": time.perf_counter() - begin},
            changed_tensors=update.changed_tensors,
            verified=update.verified,
            changes=update.changes,
            notes=update.notes,
        )
