"""Which bytes of the process tensors occupy: whether memory has been written whole again."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["byte_ranges", "ranges_without"]

# Of one tensor: more take seconds and gigabytes.
_MOST_RUNS = 1 << 20

# Addresses are unique in a process, also those of GPUs.
_NOTHING = torch.empty((0, 2), dtype=torch.int64, device="cpu")


def byte_ranges(tensors: Iterable[torch.Tensor]) -> torch.Tensor:
    """The bytes of tensors of any strides: disjoint rising ranges `[start, end)`, int64 `[n, 2]` on
    the CPU.

    Raises:
        ValueError: they are in millions of pieces.
    """
    runs = [_runs(tensor) for tensor in tensors if tensor.numel()]
    return ranges_without(torch.cat([_NOTHING, *runs]), _NOTHING)


def ranges_without(ranges: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """The bytes of some ranges that aren't in others, as `byte_ranges` gives them."""
    steps = [torch.ones(len(each), dtype=torch.int64, device="cpu") for each in (ranges, others)]
    inside = torch.cat([steps[0], -steps[0], 0 * steps[1], 0 * steps[1]])
    covered = torch.cat([0 * steps[0], 0 * steps[0], steps[1], -steps[1]])
    points, order = torch.cat([*ranges.unbind(1), *others.unbind(1)]).sort()
    # How many of either lie over the bytes from each point up to the next one.
    left = (inside[order].cumsum(0) > 0) & (covered[order].cumsum(0) == 0)
    start, end = points[:-1], points[1:]
    kept = left[:-1] & (start < end)
    return torch.stack([start[kept], end[kept]], dim=1)


def _runs(tensor: torch.Tensor) -> torch.Tensor:
    """The contiguous runs of a tensor."""
    size = tensor.element_size()
    run = size
    starts = torch.tensor([tensor.data_ptr()], dtype=torch.int64, device="cpu")
    for stride, extent in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if stride * size == run and len(starts) == 1:
            run *= extent
        elif extent > 1:
            if len(starts) * extent > _MOST_RUNS:
                raise ValueError(f"a tensor is in {len(starts) * extent:,} pieces")
            steps = torch.arange(extent, dtype=torch.int64, device="cpu") * (stride * size)
            starts = (starts[:, None] + steps).flatten()
    return torch.stack([starts, starts + run], dim=1)
