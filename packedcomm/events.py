"""In-process event hooks: what a transfer reports while it runs. No exporter, no global state."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

__all__ = ["ChunkMoved", "OnEvent", "TransferFinished"]


@dataclass(frozen=True, slots=True)
class ChunkMoved:
    """A chunk was handed to the transport (on a GPU: enqueued; on a CPU: moved)."""

    tensors: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class TransferFinished:
    """Every chunk was handed over.

    Asking for this event makes a transfer on a GPU wait for its end, since times are read from its
    CUDA events.
    """

    chunks: int
    tensors: int
    nbytes: int
    seconds: dict[str, float]
    """Time of each stage, summed over chunks: `pack` and `wire` on the sending side, `wire` and
    `unpack` on the receiving one; `total` is from call to end. Stages overlap, so they may add up
    to more than the total. On a receiver `wire` includes waiting for the sender."""


OnEvent = Callable[[ChunkMoved | TransferFinished], None]
"""Called on the caller's thread. What it raises ends the transfer."""
