"""Copies that are done once: packing, unpacking, and a contiguous copy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from packedcomm.copying.arrays import as_tensor
from packedcomm.copying.buffers import BufferPlan
from packedcomm.copying.tables import Execution, Names, new_table
from packedcomm.errors import TensorError

__all__ = ["contiguous_copy", "pack", "pack_into", "unpack_from"]


def pack_into(
    buffer: torch.Tensor,
    tensors: list[torch.Tensor],
    offsets: Sequence[int],
    sizes: Sequence[int],
    names: Names | None = None,
    *,
    threads: int = 0,
    blocks: int = 0,
) -> None:
    """Copy each tensor's elements, in row-major order, to its offset in a buffer: a `BufferPlan`
    for once.

    On a GPU the copy is enqueued on the current stream; the tensors and the buffer must stay until
    it has run.

    Args:
        buffer: contiguous uint8 tensor.
        tensors, offsets, sizes, names: as for `BufferPlan.add_tensors`.
        threads, blocks: as for `CopyPlan`.

    Raises:
        TensorError: as for `CopyPlan`, naming the tensor; nothing was copied.
        ArgumentError: a tensor would leave the buffer.
    """
    plan = BufferPlan(buffer.device, into_buffer=True, threads=threads, blocks=blocks)
    plan.add_tensors(tensors, offsets, sizes, names)
    plan.run(buffer)


def unpack_from(
    buffer: torch.Tensor,
    tensors: list[torch.Tensor],
    offsets: Sequence[int],
    sizes: Sequence[int],
    names: Names | None = None,
    *,
    threads: int = 0,
    blocks: int = 0,
) -> None:
    """The reverse of `pack_into`: from the buffer into the tensors. Same arguments and errors."""
    plan = BufferPlan(buffer.device, into_buffer=False, threads=threads, blocks=blocks)
    plan.add_tensors(tensors, offsets, sizes, names)
    plan.run(buffer)


def pack(tensors: Sequence[Any], out: torch.Tensor) -> None:
    """Copy tensors back to back into `out`, without padding.

    Args:
        tensors: tensors or arrays on `out`'s device.
        out: contiguous uint8 tensor with room for all of them, in bytes.

    Raises:
        TensorError: as for `CopyPlan`; or `out` isn't contiguous uint8 memory.
        ArgumentError: `out` is too small.
    """
    if out.dtype != torch.uint8 or not out.is_contiguous():
        raise TensorError(f"out must be contiguous uint8, got {out.dtype}, strides {out.stride()}")
    arrays = [as_tensor(t) for t in tensors]
    sizes = [t.nbytes for t in arrays]
    offsets = [0]
    for size in sizes:
        offsets.append(offsets[-1] + size)
    pack_into(out, arrays, offsets[:-1], sizes)


def contiguous_copy(tensor: torch.Tensor) -> torch.Tensor:
    """A new contiguous tensor with the same elements, bit for bit; on a GPU on the current
    stream."""
    copy = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
    table = new_table(tensor.device)
    table.add_pairs([tensor], [copy], None, [1.0], False)
    Execution(table, tensor.device, 0, 0).run()
    return copy
