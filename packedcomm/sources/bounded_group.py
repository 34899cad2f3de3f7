"""A process group of torch.distributed whose waits have a deadline, and whose errors are typed."""

from __future__ import annotations

import queue
import re
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import (  # type: ignore[attr-defined]
    AllgatherOptions,
    AllreduceOptions,
    BroadcastOptions,
)

from packedcomm.completion import wait_until
from packedcomm.errors import (
    DeadlineExceeded,
    NcclError,
    PackedCommError,
    PeerLost,
    SessionStateError,
    summary,
)
from packedcomm.threads import Thread

__all__ = ["BoundedGroup", "Transfers"]

# A wait that is begun late still has this long, for what has come already. Gloo takes 0 for ever.
_LEAST_S = 0.1

# How much later than Gloo itself its caller gives up.
_GRACE = timedelta(seconds=1)

# How far the clocks of Gloo and of this file may differ.
_TICK_S = 0.01

# What is said by torch.distributed itself where it isn't a `DistError`: Gloo begins with the place
# in its source, but not everywhere.
_PLACE = re.compile(r"^\[[^\]]*\bgloo/[^\]]*\] ")
_GIVEN_UP = ("Operation timed out!", "Application timeout caused pair closure")

# How Gloo and NCCL say that they have given up, and that a process has gone.
_LATE = re.compile("timed out|timeout", re.IGNORECASE)
_LOST = re.compile(
    "closed|reset|broken pipe|connection|unreachable|network|remote process", re.IGNORECASE
)


@dataclass(frozen=True, slots=True)
class Transfers:
    """Sends and receives that were started together."""

    works: Sequence[Any] = ()
    """One for each; or fewer, where the backend puts them together."""

    ranks: Sequence[int] = ()
    """With whom each one is."""

    on_host: bool = True
    """Whether the host waits for them, else the current stream."""


class BoundedGroup:
    """The operations on a group that a source's processes need, each done before the deadline of
    what it belongs to.

    The first failure ends it, since the processes can't know any more what the others have got;
    Gloo then closes all connections of the group too. Only the owner's thread may use it.

    Args:
        group: None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        found = dist.group.WORLD if group is None else group
        assert found is not None
        self.group: dist.ProcessGroup = found
        self.rank = dist.get_rank(found)
        self.size = dist.get_world_size(found)
        self.timeout_s: float | None = None
        """How long what is begun next may take, in seconds; None is as long as torch lets each
        operation take, which is the group's own timeout."""
        self.ended: str | None = None
        """Why it can't be used any more."""
        self._task = "the source"
        self._deadline: float | None = None
        self._paused_at = 0.0
        self._connected: set[str] = {"cpu"}

    def begin(self, task: str) -> None:
        """All operations that follow belong to this, and it may take `timeout_s` from now.

        Raises:
            SessionStateError: the group has ended.
        """
        self._check_open(task)
        self._task = task
        self.renew()

    def renew(self) -> None:
        """What is under way may take `timeout_s` from now."""
        now = self._paused_at = time.monotonic()
        self._deadline = None if self.timeout_s is None else now + self.timeout_s

    @contextmanager
    def paused(self) -> Iterator[None]:
        """The time that the body takes doesn't count: nobody is waited for."""
        self._paused_at = time.monotonic()
        try:
            yield
        finally:
            if self._deadline is not None:
                self._deadline += time.monotonic() - self._paused_at

    def all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        """Everybody's tensor, in the order of the ranks.

        Raises:
            DeadlineExceeded: somebody hasn't come in time.
            PeerLost: the connection to somebody has broken.
            NcclError: NCCL reported another error.
            SessionStateError: the group has ended.
        """
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        options = AllgatherOptions()
        self._collective(own, options, lambda: self.group.allgather([everyone], [own], options))
        return everyone

    def broadcast(self, tensor: torch.Tensor) -> None:
        """Rank 0's tensor to everybody, in place. Raises as `all_gather`."""
        options = BroadcastOptions()
        options.rootRank = options.rootTensor = 0
        self._collective(tensor, options, lambda: self.group.broadcast([tensor], options))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """The sum of everybody's tensors, in place. Raises as `all_gather`."""
        options = AllreduceOptions()
        self._collective(tensor, options, lambda: self.group.allreduce([tensor], options))

    def _collective(self, tensor: torch.Tensor, options: Any, start: Callable[[], Any]) -> None:
        on_host = tensor.device.type == "cpu"
        others = [rank for rank in range(self.size) if rank != self.rank]
        with self._failing(others):
            remaining = self._remaining()
            if on_host and remaining is not None:
                # Gloo itself gives up then, as it must before the process can end. NCCL's watchdog
                # would end the process, so it keeps its own limit.
                options.timeout = remaining
            if tensor.device.type in self._connected:
                work = start()
            else:
                # NCCL connects at the first operation, and waits for everybody meanwhile.
                work = self._called(start, tensor.device, others)
                self._connected.add(tensor.device.type)
            if on_host and (remaining := self._remaining()) is not None:
                work.wait(remaining + _GRACE)
            else:
                work.wait()
            if not on_host:
                self._await_gpu(work, others)

    def start(self, operations: Sequence[dist.P2POp]) -> Transfers:
        """Start sends and receives at once. Raises as `all_gather`."""
        if not operations:
            return Transfers()
        ranks = [operation.group_peer for operation in operations]
        with self._failing(ranks):
            works = dist.batch_isend_irecv(list(operations))
        return Transfers(works, ranks, operations[0].tensor.device.type == "cpu")

    def wait(self, transfers: Transfers) -> Transfers:
        """Return when they are done; on a GPU at once, and the current stream waits for them.
        Raises as `all_gather`.

        Returns:
            Those that may still be under way, for `settle`.
        """
        if not transfers.on_host:
            with self._failing(transfers.ranks):
                for work in transfers.works:
                    work.wait()
            return transfers
        self._check_open(self._task)
        one_each = len(transfers.works) == len(transfers.ranks)
        for index, work in enumerate(transfers.works):
            with self._failing(transfers.ranks[index : index + 1] if one_each else transfers.ranks):
                remaining = self._remaining()
                if remaining is None:
                    work.wait()
                else:
                    work.wait(remaining)
        return Transfers()

    def settle(self, transfers: Transfers) -> None:
        """Return when what `wait` returned is done. Raises as `all_gather`."""
        for work in transfers.works:
            self._await_gpu(work, transfers.ranks)

    def call(self, function: Callable[[], torch.Tensor], device: torch.device) -> torch.Tensor:
        """Run what waits for the other processes without a deadline, on a thread of its own.

        Raises:
            Exception: what the function raises; as `all_gather` where that is an error of
                torch.distributed. No other error ends the group.
        """
        others = [rank for rank in range(self.size) if rank != self.rank]
        self._check_open(self._task)
        try:
            tensor: torch.Tensor = self._called(function, device, others)
        except RuntimeError as error:
            if self._typed(error, others) is None:
                raise
            raise self._failed(error, others) from error
        return tensor

    def _called(
        self, function: Callable[[], Any], device: torch.device, ranks: Collection[int]
    ) -> Any:
        stream = torch.cuda.current_stream(device) if device.type == "cuda" else None
        outcomes: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

        def run() -> None:
            try:
                with torch.no_grad(), torch.cuda.stream(stream):
                    outcomes.put((function(), None))
            except Exception as error:  # noqa: BLE001  (raised by the caller)
                outcomes.put((None, error))

        # Nothing lets it end: it is only waited for when the interpreter ends.
        Thread(run, "packedcomm-source", let_end=lambda: None).start()
        try:
            remaining = self._remaining()
            timeout_s = None if remaining is None else remaining.total_seconds()
            found, error = outcomes.get(timeout=timeout_s)
        except queue.Empty:
            raise self._end(self._late(ranks)) from None
        if error is not None:
            raise error
        return found

    def _await_gpu(self, work: Any, ranks: Collection[int]) -> None:
        remaining = self._remaining()
        timeout_s = float("inf") if remaining is None else remaining.total_seconds()
        if not wait_until(work.is_completed, timeout_s):
            raise self._end(self._late(ranks))

    def _remaining(self) -> timedelta | None:
        if self._deadline is None:
            return None
        return timedelta(seconds=max(_LEAST_S, self._deadline - time.monotonic()))

    @contextmanager
    def _failing(self, ranks: Collection[int]) -> Iterator[None]:
        """What fails here ends the group.

        Args:
            ranks: who is waited for.
        """
        self._check_open(self._task)
        try:
            yield
        except RuntimeError as error:
            raise self._failed(error, ranks) from error

    def _failed(self, error: RuntimeError, ranks: Collection[int]) -> Exception:
        """The error to raise for one of torch's."""
        return self._end(self._typed(error, ranks) or error)

    def _end(self, error: Exception) -> Exception:
        self.ended = self.ended or summary(error)
        return error

    def _typed(self, error: RuntimeError, ranks: Collection[int]) -> PackedCommError | None:
        """As one of packedcomm's, if torch.distributed itself says that others have gone or are
        late."""
        whole = str(error)
        text = _PLACE.sub("", whole).partition(". ")[0]
        own = isinstance(error, dist.DistError) or whole.startswith(_GIVEN_UP)
        if not own and not _PLACE.match(whole):
            return None
        if _LATE.search(text):
            return self._late(ranks, text)
        if _LOST.search(whole):
            return PeerLost(
                f"{self._task}: lost the connection to {_named(ranks)} ({text}), "
                f"which has died or has given up; {_UNUSABLE}"
            )
        if isinstance(error, dist.DistBackendError):
            return NcclError(f"{self._task}, with {_named(ranks)}: {text}")
        return None

    def _late(self, ranks: Collection[int], said: str = "") -> DeadlineExceeded:
        passed = self._deadline is not None and time.monotonic() >= self._deadline - _TICK_S
        how = f"not done within {self.timeout_s:.3g} s" if passed else f"given up ({said})"
        return DeadlineExceeded(f"{self._task}: {how}, waiting for {_named(ranks)}; {_UNUSABLE}")

    def _check_open(self, task: str) -> None:
        if self.ended is not None:
            raise SessionStateError(f"{task}: {_UNUSABLE}, since {self.ended}")


_UNUSABLE = "its group of torch.distributed can't be used any more"


def _named(ranks: Collection[int]) -> str:
    found = sorted(set(ranks))
    if not found:
        return "the source"
    if len(found) == 1:
        return f"rank {found[0]} of the source"
    return f"one of ranks {', '.join(map(str, found))} of the source"
