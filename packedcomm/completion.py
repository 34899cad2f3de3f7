"""How a stage of a sync ends: in time, late, or because somebody else failed."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

from packedcomm.errors import DeadlineExceeded, NcclError, PeerLost, SessionStateError

__all__ = ["Measured", "await_cause", "wait_for_device", "wait_until"]

# Most transfers end within this time; sleeping would cost more than it saves.
_SPIN_S = 0.002

_SLEEP_S = 0.0002

# How often peers are asked whether they are well.
_LOOK_S = 0.05

# Errors of a transport that may be what another rank's failure looks like from here, and how long
# to wait for that rank's word.
_MAYBE_CAUSED_ELSEWHERE = (DeadlineExceeded, NcclError, PeerLost, SessionStateError)
_CAUSE_S = 1.0


def wait_for_device(
    device: torch.device,
    timeout_s: float,
    failure: Callable[[], Exception | None],
    operation: str,
) -> None:
    """Return when everything that the current stream has got so far is done; at once on a CPU.

    Args:
        device: the device of the stream.
        timeout_s: deadline in seconds.
        failure: asked every 50 ms what has failed elsewhere; what it returns is raised.
        operation: for the message.

    Raises:
        DeadlineExceeded: the work goes on, and somebody must abort what it waits for.
    """
    if device.type != "cuda":
        return
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]
    event.record(torch.cuda.current_stream(device))

    def look() -> None:
        if (failed := failure()) is not None:
            raise failed

    if not wait_until(event.query, timeout_s, look):
        raise DeadlineExceeded(f"{operation}: the GPU isn't done after {timeout_s:.3g} s")


def wait_until(
    done: Callable[[], bool], timeout_s: float, look: Callable[[], None] | None = None
) -> bool:
    """Ask again and again whether something is done, at first without sleeping; whether it was in
    time.

    Args:
        done: whether it is.
        timeout_s: deadline in seconds.
        look: called every 50 ms meanwhile; what it raises ends the wait.
    """
    begin = time.monotonic()
    next_look = begin + _LOOK_S
    while not done():
        now = time.monotonic()
        if look is not None and now >= next_look:
            look()
            next_look = now + _LOOK_S
        if now - begin > timeout_s:
            return False
        if now - begin > _SPIN_S:
            time.sleep(_SLEEP_S)
    return True


def await_cause(error: BaseException, failure: Callable[[], Exception | None]) -> Exception | None:
    """What another rank says is behind a failure of the transport, if that can be and it says so
    within a second."""
    deadline = time.monotonic() + _CAUSE_S
    while isinstance(error, _MAYBE_CAUSED_ELSEWHERE) and time.monotonic() < deadline:
        cause = failure()
        if cause is not None:
            return cause
        time.sleep(0.02)
    return None


class Measured:
    """Adds the time that the body of a `with` takes to a stage.

    Args:
        seconds: by stage.
        stage: which.
    """

    __slots__ = ("_begin", "_seconds", "_stage")

    def __init__(self, seconds: dict[str, float], stage: str) -> None:
        self._seconds = seconds
        self._stage = stage

    def __enter__(self) -> None:
        self._begin = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        spent = time.perf_counter() - self._begin
        self._seconds[self._stage] = self._seconds.get(self._stage, 0.0) + spent
