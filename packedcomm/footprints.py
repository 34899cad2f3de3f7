"""Exact test whether sets of indices that step evenly on every dimension share an element."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypeAlias

__all__ = ["Footprint", "Progression", "first_overlap", "progressions_meet"]

# First index, step >= 1 and number of indices, on one dimension.
Progression: TypeAlias = tuple[int, int, int]

# The product of one progression per dimension.
Footprint: TypeAlias = tuple[Progression, ...]


def progressions_meet(one: Progression, other: Progression) -> bool:
    """Whether two arithmetic progressions have a common term.

    Both are congruences `x = start (mod step)` within a range: by the Chinese remainder theorem
    common solutions are one residue modulo the least common multiple of the steps.
    """
    (start, step, count), (other_start, other_step, other_count) = one, other
    low = max(start, other_start)
    high = min(start + (count - 1) * step, other_start + (other_count - 1) * other_step)
    if count < 1 or other_count < 1 or low > high:
        return False
    if step == other_step == 1:
        return True
    divisor = math.gcd(step, other_step)
    if (other_start - start) % divisor:
        return False
    modulus = other_step // divisor
    turns = (other_start - start) // divisor * pow(step // divisor, -1, modulus) % modulus
    period = step * modulus
    first = start + turns * step
    # The smallest common term that isn't below both ranges' beginning.
    first += -((first - low) // period) * period
    return first <= high


def first_overlap(footprints: Sequence[Footprint]) -> tuple[int, int] | None:
    """Positions of two footprints of one parameter that share an element; None if no two do.

    A sweep along the dimension on which they start at the most different places: only footprints
    whose ranges there overlap are compared, so thousands of disjoint ones cost a sort.

    Args:
        footprints: all with the same number of dimensions, none empty.
    """
    if len(footprints) < 2:
        return None
    dimensions = range(len(footprints[0]))
    if not dimensions:
        return 0, 1  # several scalars
    axis = max(dimensions, key=lambda axis: len({f[axis][0] for f in footprints}))
    order = sorted(range(len(footprints)), key=lambda index: footprints[index][axis][0])
    active: list[tuple[int, int]] = []  # last index on the axis, position
    for position in order:
        footprint = footprints[position]
        start, step, count = footprint[axis]
        active = [entry for entry in active if entry[0] >= start]
        for _, earlier in active:
            if all(map(progressions_meet, footprints[earlier], footprint)):
                return earlier, position
        active.append((start + (count - 1) * step, position))
    return None
