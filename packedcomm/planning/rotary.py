"""The permutation of rotary position embeddings between Meta's and Hugging Face's row order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from packedcomm.errors import LayoutError
from packedcomm.layout import Box, Piece

__all__ = ["RotaryDirection", "rotary_pieces"]

RotaryDirection = Literal["meta_to_hf", "hf_to_meta"]


def rotary_pieces(
    tensor: str,
    shape: Sequence[int],
    heads: int,
    direction: RotaryDirection,
    *,
    parameter: str | None = None,
    scale: float = 1.0,
) -> list[Piece]:
    """Where the rows of a query or key projection lie when the holder orders them the other way.

    Meta's models rotate neighbours (rows 2p and 2p+1 of a head), Hugging Face's rotate halves (rows
    p and p + d/2), so a weight `[heads * d, H]` of the one is the other's with each head's rows
    permuted. Llama checkpoints were converted from Meta's order to Hugging Face's by
    `view(heads, d/2, 2, H).transpose(1, 2).reshape(heads * d, H)`; a bias is the same without `H`.
    Value projections are never permuted. Of a LoRA pair only the rows of B are.

    Args:
        tensor: name of the logical tensor, which is in the direction's target order.
        shape: `(rows,)` or `(rows, H)`, the same on both sides.
        heads: heads of this tensor: query heads for a query projection, KV heads for a key one.
        direction: "meta_to_hf" if the parameter is in Meta's order, "hf_to_meta" if it is in
            Hugging Face's.
        parameter: name of the tensor that is held; `tensor` if not given.
        scale: as in `Piece`.

    Returns:
        Pieces that cover the tensor: for "meta_to_hf" two per head that read every other row; for
        "hf_to_meta" d/2 per head that read two rows d/2 apart, since a piece is contiguous in the
        logical tensor.

    Raises:
        LayoutError: the shape isn't that of a weight or bias, the rows aren't heads of an even
            size, or the direction is unknown.
    """
    if len(shape) not in (1, 2):
        raise LayoutError(
            f"tensor {tensor!r} of shape {tuple(shape)} is no weight or bias to permute"
        )
    rows, columns = shape[0], tuple(shape[1:])
    if type(heads) is not int or heads < 1 or rows % heads or rows // heads % 2:
        raise LayoutError(
            f"tensor {tensor!r}: {rows} rows are not {heads} heads of an even number of rows"
        )
    half = rows // heads // 2
    if direction == "meta_to_hf":
        count, size, step = 2, half, 2
    elif direction == "hf_to_meta":
        count, size, step = half, 2, half
    else:
        raise LayoutError(f"unknown direction {direction!r}: expected meta_to_hf or hf_to_meta")
    rest = (0,) * len(columns)
    held = tensor if parameter is None else parameter
    axes = tuple(range(len(shape)))
    steps = (step, *(1 for _ in columns))
    return [
        Piece(
            tensor,
            Box((start + index * size, *rest), (size, *columns)),
            held,
            (start + index, *rest),
            axes,
            steps,
            scale,
        )
        for start in range(0, rows, 2 * half)
        for index in range(count)
    ]
