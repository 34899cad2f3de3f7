"""64-bit digests of tensors, equal on CPU and GPU, at the speed of memory.

The digest of a tensor is that of its elements' bytes in row-major order, whatever its strides and
alignment. With the bytes cut into little-endian 64-bit words w_0, w_1, …, the last one padded with
zeros, and n the number of bytes, modulo 2^64:

    digest = s(n + g) + sum over i of s(w_i xor ((i + 1) * g))

where g = 0x9e3779b97f4a7c15 and s is the output function of SplitMix64:

    x = (x xor (x >> 30)) * 0xbf58476d1ce4e5b9
    x = (x xor (x >> 27)) * 0x94d049bb133111eb
    s = x xor (x >> 31)

As s is a bijection, a change inside one word is always seen; any other accident is missed with
probability 2^-64. It guards against faults, not against somebody who makes collisions on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packedcomm import _native
from packedcomm.copying.tables import Names, UploadedTable, digests_address, thread_count

__all__ = ["DigestPlan", "digest_tensors"]

_MASK = (1 << 64) - 1


class DigestPlan:
    """The digests of some tensors of one device, planned once and computed as often as wanted.

    The plan holds references to its tensors. One that ran on a GPU must not be dropped, with its
    tensors, before that stream's work is done or ordered.

    Args:
        tensors: any dtype, shape, strides and alignment, all on one device.
        names: for messages; positions such as "#3" otherwise.
        numbers: which of the digests given to `run` each tensor's is added to; None is its
            position.
        threads: CPU threads; 0 means the number of processors this process may use, 8 at most.
        blocks: bound on the CUDA grid (thread blocks of 512 threads); 0 fills the device.

    Raises:
        TensorError: a tensor has no dense memory of its own, or is not on the device of the first;
            the message names it.
    """

    def __init__(
        self,
        tensors: Sequence[torch.Tensor],
        names: Names | None = None,
        *,
        numbers: Sequence[int] | None = None,
        threads: int = 0,
        blocks: int = 0,
    ) -> None:
        self._tensors = list(tensors)
        self._names = names
        self._threads = thread_count(threads)
        self._blocks = blocks
        self._extent = max(numbers, default=-1) + 1 if numbers is not None else len(self._tensors)
        self.device = self._tensors[0].device if self._tensors else torch.device("cpu")
        self._table = _native.DigestTable(self.device.type, self.device.index or 0)
        self._table.add(self._tensors, names, range(self._extent) if numbers is None else numbers)
        self._uploaded = UploadedTable(self._table, self.device)

    @property
    def nbytes(self) -> int:
        """Bytes that a run reads."""
        return self._table.nbytes

    def run(self, into: torch.Tensor | None = None, *, wide: bool = False) -> torch.Tensor:
        """The digests, int64, unsigned bits as signed.

        On a CPU computed before returning, on a GPU enqueued on the current stream.

        Args:
            into: contiguous int64 memory on the device, to which the digests are added, each to the
                number that the plan has for it; None makes new ones, of zero. On a GPU it must stay
                until the work has run.
            wide: whether a GPU may be filled, whatever bound on the grid the plan has.

        Returns:
            `into`, or the new tensor.

        Raises:
            ArgumentError: `into` isn't such memory, or too small.
            CapacityError: no memory for the table.
            CudaError: the launch failed, or packedcomm was built without CUDA.
        """
        if into is None:
            into = torch.zeros(self._extent, dtype=torch.int64, device=self.device)
        address = digests_address(into, self.device, self._extent)
        if self.device.type == "cpu":
            self._table.compute(address, self._threads)
        elif self._tensors:
            with torch.cuda.device(self.device):
                stream = torch.cuda.current_stream(self.device)
                table = self._uploaded.address(stream)
                self._table.launch(table, stream.cuda_stream, address, 0 if wide else self._blocks)
        return into

    def moved(self) -> str | None:
        """The name (or position) of the first tensor whose address, dtype, shape, strides or device
        is no longer what was planned; None if the plan still holds."""
        index = self._table.first_change(self._tensors)
        if index < 0:
            return None
        return f"#{index}" if self._names is None else self._names[index]

    def __repr__(self) -> str:
        return f"DigestPlan({len(self._tensors)} tensors, {self.nbytes:,} bytes, {self.device})"


def digest_tensors(tensors: Sequence[torch.Tensor], names: Names | None = None) -> list[int]:
    """The digest of each tensor, as an unsigned number; waits for GPUs.

    Args:
        tensors: any dtype, shape, strides and alignment, on any devices.
        names: for messages.

    Raises:
        TensorError: a tensor has no dense memory of its own; the message names it.
    """
    tensors = list(tensors)
    digests = [0] * len(tensors)
    by_device: dict[torch.device, list[int]] = {}
    for index, tensor in enumerate(tensors):
        by_device.setdefault(tensor.device, []).append(index)
    for indices in by_device.values():
        labels = [f"#{i}" if names is None else names[i] for i in indices]
        plan = DigestPlan([tensors[i] for i in indices], labels)
        for index, value in zip(indices, plan.run().tolist(), strict=True):
            digests[index] = value & _MASK
    return digests
