"""Lanes: where a stage of a transfer runs, in order, and how lanes wait for one another.

On a GPU a lane is a CUDA stream and a mark is an event, so nothing here makes the host wait. On a
CPU a lane is the calling thread; what it starts and doesn't finish, such as a broadcast that the
group carries out on a thread of its own, is a mark too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Protocol

import torch

from packedcomm.communicators.base import Pending

__all__ = [
    "Caller",
    "CallerStream",
    "CallerThread",
    "InlineLane",
    "Lane",
    "Mark",
    "StreamLane",
    "Work",
    "synchronize",
]


Mark = torch.cuda.Event | Pending | None
"""A point in a lane that others can wait for; None is long past."""

Work = Callable[[], Pending | None]
"""Something to do in a lane; returns what it started and left running, on a CPU only."""


class Lane(Protocol):
    """Runs pieces of work in the order in which they are given."""

    def run(self, work: Work, after: Iterable[Mark] = ()) -> Mark:
        """Run `work` behind this lane's earlier work and behind the marks; returns its end."""

    def tail(self) -> Mark:
        """The end of everything that was given to this lane."""

    def retire(self) -> None:
        """Nothing is given to this lane any more."""

    def start_timing(self) -> None:
        """Forget earlier times and measure the work that follows."""

    def seconds(self) -> float:
        """Time spent in work since `start_timing`; waits for the work on a GPU."""


class Caller(Protocol):
    """The order of the caller's own work."""

    def mark(self) -> Mark:
        """Everything that the caller has started so far."""

    def wait_for(self, mark: Mark) -> None:
        """Let what the caller starts from now on come after the mark."""


# Streams that no lane uses any more. A stream takes GPU memory when it is first used and doesn't
# give it back, so that a new one for each session would look like a leak for a while.
_IDLE: dict[torch.device, list[torch.cuda.Stream]] = {}


class StreamLane:
    """A dedicated CUDA stream; `run` enqueues, with the stream current, and returns at once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        idle = _IDLE.setdefault(device, [])
        try:
            self.stream = idle.pop()
        except IndexError:
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self._timing = False
        self._spans: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def run(self, work: Work, after: Iterable[Mark] = ()) -> Mark:
        for mark in after:
            if isinstance(mark, torch.cuda.Event):
                self.stream.wait_event(mark)
        with torch.cuda.stream(self.stream):
            begin = self._event() if self._timing else None
            work()
            end = self._event()
        if begin is not None:
            self._spans.append((begin, end))
        return end

    def tail(self) -> Mark:
        return self._event()

    def retire(self) -> None:
        """Leave the stream to a later lane; nothing is run here any more. One with work left on it,
        which may wait for a peer that has gone, isn't used again."""
        if self.stream.query():
            _IDLE[self._device].append(self.stream)

    def start_timing(self) -> None:
        self._timing = True
        self._spans.clear()

    def seconds(self) -> float:
        self._timing = False
        if self._spans:
            self._spans[-1][1].synchronize()
        total: float = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        self._spans.clear()
        return total

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self._timing)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event


class InlineLane:
    """The calling thread; `run` returns when the work is done or, if it says so, started."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._started: list[Pending] = []
        self._timing = False

    def run(self, work: Work, after: Iterable[Mark] = ()) -> Mark:
        for mark in after:
            _wait(mark)
        begin = time.perf_counter()
        pending = work()
        if pending is None:
            self._seconds += time.perf_counter() - begin
        elif self._timing:
            self._started.append(pending)
        return pending

    def tail(self) -> Mark:
        return None

    def retire(self) -> None:
        pass

    def start_timing(self) -> None:
        self._seconds = 0.0
        self._started.clear()
        self._timing = True

    def seconds(self) -> float:
        self._timing = False
        for pending in self._started:
            pending.wait()
            self._seconds += pending.seconds
        self._started.clear()
        return self._seconds


class CallerStream:
    """The stream that was current when the transfer was called."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self.stream = torch.cuda.current_stream(device)

    def mark(self) -> Mark:
        # An iterator that yields from inside `torch.cuda.stream(...)` leaves its stream current:
        # what it enqueued there counts as the caller's work too.
        current = torch.cuda.current_stream(self._device)
        if current != self.stream:
            self.stream.wait_stream(current)
        event = torch.cuda.Event()  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event

    def wait_for(self, mark: Mark) -> None:
        if isinstance(mark, torch.cuda.Event):
            self.stream.wait_event(mark)


class CallerThread:
    """A CPU caller: its work is done when it is done, and waiting is blocking."""

    def mark(self) -> Mark:
        return None

    def wait_for(self, mark: Mark) -> None:
        _wait(mark)


def synchronize(mark: Mark) -> None:
    """Let the host wait for a mark."""
    if isinstance(mark, torch.cuda.Event):
        mark.synchronize()
    else:
        _wait(mark)


def _wait(mark: Mark) -> None:
    if mark is not None and not isinstance(mark, torch.cuda.Event):
        mark.wait()
