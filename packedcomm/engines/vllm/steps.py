"""The steps of one update of the engines, and the way back from each of them."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any, Protocol, TypeVar

from packedcomm.completion import Measured
from packedcomm.engines.vllm.calls import Calls, call_all, decisive, typed
from packedcomm.engines.vllm.handles import PauseMode, finish_update
from packedcomm.errors import DeadlineExceeded, PackedCommError, PeerLost, SessionStateError

__all__ = ["Ending", "Pauses", "UpdateSteps"]

Sent = TypeVar("Sent")

# What a worker needs to give up after it has waited for a sync in vain.
_MARGIN_S = 5.0

# How long engines may take to come back when the caller is interrupted: somebody wants to get out;
# and when they have taken all of their time already.
_INTERRUPTED_S = 10.0

# How often an engine is told to go on that refuses it while a pause is under way.
_AGAIN_S = 1.0

_SENT = "everything had been sent, and committed where there is a commit"

# In the error of vLLM's worker (0.25 to 0.33) when an update was begun and never finished.
_LEFT_ACTIVE = "already active"


class Ending(Protocol):
    """What ends a transfer that can't go on because an engine has failed."""

    error: PackedCommError | None
    """What the transfer was ended with, if it was."""

    def end(self, error: PackedCommError) -> None:
        """End it; what the sending thread raises then has the error's text. From any thread."""

    def close(self, failed: BaseException | None) -> None:
        """It is over, and has failed or not."""


class Pauses:
    """Which update relies on it that engines are paused, kept from one update to the next."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        """Held while an update begins to pause, and while a pause that came late is undone."""
        self.relied_on: UpdateSteps | None = None
        self.resuming: list[Calls] = []
        """Those of earlier updates that haven't come to their end yet, and of the last one."""
        self.in_doubt: list[Any] = []
        """Engines that have been told to pause, and that nobody knows whether they do."""
        self.paused_late: list[Any] = []
        """Those that have done so since another update relies on it, which resumes them."""


class UpdateSteps:
    """The engines' side of one update: which of them are in the middle of it.

    Args:
        engines: all of them.
        timeout_s: deadline for each call, in seconds.
        seconds: filled with the time of each step.
        pauses: of these engines, kept from update to update.
    """

    def __init__(
        self, engines: list[Any], timeout_s: float, seconds: dict[str, float], pauses: Pauses
    ) -> None:
        self._engines = engines
        self._pauses = pauses
        self._timeout_s = self._longest_s = timeout_s
        self._seconds = seconds
        # Positions of engines that wait for finish_weight_update.
        self._active: set[int] = set()
        self._sent = False
        self._paused = False
        # Engines that take requests meanwhile, whose caches are to be reset.
        self._caching: list[Any] = []
        self.begun = False
        """Whether the engines were told to receive."""

    def pause(self, mode: PauseMode | None, flush: bool) -> None:
        """Pause, and forget what was cached: then also what a failed update leaves is used with
        nothing older.

        Raises:
            SessionStateError: the caller was to pause an engine (`mode` is None), which isn't.
            DeadlineExceeded: an engine doesn't pause in time. When it does, it goes on at once.
        """
        if mode is None:
            asking = [engine for engine in self._engines if hasattr(engine, "is_paused")]
            paused = call_all("is_paused", asking, lambda e: e.is_paused(), self._timeout_s)
            if False in paused:
                engine = asking[paused.index(False)]
                raise SessionStateError(
                    f"{engine!r} isn't paused: pause it before, or give a pause_mode"
                )
        pausing = [e for e in self._engines if mode is not None and hasattr(e, "pause")]
        with Measured(self._seconds, "pause"):
            if pausing:
                self._rely_on_pauses()
            self._all("pause", pausing, partial(self._pause, mode, flush))
        if flush:
            self._caching = [e for e in self._engines if getattr(e, "takes_requests", False)]
            # Pausing has done it, except where requests are kept.
            kept = (
                self._engines if mode == "keep" else [e for e in self._engines if e not in pausing]
            )
            resetting = [e for e in kept if hasattr(e, "reset_prefix_cache")]
            with Measured(self._seconds, "flush"):
                self._reset(resetting)

    def _rely_on_pauses(self) -> None:
        pauses, end = self._pauses, time.monotonic() + self._timeout_s
        late = (
            f"an engine hasn't answered after {self._timeout_s:.3g} s that it goes on, which was "
            "paused for an earlier update"
        )
        if not pauses.lock.acquire(timeout=self._timeout_s):
            raise DeadlineExceeded(late)
        try:
            # From here on nobody else undoes what comes late: this update resumes all engines,
            # whatever comes of it.
            self._paused = True
            pauses.relied_on = self
        finally:
            pauses.lock.release()
        for calls in pauses.resuming:
            calls.wait(max(0.0, end - time.monotonic()))
            if not calls.done:
                # It might still be carried out, in the middle of this update.
                raise DeadlineExceeded(
                    f"{late}; if its answer is lost, its handle's timeout ends that, if it has one"
                )

    def _pause(self, mode: PauseMode | None, flush: bool, engine: Any) -> None:
        try:
            engine.pause(mode, clear_cache=flush)
        except Exception:
            self._pauses.in_doubt.append(engine)
            raise
        with self._pauses.lock:
            # This update has ended by then. Another one that relies on it resumes the engine.
            if self._pauses.relied_on is None:
                engine.resume()
            elif self._pauses.relied_on is not self:
                self._pauses.paused_late.append(engine)

    def start(self, *, draft: bool = False) -> None:
        """Let the engines prepare, for their draft models or for their models."""
        method = "start_draft_weight_update" if draft else "start_weight_update"
        with Measured(self._seconds, "start"):
            calls = Calls(method, self._engines, partial(_start, method))
            failure = calls.wait(self._timeout_s)
        self._active = set(calls.results)
        if failure is not None:
            raise failure

    def transfer(self, body: dict[str, Any], send: Callable[[], Sent], ending: Ending) -> Sent:
        """Let the engines receive while this thread sends.

        Args:
            body: what `update_weights` is given.
            send: returns when everything is sent.
            ending: ends `send` if an engine fails.

        Raises:
            PackedCommError: see `EngineUpdater.update`.
            BaseException: what has interrupted `send`. The engines' calls have ended then, or a
                note says which haven't.
        """
        failed: BaseException | None = None
        sent: list[Sent] = []
        with Measured(self._seconds, "update"):
            # Until it is known how the calls end, there is nothing to finish.
            self._active = set()
            calls = Calls(
                "update_weights", self._engines, lambda e: e.update_weights(body), ending.end
            )
            self.begun = True
            try:
                sent.append(send())
            except BaseException as error:  # noqa: BLE001 - raised below, and engines must hear it
                failed = error
            finally:
                ending.close(failed)
            self._sent = failed is None
            interrupted = failed is not None and not isinstance(failed, Exception)
            with self._noting():
                engine = calls.wait(_INTERRUPTED_S if interrupted else self._timeout_s + _MARGIN_S)
        # vLLM has ended the update itself where it has failed.
        self._active = set(calls.results)
        if failed is None:
            if engine is None:
                return sent[0]
            engine.add_note(_SENT)
            raise engine
        if interrupted:
            if not calls.done:
                failed.add_note(f"and an engine hasn't come back: {engine}")
            raise failed
        if ending.error is not None and str(ending.error) in str(failed):
            raise (engine or ending.error) from failed
        raise failed if engine is None else decisive(failed, engine)

    def finish(self, version: str | None) -> None:
        """Let the engines process what they have received."""
        self._active = set()
        with Measured(self._seconds, "finish"), self._noting():
            self._all("finish_weight_update", self._engines, lambda e: finish_update(e, version))
        if self._caching:
            with Measured(self._seconds, "flush"), self._noting():
                self._reset(self._caching)

    def resume(self) -> None:
        """Let the engines go on."""
        # Whoever has it for long undoes a pause, which hangs.
        locked = self._pauses.lock.acquire(timeout=self._timeout_s)
        self._pauses.relied_on = None
        again, self._pauses.paused_late = self._pauses.paused_late, []
        if locked:
            self._pauses.lock.release()
        late = [earlier for earlier in self._pauses.resuming if not earlier.done]
        # Those that have been told already aren't told again, unless they have paused since.
        told = {id(engine) for earlier in late for engine in earlier.pending}
        told -= {id(engine) for engine in again}
        able = [e for e in self._engines if hasattr(e, "resume") and id(e) not in told]
        with Measured(self._seconds, "resume"), self._noting():
            calls = Calls("resume", able, self._resume)
            self._pauses.resuming = [*late, calls]
            if (failure := calls.wait(self._timeout_s)) is not None:
                raise failure

    def _resume(self, engine: Any) -> None:
        end = time.monotonic() + self._longest_s
        while True:
            try:
                engine.resume()
            except Exception as error:
                # vLLM refuses it, where data is parallel, until a pause is done that nobody waits
                # for any more. A later update pauses it again, and then resumes it.
                may = engine in self._pauses.in_doubt and self._pauses.relied_on is None
                gone = isinstance(typed(error, "resume"), PeerLost)
                if gone or not may or time.monotonic() + _AGAIN_S > end:
                    raise
            else:
                with suppress(ValueError):
                    while True:
                        self._pauses.in_doubt.remove(engine)
                return
            time.sleep(_AGAIN_S)

    def clean_up(self, error: BaseException) -> None:
        """After a failure: end the update where vLLM is in the middle of it, and go on where this
        has paused it. What fails here becomes a note of the error."""
        if not isinstance(error, Exception):
            self._timeout_s = min(self._timeout_s, _INTERRUPTED_S)
        active = [self._engines[index] for index in sorted(self._active)]
        try:
            self._all("finish_weight_update", active, lambda e: finish_update(e, None))
        except PackedCommError as second:
            error.add_note(f"and the update could not be ended: {second}")
        if isinstance(error, DeadlineExceeded) or self._pauses.in_doubt:
            self._timeout_s = min(self._timeout_s, _INTERRUPTED_S)
        try:
            # What was computed since is of the old weights, or of some old and some new.
            self._reset(self._caching if self.begun else [])
        except PackedCommError as second:
            error.add_note(f"and a cache could not be reset: {second}")
        try:
            if self._paused:
                self.resume()
        except PackedCommError as second:
            error.add_note(f"and the engine could not be resumed: {second}")

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """What fails here has the note that everything was sent, if it was."""
        try:
            yield
        except BaseException as error:
            if self._sent:
                error.add_note(_SENT)
            raise

    def _reset(self, engines: list[Any]) -> None:
        self._all("reset_prefix_cache", engines, lambda e: e.reset_prefix_cache())

    def _all(self, what: str, engines: list[Any], call: Any) -> None:
        call_all(what, engines, call, self._timeout_s)


def _start(method: str, engine: Any) -> None:
    try:
        getattr(engine, method)()
    except Exception as error:
        if _LEFT_ACTIVE not in str(error):
            raise
        # A trainer was lost between its calls: vLLM waits for the end of that update.
        finish_update(engine, None)
        getattr(engine, method)()
