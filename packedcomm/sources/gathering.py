"""Sources whose tensors may be sharded over processes: gathered to the leader, piece by piece."""

from __future__ import annotations

import abc
import hashlib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from packedcomm.copying import Part
from packedcomm.errors import LayoutError, PackedCommError, SessionStateError
from packedcomm.manifest import DTYPE_SIZES, dtype_name
from packedcomm.sources.base import Snapshot
from packedcomm.sources.entries import (
    Entry,
    NamedTensor,
    Transform,
    check_tensors,
    describe,
    entries_of,
    is_dtensor,
    local_of,
)
from packedcomm.sources.exchange import Exchange
from packedcomm.sources.placements import ShardBox, is_replicated, shard_boxes
from packedcomm.sources.structure import AddressRecord
from packedcomm.sources.transforms import CASTABLE

__all__ = ["GatheringSource"]

# Payload of one round of transfers. Two rounds are in memory at once: one arrives while the tensors
# of the other are taken. A larger tensor is a round of its own.
_ROUND_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class _Shards:
    """Who has which box of a tensor, as far as the leader needs them: one replica's boxes."""

    boxes: tuple[tuple[int, ShardBox], ...] | None
    """Rank in the group and box, empty ones left out; None where torch must gather it."""

    stand_ins: tuple[torch.Tensor, ...]
    """A meta tensor per box, which transforms take for the memory."""

    def parts(self, scale: float) -> list[Part]:
        """What transforms are applied to."""
        offsets: list[tuple[int, ...] | None] = [box[0] for _, box in self.boxes or ()]
        offsets = offsets or [None]
        pairs = zip(self.stand_ins, offsets, strict=True)
        return [Part(tensor, offset, scale) for tensor, offset in pairs]


@dataclass(frozen=True, slots=True)
class _Gathered:
    """A sharded tensor that is sent."""

    item: NamedTensor
    entry: Entry
    shards: _Shards
    cast: torch.dtype | None
    """What the shards are cast to before they travel."""

    @property
    def nbytes(self) -> int:
        dtype = self.item.tensor.dtype if self.cast is None else self.cast
        return self.item.tensor.numel() * dtype.itemsize

    def local(self) -> torch.Tensor:
        """This process's shard, contiguous and as it travels."""
        local = local_of(self.item.tensor.detach())
        return local.to(self.cast or local.dtype).contiguous()

    def parts(self, arrived: Sequence[torch.Tensor]) -> tuple[Part, ...]:
        """The entry's parts, with the shards that arrived in the place of the stand-ins."""
        storages = [tensor.untyped_storage()._cdata for tensor in self.shards.stand_ins]
        found = []
        for part in self.entry.parts:
            view = part.tensor
            shard = arrived[storages.index(view.untyped_storage()._cdata)]
            start = shard.storage_offset() + view.storage_offset()
            tensor = shard.as_strided(view.shape, view.stride(), start)
            found.append(Part(tensor, part.offset, part.scale))
        return tuple(found)


class GatheringSource(abc.ABC):
    """The part that sources of DTensors share.

    The shards of one replica travel from the ranks that have them straight to the leader, which
    gets each as a part of its own: nothing is concatenated, and no other rank ever has a whole
    tensor. Replicated tensors don't travel. Where a `Cast` makes a tensor smaller and nothing else
    is done to its values, its shards are cast before they travel.

    Args:
        transforms: applied in order.
        exchange: the processes of the source; None for one process.
    """

    def __init__(self, transforms: Sequence[Transform], exchange: Exchange | None) -> None:
        self.leader = exchange is None or exchange.leader
        self._transforms = tuple(transforms)
        self._exchange = exchange
        self._snapshot: Snapshot | None = None
        self._addresses: AddressRecord | None = None
        self._digest = b""
        self._entries: tuple[Entry, ...] = ()
        self._gathered: dict[int, _Gathered] = {}

    @abc.abstractmethod
    def _read(self) -> tuple[list[NamedTensor], Mapping[str, Any]]:
        """Read the trainer's tensors anew, and what else belongs into the manifest's attributes."""

    @abc.abstractmethod
    def _structure_holds(self) -> bool:
        """Whether `_read` would give the same objects again; no Python per tensor."""

    def snapshot(self) -> Snapshot:
        """See `Source`. A collective over the source's processes, if there are several.

        Raises:
            ManifestError: also where processes have different tensors, shards or transforms; then
                on all of them.
        """
        failure = None
        try:
            self._refresh()
        except PackedCommError as error:
            if self._exchange is None:
                raise
            failure = error
        if self._exchange is not None:
            try:
                self._exchange.agree(failure, self._digest)
            except PackedCommError:
                self._addresses = None
                raise
        assert self._snapshot is not None
        return self._snapshot

    def _refresh(self) -> None:
        if self._addresses is not None and self._structure_holds() and self._addresses.holds():
            return
        # A failure below must not leave a record that says that nothing has changed.
        self._addresses = None
        named, attributes = self._read()
        check_tensors((item.name, local_of(item.tensor)) for item in named)
        shards = {}
        layout = []
        for index, item in enumerate(named):
            if not is_dtensor(item.tensor):
                continue
            tensor: Any = item.tensor
            placements = tensor.placements
            layout.append(f"{item.name} {placements} {tuple(tensor.device_mesh.shape)}")
            if not is_replicated(placements):
                shards[index] = self._shards_of(item)
        stand_ins = {index: shard.parts(named[index].scale) for index, shard in shards.items()}
        description = describe(entries_of(named, stand_ins), self._transforms, attributes)
        manifest = description.manifest
        if self._snapshot is not None and self._snapshot.manifest == manifest:
            manifest = self._snapshot.manifest
        self._entries = description.entries
        self._gathered = {
            position: _Gathered(
                item := named[entry.origin],
                entry,
                shards[entry.origin],
                _cast_early(item.tensor.dtype, entry),
            )
            for position, entry in enumerate(description.entries)
            if entry.origin in shards
        }
        parts = None if self._gathered else description.parts()
        self._digest = hashlib.sha256("\n".join([manifest.digest, *layout]).encode()).digest()
        self._snapshot = Snapshot(manifest, parts, description.left_out)
        self._addresses = AddressRecord([item.tensor for item in named])

    def _shards_of(self, item: NamedTensor) -> _Shards:
        tensor: Any = item.tensor
        if self._exchange is None:
            raise LayoutError(
                f"tensor {item.name!r}: is sharded, but torch.distributed isn't initialised"
            )
        shape = tuple(tensor.shape)
        ranks = tensor.device_mesh.mesh.cpu()
        boxes = shard_boxes(shape, tuple(ranks.shape), tensor.placements)
        whole = (torch.empty(shape, dtype=tensor.dtype, device="meta"),)
        if boxes is None:
            return _Shards(None, whole)
        coordinate = tuple(tensor.device_mesh.get_coordinate())
        local = tuple(tensor._local_tensor.shape)
        if boxes[coordinate][1] != local:
            raise LayoutError(
                f"tensor {item.name!r}: the shard at {coordinate} of the mesh has shape {local}, "
                f"expected {boxes[coordinate][1]} for {tensor.placements} of {shape}"
            )
        members = {at: self._exchange.rank_of(int(ranks[at])) for at in boxes}
        if -1 in members.values():
            raise LayoutError(
                f"tensor {item.name!r}: its mesh has ranks outside the source's group"
            )
        leader = next((at for at, rank in members.items() if rank == 0), None)
        if leader is None:
            # Another copy of the tensor has the leader in its mesh; this one isn't needed.
            return _Shards((), whole)
        splits = [not placement.is_replicate() for placement in tensor.placements]
        needed = tuple(
            (members[at], box)
            for at, box in boxes.items()
            if 0 not in box[1]
            and all(s or a == b for s, a, b in zip(splits, at, leader, strict=True))
        )
        if not needed:
            return _Shards((), whole)
        stand_ins = [torch.empty(b[1], dtype=tensor.dtype, device="meta") for _, b in needed]
        return _Shards(needed, tuple(stand_ins))

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """See `Source`. Closing the iterator early takes the rest, so that no rank waits forever.

        Raises:
            SessionStateError: the snapshot isn't this source's latest.
        """
        if snapshot is not self._snapshot:
            raise SessionStateError("gather: expected the source's latest snapshot")
        if snapshot.parts is not None:
            yield from snapshot.parts
            return
        rounds = self._rounds()
        try:
            for arrived in rounds:
                arrived.reverse()
                while arrived:
                    yield arrived.pop()
        except GeneratorExit:
            for _ in rounds:
                pass
            raise

    def _rounds(self) -> Iterator[list[Sequence[Part]]]:
        """The parts of a few tensors at a time, while the next few are on their way."""
        assert self._exchange is not None
        devices = {g.item.tensor.device for g in self._gathered.values()}
        for device in sorted(devices, key=str):
            self._exchange.prepare(self._exchange.carrier(device))
        bounds = [0]
        nbytes = 0
        for position in range(len(self._entries)):
            if position in self._gathered:
                nbytes += self._gathered[position].nbytes
            if nbytes >= _ROUND_BYTES or position == len(self._entries) - 1:
                bounds.append(position + 1)
                nbytes = 0
        rounds = [range(a, b) for a, b in itertools.pairwise(bounds)]
        coming = self._start(rounds[0]) if rounds else None
        for number, positions in enumerate(rounds):
            assert coming is not None
            works, shards, operations = coming
            coming = self._start(rounds[number + 1]) if number + 1 < len(rounds) else None
            for work in works:
                work.wait()
            # Until here, so that what is on its way stays in memory.
            del operations
            yield [self._arrived(position, shards.pop(position, [])) for position in positions]

    def _start(
        self, positions: range
    ) -> tuple[list[Any], dict[int, list[torch.Tensor]], list[Any]]:
        """Start a round: what to wait for, on the leader the shards by position, and what must be
        kept until then."""
        assert self._exchange is not None
        operations: list[Any] = []
        shards: dict[int, list[torch.Tensor]] = {}
        for position in positions:
            gathered = self._gathered.get(position)
            if gathered is None or not gathered.shards.boxes:
                continue
            device = self._exchange.carrier(gathered.item.tensor.device)
            for rank, (_, shape) in gathered.shards.boxes:
                if rank == self._exchange.rank:
                    shard = gathered.local()
                    if not self.leader:
                        operations.append(self._exchange.send(shard.to(device), position))
                elif self.leader:
                    dtype = gathered.cast or gathered.item.tensor.dtype
                    shard = torch.empty(shape, dtype=dtype, device=device)
                    operations.append(self._exchange.receive(shard, rank, position))
                else:
                    continue
                if self.leader:
                    shards.setdefault(position, []).append(shard)
        return self._exchange.start(operations), shards, operations

    def _arrived(self, position: int, shards: list[torch.Tensor]) -> Sequence[Part]:
        gathered = self._gathered.get(position)
        if gathered is not None and gathered.shards.boxes is None:
            tensor: Any = gathered.item.tensor.detach()
            shards = [tensor.full_tensor().contiguous()]
        if not self.leader:
            return ()
        if gathered is None:
            return self._entries[position].parts
        # Without shards the tensor has no elements.
        return gathered.parts(shards) if shards else ()

    def share(self, failure: str | None) -> str | None:
        """See `Source`."""
        return failure if self._exchange is None else self._exchange.share(failure)


def _cast_early(dtype: torch.dtype, entry: Entry) -> torch.dtype | None:
    """The wire's dtype where it is smaller and the cast is all that is done to the values: then it
    makes no difference to them when they are cast."""
    memory = dtype_name(dtype)
    smaller = DTYPE_SIZES[entry.dtype] < DTYPE_SIZES[memory]
    if smaller and memory in CASTABLE and all(part.scale == 1.0 for part in entry.parts):
        found = getattr(torch, entry.dtype)
        assert isinstance(found, torch.dtype)
        return found
    return None
