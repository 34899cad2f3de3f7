"""What one chunk needs on a rank: the memory that is broadcast, and the copies beside it.

A plan holds for as long as the tensors stay where they are; only the slot that it is run with
changes from one time to the next.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packedcomm.communicators.base import Operands
from packedcomm.copying import BufferPlan, Names, Part, describe_tensors
from packedcomm.errors import TensorError
from packedcomm.manifest import TensorSpec
from packedcomm.planning.chunks import NATIVE_ALIGNMENT, Chunk, aligned
from packedcomm.transports.slots import COPY_BLOCKS, Slot

__all__ = ["ChunkPlan", "Composed", "Entry", "entry_of", "plan_chunk"]


@dataclass(frozen=True, slots=True)
class Composed:
    """A named tensor whose bytes aren't simply those of one tensor in memory."""

    spec: TensorSpec
    dtype: torch.dtype
    parts: Sequence[Part]

    @property
    def nbytes(self) -> int:
        """Bytes of the named tensor."""
        return self.spec.nbytes


Entry = torch.Tensor | Composed
"""A named tensor in a chunk: in memory as it is, or put together from parts."""


def entry_of(spec: TensorSpec, parts: Sequence[Part]) -> Entry:
    """The tensor itself if it is the only part and needs no conversion."""
    dtype: torch.dtype = getattr(torch, spec.dtype)
    if len(parts) == 1:
        part = parts[0]
        whole = part.tensor.shape == spec.shape and not any(part.offset or ())
        if whole and part.tensor.dtype == dtype and part.scale == 1.0:
            return part.tensor
    return Composed(spec, dtype, parts)


class ChunkPlan:
    """One chunk on one rank. Made by `plan_chunk`."""

    def __init__(
        self,
        chunk: Chunk,
        entries: Sequence[Entry],
        numbers: Sequence[int],
        places: Sequence[torch.Tensor | tuple[int, int]],
        slot_bytes: int,
        copies: Sequence[BufferPlan],
        host_spans: Sequence[tuple[int, int]],
    ) -> None:
        self.chunk = chunk
        self.entries = entries
        """The chunk's tensors, in order."""
        self.numbers = numbers
        """For each of them the number of its digest; of a receiver's tensor that of its first part,
        from which its other parts are counted on."""
        self.digested = frozenset(number for plan in copies for number in plan.digested)
        """Digests that the copies make, if they are asked; others need a pass of their own."""
        self.slot_bytes = slot_bytes
        """Bytes of a slot that the chunk needs; 0 if everything moves from or into place."""
        self.copies = copies
        """Between the slot and the tensors; those in host memory apart from those on the GPU."""
        self.host_spans = host_spans
        """Begin and end in the slot of what the host packs for a GPU."""
        self.moves_in_place = any(isinstance(place, torch.Tensor) for place in places)
        """Whether the memory of some tensors takes part in the broadcast itself."""
        self._places = places
        self._in_place: Operands | None = None

    def operands(self, slot: Slot | None, device: torch.device) -> Operands:
        """What to broadcast: the tensors' own memory and ranges of the slot."""
        found = self._in_place if slot is None else slot.operands.get(self)
        if found is not None:
            return found
        buffer = None if slot is None else slot.buffer
        tensors = []
        for place in self._places:
            if not isinstance(place, torch.Tensor):
                assert buffer is not None
                place = buffer[place[0] : place[1]]
            tensors.append(place)
        found = Operands.of(tensors, device, "broadcast")
        if slot is None:
            self._in_place = found
        else:
            # With the slot, because it ends with the slot's buffer.
            slot.operands[self] = found
        return found


def plan_chunk(
    chunk: Chunk,
    entries: Sequence[Entry],
    names: Names,
    numbers: Sequence[int],
    device: torch.device,
    *,
    sending: bool,
    from_host: bool = False,
) -> ChunkPlan:
    """Decide for each tensor of a chunk whether it moves from or into its own memory.

    Args:
        chunk: the chunk.
        entries: its tensors, in order.
        names: what they are called in messages.
        numbers: of their digests, see `ChunkPlan.numbers`.
        device: the group's device.
        sending: whether the chunk is packed here, or unpacked.
        from_host: whether tensors in host memory are fine where a GPU sends.

    Raises:
        TensorError: a tensor can't be copied as bytes or is on another device.
    """
    from_host = from_host and device.type == "cuda"
    if chunk.direct or len(entries) == 1:
        direct = _movable_in_place(entries, names, device, from_host)
    else:
        direct = [False] * len(entries)
    if chunk.direct:
        offsets, slot_bytes = _aside(chunk, direct)
    elif direct[0]:
        offsets, slot_bytes = [0], 0
    else:
        offsets, slot_bytes = list(chunk.offsets), chunk.nbytes
    copies = {False: _buffer_plan(device, sending)}
    spans: list[tuple[int, int]] = []
    for on_host in (False, True):
        chosen = [
            i
            for i, entry in enumerate(entries)
            if not direct[i] and (from_host and _on_host(entry)) is on_host
        ]
        if not chosen:
            continue
        if on_host:
            copies[True] = _buffer_plan(torch.device("cpu"), sending)
            spans = _merged([(offsets[i], offsets[i] + chunk.sizes[i]) for i in chosen])
        _add(copies[on_host], chosen, entries, offsets, chunk.sizes, names, numbers)
    places: list[torch.Tensor | tuple[int, int]]
    if chunk.direct:
        places = [
            entry if in_place and isinstance(entry, torch.Tensor) else (offset, offset + size)
            for entry, in_place, offset, size in zip(
                entries, direct, offsets, chunk.sizes, strict=True
            )
        ]
    elif slot_bytes:
        places = [(0, chunk.nbytes)]
    elif direct[0] and isinstance(entries[0], torch.Tensor):
        places = [entries[0]]
    else:  # nothing but empty tensors
        places = [torch.empty(0, dtype=torch.uint8, device=device)]
    used = [plan for plan in copies.values() if plan.nbytes]
    return ChunkPlan(chunk, entries, numbers, places, slot_bytes, used, spans)


def _movable_in_place(
    entries: Sequence[Entry], names: Names, device: torch.device, from_host: bool
) -> list[bool]:
    """For each entry whether its own memory can be broadcast."""
    movable = [False] * len(entries)
    plain = [
        i
        for i, entry in enumerate(entries)
        if isinstance(entry, torch.Tensor) and not (from_host and _on_host(entry))
    ]
    tensors = [entries[i] for i in plain]
    chosen = _Chosen(names, plain)
    for i, row in zip(plain, describe_tensors(tensors, device, chosen), strict=True):  # type: ignore[arg-type]
        movable[i] = row[2]
    return movable


class _Chosen:
    """Names of some of the tensors, looked up only for messages."""

    def __init__(self, names: Names, indices: Sequence[int]) -> None:
        self._names = names
        self._indices = indices

    def __getitem__(self, index: int) -> str:
        return self._names[self._indices[index]]


def _on_host(entry: Entry) -> bool:
    """Whether a tensor is in host memory."""
    tensor = entry if isinstance(entry, torch.Tensor) else None
    if isinstance(entry, Composed) and entry.parts:
        tensor = entry.parts[0].tensor
    return tensor is not None and tensor.device.type == "cpu"


def _buffer_plan(device: torch.device, sending: bool) -> BufferPlan:
    blocks = COPY_BLOCKS if device.type == "cuda" else 0
    return BufferPlan(device, into_buffer=sending, blocks=blocks)


def _aside(chunk: Chunk, direct: Sequence[bool]) -> tuple[list[int], int]:
    """Room in a slot for the tensors of a direct chunk that can't be moved in place."""
    offsets = []
    end = 0
    for size, in_place in zip(chunk.sizes, direct, strict=True):
        offsets.append(0 if in_place else end)
        if not in_place:
            end = aligned(end + size)
    return offsets, end


def _merged(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Spans in ascending order, joined where no more than padding is between them."""
    merged: list[tuple[int, int]] = []
    for begin, end in spans:
        if merged and begin - merged[-1][1] < NATIVE_ALIGNMENT:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((begin, end))
    return merged


def _add(
    plan: BufferPlan,
    chosen: Sequence[int],
    entries: Sequence[Entry],
    offsets: Sequence[int],
    sizes: Sequence[int],
    names: Names,
    numbers: Sequence[int],
) -> None:
    plain = [i for i in chosen if isinstance(entries[i], torch.Tensor)]
    plan.add_tensors(
        [entries[i] for i in plain],  # type: ignore[misc]  # chosen by their type
        [offsets[i] for i in plain],
        [sizes[i] for i in plain],
        _Chosen(names, plain),
        [numbers[i] for i in plain],
    )
    for i in chosen:
        entry = entries[i]
        if isinstance(entry, Composed):
            if len({part.tensor.device for part in entry.parts}) > 1:
                raise TensorError(f"tensor {names[i]!r}: its parts are on several devices")
            plan.add_parts(
                entry.parts, entry.dtype, entry.spec.shape, offsets[i], names[i], numbers[i]
            )
