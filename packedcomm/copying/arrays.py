"""Arrays of any library as tensors that can be copied."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from packedcomm.copying.tables import Names, new_table
from packedcomm.errors import TensorError

__all__ = ["as_destination", "as_tensor", "describe_tensors"]


def as_tensor(array: Any) -> torch.Tensor:
    """A torch tensor over the same memory: a tensor itself, or a cupy or NumPy array (DLPack, else
    `__cuda_array_interface__`).

    Raises:
        TensorError: the object is none of these.
    """
    if isinstance(array, torch.Tensor):
        return array
    if any(stride < 0 for stride in getattr(array, "strides", None) or ()):
        # torch doesn't raise on these: it ends the process.
        raise TensorError(f"{type(array).__name__} has negative strides: pass a copy of it")
    try:
        if hasattr(array, "__dlpack__"):
            return from_dlpack(array)
        if hasattr(array, "__cuda_array_interface__"):
            return torch.as_tensor(array)
    except (BufferError, RuntimeError, TypeError) as error:
        raise TensorError(f"{type(array).__name__} can't be read as a tensor: {error}") from error
    raise TensorError(f"expected a tensor or an array with __dlpack__, got {type(array).__name__}")


def as_destination(array: Any) -> torch.Tensor:
    """As `as_tensor`, for memory that will be written.

    Raises:
        TensorError: the array is read-only, or its elements share memory.
    """
    if getattr(getattr(array, "flags", None), "writeable", True) is False:
        raise TensorError(f"{type(array).__name__} is read-only")
    tensor = as_tensor(array)
    if not tensor.is_contiguous():
        new_table(tensor.device).add_pairs([tensor], [tensor], None, [1.0], False)
    return tensor


def describe_tensors(
    tensors: list[torch.Tensor], device: torch.device, names: Names | None = None
) -> list[tuple[int, int, bool]]:
    """Check that each tensor can be copied as bytes on a device.

    Returns:
        Address, bytes and whether it is contiguous, for each tensor.

    Raises:
        TensorError: a tensor is on another device, sparse, quantised, nested, lazily conjugated or
            negated, a wrapper of other tensors, or without storage; the message names it.
    """
    return new_table(device).describe(tensors, names)
