"""Runs a function once per rank, each in a process of its own, with a deadline for all of them."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Collection
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from packedcomm.communicators.rendezvous import Listener
from tests.helpers.processes import context, leave_alone_what_was_forked

__all__ = ["AddressBox", "pipes", "run_ranks"]

# Once a rank has failed, the others get this long to finish or fail by themselves.
GRACE_S = 10.0


def pipes(world_size: int) -> list[tuple[Connection, Connection]]:
    """A one-way pipe (reading end, writing end) for each rank, to pass to `run_ranks`."""
    return [context.Pipe(duplex=False) for _ in range(world_size)]


class AddressBox:
    """Hands the address that rank 0 listens on to the other ranks; usable many times in a row.

    The port is chosen by the system when rank 0 binds and is held from then on, so no port is ever
    guessed or freed in between.
    """

    def __init__(self, world_size: int, host: str = "127.0.0.1") -> None:
        self._host = host
        self._pipes = pipes(world_size)

    def endpoint(self, rank: int, timeout_s: float = 30.0) -> Listener | str:
        """A new `Listener` on rank 0, its address on every other rank."""
        if rank == 0:
            listener = Listener.bind(f"{self._host}:0")
            for _, writer in self._pipes[1:]:
                writer.send(listener.address)
            return listener
        reader = self._pipes[rank][0]
        if not reader.poll(timeout_s):
            raise TimeoutError(f"rank 0 has published no address within {timeout_s} s")
        address: str = reader.recv()
        return address


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    deadline_s: float = 60.0,
    lost: Collection[int] = (),
) -> list[Any]:
    """Run `function(rank, world_size, *args)` in `world_size` processes.

    Args:
        function: a module-level function; it and `args` are pickled.
        world_size: number of processes.
        args: further arguments, equal on every rank.
        deadline_s: every rank must have returned by then.
        lost: ranks that die or stop on purpose. They aren't waited for, their result is None, and
            they are killed once the others have returned.

    Returns:
        What each rank returned, by rank.

    Raises:
        AssertionError: a rank raised, died or was still running at the deadline. The message has
            every rank's traceback or state. No process survives the call.
    """
    deadline = time.monotonic() + deadline_s
    processes, readers = [], []
    with tempfile.TemporaryDirectory() as directory:
        stacks = [Path(directory) / f"rank{rank}" for rank in range(world_size)]
        try:
            for rank in range(world_size):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(
                    target=_child,
                    args=(writer, str(stacks[rank]), function, rank, world_size, args),
                    daemon=True,
                )
                process.start()
                writer.close()
                processes.append(process)
                readers.append(reader)
            reports = _collect(readers, deadline, lost)
            failed = [r for r in range(world_size) if r not in lost and not reports.get(r, (0,))[0]]
            if failed:
                raise AssertionError(_describe(processes, reports, stacks, deadline_s))
        finally:
            for process in processes:
                process.kill()
            for process in processes:
                process.join()
                process.close()
            for reader in readers:
                reader.close()
    return [reports[rank][1] if rank in reports else None for rank in range(world_size)]


def _child(
    writer: Connection,
    stack_path: str,
    function: Callable[..., Any],
    rank: int,
    world_size: int,
    args: tuple[Any, ...],
) -> None:
    leave_alone_what_was_forked()
    with Path(stack_path).open("w") as stack_file:
        faulthandler.register(signal.SIGUSR1, file=stack_file, all_threads=True)
        try:
            # Plain pickle: torch's reductions would share memory that dies with this process.
            report = pickle.dumps((True, function(rank, world_size, *args)))
        except BaseException:  # noqa: BLE001  (reported to the parent, whatever it is)
            report = pickle.dumps((False, traceback.format_exc()))
        with contextlib.suppress(BrokenPipeError):
            writer.send_bytes(report)
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: a rank whose threads hang in a library must still end here.
        os._exit(0)


def _collect(
    readers: list[Connection], deadline: float, lost: Collection[int]
) -> dict[int, tuple[bool, Any]]:
    reports: dict[int, tuple[bool, Any]] = {}
    open_readers = {reader: rank for rank, reader in enumerate(readers)}
    while any(rank not in lost for rank in open_readers.values()):
        ready = wait(list(open_readers), max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for reader in ready:
            assert isinstance(reader, Connection)
            rank = open_readers.pop(reader)
            # A process that died without a report leaves an end of file.
            with contextlib.suppress(EOFError):
                reports[rank] = pickle.loads(reader.recv_bytes())
            if rank not in lost and not reports.get(rank, (False,))[0]:
                deadline = min(deadline, time.monotonic() + GRACE_S)
    return reports


def _describe(
    processes: list[Any],
    reports: dict[int, tuple[bool, Any]],
    stacks: list[Path],
    deadline_s: float,
) -> str:
    running = [r for r, p in enumerate(processes) if r not in reports and p.exitcode is None]
    for rank in running:
        os.kill(processes[rank].pid, signal.SIGUSR1)
    if running:
        time.sleep(0.5)
    parts = [f"not every rank succeeded (deadline {deadline_s} s)"]
    for rank, process in enumerate(processes):
        parts.append(f"--- rank {rank} ---")
        if rank in reports:
            succeeded, value = reports[rank]
            parts.append("succeeded" if succeeded else str(value).rstrip())
        elif rank in running:
            parts.append("still running\n" + stacks[rank].read_text().rstrip())
        else:
            process.join()
            parts.append(f"exit code {process.exitcode}")
    return "\n".join(parts)
