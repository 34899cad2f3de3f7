"""`ShardedSource`: tensors that one process has as explicit lists of FSDP and TP shards."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from packedcomm.copying import Part, as_tensor
from packedcomm.errors import ArgumentError, LayoutError, ManifestError, TensorError, listed
from packedcomm.manifest import TensorSpec
from packedcomm.sources.base import Snapshot
from packedcomm.sources.entries import Entry, Transform, check_tensors, describe, is_dtensor
from packedcomm.sources.structure import AddressRecord, MappingRecord
from packedcomm.sources.transforms import NamePatterns, Selection

__all__ = ["ShardedSource"]


class ShardedSource:
    """A source that merges shards while they are packed; nothing is concatenated in memory.

    A tensor's shards are ordered with the data-parallel index first and the tensor-parallel one
    last, as by torchtitan: of T tensor-parallel ranks, rank i has `shards[i::T]`, one after the
    other on dimension 0, and the ranks' tensors lie one after the other on the tensor-parallel
    dimension. FSDP shards may be uneven or empty.

    Args:
        shards: lists of shards by name; tensors, cupy or NumPy arrays. A single one is the whole
            tensor. Shards stacked in one tensor are `list(stacked)`, made once.
        dp_shard_degree: FSDP ranks.
        tp_degree: tensor-parallel ranks.
        tp_shard_dim: dimension that tensor parallelism splits; None where it doesn't, so that all
            its ranks have the same; or a mapping of name to that, which must have every name that
            isn't replicated.
        replicated: names of tensors of which every rank has all; the first one is sent.
        shapes: whole shapes by name, checked where given.
        transforms: applied in order; see `packedcomm.sources.transforms`.

    Raises:
        ArgumentError: a degree isn't an integer > 0, or nothing says how several tensor-parallel
            ranks divide the tensors.
    """

    def __init__(
        self,
        shards: Mapping[str, Sequence[Any]],
        *,
        dp_shard_degree: int,
        tp_degree: int,
        tp_shard_dim: Mapping[str, int | None] | int | None = None,
        replicated: Selection = (),
        shapes: Mapping[str, Sequence[int]] | None = None,
        transforms: Sequence[Transform] = (),
    ) -> None:
        for name, degree in (("dp_shard_degree", dp_shard_degree), ("tp_degree", tp_degree)):
            if type(degree) is not int or degree <= 0:
                raise ArgumentError(f"{name} must be an integer > 0, got {degree!r}")
        if tp_degree > 1 and tp_shard_dim is None and not replicated:
            raise ArgumentError(
                f"tp_degree {tp_degree} needs tp_shard_dim, or the names of replicated tensors"
            )
        self.leader = True
        self._shards = shards
        self._fsdp = dp_shard_degree
        self._tp = tp_degree
        self._tp_shard_dim = tp_shard_dim
        self._replicated = replicated
        self._shapes = dict(shapes or {})
        self._transforms = tuple(transforms)
        self._snapshot: Snapshot | None = None
        self._structure: MappingRecord | None = None
        self._addresses: AddressRecord | None = None

    def snapshot(self) -> Snapshot:
        """See `Source`.

        Raises:
            LayoutError: a tensor's shards aren't a list, don't fit, overlap or leave holes; it is
                named.
            ManifestError: `shapes` or `replicated` has names of no tensor.
        """
        if (
            self._snapshot is not None
            and self._structure is not None
            and self._addresses is not None
            and self._structure.holds()
            and self._addresses.holds()
        ):
            return self._snapshot
        self._structure = self._addresses = None
        patterns = NamePatterns(self._replicated) if self._replicated else None
        entries, tensors = [], []
        for origin, (name, arrays) in enumerate(self._shards.items()):
            if not isinstance(arrays, (list, tuple)):
                # Reading one array makes other views every time, which can't be told from others.
                raise LayoutError(
                    f"tensor {name!r}: expected a list of shards, got a {type(arrays).__name__}"
                )
            whole = patterns is not None and patterns.matches(name)
            shards = [_as_plain_tensor(name, array) for array in arrays]
            entries.append(self._entry(origin, name, shards, whole))
            tensors.extend(shards)
        if patterns is not None:
            patterns.check_used("replicated")
        unknown = [
            f"shapes: no tensor is named {n!r}" for n in self._shapes if n not in self._shards
        ]
        if unknown:
            raise ManifestError(listed(unknown))
        structure = MappingRecord(self._shards, lists=True)
        description = describe(entries, self._transforms)
        self._snapshot = Snapshot(description.manifest, description.parts(), description.left_out)
        self._addresses = AddressRecord(tensors)
        self._structure = structure
        return self._snapshot

    def _entry(
        self, origin: int, name: str, shards: Sequence[torch.Tensor], replicated: bool
    ) -> Entry:
        if not shards:
            raise LayoutError(f"tensor {name!r}: has no shards")
        dtypes = {str(shard.dtype) for shard in shards}
        if len(dtypes) > 1:
            raise LayoutError(
                f"tensor {name!r}: its shards have dtypes {', '.join(sorted(dtypes))}"
            )
        if replicated or len(shards) == 1:
            shapes = {tuple(shard.shape) for shard in shards}
            if len(shapes) > 1:
                raise LayoutError(f"tensor {name!r}: its replicas have shapes {sorted(shapes)}")
            shape = tuple(shards[0].shape)
            parts: list[Part] = [Part(shards[0].detach())]
        else:
            parts, shape = self._merged(name, shards)
        expected = tuple(self._shapes.get(name, shape))
        if shape != expected:
            raise LayoutError(
                f"tensor {name!r}: its shards make up shape {shape}, expected {expected}: they "
                f"{'overlap' if _exceeds(shape, expected) else 'leave holes'}"
            )
        dtype = TensorSpec(name, str(shards[0].dtype), shape).dtype
        return Entry((name,), dtype, shape, tuple(parts), origin)

    def _merged(
        self, name: str, shards: Sequence[torch.Tensor]
    ) -> tuple[list[Part], tuple[int, ...]]:
        count = self._fsdp * self._tp
        if len(shards) != count:
            raise LayoutError(
                f"tensor {name!r}: expected {count} shards ({self._fsdp} FSDP x {self._tp} TP), "
                f"got {len(shards)}"
            )
        # FSDP gives ranks without rows an empty tensor, at times of one dimension only.
        dimensions = max(shard.dim() for shard in shards)
        if dimensions == 0:
            raise LayoutError(
                f"tensor {name!r}: a shard has no dimensions, so it must be replicated"
            )
        tp_dim = self._tp_dim(name, dimensions)
        parts: list[Part] = []
        shape: list[int] = []
        for index in range(self._tp if tp_dim is not None else 1):
            mine = [s for s in shards[index :: self._tp] if s.dim() == dimensions or s.numel()]
            if not mine:
                continue
            column, column_shape = _stacked(name, mine)
            offset = [0] * len(column_shape)
            if not shape:
                shape = column_shape
            else:
                assert tp_dim is not None
                others = [d for d in range(len(shape)) if d != tp_dim]
                if any(column_shape[d] != shape[d] for d in others):
                    raise LayoutError(
                        f"tensor {name!r}: TP rank {index} makes up shape {tuple(column_shape)}, "
                        f"which doesn't fit {tuple(shape)} on dimension {tp_dim}"
                    )
                offset[tp_dim] = shape[tp_dim]
                shape[tp_dim] += column_shape[tp_dim]
            for shard, row in column:
                start = (offset[0] + row, *offset[1:])
                parts.append(Part(shard.detach(), start))
        if not shape:
            raise LayoutError(f"tensor {name!r}: TP rank 0 has no shard that tells its shape")
        return parts, tuple(shape)

    def _tp_dim(self, name: str, dimensions: int) -> int | None:
        tp_dim = self._tp_shard_dim
        if isinstance(tp_dim, Mapping):
            if name not in tp_dim:
                raise LayoutError(
                    f"tensor {name!r}: tp_shard_dim doesn't have it, and it isn't replicated"
                )
            tp_dim = tp_dim[name]
        if tp_dim is not None and not -dimensions <= tp_dim < dimensions:
            raise LayoutError(
                f"tensor {name!r}: has {dimensions} dimensions, none of them is {tp_dim} to be "
                f"split by TP"
            )
        return None if tp_dim is None else tp_dim % dimensions

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """See `Source`: nothing needs gathering."""
        yield from snapshot.parts or ()

    def share(self, outcome: str | None) -> str | None:
        """See `Source`: there is one process."""
        return outcome


def _as_plain_tensor(name: str, array: Any) -> torch.Tensor:
    try:
        tensor = as_tensor(array)
    except TensorError as error:
        raise TensorError(f"tensor {name!r}: {error}") from None
    if is_dtensor(tensor):
        raise TensorError(f"tensor {name!r}: a shard is a DTensor, pass its local tensor")
    check_tensors([(name, tensor)])
    return tensor


def _stacked(
    name: str, shards: Sequence[torch.Tensor]
) -> tuple[list[tuple[torch.Tensor, int]], list[int]]:
    """Non-empty shards with their first rows, one below the other, and the shape they make up."""
    shape = list(shards[0].shape)
    rows = 0
    placed = []
    for shard in shards:
        if not shard.dim() or list(shard.shape[1:]) != shape[1:]:
            raise LayoutError(
                f"tensor {name!r}: FSDP shards of shapes {tuple(shards[0].shape)} and "
                f"{tuple(shard.shape)} differ in more than rows"
            )
        if shard.numel():
            placed.append((shard, rows))
        rows += shard.shape[0]
    return placed, [rows, *shape[1:]]


def _exceeds(shape: tuple[int, ...], expected: tuple[int, ...]) -> bool:
    return len(shape) == len(expected) and any(a > b for a, b in zip(shape, expected, strict=True))
