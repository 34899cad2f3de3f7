"""Processes of one benchmark: started together, timed from one common start, watched by the parent.

A rank that fails, dies or hangs ends its world, never the program: the parent hears which way was
running, ends the other ranks and can start a new world without that way.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from packedcomm.cli.parent import end_with_parent

__all__ = ["World", "WorldFailure", "run_world"]

# What every world's processes import is imported once; it doesn't touch CUDA, which doesn't survive
# a fork.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "packedcomm.session", __name__])

# Long enough for every rank to wake up after a barrier; not part of any measured time.
_LEAD_S = 2e-3
_SPIN_S = 2e-4


@dataclass(frozen=True, slots=True)
class WorldFailure:
    """Why a world ended early."""

    way: str | None
    """The way that was running; None outside of any."""
    error: str


class _Shared:
    """What all ranks of a world share; made by the parent, inherited by every rank."""

    def __init__(self, size: int, folder: str) -> None:
        self.folder = folder
        self.barrier = _CONTEXT.Barrier(size)
        self.arrivals = _CONTEXT.Array("d", size, lock=False)
        self.ends = _CONTEXT.Array("d", size, lock=False)
        self.counts = _CONTEXT.Array("q", size, lock=False)


class World:
    """One rank's view of the processes that are measured together.

    Belongs to the rank's main thread. Every rank must make the same calls in the same order.
    """

    def __init__(
        self, rank: int, size: int, device: torch.device, shared: _Shared, parent: Connection
    ) -> None:
        self.rank = rank
        self.size = size
        self.device = device
        self.folder = Path(shared.folder)
        """For files of this world, which go with it."""
        self._shared = shared
        self._parent = parent

    def synchronize(self) -> None:
        """Wait until this rank's device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def barrier(self) -> None:
        """Wait for every rank on the host; the device is idle first."""
        self.synchronize()
        self._shared.barrier.wait()

    def timed(self, run: Callable[[], Any]) -> float:
        """Seconds from a common start to the end of `run` on the slowest rank, device included.

        All ranks start at one moment, agreed after a barrier and read from CLOCK_MONOTONIC, which
        is one clock for all processes of a host: the time a rank needs to wake up from the barrier
        is in nobody's result. Returns the same value on every rank.
        """
        shared = self._shared
        self.synchronize()
        gc.disable()
        try:
            shared.arrivals[self.rank] = time.perf_counter()
            shared.barrier.wait()
            start: float = max(shared.arrivals) + _LEAD_S
            time.sleep(max(0.0, start - time.perf_counter() - _SPIN_S))
            while time.perf_counter() < start:
                pass
            run()
            self.synchronize()
            shared.ends[self.rank] = time.perf_counter()
        finally:
            gc.enable()
        shared.barrier.wait()
        return float(max(shared.ends)) - start

    def timed_on_device(self, run: Callable[[], Any]) -> float:
        """Seconds that the current stream takes for `run`, between two CUDA events around it.

        For work on one GPU: the time in which the host waits for the device isn't counted, gaps in
        which the device waits for the host are.
        """
        self.synchronize()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        gc.disable()
        try:
            begin.record()
            run()
            end.record()
        finally:
            gc.enable()
        end.synchronize()
        return begin.elapsed_time(end) / 1e3

    def total(self, count: int) -> int:
        """Sum of an integer over all ranks."""
        self._shared.counts[self.rank] = count
        self._shared.barrier.wait()
        result = int(sum(self._shared.counts))
        self._shared.barrier.wait()
        return result

    def from_root(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, on every rank; a small picklable value."""
        if self.rank == 0:
            value = make()
            self._parent.send(("root", value))
            return value
        return self._parent.recv()

    def progress(self, way: str | None) -> None:
        """Tell the parent which way is running; resets its watch."""
        if self.rank == 0:
            self._parent.send(("way", way))

    def result(self, value: Any) -> None:
        """Hand a result to the parent; rank 0's counts."""
        if self.rank == 0:
            self._parent.send(("result", value))

    def result_of_each(self, value: Any) -> None:
        """Hand a result of every rank to the parent, in any order."""
        self._parent.send(("result", value))


def run_world(
    body: Callable[..., None],
    size: int,
    device_type: str,
    arguments: tuple[Any, ...],
    *,
    silence_s: float,
) -> Iterator[Any]:
    """Run `body(world, *arguments)` in `size` new processes and yield what rank 0 reports.

    Args:
        body: a module-level function.
        device_type: "cpu", or "cuda" for rank i on GPU i.
        silence_s: a world that says nothing for so long is ended.

    Yields:
        every value of `World.result` and `World.result_of_each`; at an early end a last
        `WorldFailure`.
    """
    with TemporaryDirectory(prefix="benchmark-") as folder:
        yield from _run(body, _Shared(size, folder), size, device_type, arguments, silence_s)


def _run(
    body: Callable[..., None],
    shared: _Shared,
    size: int,
    device_type: str,
    arguments: tuple[Any, ...],
    silence_s: float,
) -> Iterator[Any]:
    pipes = [_CONTEXT.Pipe() for _ in range(size)]
    processes = [
        _CONTEXT.Process(
            target=_rank_main,
            args=(body, rank, size, device_type, shared, pipes[rank][1], arguments),
            daemon=True,
        )
        for rank in range(size)
    ]
    for process in processes:
        process.start()
    # The parent's copies of the ranks' ends must go, or a dead rank's pipe never reports its end.
    for _, theirs in pipes:
        theirs.close()
    finished: set[int] = set()
    try:
        yield from _watch([ours for ours, _ in pipes], processes, finished, silence_s)
    finally:
        for rank, process in enumerate(processes):
            # A rank that isn't done waits for one that failed: nothing is lost by ending it.
            if rank in finished:
                process.join(10)
            process.kill()
            process.join()


def _watch(
    connections: Sequence[Connection],
    processes: Sequence[BaseProcess],
    finished: set[int],
    silence_s: float,
) -> Iterator[Any]:
    ranks = {connection: rank for rank, connection in enumerate(connections)}
    way: str | None = None
    failure: str | None = None
    while ranks and failure is None:
        ready = [c for c in wait(list(ranks), silence_s) if isinstance(c, Connection)]
        if not ready:
            failure = f"no progress for {silence_s:.0f} s"
        for connection in ready:
            rank = ranks[connection]
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionError):
                del ranks[connection]
                if rank not in finished:
                    processes[rank].join(1)
                    failure = f"rank {rank} died, exit status {processes[rank].exitcode}"
                continue
            if kind == "root":
                for other in connections[1:]:
                    other.send(value)
            elif kind == "way":
                way = value
            elif kind == "result":
                yield value
            elif kind == "done":
                finished.add(rank)
            else:
                failure = f"rank {rank}: {value}"
    if failure is None:
        return
    # What rank 0 said before another rank failed may still be on its way.
    with contextlib.suppress(EOFError, ConnectionError):
        while connections[0].poll(0.2):
            kind, value = connections[0].recv()
            if kind == "result":
                yield value
            elif kind == "way":
                way = value
    yield WorldFailure(way, failure)


def _rank_main(
    body: Callable[..., None],
    rank: int,
    size: int,
    device_type: str,
    shared: _Shared,
    parent: Connection,
    arguments: tuple[Any, ...],
) -> None:
    end_with_parent()
    try:
        device = torch.device("cpu")
        if device_type == "cuda":
            device = torch.device("cuda", rank)
            torch.cuda.set_device(device)
            # Makes the device's context, which other libraries' communicators expect to find.
            torch.zeros(1, device=device)
        body(World(rank, size, device, shared, parent), *arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, the parent must hear of it
        traceback.print_exc()
        parent.send(("error", f"{type(error).__name__}: {error}"))
    else:
        parent.send(("done", None))
