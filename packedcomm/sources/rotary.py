"""Rows of a projection reordered between conventions of rotary embeddings, as strided parts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace

from packedcomm.copying import Part
from packedcomm.errors import LayoutError
from packedcomm.planning.rotary import RotaryDirection, rotary_pieces
from packedcomm.sources.entries import Entry

__all__ = ["permuted_entry"]

# What a projection owns, below its module's name: tensors whose dimension 0 is the projection's
# output, and those that have no such dimension. In a PEFT model the weight is the base layer's.
_BY_ROW = re.compile(
    r"(base_layer\.)?(weight|bias)"
    r"|lora_B\.([^.]+\.)?(weight|bias)"
    r"|lora_magnitude_vector(\..+)?"
)
_WITHOUT_ROWS = re.compile(r"lora_A\..+")


def permuted_entry(entry: Entry, rest: str, heads: int, direction: RotaryDirection) -> Entry:
    """The entry with its rows in the other order; the entry itself where it has no such rows.

    Args:
        entry: a tensor of a query or key projection, `[heads * d, ...]`.
        rest: its name below the projection's.
        heads: of the projection.
        direction: see `RotaryPermutation`.

    Raises:
        LayoutError: the heads don't divide the rows evenly into pairs, or it is a tensor (such as a
            quantisation scale) of which it isn't known what its rows are.
    """
    name = entry.names[0]
    if _WITHOUT_ROWS.fullmatch(rest):
        return entry
    if not _BY_ROW.fullmatch(rest):
        raise LayoutError(
            f"tensor {name!r}: can't be permuted for rotary embeddings, expected a weight, a bias "
            f"or a LoRA matrix of a projection"
        )
    pieces = rotary_pieces(name, entry.shape, heads, direction)
    # Rows on the wire that come from evenly spaced rows in memory.
    runs = [(p.box.offset[0], p.box.shape[0], p.at[0], p.steps[0]) for p in pieces]
    parts = tuple(piece for part in entry.parts for piece in _reordered(part, runs))
    return replace(entry, parts=parts)


def _reordered(part: Part, runs: list[tuple[int, int, int, int]]) -> Iterator[Part]:
    """The part's rows at their places on the wire.

    Args:
        part: some of the rows, or all of them.
        runs: `(first row on the wire, how many, first row in memory, step in memory)`.
    """
    dimensions = part.tensor.dim()
    offset = part.offset or (0,) * dimensions
    start, stop = offset[0], offset[0] + part.tensor.shape[0]
    for wire, count, memory, step in runs:
        # Of the run, the indices whose rows this part has: those from `low` up to `high`.
        low = max(0, -((memory - start) // step))
        high = min(count, -((memory - stop) // step))
        if low < high:
            rows = part.tensor[memory + low * step - start :: step][: high - low]
            yield Part(rows, (wire + low, *offset[1:]), part.scale)
