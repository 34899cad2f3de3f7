"""Lanes: where a stage of a transfer runs, in order, and how lanes wait for one another.

On a GPU a lane is a CUDA stream and a mark is an event, so nothing here makes the host wait. On a
CPU a lane is the calling thread or one worker thread and a mark is a future.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch

__all__ = ["CallerStream", "CallerThread", "InlineLane", "Lane", "Mark", "StreamLane", "WorkerLane"]

Mark = torch.cuda.Event | Future[None] | None
"""A point in a lane that others can wait for; None is long past."""

Work = Callable[[], None]


class Lane(Protocol):
    """Runs pieces of work in the order in which they are given."""

    def run(self, work: Work, after: Iterable[Mark] = ()) -> Mark:
        """Run `work` behind this lane's earlier work and behind the marks; returns its end."""

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


class StreamLane:
    """A dedicated CUDA stream; `run` enqueues, with the stream current, and returns at once."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.Stream(device)
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

    def start_timing(self) -> None:
        self._timing = True
        self._spans.clear()

    def seconds(self) -> float:
        self._timing = False
        for _, end in self._spans:
            end.synchronize()
        total = sum(begin.elapsed_time(end) for begin, end in self._spans) / 1e3
        self._spans.clear()
        return total

    def _event(self) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=self._timing)  # type: ignore[no-untyped-call]
        event.record(self.stream)
        return event


class InlineLane:
    """The calling thread; `run` returns when the work is done."""

    def __init__(self) -> None:
        self._seconds = 0.0

    def run(self, work: Work, after: Iterable[Mark] = ()) -> Mark:
        _wait_all(after)
        begin = time.perf_counter()
        work()
        self._seconds += time.perf_counter() - begin
        return None

    def start_timing(self) -> None:
        self._seconds = 0.0

    def seconds(self) -> float:
        return self._seconds


class WorkerLane:
    """One worker thread, for native copies that run beside the caller's thread.

    Only for work that always ends by itself: leaving the interpreter waits for it.
    """

    def __init__(self, name: str) -> None:
        self._inline = InlineLane()
        # The executor's thread ends when the executor is garbage collected.
        self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"packedcomm-{name}")

    def run(self, work: Work, after: Iterable[Mark] = ()) -> Mark:
        marks = list(after)
        return self._executor.submit(self._run, work, marks)

    def _run(self, work: Work, marks: list[Mark]) -> None:
        self._inline.run(work, marks)

    def start_timing(self) -> None:
        self._inline.start_timing()

    def seconds(self) -> float:
        return self._inline.seconds()


class CallerStream:
    """The stream that was current when the transfer was called."""

    def __init__(self, device: torch.device) -> None:
        self.stream = torch.cuda.current_stream(device)

    def mark(self) -> Mark:
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
        _wait_all((mark,))


def _wait_all(marks: Iterable[Mark]) -> None:
    for mark in marks:
        if isinstance(mark, Future):
            mark.result()
