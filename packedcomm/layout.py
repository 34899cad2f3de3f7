"""Where a rank holds which part of which tensor: pieces and whole layouts.

Pure arithmetic on indices, so that what goes where can be planned, printed and checked without any
tensor. Strides and bytes come in later (`packedcomm.pieces`).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from packedcomm.boxes import Box, Placement, Replicate, Shard, box_of, checked_indices
from packedcomm.errors import LayoutError, listed
from packedcomm.footprints import Footprint, first_overlap

__all__ = ["Box", "Layout", "Piece", "Placement", "Replicate", "Shard", "box_of"]


@dataclass(frozen=True, slots=True)
class Piece:
    """A box of a logical tensor, and where it lies in a parameter of the rank.

    Logical tensors have the names and whole shapes that are agreed on between ranks (mostly Hugging
    Face's); a parameter is what this rank holds. Index `i` within the box is the parameter's index
    `at + sum_k i[k] * steps[k] * e[axes[k]]`, with `e` the unit vectors. These are indices, not
    bytes, so the parameter may have any strides.

    Args:
        tensor: name of the logical tensor.
        box: region of it.
        parameter: name of the parameter.
        at: the parameter's index of the box's first element.
        axes: the parameter's dimension for each of the tensor's; no dimension twice.
        steps: distance of neighbours there, >= 1.
        scale: factor for values on their way between parameter and tensor.

    Raises:
        LayoutError: lengths don't fit, a dimension is named twice or isn't there.
    """

    tensor: str
    box: Box
    parameter: str
    at: tuple[int, ...]
    axes: tuple[int, ...]
    steps: tuple[int, ...]
    scale: float = 1.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "at", checked_indices(self.at, "piece at"))
        object.__setattr__(self, "axes", checked_indices(self.axes, "piece axes"))
        object.__setattr__(self, "steps", checked_indices(self.steps, "piece steps", 1))
        dimensions = len(self.box.shape)
        if len(self.axes) != dimensions or len(self.steps) != dimensions:
            raise LayoutError(
                f"{self}: {dimensions} dimensions, {len(self.axes)} axes, {len(self.steps)} steps"
            )
        if len(set(self.axes)) != dimensions or any(axis >= len(self.at) for axis in self.axes):
            raise LayoutError(
                f"{self}: axes {self.axes} are not distinct dimensions of a parameter of "
                f"{len(self.at)}"
            )

    @classmethod
    def aligned(
        cls,
        tensor: str,
        box: Box,
        parameter: str,
        at: Sequence[int] | None = None,
        scale: float = 1.0,
    ) -> Piece:
        """The usual case: a box of the same shape in a parameter with as many dimensions, there at
        index `at` (default: the parameter's first element)."""
        dimensions = len(box.shape)
        place = (0,) * dimensions if at is None else tuple(at)
        return cls(
            tensor, box, parameter, place, tuple(range(dimensions)), (1,) * dimensions, scale
        )

    def part(self, box: Box) -> Piece | None:
        """What of this piece lies in a box of the logical tensor; None if nothing does."""
        shared = self.box.intersect(box)
        if shared is None:
            return None
        at = list(self.at)
        for axis, step, new, old in zip(
            self.axes, self.steps, shared.offset, self.box.offset, strict=True
        ):
            at[axis] += (new - old) * step
        return Piece(
            self.tensor, shared, self.parameter, tuple(at), self.axes, self.steps, self.scale
        )

    @property
    def footprint(self) -> Footprint:
        """The parameter's indices: on each dimension a first one, a step and how many."""
        progressions = [(start, 1, 1) for start in self.at]
        for axis, step, size in zip(self.axes, self.steps, self.box.shape, strict=True):
            progressions[axis] = (self.at[axis], step, size)
        return tuple(progressions)

    def __str__(self) -> str:
        return f"{self.tensor}{self.box} in {self.parameter} at {self.at}"


class Layout:
    """Everything that one rank holds: which parameter elements are which tensor elements.

    Immutable. No element of a parameter is held twice; an element of a tensor may be (tied
    weights), or not at all (other ranks' shards).

    Args:
        tensors: whole shapes of the logical tensors by name.
        parameters: the rank's own shapes by name.
        pieces: what lies where.
        padding: `(parameter, box)` of elements that are no tensor's and hold zeros.

    Raises:
        LayoutError: a piece or a padding leaves its tensor or parameter, names an unknown one, or
            an element is held twice; all of these are listed, up to ten.
    """

    def __init__(
        self,
        tensors: Mapping[str, Sequence[int]],
        parameters: Mapping[str, Sequence[int]],
        pieces: Iterable[Piece],
        padding: Iterable[tuple[str, Box]] = (),
    ) -> None:
        self.tensors = MappingProxyType({name: tuple(s) for name, s in tensors.items()})
        self.parameters = MappingProxyType({name: tuple(s) for name, s in parameters.items()})
        self.pieces = tuple(pieces)
        self.padding = tuple(padding)
        problems: list[str] = []
        held: dict[str, list[tuple[Footprint, str]]] = {}
        for piece in self.pieces:
            problem = self._outside_tensor(piece)
            self._hold(piece.parameter, piece.footprint, str(piece), held, problems, problem)
        for parameter, box in self.padding:
            footprint = tuple((o, 1, s) for o, s in zip(box.offset, box.shape, strict=True))
            self._hold(parameter, footprint, f"padding {box} of {parameter}", held, problems, None)
        for parameter, holders in held.items():
            pair = first_overlap([footprint for footprint, _ in holders])
            if pair is not None:
                first, second = (holders[index][1] for index in pair)
                problems.append(f"parameter {parameter!r} is written twice: {first}; {second}")
        if problems:
            raise LayoutError(listed(problems))
        self._held = {
            parameter: sum(math.prod(size for _, _, size in f) for f, _ in holders)
            for parameter, holders in held.items()
        }

    def holes(self) -> dict[str, int]:
        """Parameters that pieces and padding don't wholly cover, and how many elements are left."""
        left = {
            name: math.prod(shape) - self._held.get(name, 0)
            for name, shape in self.parameters.items()
        }
        return {name: count for name, count in left.items() if count}

    def _outside_tensor(self, piece: Piece) -> str | None:
        shape = self.tensors.get(piece.tensor)
        if shape is None:
            return f"{piece}: no tensor of that name"
        if len(shape) != len(piece.box.shape) or not Box.whole(shape).contains(piece.box):
            return f"{piece}: the tensor's shape is {shape}"
        return None

    def _hold(
        self,
        parameter: str,
        footprint: Footprint,
        text: str,
        held: dict[str, list[tuple[Footprint, str]]],
        problems: list[str],
        problem: str | None,
    ) -> None:
        shape = self.parameters.get(parameter)
        if problem is None and shape is None:
            problem = f"{text}: no parameter of that name"
        elif problem is None and shape is not None and not _inside(footprint, shape):
            problem = f"{text}: the parameter's shape is {shape}"
        if problem is not None:
            problems.append(problem)
        elif all(size for _, _, size in footprint):
            held.setdefault(parameter, []).append((footprint, text))

    def __repr__(self) -> str:
        return (
            f"Layout({len(self.tensors)} tensors, {len(self.parameters)} parameters, "
            f"{len(self.pieces)} pieces, {len(self.padding)} paddings)"
        )


def _inside(footprint: Footprint, shape: Sequence[int]) -> bool:
    """Whether every index of a footprint is one of a tensor of this shape; an empty range may
    start at the end."""
    return len(footprint) == len(shape) and all(
        start + (size - 1) * step < length if size else start <= length
        for (start, step, size), length in zip(footprint, shape, strict=True)
    )
