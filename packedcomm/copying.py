"""The copy engine in Python: batched byte copies between tensors, one native call for all of them.

Copies are of bytes, never of values: NaN payloads, -0.0 and denormals arrive as they are. Whatever
the shapes and strides, a batch is normalised into a table of contiguous runs, cut into tiles, and
executed by threads on a CPU (the GIL released) or by one kernel on a GPU.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch.utils.dlpack import from_dlpack

from packedcomm import _native
from packedcomm.errors import ArgumentError, CapacityError, TensorError

__all__ = [
    "CopyPlan",
    "Part",
    "as_destination",
    "as_tensor",
    "contiguous_copy",
    "describe_tensors",
    "pack",
    "pack_into",
    "unpack_from",
]


@dataclass(frozen=True, slots=True)
class Part:
    """A box of a named tensor, and the memory that holds it.

    A source describes a tensor by the parts it is put together from, a target by the parts it is
    taken apart into. Where the dtypes of memory and tensor differ, values are cast.
    """

    tensor: torch.Tensor
    """View of the memory: the box's shape, as many dimensions as the named tensor, any strides."""

    offset: tuple[int, ...] | None = None
    """Index in the named tensor of the box's first element; None if this is all of it."""

    scale: float = 1.0
    """Factor for values on their way between memory and named tensor, in either direction; 1 leaves
    bytes as they are."""


class Names(Protocol):
    """What tensors are called in messages; only asked when there is something to say."""

    def __getitem__(self, index: int, /) -> str: ...


# Bytes per tile. On a GPU two passes of a block of 512 threads with four 16-byte loads each; on a
# CPU large enough to be worth handing to a thread, small enough to balance.
_CUDA_TILE_BYTES = 64 << 10
_CPU_TILE_BYTES = 256 << 10

# More threads than this don't copy faster: memory bandwidth is spent.
_MOST_THREADS = 8


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
        _new_table(tensor.device).add_pairs([tensor], [tensor], None)
    return tensor


def _new_table(device: torch.device) -> _native.CopyTable:
    tile_bytes = _CPU_TILE_BYTES if device.type == "cpu" else _CUDA_TILE_BYTES
    return _native.CopyTable(device.type, device.index or 0, tile_bytes)


def _thread_count(threads: int) -> int:
    if threads < 0:
        raise ArgumentError(f"threads must be >= 0, got {threads}")
    return threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def _upload(table: _native.CopyTable, device: torch.device) -> torch.Tensor:
    """The table's bytes on the device, enqueued on the current stream.

    torch's pinned-memory cache hands the staging block out again only after the copy has run, and
    the device block is freed in stream order, so neither needs an event of ours.
    """
    try:
        staging = torch.empty(table.table_bytes, dtype=torch.uint8, pin_memory=True)
        table.write(staging.data_ptr(), staging.nbytes)
        return staging.to(device, non_blocking=True)
    except torch.OutOfMemoryError as error:
        raise CapacityError(f"copy table of {table.table_bytes} bytes: {error}") from error


def _run(
    table: _native.CopyTable,
    device: torch.device,
    threads: int,
    blocks: int,
    uploaded: torch.Tensor | None = None,
) -> None:
    if device.type == "cpu":
        table.copy(_thread_count(threads))
    elif table.tiles:
        with torch.cuda.device(device):
            if uploaded is None:
                uploaded = _upload(table, device)
            stream = torch.cuda.current_stream(device).cuda_stream
            table.launch(uploaded.data_ptr(), stream, blocks)


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
    return _new_table(device).describe(tensors, names)


class CopyPlan:
    """A batch of copies, planned once and replayed by one call.

    The plan holds references to its tensors, so their memory stays while it lives; one that ran on
    a GPU must not be dropped, with its tensors, before that stream's work is done or ordered. All
    tensors must be on one device; a source and a destination of a pair have one shape and dtype (or
    equal item size), any strides, any alignment. Source and destination memory must not overlap.

    Args:
        pairs: `(source, destination)` tensors or arrays.
        threads: CPU threads; 0 means the number of processors this process may use, 8 at most.
        blocks: bound on the CUDA grid (thread blocks of 512 threads); 0 fills the device. A narrow
            grid leaves multiprocessors to other kernels, such as NCCL's.

    Raises:
        TensorError: a tensor can't be copied as bytes, shapes differ, devices differ, or elements
            of a destination share memory; the message gives the position of the pair.
        CapacityError: no memory for the table.
    """

    def __init__(
        self, pairs: Sequence[tuple[Any, Any]], *, threads: int = 0, blocks: int = 0
    ) -> None:
        self._pairs = [(as_tensor(s), as_destination(d)) for s, d in pairs]
        self._threads = _thread_count(threads)
        self._blocks = blocks
        self.device = self._pairs[0][1].device if self._pairs else torch.device("cpu")
        self._table = _new_table(self.device)
        self._table.add_pairs([s for s, _ in self._pairs], [d for _, d in self._pairs], None)
        self._uploaded: torch.Tensor | None = None
        if self.device.type == "cuda" and self._table.tiles:
            with torch.cuda.device(self.device):
                self._uploaded = _upload(self._table, self.device)
                # A replay may be on any stream: the table must be there before the first one.
                torch.cuda.current_stream(self.device).synchronize()

    @property
    def nbytes(self) -> int:
        """Payload bytes that a run copies."""
        return self._table.nbytes

    def run(self) -> None:
        """Copy everything: on a CPU before returning, on a GPU enqueued on the current stream.

        Raises:
            CudaError: the launch failed, or packedcomm was built without CUDA.
        """
        if self._uploaded is not None:
            # The plan may be dropped while this stream hasn't read the table yet.
            self._uploaded.record_stream(torch.cuda.current_stream(self.device))
        _run(self._table, self.device, self._threads, self._blocks, self._uploaded)

    def __repr__(self) -> str:
        return (
            f"CopyPlan({len(self._pairs)} pairs, {self.nbytes:,} bytes, "
            f"{self._table.segments} segments, {self.device})"
        )


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
    """Copy each tensor's elements, in row-major order, to its offset in a buffer.

    On a GPU the copy is enqueued on the current stream; the tensors and the buffer must stay until
    it has run.

    Args:
        buffer: contiguous uint8 tensor.
        tensors: any dtype, shape and strides, on the buffer's device.
        offsets, sizes: bytes, one per tensor; sizes must be the tensors' own.
        names: for messages.
        threads, blocks: as for `CopyPlan`.

    Raises:
        TensorError: as for `CopyPlan`, naming the tensor; nothing was copied.
    """
    table = _new_table(buffer.device)
    table.add_packed(tensors, names, buffer.data_ptr(), buffer.nbytes, offsets, sizes, True)
    _run(table, buffer.device, threads, blocks)


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
    table = _new_table(buffer.device)
    table.add_packed(tensors, names, buffer.data_ptr(), buffer.nbytes, offsets, sizes, False)
    _run(table, buffer.device, threads, blocks)


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
    table = _new_table(tensor.device)
    table.add_pairs([tensor], [copy], None)
    _run(table, tensor.device, 0, 0)
    return copy
