"""The sending side of a broadcast: pull tensors, pack a chunk, hand it to the group."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from packedcomm.communicators.base import contiguous_bytes
from packedcomm.copying import check_tensors, contiguous_copy, pack_into
from packedcomm.errors import ManifestError, TensorError
from packedcomm.events import OnEvent
from packedcomm.planning.chunks import Chunk, Cut
from packedcomm.transports.lanes import Mark, Pending
from packedcomm.transports.progress import Progress
from packedcomm.transports.slots import COPY_BLOCKS, Pipeline

__all__ = ["Sending", "broadcast_all", "check_name", "starts_broadcasts"]


def check_name(name: Any, seen: set[str]) -> None:
    """Raise `ManifestError` unless the name is a non-empty string that isn't in `seen`; add it."""
    if type(name) is not str or not name:
        raise ManifestError(f"tensor name must be a non-empty string, got {name!r}")
    if name in seen:
        raise ManifestError(f"duplicate tensor name {name!r}")
    seen.add(name)


def starts_broadcasts(group: Any) -> bool:
    """Whether the group carries out broadcasts in the background (`start_broadcast`)."""
    return hasattr(group, "start_broadcast")


def broadcast_all(group: Any, views: Sequence[torch.Tensor], src: int) -> Pending | None:
    """Broadcast each tensor, as one group of operations where the communicator has groups.

    Returns what is still under way, if the group works in the background.
    """
    if starts_broadcasts(group):
        pending: Pending = group.start_broadcast(views, src)
        return pending
    with group.group() if len(views) > 1 and hasattr(group, "group") else nullcontext():
        for view in views:
            group.broadcast(view, src=src)
    return None


class Sending:
    """One call of the producer: chunks are pulled from the iterator on the caller's stream or
    thread, packed in the copy lane and broadcast in the wire lane."""

    def __init__(
        self, pipeline: Pipeline, group: Any, src: int, cut: Cut, on_event: OnEvent | None
    ) -> None:
        self._pipeline = pipeline
        self._group = group
        self._src = src
        self._cut = cut
        self._progress = Progress({"pack": pipeline.copy, "wire": pipeline.wire}, on_event)
        self._pulled: dict[int, tuple[str, torch.Tensor]] = {}
        # Broadcasts that may still be under way: one per slot, and one in place.
        self._sent: deque[Mark] = deque(maxlen=len(pipeline.slots) + 1)

    def run(self, items: Iterable[tuple[str, torch.Tensor]]) -> None:
        """Send every `(name, tensor)`."""
        caller = self._pipeline.caller
        with self._progress:
            for chunk in self._cut(self._sizes(items)):
                pulled = [self._pulled.pop(i) for i in chunk.indices]
                names = [name for name, _ in pulled]
                tensors = [tensor for _, tensor in pulled]
                del pulled
                if self._in_place(chunk, tensors, names):
                    taken = self._send_in_place(tensors)
                else:
                    taken = self._send_packed(chunk, tensors, names)
                # From here on the caller may free or overwrite the tensors.
                caller.wait_for(taken)
                del tensors
                self._progress.moved(chunk)
            for sent in self._sent:
                caller.wait_for(sent)

    def _sizes(self, items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[int]:
        """Pull tensors, remember them by position, yield their sizes in bytes."""
        seen: set[str] = set()
        pulled = self._pulled
        for index, (name, tensor) in enumerate(items):
            check_name(name, seen)
            pulled[index] = (name, tensor)
            try:
                yield tensor.nbytes
            except RuntimeError as error:  # a sparse layout has no byte count
                raise TensorError(f"tensor {name!r}: {str(error).splitlines()[0]}") from error

    def _in_place(self, chunk: Chunk, tensors: list[torch.Tensor], names: list[str]) -> bool:
        """Whether the chunk goes out from the tensors' own memory.

        A packed chunk of one contiguous tensor has the same bytes as the tensor. In a direct chunk
        a tensor that isn't contiguous is replaced by a contiguous copy.
        """
        if not chunk.direct and len(tensors) > 1:
            return False
        contiguous = check_tensors(tensors, self._pipeline.device, names)
        if not chunk.direct:
            return contiguous[0]
        for i, whole in enumerate(contiguous):
            if not whole:
                tensors[i] = contiguous_copy(tensors[i])
        return True

    def _send_in_place(self, tensors: list[torch.Tensor]) -> Mark:
        views = [contiguous_bytes(tensor, "broadcast") for tensor in tensors]
        return self._broadcast(views, after=self._pipeline.caller.mark())

    def _send_packed(self, chunk: Chunk, tensors: list[torch.Tensor], names: list[str]) -> Mark:
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

    def _broadcast(self, views: list[torch.Tensor], after: Mark) -> Mark:
        sent = self._pipeline.wire.run(
            lambda: broadcast_all(self._group, views, self._src), after=(after,)
        )
        self._sent.append(sent)
        return sent
