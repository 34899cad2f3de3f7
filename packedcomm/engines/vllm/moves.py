"""Movements of elements between strided memory, and what two of them one after the other amount to.

Pure arithmetic on addresses in bytes, so that it can be checked without any tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import prod

__all__ = ["Axis", "Move", "box_in", "compose", "dense_steps"]


@dataclass(frozen=True, slots=True)
class Axis:
    """One dimension of a movement."""

    size: int
    """Elements along it, >= 2."""

    src: int
    """Distance of neighbours where they come from, in bytes."""

    dst: int
    """Distance of neighbours where they go to, in bytes."""


@dataclass(frozen=True, slots=True)
class Move:
    """Elements that go from one piece of strided memory to another.

    The element with index `i` comes from `src + sum_k i[k] * axes[k].src` and goes to
    `dst + sum_k i[k] * axes[k].dst`.
    """

    src: int
    """Address of the first element where it comes from."""

    dst: int
    """Address of the first element where it goes to."""

    axes: tuple[Axis, ...]

    src_dtype: str
    """Dtype there, by its name; where it differs from `dst_dtype` values are cast."""

    dst_dtype: str

    @classmethod
    def of(
        cls,
        src: int,
        src_steps: Sequence[int],
        dst: int,
        dst_steps: Sequence[int],
        shape: Sequence[int],
        dtypes: tuple[str, str],
    ) -> Move:
        """The movement between two tensors of one shape; steps are in bytes."""
        axes = [
            Axis(size, from_step, to_step)
            for size, from_step, to_step in zip(shape, src_steps, dst_steps, strict=True)
            if size != 1
        ]
        return cls(src, dst, _merged(axes), *dtypes)

    @property
    def reversed(self) -> Move:
        """From where this one writes to where it reads."""
        axes = tuple(Axis(axis.size, axis.dst, axis.src) for axis in self.axes)
        return Move(self.dst, self.src, axes, self.dst_dtype, self.src_dtype)

    @property
    def read(self) -> tuple[int, int]:
        """Addresses of the first and of the last element that is read."""
        return self.reversed.written

    @property
    def written(self) -> tuple[int, int]:
        """Addresses of the first and of the last element that is written."""
        reach = [axis.dst * (axis.size - 1) for axis in self.axes]
        return self.dst + sum(r for r in reach if r < 0), self.dst + sum(r for r in reach if r > 0)

    @property
    def numel(self) -> int:
        """Number of elements."""
        return prod(axis.size for axis in self.axes)


def dense_steps(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Steps in bytes of a contiguous tensor."""
    steps = []
    step = itemsize
    for size in reversed(shape):
        steps.append(step)
        step *= max(size, 1)
    return tuple(reversed(steps))


def compose(first: Move, second: Move) -> Move | None:
    """What of `first` is carried on by `second`, which reads where `first` has written.

    Returns:
        From where `first` reads to where `second` writes; None if `second` reads nothing of it.

    Raises:
        ValueError: the two cut the memory between them in ways that aren't followed, or both cast.
    """
    casts = (first.src_dtype != first.dst_dtype) + (second.src_dtype != second.dst_dtype)
    if not _meet(first.written, second.read):
        return None
    if casts > 1:
        raise ValueError("values are cast twice")
    if first.dst_dtype != second.src_dtype:
        raise ValueError(f"{first.dst_dtype} is read as {second.src_dtype}")
    shifted = _shifted(first, second)
    if shifted is not None:
        return shifted
    try:
        return _inside(first, second)
    except ValueError:
        # Perhaps what is read is the smaller one.
        composed = _inside(second.reversed, first.reversed)
        return None if composed is None else composed.reversed


def _shifted(first: Move, second: Move) -> Move | None:
    """`compose` where one of both keeps all distances, and the other is within it: what most copies
    are."""
    if len(second.axes) == 1:
        (axis,) = second.axes
        if axis.src == axis.dst > 0 and _on_line(first.written, second.read, axis.src, first.axes):
            dst = first.dst - second.src + second.dst
            return Move(first.src, dst, first.axes, first.src_dtype, second.dst_dtype)
    if len(first.axes) == 1:
        (axis,) = first.axes
        back = second.reversed
        if axis.src == axis.dst > 0 and _on_line(back.written, first.written, axis.dst, back.axes):
            src = second.src - first.dst + first.src
            return Move(src, second.dst, second.axes, first.src_dtype, second.dst_dtype)
    return None


def _on_line(
    inner: tuple[int, int], line: tuple[int, int], step: int, axes: Sequence[Axis]
) -> bool:
    """Whether all elements of a movement, by what its axes write, are elements of a line."""
    if inner[0] < line[0] or inner[1] > line[1] or (inner[0] - line[0]) % step:
        return False
    return not any(axis.dst % step for axis in axes)


def _inside(first: Move, second: Move) -> Move | None:
    """`compose`, in coordinates of what `second` reads."""
    order = sorted(second.axes, key=lambda axis: -abs(axis.src))
    steps = [axis.src for axis in order]
    sizes = [axis.size for axis in order]
    if any(step <= 0 for step in steps):
        raise ValueError("elements are repeated or reversed")
    if any(o < i * n for o, i, n in zip(steps, steps[1:], sizes[1:], strict=False)):
        raise ValueError("memory is read more than once")
    start = _coordinates(first.dst - second.src, steps)
    axes = _split(first.axes, lambda axis: axis.dst, steps, sizes, start)
    # How far each axis of `first` goes along which axis of `second`.
    along: list[list[int]] = [[] for _ in steps]
    strides: list[tuple[int, int]] = []
    for index, axis in enumerate(axes):
        place = _place(axis.dst, steps)
        if place is None:
            raise ValueError("memory is read in other strides than it was written")
        along[place].append(index)
        strides.append((place, axis.dst // steps[place]))
    ends = [
        low + sum(strides[i][1] * (axes[i].size - 1) for i in indices)
        for low, indices in zip(start, along, strict=True)
    ]
    if any(
        end * step >= outer for outer, step, end in zip(steps, steps[1:], ends[1:], strict=False)
    ):
        raise ValueError("memory is read in other rows than it was written")
    result = list(axes)
    src = first.src
    for j, (size, high) in enumerate(zip(sizes, ends, strict=True)):
        low = start[j]
        if low >= 0 and high < size:
            continue
        if low >= size or high < 0:
            return None
        if len(along[j]) != 1:
            raise ValueError("memory is read in other pieces than it was written")
        index = along[j][0]
        stride = strides[index][1]
        skipped = -(low // stride) if low < 0 else 0
        last = min(axes[index].size - 1, (size - 1 - low) // stride)
        if last < skipped:
            return None
        src += skipped * axes[index].src
        start[j] = low + skipped * stride
        result[index] = replace(axes[index], size=last - skipped + 1)
    dst = second.dst + sum(s * axis.dst for s, axis in zip(start, order, strict=True))
    composed = [
        Axis(axis.size, axis.src, stride * order[place].dst)
        for axis, (place, stride) in zip(result, strides, strict=True)
        if axis.size != 1
    ]
    return Move(src, dst, _merged(composed), first.src_dtype, second.dst_dtype)


def box_in(
    move: Move, address: int, shape: Sequence[int], itemsize: int
) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    """Where a movement begins in a contiguous tensor at an address, and what it looks like there.

    Args:
        move: reads from the tensor only.
        address: of the tensor's first element.
        shape: the tensor's.
        itemsize: bytes of an element.

    Returns:
        The index of the box's first element, its shape, and for each of the tensor's dimensions the
        distance of neighbours in the destination, in bytes.

    Raises:
        ValueError: what is read is no box of the tensor.
    """
    dense = dense_steps(shape, itemsize)
    offset = [0] * len(shape)
    rest = move.src - address
    for d, step in enumerate(dense):
        if shape[d] > 1:
            offset[d], rest = divmod(rest, step)
    if rest or any(o < 0 for o in offset):
        raise ValueError("what is read begins outside the tensor")
    wide = [d for d in range(len(shape)) if shape[d] > 1]
    steps, sizes = [dense[d] for d in wide], [shape[d] for d in wide]
    axes = _split(move.axes, lambda axis: axis.src, steps, sizes, [offset[d] for d in wide])
    box, strides = [1] * len(shape), [itemsize] * len(shape)
    for axis in axes:
        d = next((d for d in wide if dense[d] == axis.src), None)  # type: ignore[assignment]
        if d is None or box[d] != 1 or offset[d] + axis.size > shape[d]:
            raise ValueError("what is read is no box of the tensor")
        box[d], strides[d] = axis.size, axis.dst
    return tuple(offset), tuple(box), tuple(strides)


def _meet(one: tuple[int, int], other: tuple[int, int]) -> bool:
    return one[0] <= other[1] and other[0] <= one[1]


def _coordinates(distance: int, steps: Sequence[int]) -> list[int]:
    """Index of the element at a distance in bytes, outermost first; the outermost may be
    negative."""
    found = []
    for step in steps:
        index, distance = divmod(distance, step)
        found.append(index)
    if distance:
        raise ValueError("memory is read at other places than it was written")
    return found


def _merged(axes: Sequence[Axis]) -> tuple[Axis, ...]:
    """The same movement with as few axes as possible."""
    merged: list[Axis] = []
    for axis in sorted(axes, key=lambda a: (-abs(a.dst), -abs(a.src))):
        if merged:
            outer = merged[-1]
            if outer.src == axis.src * axis.size and outer.dst == axis.dst * axis.size:
                merged[-1] = Axis(outer.size * axis.size, axis.src, axis.dst)
                continue
        merged.append(axis)
    return tuple(merged)


def _split(
    axes: Sequence[Axis],
    side: Callable[[Axis], int],
    steps: Sequence[int],
    sizes: Sequence[int],
    start: Sequence[int],
) -> list[Axis]:
    """Axes cut so that none runs over the end of a dimension into the next one, where it does so in
    whole turns.

    Args:
        axes: those of a movement.
        side: which step of an axis is looked at.
        steps, sizes: of the dimensions, outermost first.
        start: coordinates of the first element.
    """
    left = list(axes)
    done: list[Axis] = []
    while left:
        axis = left.pop()
        step = side(axis)
        place = _place(step, steps)
        if place is None or place == 0:
            done.append(axis)
            continue
        stride = step // steps[place]
        turn = sizes[place] // stride
        runs_over = start[place] + stride * (axis.size - 1) >= sizes[place]
        nested = steps[place - 1] == steps[place] * sizes[place]
        whole = turn * stride == sizes[place] and turn > 1 and axis.size % turn == 0
        if runs_over and nested and whole and start[place] == 0:
            done.append(Axis(turn, axis.src, axis.dst))
            left.append(Axis(axis.size // turn, axis.src * turn, axis.dst * turn))
            continue
        done.append(axis)
    return done


def _place(step: int, steps: Sequence[int]) -> int | None:
    """The outermost dimension along which a step goes."""
    return next((j for j, s in enumerate(steps) if s <= step and step % s == 0), None)
