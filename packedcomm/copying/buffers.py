"""Copies between a buffer and tensors, planned once; and parts of tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from packedcomm.copying.tables import Execution, Names, digests_address, new_table
from packedcomm.errors import ArgumentError, TensorError

__all__ = ["BufferPlan", "Part"]


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


@dataclass(frozen=True, slots=True)
class _Single:
    """Names of tensors that are all parts of one."""

    name: str

    def __getitem__(self, index: int, /) -> str:
        return self.name


@lru_cache(maxsize=64)
def _example(dtype: torch.dtype) -> torch.Tensor:
    """A tensor from which the native side reads what the dtype is."""
    return torch.empty(0, dtype=dtype)


class BufferPlan:
    """Copies between a buffer and tensors, planned once; the buffer is named when it runs.

    References, ordering and arithmetic are as for `CopyPlan`. A plan of which an `add_` method
    raised must not be used.

    Args:
        device: of the tensors and of every buffer.
        into_buffer: whether tensors are copied into the buffer or taken from it.
        threads, blocks: as for `CopyPlan`.
    """

    def __init__(
        self, device: torch.device, *, into_buffer: bool, threads: int = 0, blocks: int = 0
    ) -> None:
        if device == torch.device("cuda"):
            device = torch.device("cuda", torch.cuda.current_device())
        self.device = device
        self.into_buffer = into_buffer
        self._table = new_table(device, "destination" if into_buffer else "source")
        self._execution = Execution(self._table, device, threads, blocks)
        self._tensors: list[torch.Tensor] = []
        # What the tensors are called from each of these positions on.
        self._names: list[tuple[int, Names | None]] = []

    def add_tensors(
        self,
        tensors: list[torch.Tensor],
        offsets: Sequence[int],
        sizes: Sequence[int],
        names: Names | None = None,
        numbers: Sequence[int] = (),
    ) -> None:
        """Add whole tensors, each row-major at its offset in the buffer, as bytes.

        Args:
            tensors: any dtype, shape and strides, on the plan's device.
            offsets, sizes: bytes, one per tensor; sizes must be the tensors' own.
            names: for messages.
            numbers: of the tensors' digests, see `digested`; empty if none will be asked for.

        Raises:
            TensorError: as for `CopyPlan`, naming the tensor.
            ArgumentError: an offset is negative.
        """
        self._table.add_packed(tensors, names, offsets, sizes, numbers)
        self._added(tensors, names)

    def add_parts(
        self,
        parts: Sequence[Part],
        dtype: torch.dtype,
        shape: tuple[int, ...],
        offset: int,
        name: str,
        number: int = -1,
    ) -> None:
        """Add parts of one named tensor, which lies row-major in the buffer.

        Each part's box is copied between the buffer and the part's memory, cast if dtypes differ
        and scaled. Parts need not cover the tensor.

        Args:
            parts: boxes of the named tensor; their memory may be of any strides and alignment.
            dtype: of the named tensor, in the buffer.
            shape: of the named tensor.
            offset: of the named tensor in the buffer, in bytes.
            name: of the tensor, for messages.
            number: into a buffer, of the named tensor's digest as it is there; out of one, of the
                first part's, which is of the part's memory, the next part's being one more. -1 if
                none will be asked for.

        Raises:
            TensorError: a part leaves the shape or has another number of dimensions, dtypes differ
                and aren't both castable, a scale doesn't fit, or as for `CopyPlan`; names
                the tensor.
            ArgumentError: the offset is negative.
        """
        tensors = [part.tensor for part in parts]
        self._table.add_parts(
            tensors,
            [part.offset for part in parts],
            [part.scale for part in parts],
            _example(dtype),
            shape,
            offset,
            name,
            number,
        )
        self._added(tensors, _Single(name))

    def _added(self, tensors: list[torch.Tensor], names: Names | None) -> None:
        self._names.append((len(self._tensors), names))
        self._tensors += tensors
        self._execution.uploaded.forget()

    @property
    def nbytes(self) -> int:
        """Payload bytes that a run moves, counted in the buffer."""
        return self._table.nbytes

    @property
    def extent(self) -> int:
        """Bytes that a buffer must have."""
        return self._table.extent

    @property
    def digested(self) -> Sequence[int]:
        """Numbers of the digests that a run makes, if it is asked for them: those of contiguous
        memory whose bytes the copies go through in order, so that every tile's are known by
        themselves. All other digests need a pass of their own, `packedcomm.digests`."""
        return self._table.digested

    def run(
        self, buffer: torch.Tensor, digests: torch.Tensor | None = None, *, wide: bool = False
    ) -> None:
        """Copy everything: on a CPU before returning, on a GPU enqueued on the current stream.

        The first run on a GPU uploads the table, which is kept.

        Args:
            buffer: contiguous uint8 memory on the plan's device, `extent` bytes or more, at any
                alignment. On a GPU it must stay until the copy has run.
            digests: contiguous int64 memory on the plan's device, to which the copies add the
                digests of what they read, or of what they write where values are converted, each to
                its number; zero before. On a GPU it must stay until the copy has run. None copies
                only.
            wide: whether a GPU may be filled, whatever bound on the grid the plan has.

        Raises:
            ArgumentError: the buffer is too small, or `digests` isn't such memory.
            TensorError: it isn't contiguous uint8 memory of the device.
            CudaError: the launch failed, or packedcomm was built without CUDA.
        """
        if buffer.dtype != torch.uint8 or not buffer.is_contiguous():
            raise TensorError(
                f"buffer must be contiguous uint8, got {buffer.dtype}, strides {buffer.stride()}"
            )
        if buffer.device != self.device:
            raise TensorError(f"buffer is on {buffer.device}, expected {self.device}")
        if buffer.nbytes < self.extent:
            raise ArgumentError(
                f"the plan leaves its buffer of {buffer.nbytes} bytes: it needs {self.extent}"
            )
        address = 0
        if digests is not None and self._table.digest_extent:
            address = digests_address(digests, self.device, self._table.digest_extent)
        self._execution.run(buffer.data_ptr(), address, wide=wide)

    def moved(self) -> str | None:
        """The name (or position, as "#3") of the first tensor whose address, dtype, shape, strides
        or device is no longer what was planned; None if the plan still holds."""
        index = self._table.first_change(self._tensors)
        if index < 0:
            return None
        first, names = next(entry for entry in reversed(self._names) if entry[0] <= index)
        return f"#{index}" if names is None else names[index - first]

    def __repr__(self) -> str:
        return (
            f"BufferPlan({len(self._tensors)} tensors {'into' if self.into_buffer else 'from'} a "
            f"buffer, {self.nbytes:,} bytes, {self._table.segments} segments, {self.device})"
        )
