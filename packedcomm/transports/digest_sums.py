"""Digests of what a transfer moves: made by its copies, or by passes in a lane of their own."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from functools import partial
from typing import Protocol

import torch

from packedcomm.digests import DigestPlan
from packedcomm.transports.chunk_plans import ChunkPlan, Composed
from packedcomm.transports.lanes import Work
from packedcomm.transports.slots import DIGEST_BLOCKS, Pipeline

__all__ = ["DigestSums", "Digests", "ReceivedDigests", "digest_blocks"]


def digest_blocks(device: torch.device) -> int:
    """Thread blocks of a pass that runs beside a broadcast; 0 on a CPU."""
    return DIGEST_BLOCKS if device.type == "cuda" else 0


class Digests(Protocol):
    """What an executor is given to have a transfer's digests made on the way."""

    def begin(self, pipeline: Pipeline) -> None:
        """Before the first chunk, on the caller's stream or thread: digests of zero."""

    def sums(self, device: torch.device) -> torch.Tensor:
        """What copies on this device add their digests to."""

    def finish(self) -> None:
        """After the last chunk, with the caller's stream behind all lanes."""

    def rest(self, plan: ChunkPlan, *, keep: bool, wide: bool = False) -> Work | None:
        """What a chunk's copies leave to be digested, as work for the digest lane.

        It reads the chunk's tensors where they are in memory, and never a slot.

        Args:
            plan: the chunk.
            keep: whether the plan comes again in a later transfer.
            wide: whether it may fill a GPU, since next to nothing is broadcast beside it.

        Returns:
            None if nothing is left.
        """


class DigestSums:
    """The digests of one transfer while they are being added up, by device.

    Made on the caller's stream. Every lane's work comes after a mark of the caller's that is later,
    so it finds zeros. A GPU's memory is known to the allocator as used by all lanes, so a transfer
    that fails may drop it while they still add to it.
    """

    def __init__(self, pipeline: Pipeline, count: int) -> None:
        self._count = count
        sums = pipeline.allocate(8 * count).view(torch.int64).zero_()
        self._by_device = {sums.device: sums}
        self._arriving: list[tuple[torch.Tensor, torch.cuda.Event | None]] = []

    def finish(self) -> None:
        """After the last work, on the caller's stream, which comes after all lanes: bring a GPU's
        digests to the host, so that whoever waits for that stream has them."""
        for device, sums in self._by_device.items():
            if device.type == "cuda":
                host = torch.empty(self._count, dtype=torch.int64, pin_memory=True)
                host.copy_(sums, non_blocking=True)
                arrived = torch.cuda.Event()  # type: ignore[no-untyped-call]
                arrived.record()
                self._arriving.append((host, arrived))
            else:
                self._arriving.append((sums, None))

    def on(self, device: torch.device) -> torch.Tensor:
        """One digest per number, int64, on the pipeline's device or in host memory."""
        found = self._by_device.get(device)
        if found is None:
            # Only the host's work adds to these, and it is done when it returns.
            assert device.type == "cpu", device
            found = self._by_device[device] = torch.zeros(self._count, dtype=torch.int64)
        return found

    def total(self) -> torch.Tensor:
        """All digests, int64, on the CPU. To be called after `finish`; waits for a GPU."""
        for _, arrived in self._arriving:
            if arrived is not None:
                arrived.synchronize()
        (first, _), *others = self._arriving
        total = first.clone()
        for sums, _ in others:
            # No digest is made on two devices, so one of the addends is 0.
            total += sums
        return total


class ReceivedDigests:
    """The digests of what a target's memory holds, made as it arrives.

    One object serves all transfers into the same `TargetPlan`, one at a time.

    Args:
        destinations: the memory of all parts, in order.
    """

    def __init__(self, destinations: Sequence[torch.Tensor]) -> None:
        self._count = len(destinations)
        self._sums: DigestSums | None = None
        self._passes: weakref.WeakKeyDictionary[ChunkPlan, DigestPlan | None] = (
            weakref.WeakKeyDictionary()
        )

    def begin(self, pipeline: Pipeline) -> None:
        """As `Digests.begin`."""
        self._sums = DigestSums(pipeline, self._count)

    def sums(self, device: torch.device) -> torch.Tensor:
        """As `Digests.sums`."""
        assert self._sums is not None
        return self._sums.on(device)

    def finish(self) -> None:
        """As `Digests.finish`."""
        assert self._sums is not None
        self._sums.finish()

    def rest(self, plan: ChunkPlan, *, keep: bool, wide: bool = False) -> Work | None:
        """As `Digests.rest`: the parts of a chunk that are received in place, strided or cut so
        that their words don't end with the copy's tiles."""
        if plan in self._passes:
            digests = self._passes[plan]
        else:
            digests = _pass_over(plan)
            if keep:
                self._passes[plan] = digests
        return None if digests is None else partial(self._run, digests, wide)

    def _run(self, digests: DigestPlan, wide: bool) -> None:
        digests.run(self.sums(digests.device), wide=wide)

    def take(self) -> torch.Tensor:
        """The digests of the last transfer, int64 on the CPU, in the order of the destinations;
        waits for a GPU."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        return sums.total()


def _pass_over(plan: ChunkPlan) -> DigestPlan | None:
    tensors: list[torch.Tensor] = []
    numbers: list[int] = []
    for entry, first in zip(plan.entries, plan.numbers, strict=True):
        parts = [p.tensor for p in entry.parts] if isinstance(entry, Composed) else [entry]
        for number, tensor in enumerate(parts, first):
            if number not in plan.digested:
                tensors.append(tensor)
                numbers.append(number)
    if not tensors:
        return None
    return DigestPlan(tensors, numbers=numbers, blocks=digest_blocks(tensors[0].device))
