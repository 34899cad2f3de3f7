"""Comparing what receivers hold with what was sent: digests of regions, and change statistics.

A receiver names the regions of the named tensors that it holds, with their dtype and scale there;
the sender computes the digests that these must have from its own tensors, by the same copy engine.
So slices of a tensor-parallel rank and scaled LoRA matrices are compared bit by bit too.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterable, Sequence

import torch

from packedcomm.copying import Part
from packedcomm.errors import IntegrityError, ProtocolError, listed
from packedcomm.manifest import Manifest, dtype_name
from packedcomm.results import ChangeStatistics
from packedcomm.session.messages import Region
from packedcomm.targets.staged import StagedPart

__all__ = [
    "ChangeCount",
    "change_statistics",
    "compare",
    "packed_digests",
    "regions_of",
    "whole_regions",
]

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
