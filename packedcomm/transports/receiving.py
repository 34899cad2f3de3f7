"""The receiving side of a broadcast: receive a chunk, then deliver it to a target or a callback."""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch

from packedcomm.communicators.base import Communicator, Operands
from packedcomm.copying import Part, TensorRecord, unpack_from
from packedcomm.endpoints import Target, is_target
from packedcomm.errors import ManifestError, TensorError
from packedcomm.events import OnEvent
from packedcomm.manifest import Manifest, checked_nbytes, dtype_name
from packedcomm.planning.chunks import Chunk, Cut, little_follows
from packedcomm.transports.chunk_plans import ChunkPlan, entry_of, plan_chunk
from packedcomm.transports.digest_sums import Digests
from packedcomm.transports.lanes import Mark, Work, synchronize
from packedcomm.transports.progress import Progress
from packedcomm.transports.sending import broadcast_all, check_name
from packedcomm.transports.slots import Pipeline, Slot

__all__ = ["Receiving", "TargetPlan"]

# Plans kept for a target and a group: a full sync and a few partial ones, in either format.
_KEPT_PLANS = 8

Spec = tuple[str, torch.dtype, tuple[int, ...]]
Callback = Callable[[list[tuple[str, torch.Tensor]]], Any]


@lru_cache(maxsize=256)
def _torch_dtype(dtype: Any) -> torch.dtype:
    resolved: torch.dtype = getattr(torch, dtype_name(dtype))
    return resolved


@lru_cache(maxsize=65536)
def _row_major(shape: tuple[int, ...]) -> tuple[int, ...]:
    strides = []
    step = 1
    for extent in reversed(shape):
        strides.append(step)
        step *= max(extent, 1)
    return tuple(reversed(strides))


def _drop(items: list[tuple[str, torch.Tensor]]) -> None:
    """The callback of a receiver that wants nothing."""


@dataclass(frozen=True, slots=True)
class TargetPlan:
    """All chunks of a manifest with their destinations."""

    chunks: list[ChunkPlan]
    wide: list[bool]
    """Of each chunk whether what is left to be done with it may fill a GPU."""
    parts: Sequence[Sequence[Part]]
    """By tensor, as the target placed them."""
    destinations: list[torch.Tensor]
    """The memory of all parts, in order."""
    memory: list[torch.Tensor]
    """The tensors that these are views of."""
    record: TensorRecord
    """Where that was when the plan was made."""

    def holds(self, target: Target) -> bool:
        """Whether the target's memory is where it was."""
        now = getattr(target, "memory", self.memory)
        return len(now) == len(self.memory) and self.record.first_change(now) < 0


@dataclass(frozen=True, slots=True)
class Arrival:
    """A chunk that was received, or is being."""

    received: Mark
    deliver: Work | None
    """What is left to do in the copy lane; None if the data is where it belongs."""

    slot: Slot | None

    digest: Work | None
    """What is left to digest, in the digest lane, once the data is where it belongs."""


class Receiving:
    """One call of the consumer: chunks are received in the wire lane, then written to a target or
    shown to a callback in the copy lane."""

    def __init__(
        self,
        pipeline: Pipeline,
        group: Any,
        src: int,
        cut: Cut,
        receiver: Callback | Target | None,
        on_event: OnEvent | None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._pipeline = pipeline
        self._group = group
        self._src = src
        self._cut = cut
        self._receiver = receiver
        self._callback: Callback = _drop
        self._placed: TargetPlan | None = None
        self._digests: Digests | None = None
        stages = {"wire": pipeline.wire, "unpack": pipeline.copy}
        self._progress = Progress(stages, on_event, wait)
        self._pulled: dict[int, Spec] = {}
        self._seen: set[str] = set()
        # Where broadcasts run in the background the next one is started before the last chunk is
        # delivered, so that the wire never waits for callbacks.
        self._ahead = pipeline.device.type == "cuda" or isinstance(group, Communicator)
        self._arriving: Arrival | None = None
        self._done: Mark = None
        # Deliveries of buffers that aren't slots, see `_await_earlier_buffers`.
        self._lent: deque[Mark] = deque()

    def run(
        self, metadata: Iterable[tuple[str, tuple[Any, Any]]], digests: Digests | None = None
    ) -> None:
        """Receive every tensor that the metadata describes. A target isn't committed.

        Args:
            metadata: names, shapes and dtypes; with a target a manifest.
            digests: made of everything that is written to a target, as it arrives: by the copies
                that unpack it, else in the digest lane, behind the arrival and beside the next
                chunk's. They are numbered as the plan's destinations.
        """
        self._digests = digests
        if digests is not None:
            digests.begin(self._pipeline)
        try:
            with self._progress:
                if is_target(self._receiver):
                    assert isinstance(metadata, Manifest)
                    plan = self._placed or self.place(metadata)
                    for chunk_plan, wide in zip(plan.chunks, plan.wide, strict=True):
                        self._receive_into(chunk_plan, wide=wide)
                        self._progress.moved(chunk_plan.chunk)
                else:
                    callback: Any = self._receiver
                    self._callback = callback or _drop
                    self._run_for_callback(metadata)
                self._deliver()
                self._pipeline.caller.wait_for(self._done)
                if digests is not None:
                    # From here on the caller may overwrite what the digest lane reads.
                    self._pipeline.caller.wait_for(self._pipeline.digest.tail())
                    digests.finish()
        finally:
            # They refer back to this object; buffers must not wait for the garbage collector.
            self._arriving = None

    def _run_for_callback(self, metadata: Iterable[tuple[str, tuple[Any, Any]]]) -> None:
        for chunk in self._cut(self._sizes(metadata)):
            specs = [self._pulled.pop(i) for i in chunk.indices]
            self._receive_for_callback(chunk, specs)
            self._progress.moved(chunk)

    def place(self, manifest: Manifest) -> TargetPlan:
        """Plan everything about a manifest and the target; raises before any data.

        Kept for targets whose destinations are fixed: their later transfers cost no Python per
        tensor, only a native look at whether the memory is where it was.
        """
        target = self._receiver
        assert is_target(target)
        key = (manifest.digest, self._cut)
        kept: dict[Any, TargetPlan] = {}
        if getattr(target, "fixed_destinations", False):
            # An object that can't be referred to weakly, or isn't hashable, is asked every time.
            with suppress(TypeError):
                kept = self._pipeline.plans.setdefault(target, {})
        plan = kept.get(key)
        if plan is None or not plan.holds(target):
            kept.pop(key, None)
            plan = self._new_plan(manifest, target)
            if len(kept) >= _KEPT_PLANS:
                del kept[next(iter(kept))]
            kept[key] = plan
        self._placed = plan
        return plan

    def _new_plan(self, manifest: Manifest, target: Target) -> TargetPlan:
        parts = target.place(manifest)
        if len(parts) != len(manifest):
            raise ManifestError(
                f"the target placed {len(parts)} tensors, the manifest has {len(manifest)}"
            )
        names = list(manifest.by_name)
        for name, pieces in zip(names, parts, strict=True):
            if not all(isinstance(piece, Part) for piece in pieces):
                raise TensorError(f"tensor {name!r}: the target placed something that is no Part")
        entries = [
            entry_of(spec, pieces) for spec, pieces in zip(manifest.specs, parts, strict=True)
        ]
        chunks = []
        first_parts = list(accumulate((len(pieces) for pieces in parts), initial=0))
        for chunk in self._cut(spec.nbytes for spec in manifest.specs):
            chunks.append(
                plan_chunk(
                    chunk,
                    [entries[i] for i in chunk.indices],
                    [names[i] for i in chunk.indices],
                    [first_parts[i] for i in chunk.indices],
                    self._pipeline.device,
                    sending=False,
                )
            )
        destinations = [part.tensor for pieces in parts for part in pieces]
        memory = list(getattr(target, "memory", destinations))
        wide = little_follows([plan.chunk for plan in chunks])
        return TargetPlan(chunks, wide, parts, destinations, memory, TensorRecord(memory))

    def _sizes(self, metadata: Iterable[tuple[str, tuple[Any, Any]]]) -> Iterator[int]:
        """Pull descriptions, remember them by position, yield their sizes in bytes."""
        pulled = self._pulled
        seen = self._seen
        for index, item in enumerate(metadata):
            try:
                name, (shape, dtype) = item
            except (TypeError, ValueError):
                raise ManifestError(
                    f"item {index} is {item!r}, expected (name, (shape, dtype))"
                ) from None
            check_name(name, seen)
            try:
                shape = tuple(shape)
                nbytes = checked_nbytes(shape, dtype)
                pulled[index] = (name, _torch_dtype(dtype), shape)
            except (ManifestError, TypeError) as error:
                raise ManifestError(f"tensor {name!r}: {error}") from None
            yield nbytes

    def _receive(
        self,
        operands: Operands,
        deliver: Work | None,
        slot: Slot | None = None,
        digest: Work | None = None,
    ) -> None:
        """Receive into contiguous tensors; then, after the chunk before, deliver."""
        received = self._pipeline.wire.run(
            lambda: broadcast_all(self._group, operands, self._src),
            # The caller's mark covers earlier users of the destinations and of the slot's memory.
            after=(self._pipeline.caller.mark(), None if slot is None else slot.free),
        )
        before, self._arriving = self._arriving, Arrival(received, deliver, slot, digest)
        self._deliver_one(before)
        if not self._ahead:
            self._deliver()

    def _slot_for(self, nbytes: int) -> tuple[Slot, torch.Tensor]:
        """The next slot, once what it held before is delivered."""
        slot = self._pipeline.next_slot()
        if self._arriving is not None and self._arriving.slot is slot:
            self._deliver()
        if slot.buffer is None:
            self._await_earlier_buffers()
        return slot, self._pipeline.reserve(slot, nbytes)

    def _deliver(self) -> None:
        before, self._arriving = self._arriving, None
        self._deliver_one(before)

    def _deliver_one(self, arrival: Arrival | None) -> None:
        if arrival is None:
            return
        if arrival.deliver is None:
            self._pipeline.caller.wait_for(arrival.received)
            self._digest(arrival, after=arrival.received)
            return
        self._done = self._pipeline.copy.run(arrival.deliver, after=(arrival.received,))
        if arrival.slot is not None:
            arrival.slot.free = self._done
        if arrival.slot is None or arrival.slot.buffer is None:
            self._lent.append(self._done)
        # The delivery came after the arrival, so this is behind both.
        self._digest(arrival, after=self._done)

    def _digest(self, arrival: Arrival, after: Mark) -> None:
        # Nothing waits for it but the caller, at the end: it reads destinations, which no later
        # chunk writes, and no slot.
        if arrival.digest is not None:
            self._pipeline.digest.run(arrival.digest, after=(after,))

    def _await_earlier_buffers(self) -> None:
        """Before a fresh buffer: wait, on the host, until all but the last few were delivered.

        The host runs ahead of a GPU, and torch's allocator can't reuse what the GPU isn't done
        with: without this a whole model's worth of buffers would be allocated.
        """
        while len(self._lent) >= len(self._pipeline.slots):
            synchronize(self._lent.popleft())

    # Into a target.

    def _receive_into(self, plan: ChunkPlan, *, wide: bool) -> None:
        digests = self._digests
        digest = None if digests is None else digests.rest(plan, keep=True, wide=wide)
        if not plan.slot_bytes:
            self._receive(plan.operands(None, self._pipeline.device), None, digest=digest)
            return
        slot, buffer = self._slot_for(plan.slot_bytes)

        def unpack() -> None:
            for copies in plan.copies:
                sums = None if digests is None else digests.sums(copies.device)
                copies.run(buffer, sums, wide=wide)

        self._receive(plan.operands(slot, self._pipeline.device), unpack, slot, digest)

    # For a callback.

    def _receive_for_callback(self, chunk: Chunk, specs: list[Spec]) -> None:
        if chunk.direct:
            self._await_earlier_buffers()
            items = [
                (name, self._pipeline.allocate(size).view(dtype).view(shape))
                for (name, dtype, shape), size in zip(specs, chunk.sizes, strict=True)
            ]
            operands = Operands.of([t for _, t in items], self._pipeline.device, "broadcast")
            self._receive(operands, lambda: self._call(items))
        else:
            slot, buffer = self._slot_for(chunk.nbytes)
            operands = Operands.of([buffer], self._pipeline.device, "broadcast")
            self._receive(operands, lambda: self._show(slot, chunk, specs), slot)

    def _call(self, items: list[tuple[str, torch.Tensor]]) -> None:
        self._callback(items)

    def _show(self, slot: Slot, chunk: Chunk, specs: list[Spec]) -> None:
        storage = self._call_back(slot, chunk, specs)
        if storage() is not None:
            # The callback kept a view: its memory must never be received into again.
            self._pipeline.give_away(slot)

    def _call_back(
        self, slot: Slot, chunk: Chunk, specs: list[Spec]
    ) -> weakref.ref[torch.UntypedStorage]:
        """Call the callback with views of the slot; nothing here refers to them afterwards."""
        alias, storage = self._pipeline.lend(slot, chunk.nbytes)
        typed: dict[torch.dtype, torch.Tensor] = {}
        items: list[tuple[str, torch.Tensor]] = []
        misaligned: list[int] = []
        for i, (name, dtype, shape) in enumerate(specs):
            base = typed.get(dtype)
            if base is None:
                whole = chunk.nbytes // dtype.itemsize * dtype.itemsize
                base = typed[dtype] = alias[:whole].view(dtype)
            offset, rest = divmod(chunk.offsets[i], dtype.itemsize)
            if rest:
                misaligned.append(i)
                items.append((name, torch.empty(shape, dtype=dtype, device=alias.device)))
            else:
                items.append((name, base.as_strided(shape, _row_major(shape), offset)))
        if misaligned:
            # No view of such an address can have the dtype: these arrive as aligned copies.
            unpack_from(
                alias,
                [items[i][1] for i in misaligned],
                [chunk.offsets[i] for i in misaligned],
                [chunk.sizes[i] for i in misaligned],
            )
        self._callback(items)
        return storage
