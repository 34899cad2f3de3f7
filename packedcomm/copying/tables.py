"""The native copy table of a device, and running it there."""

from __future__ import annotations

import os
from typing import Protocol

import torch

from packedcomm import _native
from packedcomm.errors import ArgumentError, CapacityError

__all__ = ["Execution", "Names", "UploadedTable", "digests_address", "new_table", "thread_count"]

# Bytes per tile. On a GPU two passes of a block of 512 threads with four 16-byte loads each; on a
# CPU large enough to be worth handing to a thread, small enough to balance.
_CUDA_TILE_BYTES = 64 << 10
_CPU_TILE_BYTES = 256 << 10

# More threads than this don't copy faster: memory bandwidth is spent.
_MOST_THREADS = 8


class Names(Protocol):
    """What tensors are called in messages; only asked when there is something to say."""

    def __getitem__(self, index: int, /) -> str: ...


def new_table(device: torch.device, buffer_side: str = "") -> _native.CopyTable:
    """An empty table; `buffer_side` is "source" or "destination" if that is a buffer."""
    tile_bytes = _CPU_TILE_BYTES if device.type == "cpu" else _CUDA_TILE_BYTES
    return _native.CopyTable(device.type, device.index or 0, tile_bytes, buffer_side)


def thread_count(threads: int) -> int:
    """How many CPU threads to use when asked for this many; 0 asks for a good number.

    Raises:
        ArgumentError: the number is negative.
    """
    if threads < 0:
        raise ArgumentError(f"threads must be >= 0, got {threads}")
    return threads or min(_MOST_THREADS, len(os.sched_getaffinity(0)))


def digests_address(digests: torch.Tensor, device: torch.device, count: int) -> int:
    """Where digests are that a run adds to.

    Raises:
        ArgumentError: they aren't contiguous int64 memory of the device, or fewer than `count`.
    """
    wrong = digests.dtype != torch.int64 or not digests.is_contiguous() or digests.device != device
    if wrong or digests.numel() < count:
        raise ArgumentError(
            f"digests must be {count} or more contiguous int64 on {device}, got "
            f"{digests.numel()} of {digests.dtype}, strides {digests.stride()}, on {digests.device}"
        )
    return digests.data_ptr()


class _Table(Protocol):
    """A native table that can be uploaded."""

    @property
    def table_bytes(self) -> int: ...
    def write(self, address: int, capacity: int) -> None: ...


class UploadedTable:
    """A native table's bytes on a GPU, uploaded at first use and kept. For one thread at a time."""

    def __init__(self, table: _Table, device: torch.device) -> None:
        self._table = table
        self._device = device
        self._bytes: torch.Tensor | None = None
        self._ready: torch.cuda.Event | None = None
        self._stream = 0

    def address(self, stream: torch.cuda.Stream) -> int:
        """Where the table is, for work on this stream, which must be the current one.

        Raises:
            CapacityError: no memory for the table.
        """
        if self._bytes is None:
            self._bytes = self._upload(stream)
            self._ready = stream.record_event()
            self._stream = stream.cuda_stream
        elif stream.cuda_stream != self._stream:
            if self._ready is not None:
                stream.wait_event(self._ready)
            # The table may be dropped while this stream hasn't read it yet.
            self._bytes.record_stream(stream)
        return self._bytes.data_ptr()

    def upload_now(self) -> None:
        """Upload and wait for that: a replay may be captured in a graph, where a stream can't wait
        for what happened outside."""
        with torch.cuda.device(self._device):
            stream = torch.cuda.current_stream(self._device)
            self.address(stream)
            stream.synchronize()
            self._ready = None

    def forget(self) -> None:
        """To be called when the table has grown."""
        self._bytes = None

    def _upload(self, stream: torch.cuda.Stream) -> torch.Tensor:
        # torch's pinned-memory cache hands the staging block out again only after the copy has run,
        # and the device block is freed in stream order, so neither needs an event of ours.
        size = self._table.table_bytes
        try:
            staging = torch.empty(size, dtype=torch.uint8, pin_memory=True)
            self._table.write(staging.data_ptr(), staging.nbytes)
            return staging.to(self._device, non_blocking=True)
        except torch.OutOfMemoryError as error:
            raise CapacityError(f"table of {size} bytes for {stream}: {error}") from error


class Execution:
    """Runs a copy table on its device."""

    def __init__(
        self, table: _native.CopyTable, device: torch.device, threads: int, blocks: int
    ) -> None:
        self._table = table
        self._device = device
        self._threads = thread_count(threads)
        self._blocks = blocks
        self.uploaded = UploadedTable(table, device)

    def run(self, buffer: int = 0, digests: int = 0, *, wide: bool = False) -> None:
        """Copy everything.

        Args:
            buffer: the address of the table's buffer, if it has one.
            digests: the address of digests that the copies add to; 0 asks for none.
            wide: whether a GPU may be filled, whatever bound on the grid there is.
        """
        if self._device.type == "cpu":
            self._table.copy(self._threads, buffer, digests)
        elif self._table.tiles:
            with torch.cuda.device(self._device):
                stream = torch.cuda.current_stream(self._device)
                address = self.uploaded.address(stream)
                blocks = 0 if wide else self._blocks
                self._table.launch(address, stream.cuda_stream, blocks, buffer, digests)
