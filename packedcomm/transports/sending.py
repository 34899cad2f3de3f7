"""The sending side of a broadcast: pull tensors, pack a chunk, hand it to the group."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

import torch

from packedcomm.communicators.base import Communicator, Pending, contiguous_bytes
from packedcomm.copying import as_tensor, contiguous_copy, describe_tensors, pack_into
from packedcomm.errors import ManifestError, TensorError
from packedcomm.events import OnEvent
from packedcomm.planning.chunks import Chunk, Cut
from packedcomm.transports.lanes import Mark
from packedcomm.transports.progress import Progress
from packedcomm.transports.slots import COPY_BLOCKS, PIPELINES, Pipeline, group_device

__all__ = ["PostIter", "Sending", "broadcast_all", "check_name"]

PostIter = Callable[[tuple[str, Any]], Any]


def check_name(name: Any, seen: set[str]) -> None:
    """Raise `ManifestError` unless the name is a non-empty string that isn't in `seen`; add it."""
    if type(name) is not str or not name:
        raise ManifestError(f"tensor name must be a non-empty string, got {name!r}")
    if name in seen:
        raise ManifestError(f"duplicate tensor name {name!r}")
    seen.add(name)


def broadcast_all(group: Any, tensors: list[torch.Tensor], src: int) -> Pending | None:
    """Broadcast contiguous tensors, as one group of operations over a communicator of ours.

    Returns what is still under way, if the group works in the background.
    """
    if isinstance(group, Communicator):
        return group.start_broadcast(tensors, src)
    for tensor in tensors:
        group.broadcast(contiguous_bytes(tensor, "broadcast"), src=src)
    return None


class ChunkNames:
    """Names of a chunk's tensors, looked up only for messages."""

    def __init__(self, names: Sequence[str], indices: Sequence[int]) -> None:
        self._names = names
        self._indices = indices

    def __getitem__(self, index: int) -> str:
        return self._names[self._indices[index]]


class Sending:
    """One call of the producer: chunks are pulled from the iterator on the caller's stream or
    thread, packed in the copy lane and broadcast in the wire lane."""

    def __init__(self, group: Any, src: int, cut: Cut, post_iter_func: PostIter | None) -> None:
        self._group = group
        self._src = src
        self._cut = cut
        self._post_iter_func = post_iter_func
        self._names: list[str] = []
        self._pulled: dict[int, torch.Tensor] = {}
        self._pipeline: Pipeline
        # Broadcasts that may still be under way: one per slot, and one in place.
        self._sent: deque[Mark]

    def run(
        self, iterator: Iterable[tuple[str, Any]], num_buffers: int, on_event: OnEvent | None
    ) -> None:
        """Send everything."""
        sizes = self._sizes(iterator)
        first = next(sizes, None)
        if first is None:
            return
        device = group_device(self._group) or self._pulled[0].device
        if device.type not in ("cpu", "cuda"):
            raise TensorError(
                f"tensor {self._names[0]!r} is on {device}, expected a cpu or cuda device"
            )
        with PIPELINES.borrow(self._group, device, num_buffers) as pipeline:
            self._pipeline = pipeline
            self._sent = deque(maxlen=num_buffers + 1)
            with Progress({"pack": pipeline.copy, "wire": pipeline.wire}, on_event) as progress:
                self._send_chunks(self._cut(chain((first,), sizes)), progress)

    def _send_chunks(self, chunks: Iterator[Chunk], progress: Progress) -> None:
        caller = self._pipeline.caller
        pull = self._pulled.pop
        for chunk in chunks:
            tensors = [pull(i) for i in chunk.indices]
            names = ChunkNames(self._names, chunk.indices)
            if self._in_place(chunk, tensors, names):
                taken = self._broadcast(tensors, after=caller.mark())
            else:
                taken = self._send_packed(chunk, tensors, names)
            # From here on the caller may free or overwrite the tensors.
            caller.wait_for(taken)
            del tensors
            progress.moved(chunk)
        for sent in self._sent:
            caller.wait_for(sent)

    def _sizes(self, iterator: Iterable[tuple[str, Any]]) -> Iterator[int]:
        """Pull tensors, remember them by position, yield their sizes in bytes."""
        seen: set[str] = set()
        names, pulled, post_iter_func = self._names, self._pulled, self._post_iter_func
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

    def _in_place(self, chunk: Chunk, tensors: list[torch.Tensor], names: ChunkNames) -> bool:
        """Whether the chunk goes out from the tensors' own memory.

        A packed chunk of one contiguous tensor has the same bytes as the tensor. In a direct chunk
        a tensor that isn't contiguous is replaced by a contiguous copy.
        """
        if not chunk.direct and len(tensors) > 1:
            return False
        rows = describe_tensors(tensors, self._pipeline.device, names)
        if not chunk.direct:
            return rows[0][2]
        for i, (_, _, contiguous) in enumerate(rows):
            if not contiguous:
                tensors[i] = contiguous_copy(tensors[i])
        return True

    def _send_packed(self, chunk: Chunk, tensors: list[torch.Tensor], names: ChunkNames) -> Mark:
        slot = self._pipeline.next_slot()
        buffer = self._pipeline.reserve(slot, chunk.nbytes)
        packed = self._pipeline.copy.run(
            lambda: pack_into(
                buffer, tensors, chunk.offsets, chunk.sizes, names, blocks=COPY_BLOCKS
            ),
            # The caller's mark covers what filled the tensors and what freed the slot's memory.
            after=(self._pipeline.caller.mark(), slot.free),
        )
        slot.free = self._broadcast([buffer], after=packed)
        return packed

    def _broadcast(self, tensors: list[torch.Tensor], after: Mark) -> Mark:
        sent = self._pipeline.wire.run(
            lambda: broadcast_all(self._group, tensors, self._src), after=(after,)
        )
        self._sent.append(sent)
        return sent
