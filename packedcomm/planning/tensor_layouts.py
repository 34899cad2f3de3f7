"""The pieces of one tensor in one parameter of a tensor-parallel engine rank.

The rules are vLLM's (its linear, vocabulary embedding and fused MoE layers), for parameters as they
are before any backend repacks them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from packedcomm.layout import Box, Piece
from packedcomm.planning.engine_names import UNDIVIDED, Destination, is_vocabulary, layer_of
from packedcomm.planning.geometry import ModelGeometry

__all__ = ["MisfitError", "Placed", "place_tensor"]

# vLLM pads the vocabulary to a multiple of this many rows before dividing it among ranks.
_VOCABULARY_MULTIPLE = 64

# Dimension on which layers that engines keep under the wire's names are divided, and of which also
# the bias is.
_DIVIDED = {
    "q_proj": 0,
    "k_proj": 0,
    "v_proj": 0,
    "gate_proj": 0,
    "up_proj": 0,
    "o_proj": 1,
    "down_proj": 1,
}

_PARTS = {"qkv": ("q", "k", "v"), "gate_up": ("gate", "up")}


class MisfitError(Exception):
    """A tensor's shape isn't what its destination takes; the text says what would be. Internal:
    callers collect these into one public error."""


@dataclass(frozen=True, slots=True)
class Placed:
    """One tensor's share of a rank's layout."""

    pieces: tuple[Piece, ...]

    filled: tuple[str, ...]
    """What of the parameter the tensor is: parts such as "q", experts' parts such as
    "expert 3 gate", or "" for all of it. Empty if the tensor belongs to other ranks."""

    padding: tuple[tuple[str, Box], ...] = ()


def place_tensor(
    tensor: str,
    shape: Sequence[int],
    destination: Destination,
    local: Sequence[int],
    geometry: ModelGeometry,
) -> Placed:
    """Which box of a tensor lies where in a parameter.

    Args:
        tensor: name on the wire.
        shape: whole shape of it.
        destination: the parameter, and which part of it the tensor is.
        local: this rank's shape of the parameter.
        geometry: the model's and the rank's.

    Raises:
        MisfitError: the shapes don't fit each other.
    """
    geometry = geometry.of(destination.parameter)
    if destination.experts:
        return _experts(tensor, tuple(shape), destination, tuple(local), geometry)
    if destination.part in ("q", "k", "v", "qkv"):
        return _attention(tensor, tuple(shape), destination, tuple(local), geometry)
    if destination.part in ("gate", "up", "gate_up"):
        return _gate_up(tensor, tuple(shape), destination, tuple(local), geometry)
    if is_vocabulary(destination.parameter):
        return _vocabulary(tensor, tuple(shape), destination, tuple(local), geometry)
    return _plain(tensor, tuple(shape), destination, tuple(local), geometry)


def _rows(
    tensor: str, shape: tuple[int, ...], parameter: str, start: int, count: int, at: int
) -> Piece:
    """Some rows of a tensor, all of their elements, at a row of a parameter."""
    rest = (0,) * (len(shape) - 1)
    return Piece.aligned(tensor, Box((start, *rest), (count, *shape[1:])), parameter, (at, *rest))


def _expect(found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise MisfitError(f"expected shape {expected}")


def _attention(
    tensor: str,
    shape: tuple[int, ...],
    destination: Destination,
    local: tuple[int, ...],
    geometry: ModelGeometry,
) -> Placed:
    """Local rows are [q; k; v]: this rank's query heads, then its keys' and its values', which
    neighbouring ranks share where there are fewer KV heads than ranks."""
    size, shards = geometry.head_size, geometry.kv_shards
    whole = {"q": geometry.num_heads * size, "k": geometry.num_kv_heads * size}
    rows = {"q": whole["q"] // geometry.tp_size, "k": whole["k"] // shards}
    index = {"q": geometry.tp_rank, "k": geometry.shard_index(shards)}
    for table in (whole, rows, index):
        table["v"] = table["k"]
    if not local or local[0] != sum(rows.values()):
        raise MisfitError(f"the geometry gives the parameter {sum(rows.values())} rows")
    parts = _PARTS.get(destination.part, (destination.part,))
    _expect(shape, (sum(whole[part] for part in parts), *local[1:]))
    at = dict(zip("qkv", (0, rows["q"], rows["q"] + rows["k"]), strict=True))
    pieces, base = [], 0
    for part in parts:
        start = base + index[part] * rows[part]
        pieces.append(_rows(tensor, shape, destination.parameter, start, rows[part], at[part]))
        base += whole[part]
    return Placed(tuple(pieces), parts)


def _gate_up(
    tensor: str,
    shape: tuple[int, ...],
    destination: Destination,
    local: tuple[int, ...],
    geometry: ModelGeometry,
) -> Placed:
    """Local rows are [gate; up], this rank's slice of either."""
    parts = _PARTS.get(destination.part, (destination.part,))
    if not local or not shape or local[0] % 2 or shape[0] % len(parts):
        raise MisfitError("rows don't divide into gate and up")
    rows, whole = local[0] // 2, shape[0] // len(parts)
    index = _slice_index(whole, rows, geometry)
    if index is None or shape[1:] != local[1:]:
        raise MisfitError(f"expected shape {(rows * geometry.tp_size * len(parts), *local[1:])}")
    pieces = tuple(
        _rows(
            tensor,
            shape,
            destination.parameter,
            number * whole + index * rows,
            rows,
            rows if part == "up" else 0,
        )
        for number, part in enumerate(parts)
    )
    return Placed(pieces, parts)


def _vocabulary(
    tensor: str,
    shape: tuple[int, ...],
    destination: Destination,
    local: tuple[int, ...],
    geometry: ModelGeometry,
) -> Placed:
    """Rows are padded to a multiple of 64, then divided; what a rank has beyond the last real row
    holds zeros. An embedding that isn't divided has the tensor's own shape."""
    if not local or not shape or shape[1:] != local[1:]:
        raise MisfitError(f"expected rows of shape {local[1:]}")
    rows, held = shape[0], local[0]
    if geometry.vocab_size not in (None, rows):
        raise MisfitError(f"expected {geometry.vocab_size} rows, the vocabulary's")
    padded = -(-rows // _VOCABULARY_MULTIPLE) * _VOCABULARY_MULTIPLE
    if padded == held * geometry.tp_size:
        start = min(rows, geometry.tp_rank * held)
        count = min(held, rows - start)
    elif held == rows:
        start, count = 0, rows
    else:
        raise MisfitError(
            f"{rows} rows padded to {padded} and divided among {geometry.tp_size} ranks are not "
            f"{held} each"
        )
    pieces = (_rows(tensor, shape, destination.parameter, start, count, 0),) if count else ()
    rest = (0,) * (len(local) - 1)
    tail = Box((count, *rest), (held - count, *local[1:]))
    padding = ((destination.parameter, tail),) if held > count else ()
    return Placed(pieces, ("",), padding)


def _plain(
    tensor: str,
    shape: tuple[int, ...],
    destination: Destination,
    local: tuple[int, ...],
    geometry: ModelGeometry,
) -> Placed:
    """Whole where the shapes are equal, else divided on the one dimension on which they differ: 0
    for column-parallel layers, 1 for row-parallel ones, whose biases are whole."""
    parameter = destination.parameter
    leaf = layer_of(parameter)
    if leaf in UNDIVIDED and geometry.tp_size > 1:
        raise MisfitError(
            f"{leaf} holds several projections, and how {geometry.tp_size} ranks divide them can't "
            f"be told: send them one by one to qkv_proj or gate_up_proj"
        )
    # Keys and values that an engine keeps apart are replicated like fused ones.
    count = geometry.kv_shards if leaf in ("k_proj", "v_proj") else geometry.tp_size
    must = _divided_dimension(leaf, parameter, len(local)) if count > 1 else None
    if shape == local and must is None:
        return Placed((Piece.aligned(tensor, Box.whole(shape), parameter),), ("",))
    differing = [d for d, (a, b) in enumerate(zip(shape, local, strict=False)) if a != b]
    if len(shape) != len(local) or len(differing) != 1 or must not in (None, differing[0]):
        if must is not None:
            expected = tuple(n * count if d == must else n for d, n in enumerate(local))
            raise MisfitError(f"expected shape {expected}; what ranks hold whole is `replicated`")
        raise MisfitError(f"expected shape {local}, or {count} times that on one dimension")
    dim = differing[0]
    if shape[dim] != local[dim] * count:
        raise MisfitError(f"expected {local[dim] * count} on dimension {dim}")
    offset = [0] * len(shape)
    offset[dim] = geometry.shard_index(count) * local[dim]
    return Placed((Piece.aligned(tensor, Box(tuple(offset), local), parameter),), ("",))


def _divided_dimension(leaf: str, parameter: str, dimensions: int) -> int | None:
    """The dimension on which ranks divide a parameter; None where that isn't known."""
    dim = _DIVIDED.get(leaf)
    if dim is None or (dim == 1 and dimensions == 1) or dim >= dimensions:
        return None
    return dim if parameter.endswith((".weight", ".bias")) else None


def _experts(
    tensor: str,
    shape: tuple[int, ...],
    destination: Destination,
    local: tuple[int, ...],
    geometry: ModelGeometry,
) -> Placed:
    """`w13_weight` is `[experts, gate rows then up rows, H]`, `w2_weight` `[experts, H, I]`: this
    rank's experts, and this rank's slice of each one's intermediate dimension.

    On the wire an expert is `[I, H]` or `[H, I]`, all of them `[E, 2 I, H]` or `[E, H, I]`.
    """
    if len(local) != 3:
        raise MisfitError("the parameter isn't [experts, rows, columns]")
    mine = geometry.experts or range(local[0])
    if len(mine) != local[0]:
        raise MisfitError(f"the geometry gives this rank {len(mine)} experts")
    total = geometry.num_experts or local[0]
    every = destination.expert is None
    if every and shape == local and geometry.tp_size == 1 and total == local[0]:
        # The same on both sides, in whatever order of rows and columns.
        filled = tuple(_filled_experts(mine, destination.part))
        whole_piece = Piece.aligned(tensor, Box.whole(shape), destination.parameter)
        return Placed((whole_piece,), filled)
    if len(shape) != (3 if every else 2) or (every and shape[0] != total):
        raise MisfitError(f"expected {total} experts" if every else "expected two dimensions")
    parts = _PARTS.get(destination.part, (destination.part,))
    down = destination.part == "down"
    dim, fixed = (1, 0) if down else (0, 1)
    inner, inner_local = shape[-2:], local[-2:]
    width = inner_local[dim] if down else inner_local[dim] // 2
    whole = inner[dim] // len(parts)
    index = _slice_index(whole, width, geometry)
    if index is None and geometry.ep_size > 1 and whole == width:
        # Experts that have a rank of their own are mostly not divided as well.
        index = 0
    if inner[fixed] != inner_local[fixed] or inner[dim] % len(parts) or index is None:
        expected = [inner_local[fixed]] * 2
        expected[dim] = width * geometry.tp_size * len(parts)
        raise MisfitError(f"expected {tuple(expected)} per expert")
    if destination.expert is not None and destination.expert >= total:
        raise MisfitError(f"there are {total} experts")
    if destination.expert is not None and destination.expert not in mine:
        return Placed((), ())
    pieces = []
    extent = list(inner_local)
    extent[dim] = width
    for number, part in enumerate(parts):
        offset, at = [0, 0], [0, 0]
        offset[dim] = number * whole + index * width
        at[dim] = width if part == "up" else 0
        first, axes = 0, [1, 2]
        if destination.expert is None:
            offset, size, axes = [mine.start, *offset], [len(mine), *extent], [0, 1, 2]
        else:
            first, size = destination.expert - mine.start, extent
        box = Box(tuple(offset), tuple(size))
        steps = (1,) * len(axes)
        place = (first, *at)
        pieces.append(Piece(tensor, box, destination.parameter, place, tuple(axes), steps))
    experts = mine if destination.expert is None else [destination.expert]
    return Placed(tuple(pieces), tuple(_filled_experts(experts, destination.part)))


def _filled_experts(experts: Iterable[int], part: str) -> Iterator[str]:
    for expert in experts:
        for single in _PARTS.get(part, (part,)):
            yield f"expert {expert} {single}"


def _slice_index(whole: int, held: int, geometry: ModelGeometry) -> int | None:
    """Which slice of a dimension a rank holds; None if the dimension isn't as long as all have."""
    return geometry.tp_rank if whole == held * geometry.tp_size else None
