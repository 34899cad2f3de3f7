"""The sending side of a broadcast: pull tensors, pack a chunk, hand it to the group."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from packedcomm.communicators.base import Communicator, Operands, Pending
from packedcomm.copying import Part, as_tensor
from packedcomm.errors import ManifestError, TensorError
from packedcomm.events import OnEvent
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import Cut
from packedcomm.transports.chunk_plans import ChunkPlan, Entry, entry_of, plan_chunk
from packedcomm.transports.digest_sums import Digests
from packedcomm.transports.lanes import Mark
from packedcomm.transports.progress import Progress
from packedcomm.transports.slots import PIPELINES, Pipeline, Slot, group_device

__all__ = ["PostIter", "Sending", "broadcast_all", "check_name"]

PostIter = Callable[[tuple[str, Any]], Any]


def check_name(name: Any, seen: set[str]) -> None:
    """Raise `ManifestError` unless the name is a non-empty string that isn't in `seen`; add it."""
    if type(name) is not str or not name:
        raise ManifestError(f"tensor name must be a non-empty string, got {name!r}")
    if name in seen:
        raise ManifestError(f"duplicate tensor name {name!r}")
    seen.add(name)


def broadcast_all(group: Any, operands: Operands, src: int) -> Pending | None:
    """Broadcast contiguous tensors, as one group of operations over a communicator of ours.

    Returns what is still under way, if the group works in the background.
    """
    if isinstance(group, Communicator):
        return group.start_broadcast(operands, src)
    for tensor in operands.as_bytes():
        group.broadcast(tensor, src=src)
    return None


class ChunkNames:
    """Names of a chunk's tensors, looked up only for messages."""

    def __init__(self, names: Sequence[str], indices: Sequence[int]) -> None:
        self._names = names
        self._indices = indices

    def __getitem__(self, index: int) -> str:
        return self._names[self._indices[index]]


class Sending:
    """One call of the producer: chunks are pulled on the caller's stream or thread, packed in the
    copy lane and broadcast in the wire lane.

    With `digests` packing makes those of what it packs; what it leaves, such as tensors that are
    sent from where they are, is digested in a lane of its own beside the broadcast. Digests of
    tensors are numbered by their positions.
    """

    def __init__(
        self,
        group: Any,
        src: int,
        cut: Cut,
        digests: Digests | None = None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._group = group
        self._src = src
        self._cut = cut
        self._digests = digests
        self._wait = wait
        self._names: list[str] = []
        # Whether tensors in host memory are sent by a GPU.
        self._from_host = False
        # Whether chunk plans, and so the memory of their tensors, outlast the transfer.
        self._kept = False
        self._pulled: dict[int, Entry] = {}
        self._pipeline: Pipeline
        # Broadcasts that may still be under way: one per slot, and one in place.
        self._sent: deque[Mark]

    def run(
        self,
        iterator: Iterable[tuple[str, Any]],
        post_iter_func: PostIter | None,
        num_buffers: int,
        on_event: OnEvent | None,
    ) -> None:
        """Send named tensors as they come."""
        sizes = self._pull(iterator, post_iter_func)
        first = next(sizes, None)
        if first is None:
            return
        device = group_device(self._group)
        if device is None:
            entry = self._pulled[0]
            assert isinstance(entry, torch.Tensor)
            device = entry.device
        if device.type not in ("cpu", "cuda"):
            raise TensorError(
                f"tensor {self._names[0]!r} is on {device}, expected a cpu or cuda device"
            )
        self._run(device, lambda: self._plans(chain((first,), sizes)), num_buffers, on_event)

    def run_parts(
        self,
        manifest: Manifest,
        parts: Iterable[Sequence[Part]],
        device: torch.device,
        num_buffers: int,
        on_event: OnEvent | None,
        keep_for: object | None = None,
    ) -> None:
        """Send what a manifest describes, from the parts that come for each of its tensors.

        Args:
            manifest: the tensors, in order.
            parts: for each of them the parts that make it up.
            device: the group's device.
            num_buffers: slots.
            on_event: as for `broadcast_producer`.
            keep_for: an object that lives as long as the parts stay where they are: the plan is
                kept with it, and `parts` isn't looked at again.
        """

        def plans() -> Iterable[ChunkPlan]:
            made = self._plans(self._pull_parts(manifest, parts))
            if keep_for is None:
                return made
            kept = self._pipeline.plans.setdefault(keep_for, {})
            key = (manifest.digest, self._cut)
            if key not in kept:
                kept[key] = list(made)
            plans: list[ChunkPlan] = kept[key]
            return plans

        self._names = list(manifest.by_name)
        self._from_host = True
        self._kept = keep_for is not None
        self._run(device, plans, num_buffers, on_event)

    def _run(
        self,
        device: torch.device,
        plans: Callable[[], Iterable[ChunkPlan]],
        num_buffers: int,
        on_event: OnEvent | None,
    ) -> None:
        with PIPELINES.borrow(self._group, device, num_buffers) as pipeline:
            self._pipeline = pipeline
            self._sent = deque(maxlen=num_buffers + 1)
            if self._digests is not None:
                self._digests.begin(pipeline)
            stages = {"pack": pipeline.copy, "wire": pipeline.wire}
            with Progress(stages, on_event, self._wait) as progress:
                for plan in plans():
                    self._send(plan)
                    chunk = plan.chunk
                    # A plan that isn't kept must not hold its tensors while the next is made.
                    del plan
                    progress.moved(chunk)
                for sent in self._sent:
                    pipeline.caller.wait_for(sent)
                if self._digests is not None:
                    # From here on the caller may overwrite what the digest lane reads.
                    pipeline.caller.wait_for(pipeline.digest.tail())
                    self._digests.finish()

    def _plans(self, sizes: Iterator[int]) -> Iterator[ChunkPlan]:
        pull = self._pulled.pop
        device = self._pipeline.device
        for chunk in self._cut(sizes):
            entries = [pull(i) for i in chunk.indices]
            names = ChunkNames(self._names, chunk.indices)
            plan = [
                plan_chunk(
                    chunk,
                    entries,
                    names,
                    chunk.indices,
                    device,
                    sending=True,
                    from_host=self._from_host,
                )
            ]
            del entries
            # Nothing here may keep what isn't needed any more.
            yield plan.pop()

    def _send(self, plan: ChunkPlan) -> None:
        caller = self._pipeline.caller
        # What filled the tensors, and what freed the slot's memory.
        ready = caller.mark()
        if not plan.slot_bytes:
            done = self._broadcast(plan, None, after=ready)
        else:
            slot = self._pipeline.next_slot()
            buffer = self._pipeline.reserve(slot, plan.slot_bytes)
            packed = self._pipeline.copy.run(
                lambda: self._pack(plan, slot, buffer), after=(ready, slot.free)
            )
            slot.free = self._broadcast(plan, slot, after=packed)
            done = slot.free if plan.moves_in_place else packed
        # On a CPU this is where the caller's thread digests while the broadcast goes on.
        self._digest_rest(plan, ready)
        # From here on the caller may free or overwrite the tensors.
        caller.wait_for(done)

    def _digest_rest(self, plan: ChunkPlan, ready: Mark) -> None:
        """Digest what packing doesn't, behind what filled the tensors."""
        if self._digests is None:
            return
        work = self._digests.rest(plan, keep=self._kept)
        if work is None:
            return
        digested = self._pipeline.digest.run(work, after=(ready,))
        if not self._kept:
            # The chunk's tensors are dropped next, and their memory is used again in the order of
            # the caller's stream. Kept ones stay: the caller waits once, at the end, and the next
            # chunk's broadcast, which waits for the caller, not at all.
            self._pipeline.caller.wait_for(digested)

    def _pack(self, plan: ChunkPlan, slot: Slot, buffer: torch.Tensor) -> None:
        digests = self._digests
        for copies in plan.copies:
            sums = None if digests is None else digests.sums(copies.device)
            if copies.device == buffer.device:
                copies.run(buffer, sums)
                continue
            # Host memory goes by way of pinned staging, which the copy before may still be reading.
            staging = self._pipeline.staging(slot, plan.slot_bytes)
            copies.run(staging, sums)
            for begin, end in plan.host_spans:
                buffer[begin:end].copy_(staging[begin:end], non_blocking=True)
            slot.staged = self._pipeline.copy.tail()

    def _broadcast(self, plan: ChunkPlan, slot: Slot | None, after: Mark) -> Mark:
        operands = plan.operands(slot, self._pipeline.device)
        sent = self._pipeline.wire.run(
            lambda: broadcast_all(self._group, operands, self._src), after=(after,)
        )
        self._sent.append(sent)
        return sent

    def _pull(
        self, iterator: Iterable[tuple[str, Any]], post_iter_func: PostIter | None
    ) -> Iterator[int]:
        """Pull tensors, remember them by position, yield their sizes in bytes."""
        seen: set[str] = set()
        names, pulled = self._names, self._pulled
        for index, item in enumerate(iterator):
            try:
                name, tensor = item
            except (TypeError, ValueError):
                raise ManifestError(f"item {index} is {item!r}, expected (name, tensor)") from None
            check_name(name, seen)
            names.append(name)
            if post_iter_func is not None:
                tensor = post_iter_func(item)
            try:
                if not isinstance(tensor, torch.Tensor):
                    tensor = as_tensor(tensor)
                size = tensor.nbytes
            except (TensorError, RuntimeError) as error:  # a sparse layout has no byte count
                raise TensorError(f"tensor {name!r}: {str(error).splitlines()[0]}") from error
            pulled[index] = tensor
            # While this waits for the next turn, only `pulled` may keep the tensor.
            del item, tensor
            yield size

    def _pull_parts(self, manifest: Manifest, parts: Iterable[Sequence[Part]]) -> Iterator[int]:
        for index, (spec, pieces) in enumerate(zip(manifest.specs, parts, strict=True)):
            self._pulled[index] = entry_of(spec, pieces)
            del pieces
            yield spec.nbytes
