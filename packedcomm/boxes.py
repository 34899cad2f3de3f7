"""Regions of tensors: boxes, and the shards by which ranks divide a tensor among them."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from packedcomm.errors import LayoutError

__all__ = ["Box", "Placement", "Replicate", "Shard", "box_of", "checked_indices"]


def checked_indices(values: Iterable[int], what: str, least: int = 0) -> tuple[int, ...]:
    """A tuple of integers of at least a least one.

    Raises:
        LayoutError: one isn't; the message says of what.
    """
    checked = tuple(values)
    for value in checked:
        if type(value) is not int or value < least:
            raise LayoutError(f"{what} {checked}: {value!r} is not an integer >= {least}")
    return checked


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangular region of a tensor: the index of its first element, and its shape.

    Raises:
        LayoutError: the lengths differ, or an entry isn't an integer >= 0.
    """

    offset: tuple[int, ...]
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "offset", checked_indices(self.offset, "box offset"))
        object.__setattr__(self, "shape", checked_indices(self.shape, "box shape"))
        if len(self.offset) != len(self.shape):
            raise LayoutError(
                f"box has an offset of {len(self.offset)} and a shape of {len(self.shape)} "
                f"dimensions: {self.offset} and {self.shape}"
            )

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Box:
        """All of a tensor of this shape."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def stop(self) -> tuple[int, ...]:
        """The index after the last one, on each dimension."""
        return tuple(o + s for o, s in zip(self.offset, self.shape, strict=True))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    def contains(self, other: Box) -> bool:
        """Whether the other box lies in this one. An empty box needs its offset and stop inside."""
        self._same_dimensions(other)
        return all(
            o <= p and p + t <= o + s
            for o, s, p, t in zip(self.offset, self.shape, other.offset, other.shape, strict=True)
        )

    def intersect(self, other: Box) -> Box | None:
        """The region that both have; None if there is none.

        Raises:
            LayoutError: the boxes have different numbers of dimensions.
        """
        self._same_dimensions(other)
        offset = tuple(map(max, self.offset, other.offset))
        stop = tuple(map(min, self.stop, other.stop))
        shape = tuple(b - a for a, b in zip(offset, stop, strict=True))
        return None if any(s <= 0 for s in shape) else Box(offset, shape)

    def _same_dimensions(self, other: Box) -> None:
        if len(self.shape) != len(other.shape):
            raise LayoutError(f"boxes {self} and {other} have different numbers of dimensions")

    def __str__(self) -> str:
        ranges = (f"{o}:{o + s}" for o, s in zip(self.offset, self.shape, strict=True))
        return f"[{', '.join(ranges)}]"


@dataclass(frozen=True, slots=True)
class Replicate:
    """The rank holds everything."""

    def box(self, shape: Sequence[int]) -> Box:
        """All of a tensor of this shape."""
        return Box.whole(shape)


@dataclass(frozen=True, slots=True)
class Shard:
    """The rank holds one of `count` consecutive ranges of dimension `dim`.

    Args:
        dim: dimension, counted from 0.
        index: which of the ranges.
        count: number of ranges.
        sizes: their lengths; None for those of `torch.chunk` and DTensor, `ceil(n / count)` each,
            the last ones shorter or empty.

    Raises:
        LayoutError: a number is out of range, or there aren't `count` sizes.
    """

    dim: int
    index: int
    count: int
    sizes: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checked_indices((self.dim, self.index), "shard (dim, index)")
        checked_indices((self.count,), "shard count", 1)
        if self.index >= self.count:
            raise LayoutError(f"shard index {self.index} is not below count {self.count}")
        if self.sizes is not None:
            object.__setattr__(self, "sizes", checked_indices(self.sizes, "shard sizes"))
            if len(self.sizes) != self.count:
                raise LayoutError(f"{len(self.sizes)} shard sizes for {self.count} shards")

    def box(self, shape: Sequence[int]) -> Box:
        """The rank's region of a tensor of this shape.

        Raises:
            LayoutError: the tensor has no such dimension, or the sizes don't add up to it.
        """
        if self.dim >= len(shape):
            raise LayoutError(f"shard of dimension {self.dim}: shape {tuple(shape)} has none")
        length = shape[self.dim]
        if self.sizes is None:
            step = -(-length // self.count)
            start = min(length, self.index * step)
            size = min(step, length - start)
        else:
            if sum(self.sizes) != length:
                raise LayoutError(
                    f"shard sizes {self.sizes} add up to {sum(self.sizes)}, "
                    f"dimension {self.dim} of shape {tuple(shape)} is {length}"
                )
            start, size = sum(self.sizes[: self.index]), self.sizes[self.index]
        offset, extent = [0] * len(shape), list(shape)
        offset[self.dim], extent[self.dim] = start, size
        return Box(tuple(offset), tuple(extent))


Placement: TypeAlias = Shard | Replicate


def box_of(shape: Sequence[int], placements: Iterable[Placement]) -> Box:
    """The region that a rank holds after several placements, each applied to what the one before
    left.

    For FSDP within tensor parallelism give the tensor-parallel shard first: its slice is what FSDP
    then divides.

    Raises:
        LayoutError: as `Shard.box`.
    """
    box = Box.whole(shape)
    for placement in placements:
        inner = placement.box(box.shape)
        offset = tuple(a + b for a, b in zip(box.offset, inner.offset, strict=True))
        box = Box(offset, inner.shape)
    return box
