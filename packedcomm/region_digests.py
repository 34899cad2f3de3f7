"""The digests that receivers' regions must have, made on the sender while it sends."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch

from packedcomm.copying import BufferPlan, Part
from packedcomm.digests import DigestPlan
from packedcomm.errors import ProtocolError
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import aligned
from packedcomm.session.messages import Region
from packedcomm.transports.chunk_plans import ChunkPlan, Composed, Entry
from packedcomm.transports.digest_sums import DigestSums, digest_blocks
from packedcomm.transports.lanes import Work
from packedcomm.transports.slots import Pipeline, bytes_on

__all__ = ["RegionDigests"]

# Converted values that digests need are kept from one sync to the next up to this size, and
# made anew in turns of this size above it.
_KEPT_BYTES = 64 << 20

SumsOf = Callable[[torch.device], torch.Tensor]


@dataclass(frozen=True, slots=True)
class Wanted:
    """A tensor of a chunk, and the regions of it that its packing doesn't digest."""

    entry: Entry
    regions: list[tuple[int, Region]]
    """Each with the number of its digest."""

    @property
    def device(self) -> torch.device:
        """Where it is read."""
        entry = self.entry
        return entry.parts[0].tensor.device if isinstance(entry, Composed) else entry.device

    @property
    def temporary_bytes(self) -> int:
        """Memory that must be filled to digest it."""
        composed = self.entry.nbytes if isinstance(self.entry, Composed) else 0
        return composed + sum(
            torch.Size(region.shape).numel() * _dtype(region).itemsize
            for _, region in self.regions
            if self.converts(region)
        )

    def converts(self, region: Region) -> bool:
        """Whether the receiver holds other values than are sent."""
        return _dtype(region) != self.entry.dtype or region.scale != 1.0


class Filling:
    """Temporary memory that one plan fills with tensors side by side; on a GPU it belongs to the
    stream that is current when it is made."""

    def __init__(self, device: torch.device) -> None:
        self.plan = BufferPlan(device, into_buffer=True, blocks=digest_blocks(device))
        self._places: list[tuple[int, int, torch.dtype, tuple[int, ...]]] = []
        self._end = 0
        self._device = device
        self._buffer: torch.Tensor | None = None

    def add(
        self,
        parts: Sequence[Part],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        name: str,
        number: int = -1,
    ) -> None:
        """Another tensor, made up of parts; its digest has a number, if the plan is to make it."""
        self.plan.add_parts(parts, dtype, shape, self._end, name, number)
        nbytes = torch.Size(shape).numel() * dtype.itemsize
        self._places.append((self._end, nbytes, dtype, shape))
        self._end = aligned(self._end + nbytes)

    def tensors(self) -> list[torch.Tensor]:
        """What was added, in order, in memory that is allocated now."""
        buffer = self._buffer = bytes_on(self._device, self._end)
        return [
            buffer[begin : begin + nbytes].view(dtype).view(shape)
            for begin, nbytes, dtype, shape in self._places
        ]

    def run(self, sums: torch.Tensor) -> None:
        """Fill the memory."""
        if self._buffer is not None and self._places:
            self.plan.run(self._buffer, sums)


class RegionPass:
    """Digests of some regions of one device, by a few launches however many they are. On a GPU to
    be made and run in the digest lane, whose stream the temporary memory belongs to."""

    def __init__(self, items: Sequence[Wanted]) -> None:
        self._device = items[0].device
        self._composed = Filling(self._device)
        self._converted = Filling(self._device)
        # What is digested where it is, or where it was filled in.
        views: list[torch.Tensor] = []
        numbers: list[int] = []
        converted: list[int] = []
        for item, tensor in zip(items, self._whole(items), strict=True):
            for number, region in item.regions:
                view = tensor[tuple(map(slice, region.offset, _stop(region)))]
                if item.converts(region):
                    part = Part(view, None, region.scale)
                    shape = tuple(region.shape)
                    self._converted.add([part], _dtype(region), shape, "of a digest", number)
                    converted.append(number)
                else:
                    views.append(view)
                    numbers.append(number)
        digested = set(self._converted.plan.digested)
        for number, view in zip(converted, self._converted.tensors(), strict=True):
            if number not in digested:
                views.append(view)
                numbers.append(number)
        blocks = digest_blocks(self._device)
        self._digests = DigestPlan(views, numbers=numbers, blocks=blocks) if views else None

    def run(self, sums_of: SumsOf) -> None:
        """Add the digests."""
        sums = sums_of(self._device)
        self._composed.run(sums)
        self._converted.run(sums)
        if self._digests is not None:
            self._digests.run(sums)

    def _whole(self, items: Sequence[Wanted]) -> list[torch.Tensor]:
        """The named tensors; those of several parts are put together."""
        several = [item.entry for item in items if isinstance(item.entry, Composed)]
        for entry in several:
            name = entry.spec.name
            self._composed.add(entry.parts, entry.dtype, entry.spec.shape, name)
        made = iter(self._composed.tensors())
        return [next(made) if isinstance(i.entry, Composed) else i.entry for i in items]


@dataclass(slots=True)
class ChunkDigests:
    """What is left to digest of a chunk that comes again."""

    kept: list[RegionPass] = field(default_factory=list)
    remade: list[list[Wanted]] = field(default_factory=list)
    """Whose temporary memory is too large to keep, in turns."""
    kept_bytes: int = 0
    """Temporary memory that is kept."""

    def run(self, sums_of: SumsOf) -> None:
        """Add all digests."""
        for each in self.kept:
            each.run(sums_of)
        for items in self.remade:
            # One after the other: temporary memory is the next turn's, in stream order.
            RegionPass(items).run(sums_of)


class RegionDigests:
    """The digests that regions must have, made by a `Sending` from what it sends; see `Digests` in
    `transports`. Serves one transfer at a time, and again for the same manifest.

    Whole tensors as they are on the wire come from packing where they are packed; everything else
    from passes over the sender's tensors.

    Args:
        manifest: what is sent.
        regions: as receivers named them.

    Raises:
        ProtocolError: a region isn't inside its tensor.
    """

    def __init__(self, manifest: Manifest, regions: Sequence[Region]) -> None:
        # Packing numbers digests by tensor; regions come behind these.
        self._first = len(manifest)
        self._count = len(regions)
        self._of_tensor: dict[int, list[tuple[int, Region]]] = {}
        whole: list[int] = []
        for number, region in enumerate(regions):
            _check_region(manifest, region)
            self._of_tensor.setdefault(region.tensor, []).append((self._first + number, region))
            if _is_whole(manifest, region):
                whole.append(number)
        self._whole = torch.tensor(whole, dtype=torch.int64)
        self._whole_tensors = torch.tensor(
            [regions[number].tensor for number in whole], dtype=torch.int64
        )
        self._whole_numbers = {self._first + number for number in whole}
        self._chunks: weakref.WeakKeyDictionary[ChunkPlan, ChunkDigests] = (
            weakref.WeakKeyDictionary()
        )
        self._sums: DigestSums | None = None

    def begin(self, pipeline: Pipeline) -> None:
        """As `Digests.begin`."""
        self._sums = DigestSums(pipeline, self._first + self._count)

    def sums(self, device: torch.device) -> torch.Tensor:
        """As `Digests.sums`."""
        assert self._sums is not None
        return self._sums.on(device)

    def finish(self) -> None:
        """As `Digests.finish`."""
        assert self._sums is not None
        self._sums.finish()

    def rest(
        self,
        plan: ChunkPlan,
        *,
        keep: bool,
        wide: bool = False,  # noqa: ARG002  (here the broadcast runs beside it)
    ) -> Work | None:
        """As `Digests.rest`."""
        found = self._chunks.get(plan)
        if found is None:
            wanted = self._wanted(plan)
            if wanted:
                return partial(self._digest_new, plan, wanted, keep)
            if keep:
                self._chunks[plan] = ChunkDigests()
            return None
        if not found.kept and not found.remade:
            return None
        return partial(found.run, self.sums)

    def take(self) -> torch.Tensor:
        """The digests of the last transfer, int64 on the CPU, in the order of the regions; waits
        for a GPU."""
        assert self._sums is not None
        sums, self._sums = self._sums, None
        total = sums.total()
        digests = total[self._first :]
        # Whole tensors were digested either by packing or by a pass; the other one is 0.
        digests[self._whole] += total[self._whole_tensors]
        return digests

    def _wanted(self, plan: ChunkPlan) -> list[Wanted]:
        wanted = []
        for entry, tensor in zip(plan.entries, plan.numbers, strict=True):
            regions = self._of_tensor.get(tensor, [])
            if tensor in plan.digested:
                regions = [each for each in regions if each[0] not in self._whole_numbers]
            if regions:
                wanted.append(Wanted(entry, regions))
        return wanted

    def _digest_new(self, plan: ChunkPlan, wanted: Sequence[Wanted], keep: bool) -> None:
        """In the digest lane."""
        sizes = [(item, item.temporary_bytes) for item in wanted]
        as_they_are = [item for item, nbytes in sizes if not nbytes]
        filled = [item for item, nbytes in sizes if nbytes]
        temporary = sum(nbytes for _, nbytes in sizes)
        new = ChunkDigests([RegionPass(items) for items in _by_device(as_they_are)])
        held = sum(chunk.kept_bytes for chunk in self._chunks.values())
        if keep and held + temporary <= _KEPT_BYTES:
            new.kept_bytes = temporary
            new.kept += [RegionPass(items) for items in _by_device(filled)]
        else:
            new.remade = [turn for each in _by_device(filled) for turn in _turns(each)]
        if keep:
            self._chunks[plan] = new
        new.run(self.sums)


def _by_device(items: Iterable[Wanted]) -> Iterable[list[Wanted]]:
    by_device: dict[torch.device, list[Wanted]] = {}
    for item in items:
        by_device.setdefault(item.device, []).append(item)
    return by_device.values()


def _turns(items: Iterable[Wanted]) -> Iterator[list[Wanted]]:
    """What is filled together, in so much memory or for one tensor."""
    turn: list[Wanted] = []
    room = _KEPT_BYTES
    for item in items:
        nbytes = item.temporary_bytes
        if turn and nbytes > room:
            yield turn
            turn, room = [], _KEPT_BYTES
        turn.append(item)
        room -= nbytes
    if turn:
        yield turn


def _dtype(region: Region) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, region.dtype)
    return dtype


def _stop(region: Region) -> tuple[int, ...]:
    return tuple(a + n for a, n in zip(region.offset, region.shape, strict=True))


def _is_whole(manifest: Manifest, region: Region) -> bool:
    """Whether its bytes are those of its tensor on the wire."""
    spec = manifest.specs[region.tensor]
    same = (tuple(region.shape), region.dtype, region.scale) == (spec.shape, spec.dtype, 1.0)
    return same and not any(region.offset)


def _check_region(manifest: Manifest, region: Region) -> None:
    if not 0 <= region.tensor < len(manifest.specs):
        raise ProtocolError(f"a region names tensor {region.tensor} of {len(manifest.specs)}")
    spec = manifest.specs[region.tensor]
    inside = len(region.offset) == len(region.shape) == len(spec.shape) and all(
        min(a, n) >= 0 and a + n <= extent
        for a, n, extent in zip(region.offset, region.shape, spec.shape, strict=True)
    )
    if not inside:
        raise ProtocolError(
            f"a region at {region.offset} of shape {region.shape} leaves tensor {spec.name!r} of "
            f"shape {spec.shape}"
        )
