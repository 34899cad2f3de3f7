"""Comparing what receivers hold with what was sent: digests of regions, and change statistics.

A receiver names the regions of the named tensors that it holds, with their dtype and scale there;
the sender computes the digests that these must have from its own tensors, by the same copy engine.
So slices of a tensor-parallel rank and scaled LoRA matrices are compared bit by bit too.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial

import torch

from packedcomm.copying import BufferPlan, CopyPlan, Part
from packedcomm.digests import DigestPlan
from packedcomm.errors import IntegrityError, ProtocolError, listed
from packedcomm.manifest import Manifest, dtype_name
from packedcomm.results import ChangeStatistics
from packedcomm.session.messages import Region
from packedcomm.targets.staged import StagedPart
from packedcomm.transports.chunk_plans import Composed, Entry

__all__ = [
    "ChangeCount",
    "RegionDigests",
    "change_statistics",
    "compare",
    "packed_digests",
    "regions_of",
    "whole_regions",
]

# Converted values that a digest needs are kept from one sync to the next up to this size.
_KEPT_BYTES = 64 << 20

# Digests of tensors that only earlier syncs had.
_REMEMBERED = 100_000

# Elements that change statistics look at in one go.
_SLICE = 4 << 20


def regions_of(parts: Sequence[Sequence[Part]]) -> tuple[Region, ...]:
    """What a target holds of each tensor, in the order of its parts."""
    return tuple(
        Region(
            index,
            part.offset or (0,) * part.tensor.dim(),
            tuple(part.tensor.shape),
            dtype_name(part.tensor.dtype),
            part.scale,
        )
        for index, pieces in enumerate(parts)
        for part in pieces
    )


def whole_regions(manifest: Manifest) -> tuple[Region, ...]:
    """Every tensor as it is on the wire."""
    return tuple(
        Region(index, (0,) * len(spec.shape), spec.shape, spec.dtype, 1.0)
        for index, spec in enumerate(manifest.specs)
    )


def compare(manifest: Manifest, regions: Sequence[Region], sent: bytes, held: bytes) -> None:
    """Raise `IntegrityError`, listing up to ten tensors, unless all digests are equal.

    Args:
        manifest: what was sent.
        regions: whose digests these are.
        sent, held: as `packed_digests` makes them.

    Raises:
        ProtocolError: there are more or fewer digests than regions.
    """
    if len(sent) != len(held):
        raise ProtocolError(f"{len(held) // 8} digests came for {len(regions)} regions")
    if sent == held:
        return
    names = {
        manifest.specs[region.tensor].name: None
        for i, region in enumerate(regions)
        if sent[8 * i : 8 * i + 8] != held[8 * i : 8 * i + 8]
    }
    raise IntegrityError(
        "received values differ from those that were sent: "
        + listed([repr(name) for name in names])
    )


def packed_digests(digests: torch.Tensor) -> bytes:
    """Digests (int64) as bytes, 8 each, little-endian."""
    packed = array("q", digests.tolist())
    if sys.byteorder == "big":
        packed.byteswap()
    return packed.tobytes()


class ChangeCount:
    """Counts how many tensors changed from one sync to the next, by their digests."""

    def __init__(self) -> None:
        self._digest = ""
        self._names: Sequence[str] = ()
        self._last = torch.empty(0, dtype=torch.int64)
        self._owners = torch.empty(0, dtype=torch.int64)
        # Of syncs before the last one with other manifests.
        self._older: dict[str, list[int]] = {}

    def count(
        self, manifest: Manifest, digests: torch.Tensor, regions: Sequence[Region] | None = None
    ) -> int | None:
        """Compare with the last sync, and remember this one.

        Args:
            manifest: what was sent.
            digests: int64, one per region.
            regions: whose digests they are; None for whole tensors in the manifest's order.

        Returns:
            How many tensors differ or are new; None at the first sync.
        """
        if manifest.digest == self._digest and len(digests) == len(self._last):
            changed = len(set(self._owners[digests != self._last].tolist()))
            self._last = digests
            return changed
        first = not self._digest
        for name, found in self._by_name().items():
            # Again at the end: the oldest are forgotten first.
            self._older.pop(name, None)
            self._older[name] = found
        while len(self._older) > max(_REMEMBERED, len(self._names)):
            del self._older[next(iter(self._older))]
        self._digest, self._names, self._last = manifest.digest, list(manifest.by_name), digests
        owners = range(len(digests)) if regions is None else [r.tensor for r in regions]
        self._owners = torch.tensor(owners, dtype=torch.int64)
        changed = sum(self._older.get(n) != found for n, found in self._by_name().items())
        return None if first else changed

    def _by_name(self) -> dict[str, list[int]]:
        found: dict[str, list[int]] = {}
        for owner, digest in zip(self._owners.tolist(), self._last.tolist(), strict=True):
            found.setdefault(self._names[owner], []).append(digest)
        return found


@dataclass(slots=True)
class _Batch:
    """Digests of some regions, in their order."""

    order: torch.Tensor
    """Numbers of the regions."""
    prepare: list[Callable[[], None]]
    """Fill the temporary memory that some of the digests are of."""
    digests: DigestPlan
    temporary_bytes: int

    def run(self) -> torch.Tensor:
        for fill in self.prepare:
            fill()
        return self.digests.run()


class RegionDigests:
    """The digests that regions must have, computed on the sender from what it sends.

    Args:
        manifest: what is sent.
        regions: as a receiver named them.

    Raises:
        ProtocolError: a region isn't inside its tensor.
    """

    def __init__(self, manifest: Manifest, regions: Sequence[Region]) -> None:
        self._regions = regions
        self._by_tensor: dict[int, list[int]] = {}
        for number, region in enumerate(regions):
            _check_region(manifest, region)
            self._by_tensor.setdefault(region.tensor, []).append(number)
        self._found: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._kept: list[_Batch] | None = None

    def inspect(self, indices: Sequence[int], entries: Sequence[Entry]) -> None:
        """Digest the regions of some tensors; on a GPU enqueued on the current stream."""
        for batch in self._batches(indices, entries):
            self._found.append((batch.order, batch.run()))

    def run_kept(self, indices: Sequence[int], entries: Sequence[Entry]) -> None:
        """As `inspect`, for all tensors at once when they are the same at every sync."""
        if self._kept is None:
            kept = self._batches(indices, entries)
            if sum(batch.temporary_bytes for batch in kept) > _KEPT_BYTES:
                self._one_by_one(indices, entries)
                return
            self._kept = kept
        for batch in self._kept:
            self._found.append((batch.order, batch.run()))

    def _one_by_one(self, indices: Sequence[int], entries: Sequence[Entry]) -> None:
        for index, entry in zip(indices, entries, strict=True):
            self.inspect([index], [entry])

    def take(self) -> torch.Tensor:
        """All digests as int64 on the CPU, in the order of the regions; waits for a GPU."""
        digests = torch.zeros(len(self._regions), dtype=torch.int64)
        for order, values in self._found:
            digests[order] = values.cpu()
        self._found.clear()
        return digests

    def _batches(self, indices: Sequence[int], entries: Sequence[Entry]) -> list[_Batch]:
        by_device: dict[torch.device, list[tuple[int, Entry]]] = {}
        for index, entry in zip(indices, entries, strict=True):
            if index in self._by_tensor:
                by_device.setdefault(_device_of(entry), []).append((index, entry))
        return [self._batch(items) for items in by_device.values()]

    def _batch(self, items: Sequence[tuple[int, Entry]]) -> _Batch:
        order: list[int] = []
        views: list[torch.Tensor] = []
        prepare: list[Callable[[], None]] = []
        pairs: list[tuple[torch.Tensor, torch.Tensor, float]] = []
        temporary = 0
        for index, entry in items:
            if isinstance(entry, Composed):
                tensor, fill = _compose(entry)
                prepare.append(fill)
                temporary += tensor.nbytes
            else:
                tensor = entry
            for number in self._by_tensor[index]:
                region = self._regions[number]
                view = tensor[tuple(map(slice, region.offset, _stop(region)))]
                dtype: torch.dtype = getattr(torch, region.dtype)
                if dtype != view.dtype or region.scale != 1.0:
                    converted = torch.empty(region.shape, dtype=dtype, device=view.device)
                    pairs.append((view, converted, region.scale))
                    temporary += converted.nbytes
                    view = converted
                order.append(number)
                views.append(view)
        if pairs:
            prepare.append(CopyPlan(pairs, cast=True).run)
        numbers = torch.tensor(order, dtype=torch.int64)
        return _Batch(numbers, prepare, DigestPlan(views), temporary)


def _stop(region: Region) -> tuple[int, ...]:
    return tuple(a + n for a, n in zip(region.offset, region.shape, strict=True))


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


def _device_of(entry: Entry) -> torch.device:
    return entry.parts[0].tensor.device if isinstance(entry, Composed) else entry.device


def _compose(entry: Composed) -> tuple[torch.Tensor, Callable[[], None]]:
    """Memory for a named tensor, and what puts it together there."""
    device = _device_of(entry)
    plan = BufferPlan(device, into_buffer=True)
    plan.add_parts(entry.parts, entry.dtype, entry.spec.shape, 0, entry.spec.name)
    buffer = torch.empty(entry.nbytes, dtype=torch.uint8, device=device)
    return buffer.view(entry.dtype).view(entry.spec.shape), partial(plan.run, buffer)


def change_statistics(pairs: Iterable[StagedPart]) -> dict[str, ChangeStatistics]:
    """Mean, standard deviation and maximum of |new - old| by tensor, in float64 sums.

    Tensors of several pieces count as one. Reads the results back, so waits for a GPU.
    """
    names: list[str] = []
    sums: dict[str, torch.Tensor] = {}
    for pair in pairs:
        for new, old in _slices(pair.staged, pair.live):
            difference = (_as_real(new) - _as_real(old)).abs()
            found = torch.stack(
                [
                    difference.sum(dtype=torch.float64),
                    difference.square().sum(dtype=torch.float64),
                    difference.max().double(),
                    torch.full((), difference.numel(), dtype=torch.float64, device=new.device),
                ]
            )
            before = sums.get(pair.name)
            if before is None:
                names.append(pair.name)
                sums[pair.name] = found
            else:
                largest = torch.maximum(before[2], found[2])
                sums[pair.name] = torch.stack(
                    [before[0] + found[0], before[1] + found[1], largest, before[3] + found[3]]
                )
    if not names:
        return {}
    rows = torch.stack([sums[name] for name in names]).tolist()
    statistics = {}
    for name, (total, squares, largest, count) in zip(names, rows, strict=True):
        mean = total / count
        variance = max(squares / count - mean * mean, 0.0)
        statistics[name] = ChangeStatistics(mean, variance**0.5, largest, int(count))
    return statistics


def _slices(new: torch.Tensor, old: torch.Tensor) -> Iterable[tuple[torch.Tensor, torch.Tensor]]:
    """The same rows of both, few enough that float copies of them are small."""
    if not new.numel():
        return
    if new.dim() == 0 or new.numel() <= _SLICE:
        yield new, old
        return
    rows = max(1, _SLICE // (new.numel() // new.shape[0]))
    for first in range(0, new.shape[0], rows):
        yield new[first : first + rows], old[first : first + rows]


def _as_real(tensor: torch.Tensor) -> torch.Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    return tensor.to(torch.float64)
