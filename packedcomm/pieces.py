"""Pieces of a layout on real tensors: the strided views that copies read and write."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packedcomm.copying import Part
from packedcomm.errors import LayoutError
from packedcomm.layout import Box, Piece

__all__ = ["box_view", "part_of"]


def part_of(piece: Piece, tensor: torch.Tensor, shape: Sequence[int] | None = None) -> Part:
    """The memory of a piece, as a part of its logical tensor.

    The view has as many dimensions as the logical tensor, doesn't require grad and shares the
    parameter's memory; a parameter whose `.data` is replaced later leaves it behind.

    Args:
        piece: where the box lies.
        tensor: the parameter of that name, any strides.
        shape: the logical tensor's; given it, a piece that is all of the tensor gets no offset.

    Raises:
        LayoutError: the piece leaves the parameter.
    """
    bounds = tuple(tensor.shape)
    footprint = piece.footprint
    empty = piece.box.numel == 0
    if len(footprint) != len(bounds) or (
        not empty
        and any(
            start + (count - 1) * step >= bound
            for (start, step, count), bound in zip(footprint, bounds, strict=True)
        )
    ):
        raise LayoutError(f"{piece}: the parameter's shape is {bounds}")
    strides = tensor.stride()
    first = tensor.storage_offset()
    if not empty:
        first += sum(a * s for a, s in zip(piece.at, strides, strict=True))
    view = tensor.detach().as_strided(
        piece.box.shape,
        [strides[axis] * step for axis, step in zip(piece.axes, piece.steps, strict=True)],
        first,
    )
    whole = shape is not None and piece.box.shape == tuple(shape)
    return Part(view, None if whole else piece.box.offset, piece.scale)


def box_view(box: Box, tensor: torch.Tensor) -> torch.Tensor:
    """A view of a box of a tensor, which doesn't require grad.

    Raises:
        LayoutError: the box leaves the tensor.
    """
    if not Box.whole(tensor.shape).contains(box):
        raise LayoutError(f"box {box} is not within shape {tuple(tensor.shape)}")
    view = tensor.detach()
    for dim, (offset, size) in enumerate(zip(box.offset, box.shape, strict=True)):
        view = view.narrow(dim, offset, size)
    return view
