"""The sending side of a broadcast: pull tensors, pack a chunk, hand it to the group."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from typing import Any

import torch

from packedcomm.communicators.base import contiguous_bytes
from packedcomm.copying import check_tensors, contiguous_copy, pack_into
from packedcomm.errors import ManifestError, TensorError
from packedcomm.events import OnEvent
from packedcomm.planning.chunks import Chunk, Cut
from packedcomm.transports.lanes import Mark
from packedcomm.transports.progress import Progress
from packedcomm.transports.slots import COPY_BLOCKS, Pipeline, Slot

__all__ = ["Sending", "broadcast_all", "check_name"]


def check_name(name: Any, seen: set[str]) -> None:
    """Raise `ManifestError` unless the name is a non-empty string that isn't in `seen`; add it."""
    if type(name) is not str or not name:
        raise ManifestError(f"tensor name must be a non-empty string, got {name!r}")
    if name in seen:
        raise ManifestError(f"duplicate tensor name {name!r}")
    seen.add(name)


def broadcast_all(group: Any, views: Sequence[torch.Tensor], src: int) -> None:
    """Broadcast each tensor, as one group of operations where the communicator has groups."""
    with group.group() if len(views) > 1 and hasattr(group, "group") else nullcontext():
        for view in views:
            group.broadcast(view, src=src)


class Sending:
    """One call of the producer: chunks are pulled from the iterator on the caller's stream or
    thread, packed in the pack lane and broadcast in the wire lane."""

    def __init__(
        self, pipeline: Pipeline, group: Any, src: int, cut: Cut, on_event: OnEvent | None
    ) -> None:
        self._pipeline = pipeline
        self._group = group
        self._src = src
        self._cut = cut
        self._progress = Progress({"pack": pipeline.pack, "wire": pipeline.wire}, on_event)
        self._pulled: dict[int, tuple[str, torch.Tensor]] = {}
        # On a CPU the broadcast occupies the caller's thread, so it is called when the packing of
        # the next chunk has been started and runs beside it. On a GPU it is enqueued at once.
        self._defer = pipeline.device.type == "cpu"
        self._unsent: tuple[Slot, torch.Tensor, Mark] | None = None
        self._sent: Mark = None

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
                    taken = self._pack(chunk, tensors, names)
                # From here on the caller may free or overwrite the tensors.
                caller.wait_for(taken)
                del tensors
                self._progress.moved(chunk)
            self._send_packed()
            caller.wait_for(self._sent)

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
        self._send_packed()
        views = [contiguous_bytes(tensor, "broadcast") for tensor in tensors]
        self._sent = self._pipeline.wire.run(
            lambda: broadcast_all(self._group, views, self._src),
            after=(self._pipeline.caller.mark(),),
        )
        return self._sent

    def _pack(self, chunk: Chunk, tensors: list[torch.Tensor], names: list[str]) -> Mark:
        slot = self._pipeline.next_slot()
        if self._unsent is not None and self._unsent[0] is slot:
            self._send_packed()
        buffer = self._pipeline.reserve(slot, chunk.nbytes)
        packed = self._pipeline.pack.run(
            lambda: pack_into(
                buffer, tensors, chunk.offsets, chunk.sizes, names, blocks=COPY_BLOCKS
            ),
            # The caller's mark covers what filled the tensors and what freed the slot's memory.
            after=(self._pipeline.caller.mark(), slot.free),
        )
        self._send_packed()
        self._unsent = (slot, buffer, packed)
        if not self._defer:
            self._send_packed()
        return packed

    def _send_packed(self) -> None:
        """Broadcast the packed chunk that waits for it, if there is one."""
        if self._unsent is None:
            return
        slot, buffer, packed = self._unsent
        self._unsent = None
        slot.free = self._sent = self._pipeline.wire.run(
            lambda: self._group.broadcast(buffer, src=self._src), after=(packed,)
        )
