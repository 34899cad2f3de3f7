"""Rounds of transfers that bring the shards of tensors to a source's leader, whatever fails."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from packedcomm.copying import Part
from packedcomm.errors import LayoutError
from packedcomm.sources.bounded_group import Transfers
from packedcomm.sources.entries import Entry, NamedTensor, local_of
from packedcomm.sources.exchange import Exchange
from packedcomm.sources.placements import ShardBox

__all__ = ["Gathered", "Rounds", "Shards"]


@dataclass(frozen=True, slots=True)
class Shards:
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
class Gathered:
    """A sharded tensor that is sent."""

    item: NamedTensor
    entry: Entry
    shards: Shards
    cast: torch.dtype | None
    """What the shards are cast to before they travel."""

    @property
    def dtype(self) -> torch.dtype:
        """The shards' dtype on their way."""
        return self.item.tensor.dtype if self.cast is None else self.cast

    @property
    def nbytes(self) -> int:
        """Of all shards on their way."""
        return self.item.tensor.numel() * self.dtype.itemsize

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


@dataclass(slots=True)
class _Round:
    """A round on its way."""

    works: Transfers
    shards: dict[int, list[torch.Tensor]]
    """On the leader the shards by position."""

    operations: list[Any]
    """What must stay in memory until the works are done."""


class Rounds:
    """All transfers of one gather.

    What fails on this process alone, such as memory for a cast, is kept in `failure`; the process
    goes on with zeros for its shards, since the others wait for it. The failure of a transfer
    itself is raised: `DeadlineExceeded` or `PeerLost`, if another process is late or lost.

    Args:
        exchange: the source's processes.
        entries: everything that is sent, in order.
        gathered: by position in `entries`, the tensors that are sharded.
        round_bytes: payload of one round. Two rounds are in memory at once: one arrives while the
            tensors of the other are taken. A larger tensor is a round of its own.
    """

    def __init__(
        self,
        exchange: Exchange,
        entries: Sequence[Entry],
        gathered: Mapping[int, Gathered],
        round_bytes: int,
    ) -> None:
        self.failure: Exception | None = None
        """The first thing that failed on this process."""
        self._exchange = exchange
        self._entries = entries
        self._gathered = gathered
        self._round_bytes = round_bytes

    def run(self) -> Iterator[list[Sequence[Part]]]:
        """The parts of a few tensors at a time, while the next few are on their way; once this
        process has failed the rest is transferred within one step."""
        devices = {g.item.tensor.device for g in self._gathered.values()}
        for device in sorted(devices, key=str):
            self._exchange.prepare(self._exchange.carrier(device))
        rounds = self._division()
        coming = self._start(rounds[0]) if rounds else None
        before = Transfers()
        for number, positions in enumerate(rounds):
            assert coming is not None
            current = coming
            coming = self._start(rounds[number + 1]) if number + 1 < len(rounds) else None
            # The host is never far ahead of what arrives on a GPU, and finds out what doesn't; the
            # GPU has work for two rounds meanwhile.
            self._exchange.settle(before)
            before = self._exchange.wait(current.works)
            # Until here, so that what is on its way stays in memory.
            current.operations.clear()
            arrived = [self._arrived(at, current.shards.pop(at, [])) for at in positions]
            if self.failure is None:
                yield arrived

    def _division(self) -> list[range]:
        bounds = [0]
        nbytes = 0
        for position in range(len(self._entries)):
            if position in self._gathered:
                nbytes += self._gathered[position].nbytes
            if nbytes >= self._round_bytes or position == len(self._entries) - 1:
                bounds.append(position + 1)
                nbytes = 0
        return [range(a, b) for a, b in itertools.pairwise(bounds)]

    def _start(self, positions: range) -> _Round:
        started = _Round(Transfers(), {}, [])
        for position in positions:
            gathered = self._gathered.get(position)
            if gathered is None or not gathered.shards.boxes:
                continue
            for rank, (_, shape) in gathered.shards.boxes:
                if rank == self._exchange.rank:
                    self._offer(started, position, gathered, shape)
                elif self._exchange.leader:
                    self._await(started, position, gathered, shape, rank)
        started.works = self._exchange.start(started.operations)
        return started

    def _offer(
        self, started: _Round, position: int, gathered: Gathered, shape: tuple[int, ...]
    ) -> None:
        """This process's shard, kept on the leader and sent elsewhere."""
        device = self._exchange.carrier(gathered.item.tensor.device)
        shard: torch.Tensor | None = None
        try:
            if self.failure is None:
                shard = gathered.local()
                if tuple(shard.shape) != shape:
                    raise LayoutError(
                        f"tensor {gathered.item.name!r}: its shard of shape {shape} has become one "
                        f"of {tuple(shard.shape)} since the snapshot"
                    )
                if not self._exchange.leader:
                    shard = shard.to(device)
        except Exception as error:  # noqa: BLE001
            self._note(error)
            shard = None
        if self._exchange.leader:
            started.shards.setdefault(position, []).extend(() if shard is None else (shard,))
            return
        if shard is None:
            shard = _stand_in(gathered, shape, device)
        started.operations.append(self._exchange.send(shard, position))

    def _await(
        self,
        started: _Round,
        position: int,
        gathered: Gathered,
        shape: tuple[int, ...],
        rank: int,
    ) -> None:
        """Memory for another process's shard."""
        device = self._exchange.carrier(gathered.item.tensor.device)
        try:
            shard = torch.empty(shape, dtype=gathered.dtype, device=device)
        except Exception as error:  # noqa: BLE001
            self._note(error)
            # Nobody takes this process's parts any more, so what it has of them can go first.
            started.shards.clear()
            shard = torch.empty(shape, dtype=gathered.dtype, device=device)
        started.operations.append(self._exchange.receive(shard, rank, position))
        started.shards.setdefault(position, []).append(shard)

    def _arrived(self, position: int, shards: list[torch.Tensor]) -> Sequence[Part]:
        gathered = self._gathered.get(position)
        try:
            if gathered is not None and gathered.shards.boxes is None:
                shards = [self._exchange.whole(gathered.item.tensor.detach())]
            if not self._exchange.leader or self.failure is not None:
                return ()
            if gathered is None:
                return self._entries[position].parts
            # Where the group can't carry the tensor's device its shards come on another one.
            device = local_of(gathered.item.tensor).device
            shards = [shard.to(device) for shard in shards]
            # Without shards the tensor has no elements.
            return gathered.parts(shards) if shards else ()
        except Exception as error:
            if self._exchange.ended:
                raise
            self._note(error)
            return ()

    def _note(self, error: Exception) -> None:
        if self.failure is None:
            self.failure = error


def _stand_in(gathered: Gathered, shape: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """What is sent in the place of a shard: zeros, or without memory for them whatever bytes the
    shard's own memory has."""
    try:
        return torch.zeros(shape, dtype=gathered.dtype, device=device)
    except Exception:
        local = local_of(gathered.item.tensor)
        count = math.prod(shape) * gathered.dtype.itemsize
        storage = local.untyped_storage()
        if local.device != device or storage.nbytes() < count:
            raise
        memory = torch.empty(0, dtype=torch.uint8, device=device).set_(storage)
        return memory[:count]
