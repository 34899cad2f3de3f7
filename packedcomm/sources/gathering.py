"""Sources whose tensors may be sharded over processes: gathered to the leader, piece by piece."""

from __future__ import annotations

import abc
import contextlib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from packedcomm.copying import CASTABLE, Part
from packedcomm.errors import LayoutError, PackedCommError, SessionStateError
from packedcomm.manifest import DTYPE_SIZES, dtype_name
from packedcomm.sources.base import Snapshot
from packedcomm.sources.entries import (
    Attributes,
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
from packedcomm.sources.placements import is_replicated, shard_boxes
from packedcomm.sources.rounds import Gathered, Rounds, Shards
from packedcomm.sources.structure import AddressRecord

__all__ = ["GatheringSource"]

# Payload of one round of transfers. Two rounds are in memory at once: one arrives while the tensors
# of the other are taken. A larger tensor is a round of its own.
_ROUND_BYTES = 64 << 20


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
        self._gathered: dict[int, Gathered] = {}

    @abc.abstractmethod
    def _read(self) -> tuple[list[NamedTensor], Attributes]:
        """Read the trainer's tensors anew, and what else belongs into the manifest's attributes."""

    @abc.abstractmethod
    def _structure_holds(self) -> bool:
        """Whether `_read` would give the same objects again; no Python per tensor."""

    def set_timeout(self, timeout_s: float, others_s: float | None) -> None:
        """See `BoundedSource`."""
        if self._exchange is not None:
            self._exchange.set_timeout(timeout_s, others_s)

    def snapshot(self) -> Snapshot:
        """See `Source`. A collective over the source's processes, if there are several.

        Raises:
            ManifestError: also where processes have different tensors, shards or transforms; then
                on all of them.
            RemoteError: a process failed with an error of another class than packedcomm's, on all
                of them.
        """
        failure = None
        if self._exchange is not None:
            self._exchange.begin("snapshot")
        try:
            self._refresh()
        except Exception as error:
            if self._exchange is None:
                raise
            failure = error
        if self._exchange is not None:
            try:
                self._exchange.agree(failure, self._digest)
            except Exception:
                self._addresses = None
                self._exchange.forget_timeout()
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
            position: Gathered(
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

    def _shards_of(self, item: NamedTensor) -> Shards:
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
            return Shards(None, whole)
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
            return Shards((), whole)
        splits = [not placement.is_replicate() for placement in tensor.placements]
        needed = tuple(
            (members[at], box)
            for at, box in boxes.items()
            if 0 not in box[1]
            and all(s or a == b for s, a, b in zip(splits, at, leader, strict=True))
        )
        if not needed:
            return Shards((), whole)
        stand_ins = [torch.empty(b[1], dtype=tensor.dtype, device="meta") for _, b in needed]
        return Shards(needed, tuple(stand_ins))

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """See `Source`. Closing the iterator early takes the rest, so that no rank waits forever.

        A process that has failed sends zeros in the place of its shards. It fails on its own only
        where torch.distributed does, or where there is no memory for what must arrive.

        Raises:
            SessionStateError: the snapshot isn't this source's latest.
        """
        latest = self._snapshot
        stale = snapshot is not latest
        if stale and (latest is None or latest.parts is not None):
            raise _stale()
        assert latest is not None
        if latest.parts is not None:
            yield from latest.parts
            return
        assert self._exchange is not None
        self._exchange.begin("gather")
        rounds = Rounds(self._exchange, self._entries, self._gathered, _ROUND_BYTES)
        if stale:
            rounds.failure = _stale()
        arriving = rounds.run()
        try:
            for arrived in arriving:
                arrived.reverse()
                while arrived:
                    with self._exchange.in_other_hands():
                        yield arrived.pop()
        except GeneratorExit:
            # The taker has ended by itself; the others learn what failed.
            with contextlib.suppress(PackedCommError):
                self._exchange.begin("gather")
                for _ in arriving:
                    pass
                self._exchange.agree(rounds.failure)
            raise
        self._exchange.agree(rounds.failure)

    def share(self, outcome: str | None) -> str | None:
        """See `Source`."""
        if self._exchange is None:
            return outcome
        self._exchange.begin("share")
        return self._exchange.share(outcome)


def _stale() -> SessionStateError:
    return SessionStateError("gather: expected the source's latest snapshot")


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
