"""The bytes that benchmark tensors carry: equal on every rank, made again to check transfers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

__all__ = ["Content", "as_bytes", "poison"]

# A prime, so that no chunk, tensor or alignment is a multiple of it: a piece that arrives at the
# wrong offset then differs from what belongs there.
_POOL_BYTES = 67_108_859
_STRIDE = 7_368_787
_POISON = 0x5A


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """A contiguous tensor's memory as a flat uint8 view."""
    return tensor.view(-1).view(torch.uint8)


def poison(tensors: Sequence[torch.Tensor]) -> None:
    """Overwrite tensors, so that bytes that a later transfer leaves out don't look right."""
    for tensor in tensors:
        as_bytes(tensor).fill_(_POISON)


class Content:
    """Random bytes for tensor 0, 1, 2, ...: slices of one pool, each from its own start.

    Bits are random, so NaN payloads occur and nothing compresses. The pool is made on the CPU from
    a fixed seed, which makes it equal in every process and on every device.
    """

    def __init__(self, device: torch.device, seed: int = 20260) -> None:
        generator = torch.Generator().manual_seed(seed)
        words = torch.empty(-(-_POOL_BYTES // 8), dtype=torch.int64)
        words.random_(-(1 << 63), None, generator=generator)
        self._device = device
        self._pool = words.view(torch.uint8)[:_POOL_BYTES].to(device)

    def write(self, tensors: Sequence[torch.Tensor], first: int = 0) -> None:
        """Fill tensor i of the sequence with content `first` + i."""
        for index, tensor in enumerate(tensors, first):
            for piece, expected in self._pieces(index, tensor):
                piece.copy_(expected)

    def count_wrong(self, tensors: Sequence[torch.Tensor]) -> int:
        """Bytes that differ from content i in tensor i, over the whole sequence."""
        wrong = torch.zeros((), dtype=torch.int64, device=self._device)
        for index, tensor in enumerate(tensors):
            for piece, expected in self._pieces(index, tensor):
                # A host can afford to look before it counts; a device would have to be waited for.
                if self._device.type == "cpu" and torch.equal(piece, expected):
                    continue
                wrong += (piece != expected).sum()
        return int(wrong)

    def _pieces(
        self, index: int, tensor: torch.Tensor
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        data = as_bytes(tensor)
        start = (index + 1) * _STRIDE % _POOL_BYTES
        done = 0
        while done < data.numel():
            size = min(data.numel() - done, _POOL_BYTES - start)
            yield data[done : done + size], self._pool[start : start + size]
            done += size
            start = 0
