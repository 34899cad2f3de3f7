"""Operations over a Gloo process group, and the thread that waits for them."""

from __future__ import annotations

import contextlib
import queue
import threading
import time
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch.distributed import AllreduceOptions

from packedcomm.threads import Thread

__all__ = ["Batch", "Transfer", "TransferThread", "broadcast_tree"]

# Tags keep a broadcast's messages apart from sends between the same two ranks.
SEND_TAG = 0
BROADCAST_TAG = 1

# Gloo's own timeout comes after ours, as a last resort.
GLOO_SLACK_S = 5.0

# How long what is left of a failed batch may take: its connections are cut by then.
LEFT_OVER_S = 1.0


def broadcast_tree(rank: int, src: int, world_size: int) -> tuple[int | None, tuple[int, ...]]:
    """Whom `rank` receives from and sends to in a broadcast along a binomial tree.

    With positions counted from `src`, position p receives from p without its highest bit, then
    sends to every p + 2^k above that bit.

    Returns:
        The parent, None at `src`; the children, the one with the largest subtree first.
    """
    position = (rank - src) % world_size
    step = 1 << position.bit_length()
    parent = None if position == 0 else (position - (step >> 1) + src) % world_size
    children = []
    while position + step < world_size:
        children.append((position + step + src) % world_size)
        step <<= 1
    return parent, tuple(children)


@dataclass(slots=True)
class Transfer:
    """One operation on one tensor: receive, then send on; or reduce."""

    operation: str
    tensor: torch.Tensor
    receive_from: int | None = None
    send_to: tuple[int, ...] = ()
    tag: int = SEND_TAG
    reduce: bool = False
    _works: list[tuple[Any, int | None]] = field(default_factory=list)

    def post(self, group: Any) -> None:
        """Start what needs nothing from other transfers."""
        if self.reduce:
            self._works.append((group.allreduce([self.tensor], AllreduceOptions()), None))
        elif self.receive_from is not None:
            work = group.recv([self.tensor], self.receive_from, self.tag)
            self._works.append((work, self.receive_from))
        else:
            self._post_sends(group)

    def finish(self, group: Any, batch: Batch) -> None:
        """Wait until the tensor is received and sent on."""
        self._wait(batch)
        if self.receive_from is not None:
            self._post_sends(group)
            self._wait(batch)

    def _post_sends(self, group: Any) -> None:
        for rank in self.send_to:
            self._works.append((group.send([self.tensor], rank, self.tag), rank))

    def _wait(self, batch: Batch) -> None:
        while self._works:
            work, batch.peer = self._works[0]
            # Removed once it has ended: what is left over must be waited for all the same.
            # The timeout is given explicitly: without it a send whose connection was cut while its
            # bytes were on their way can wait for ever.
            try:
                work.wait(batch.timeout)
            finally:
                self._works.pop(0)

    def wait_out(self) -> None:
        """Wait for what is still posted, however it ends."""
        for work, _ in self._works:
            with contextlib.suppress(RuntimeError):
                work.wait(timedelta(seconds=LEFT_OVER_S))


class Batch:
    """Transfers that are issued together, and how they went."""

    def __init__(self, transfers: Sequence[Transfer], timeout: timedelta) -> None:
        """Not started yet; see `TransferThread.start`."""
        self._transfers = transfers
        self.timeout = timeout
        self._running = threading.Lock()
        self._running.acquire()
        self.current = transfers[0]
        self.peer: int | None = None
        self.error: Exception | None = None
        self.seconds = 0.0

    def wait(self, timeout_s: float) -> bool:
        """Wait for the end; True once there. May be called again until it is."""
        if self._running.acquire(timeout=timeout_s):
            self._running.release()
            return True
        return False

    def refuse(self, error: Exception) -> None:
        """End without having started, because a batch before failed with `error`."""
        self.error = error
        self._running.release()

    def run(self, group: Any) -> None:
        """Do everything. `current` and `peer` say what is waited for, `error` what failed."""
        begin = time.perf_counter()
        try:
            for transfer in self._transfers:
                self.current = transfer
                transfer.post(group)
            for transfer in self._transfers:
                self.current = transfer
                transfer.finish(group, self)
        except Exception as error:  # noqa: BLE001  (raised again on the caller's thread)
            # The traceback would tie torch's work, and so the group, to this object in a cycle.
            self.error = error.with_traceback(None)
        self.seconds = time.perf_counter() - begin
        self._running.release()
        if self.error is not None:
            # The connections are being cut. Until the rest has ended as well, Gloo may still write
            # into these tensors, so they stay alive here.
            for transfer in self._transfers:
                transfer.wait_out()


class TransferThread:
    """One daemon thread that runs batches in order.

    The caller waits on a lock instead of inside torch, so that it sees signals, aborts and
    deadlines. What it gives up on stays with the thread: group and tensors live until Gloo is done
    with them.
    """

    def __init__(self, group: Any, timeout_s: float) -> None:
        """Start the thread, which keeps `group` alive until `stop`.

        Args:
            group: Gloo's process group.
            timeout_s: as for `set_timeout`.
        """
        self._timeout = timedelta(seconds=timeout_s + GLOO_SLACK_S)
        self._group = weakref.ref(group)
        self._batches: queue.SimpleQueue[Batch | None] = queue.SimpleQueue()
        # Also the thread of a communicator that was forgotten is waited for at the end.
        let_end = partial(self._batches.put, None)
        self._thread = Thread(self._run, "packedcomm-gloo", (group,), let_end=let_end)
        self._thread.start()

    def start(self, transfers: Sequence[Transfer]) -> Batch:
        """Start transfers together."""
        batch = Batch(transfers, self._timeout)
        self._batches.put(batch)
        return batch

    def set_timeout(self, timeout_s: float) -> None:
        """Give what is started later a deadline, after which Gloo itself gives up."""
        self._timeout = timedelta(seconds=timeout_s + GLOO_SLACK_S)
        group = self._group()
        if group is not None:
            group._set_default_timeout(self._timeout)

    def let_end(self) -> None:
        """Let the thread end after what it is doing; from any thread, also in a finalizer."""
        self._batches.put(None)

    def stop(self, timeout_s: float) -> None:
        """Let the thread end after what it is doing, and wait for that."""
        self.let_end()
        self._thread.join(timeout_s)

    def _run(self, group: Any) -> None:
        failure: Exception | None = None
        while (batch := self._batches.get()) is not None:
            if failure is None:
                batch.run(group)
                failure = batch.error
            else:
                batch.refuse(failure)
            # Its tensors must not live until the next batch comes.
            del batch
