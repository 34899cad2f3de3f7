"""Which box of a DTensor each coordinate of its mesh holds."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch.distributed.tensor.placement_types import Placement

__all__ = ["ShardBox", "is_replicated", "shard_boxes"]

ShardBox = tuple[tuple[int, ...], tuple[int, ...]]
"""Index of the first element, and shape."""


def is_replicated(placements: Sequence[Placement]) -> bool:
    """Whether every rank of the mesh has all of the tensor."""
    return all(placement.is_replicate() for placement in placements)


def _split_order(
    placements: Sequence[Placement], mesh_shape: Sequence[int]
) -> dict[int, list[int]] | None:
    """For each sharded dimension of the tensor the mesh dimensions that split it, first one first;
    None where the placements aren't understood.

    A plain shard of an earlier mesh dimension splits before later ones. A strided shard, which
    FSDP2 uses above tensor parallelism, splits what `split_factor` later shards have left.
    """
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    orders: dict[int, list[int]] = {}
    for mesh_dim in reversed(range(len(placements))):
        placement = placements[mesh_dim]
        if placement.is_replicate():
            continue
        if isinstance(placement, _StridedShard):
            order = orders.setdefault(placement.dim, [])
            products = itertools.accumulate((mesh_shape[d] for d in order), initial=1)
            places = [i for i, n in enumerate(products) if n == placement.split_factor]
            if not places:
                return None
            order.insert(places[-1], mesh_dim)
        elif isinstance(placement, Shard):
            orders.setdefault(placement.dim, []).insert(0, mesh_dim)
        else:
            return None
    return orders


def shard_boxes(
    shape: Sequence[int], mesh_shape: Sequence[int], placements: Sequence[Placement]
) -> dict[tuple[int, ...], ShardBox] | None:
    """The box of every coordinate of the mesh; None where the placements aren't understood.

    Uneven ones are split as by `torch.chunk`: by the size rounded up, the last ones are smaller or
    empty.
    """
    orders = _split_order(placements, mesh_shape)
    if orders is None:
        return None

    def box(coordinate: tuple[int, ...]) -> ShardBox:
        offset, size = [0] * len(shape), list(shape)
        for dim, order in orders.items():
            for mesh_dim in order:
                step = math.ceil(size[dim] / mesh_shape[mesh_dim])
                start = min(step * coordinate[mesh_dim], size[dim])
                offset[dim] += start
                size[dim] = min(step, size[dim] - start)
        return tuple(offset), tuple(size)

    coordinates: Iterator[tuple[int, ...]] = itertools.product(*map(range, mesh_shape))
    return {coordinate: box(coordinate) for coordinate in coordinates}
