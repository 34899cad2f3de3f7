"""The demo's processes seen from their parent: start them, hear them out, leave none behind."""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import time
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from types import TracebackType
from typing import Self

from packedcomm.cli.demo_messages import DemoOptions, Failed, Link, Message
from packedcomm.cli.demo_worker import Role, process_main
from packedcomm.errors import DeadlineExceeded

__all__ = ["DemoProcesses", "ProcessFailure"]

# A failure makes the other ranks fail too, and the one that is heard first need not be the cause.
FAILURE_GRACE_S = 2.0
TERMINATE_GRACE_S = 5.0


class ProcessFailure(Exception):  # noqa: N818 - not an error of packedcomm's, it carries them
    """One or more processes failed; `failures` says how, in the order in which they were heard."""

    def __init__(self, failures: Sequence[Failed]) -> None:
        super().__init__("; ".join(f"rank {f.rank}: {f.message}" for f in failures))
        self.failures = tuple(failures)


class DemoProcesses:
    """One process per role, rank by rank, each with a pipe. A context manager.

    Leaving the context ends whatever still runs. Belongs to one thread.
    """

    def __init__(self, roles: Sequence[Role], options: DemoOptions) -> None:
        # Not forked from this one, which may have threads, but from a server that has imported what
        # all of them need. Only torch where there are GPUs: CUDA doesn't survive a fork.
        context = multiprocessing.get_context("forkserver")
        models = ["transformers.modeling_utils"] if options.device == "cpu" else []
        context.set_forkserver_preload([process_main.__module__, *models])
        self._connections: dict[int, Connection] = {}
        self._processes: list[multiprocessing.process.BaseProcess] = []
        self._failures: list[Failed] = []
        try:
            for rank, role in enumerate(roles):
                ours, theirs = context.Pipe()
                process = context.Process(
                    target=process_main,
                    args=(role, theirs, options, rank),
                    name=f"packedcomm demo rank {rank}",
                    daemon=True,
                )
                process.start()
                theirs.close()
                self._processes.append(process)
                self._connections[rank] = ours
        except BaseException:
            self.close()
            raise

    def send(self, rank: int, message: Message) -> None:
        """Tell a process something; one that has died meanwhile is reported by `messages`."""
        try:
            Link(self._connections[rank]).send(message)
        except (KeyError, OSError):
            return

    def messages(self, deadline: float) -> Iterator[Message]:
        """Every message as it comes, until all processes have ended.

        Args:
            deadline: on the clock of `time.monotonic`.

        Raises:
            ProcessFailure: a process reported an error or died without a word.
            DeadlineExceeded: the deadline has passed; names the ranks that still run.
        """
        while self._connections and not any(failed.wrong_input for failed in self._failures):
            if self._failures:
                deadline = min(deadline, time.monotonic() + FAILURE_GRACE_S)
            ready = multiprocessing.connection.wait(
                list(self._connections.values()), max(0.0, deadline - time.monotonic())
            )
            if not ready:
                break
            for rank in [r for r, c in self._connections.items() if c in ready]:
                message = self._next_message(rank)
                if isinstance(message, Failed):
                    self._failures.append(message)
                elif message is not None:
                    yield message
        if self._failures:
            raise ProcessFailure(self._failures)
        if self._connections:
            ranks = ", ".join(str(rank) for rank in self._connections)
            raise DeadlineExceeded(f"the demo's time is over; still running: rank {ranks}")

    def _next_message(self, rank: int) -> Message | None:
        """The message of a pipe that has something; None at its end, which is the process's end."""
        try:
            return Link(self._connections[rank]).receive()
        except (EOFError, OSError):
            self._connections.pop(rank).close()
        process = self._processes[rank]
        process.join(TERMINATE_GRACE_S)
        if process.exitcode != 0 and all(failed.rank != rank for failed in self._failures):
            message = f"the process ended with exit code {process.exitcode} and no message"
            self._failures.append(Failed(rank, message, "", wrong_input=False))
        return None

    def close(self) -> None:
        """End what still runs, first politely. Idempotent."""
        for process in self._processes:
            if process.is_alive():
                process.terminate()
        deadline = time.monotonic() + TERMINATE_GRACE_S
        for process in self._processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                process.kill()
                process.join()
        for connection in self._connections.values():
            connection.close()
        self._connections.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()
