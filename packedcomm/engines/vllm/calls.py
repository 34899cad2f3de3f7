"""One call of several engines at once, in threads, with a deadline and typed errors."""

from __future__ import annotations

import inspect
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from packedcomm.engines.vllm.markers import unmarked
from packedcomm.errors import (
    ArgumentError,
    DeadlineExceeded,
    NcclError,
    PackedCommError,
    PeerLost,
    RemoteError,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session.remote_errors import combined

__all__ = ["Calls", "call_all", "decisive", "typed"]

# What the failure of somebody else looks like.
_MAYBE_CAUSED_ELSEWHERE = (
    DeadlineExceeded,
    NcclError,
    PeerLost,
    RemoteError,
    RendezvousTimeout,
    SessionStateError,
)


class Calls:
    """A call of every engine, begun at once, each in a daemon thread of its own.

    Args:
        what: the call, for messages.
        engines: called with each; any objects.
        call: takes an engine.
        on_failure: called with the error as soon as a call fails, in the call's thread.
    """

    def __init__(
        self,
        what: str,
        engines: Sequence[Any],
        call: Callable[[Any], Any],
        on_failure: Callable[[PackedCommError], object] | None = None,
    ) -> None:
        self._what = what
        self._engines = engines
        self._call = call
        self._on_failure = on_failure
        self._failures: dict[int, PackedCommError] = {}
        self._results: dict[int, Any] = {}
        self._threads = [
            threading.Thread(
                target=self._run, args=(index,), name=f"packedcomm-{what}", daemon=True
            )
            for index in range(len(engines))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def results(self) -> Mapping[int, Any]:
        """What the calls that are done have returned, by the engines' positions."""
        return dict(self._results)

    @property
    def done(self) -> bool:
        """Whether every call has returned or failed."""
        return len(self._results) + len(self._failures) == len(self._engines)

    @property
    def pending(self) -> list[Any]:
        """Engines whose calls have neither returned nor failed."""
        ended = {*self._results, *self._failures}
        return [engine for index, engine in enumerate(self._engines) if index not in ended]

    @property
    def failure(self) -> PackedCommError | None:
        """What has failed so far, as one error."""
        return combined(dict(self._failures)) if self._failures else None

    def wait(self, timeout_s: float) -> PackedCommError | None:
        """Wait until all calls are done.

        Returns:
            What has failed, as one error; a `DeadlineExceeded` for calls that go on.
        """
        deadline = time.monotonic() + timeout_s
        for thread in self._threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        failures = dict(self._failures)
        for index, engine in enumerate(self._engines):
            if index not in failures and index not in self._results:
                failures[index] = DeadlineExceeded(
                    f"{self._what} of {engine!r:.200}: not done after {timeout_s:.3g} s"
                )
        return combined(failures) if failures else None

    def _run(self, index: int) -> None:
        engine = self._engines[index]
        try:
            result = self._call(engine)
            if inspect.isawaitable(result):
                close = getattr(result, "close", None)
                if close is not None:
                    close()
                raise ArgumentError(
                    f"{self._what} of {engine!r:.200} is asynchronous: pass an object whose "
                    "methods return when they are done"
                )
        except Exception as error:  # noqa: BLE001 - whatever an engine raises is its failure
            failure = self._failures[index] = typed(error, f"{self._what} of {engine!r:.200}")
            if self._on_failure is not None:
                self._on_failure(failure)
        else:
            self._results[index] = result


def call_all(
    what: str, engines: Sequence[Any], call: Callable[[Any], Any], timeout_s: float
) -> list[Any]:
    """Call every engine at once; returns the results in order.

    Raises:
        PackedCommError: what has failed, as one error.
        DeadlineExceeded: a call isn't done in time; it goes on.
    """
    calls = Calls(what, engines, call)
    failure = calls.wait(timeout_s)
    if failure is not None:
        raise failure
    return [calls.results[index] for index in range(len(engines))]


def typed(error: BaseException, where: str) -> PackedCommError:
    """What an engine's call has raised, as an error of packedcomm's: itself, or the one that its
    text or its HTTP response has brought, else a general one."""
    if isinstance(error, PackedCommError):
        return error
    response = getattr(getattr(error, "response", None), "text", "")
    found = unmarked(str(error)) or (unmarked(response) if isinstance(response, str) else None)
    if found is None:
        text = f"{where}: {type(error).__name__}: {error}"
        if isinstance(error, TimeoutError):
            found = DeadlineExceeded(text)
        elif isinstance(error, ConnectionError):
            found = PeerLost(text)
        else:
            found = RemoteError(text)
    found.__cause__ = error
    return found


def decisive(session: BaseException, engine: PackedCommError) -> BaseException:
    """Which of two errors of one failed update to raise: the session's, unless only the engine's
    says what the matter is. The other one becomes a note of it."""
    first: BaseException = session
    second: BaseException = engine
    # Some classes don't cross a session; the engine's error still has its own.
    unnamed = type(session) is RemoteError and f"{type(engine).__name__}: " in str(session)
    if unnamed or (
        isinstance(session, _MAYBE_CAUSED_ELSEWHERE)
        and not isinstance(engine, _MAYBE_CAUSED_ELSEWHERE)
    ):
        first, second = engine, session
    who = "the engine" if second is engine else "the session"
    if str(second) not in str(first):
        first.add_note(f"{who} says: {type(second).__name__}: {second}")
    return first
