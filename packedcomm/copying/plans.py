"""Copies between tensors, planned once and replayed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from packedcomm.copying.arrays import as_destination, as_tensor
from packedcomm.copying.tables import Execution, new_table

__all__ = ["CASTABLE", "CopyPlan"]

CASTABLE = ("float64", "float32", "float16", "bfloat16")
"""Dtypes whose values may be rounded to one another. All others stay the bytes that they are."""


class CopyPlan:
    """A batch of copies, planned once and replayed by one call.

    The plan holds references to its tensors, so their memory stays while it lives; one that ran on
    a GPU must not be dropped, with its tensors, before that stream's work is done or ordered. All
    tensors must be on one device; a source and a destination of a pair have one shape, any strides,
    any alignment. Source and destination memory must not overlap.

    Values are cast or scaled as torch does in `(source * scale).to(dtype)`, the product in float32,
    or in float64 if either side is float64, and the result rounded to nearest, ties to even.

    Args:
        pairs: `(source, destination)` or `(source, destination, scale)`: tensors or arrays, and a
            finite factor for the values. Both dtypes are the same unless `cast`; a scale other than
            1 needs float64, float32, float16 or bfloat16.
        names: of the pairs, for messages; None numbers them.
        cast: whether dtypes may differ, if both are of these four.
        threads: CPU threads; 0 means the number of processors this process may use, 8 at most.
        blocks: bound on the CUDA grid (thread blocks of 512 threads); 0 fills the device. A narrow
            grid leaves multiprocessors to other kernels, such as NCCL's.

    Raises:
        TensorError: a tensor can't be copied as bytes, shapes, dtypes or devices differ, a scale
            doesn't fit, or elements of a destination share memory; the message gives the name of
            the pair.
        CapacityError: no memory for the table.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Any, Any] | tuple[Any, Any, float]],
        *,
        names: Sequence[str] | None = None,
        cast: bool = False,
        threads: int = 0,
        blocks: int = 0,
    ) -> None:
        self._sources = [as_tensor(pair[0]) for pair in pairs]
        self._destinations = [as_destination(pair[1]) for pair in pairs]
        # In the order in which the table has them.
        both = zip(self._sources, self._destinations, strict=True)
        self._tensors = [tensor for pair in both for tensor in pair]
        scales = [pair[2] if len(pair) == 3 else 1.0 for pair in pairs]
        self.device = self._destinations[0].device if pairs else torch.device("cpu")
        self._table = new_table(self.device)
        self._execution = Execution(self._table, self.device, threads, blocks)
        self._table.add_pairs(self._sources, self._destinations, names, scales, cast)
        if self.device.type == "cuda" and self._table.tiles:
            self._execution.uploaded.upload_now()

    @property
    def nbytes(self) -> int:
        """Payload bytes that a run writes."""
        return self._table.nbytes

    def run(self) -> None:
        """Copy everything: on a CPU before returning, on a GPU enqueued on the current stream.

        Raises:
            CudaError: the launch failed, or packedcomm was built without CUDA.
        """
        self._execution.run()

    def moved(self) -> str | None:
        """Which tensor first is no longer what was planned, such as "source #3": its address,
        dtype, shape, strides or device has changed; None if the plan still holds."""
        index = self._table.first_change(self._tensors)
        return None if index < 0 else f"{('source', 'destination')[index % 2]} #{index // 2}"

    def __repr__(self) -> str:
        return (
            f"CopyPlan({len(self._sources)} pairs, {self.nbytes:,} bytes, "
            f"{self._table.segments} segments, {self.device})"
        )
