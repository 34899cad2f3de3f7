"""Bytes that change between the wire and the receiver's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from packedcomm.communicators.base import Communicator, Operands, Pending, contiguous_bytes

__all__ = ["flipped_on_arrival"]


@dataclass
class _Flipping:
    """A broadcast in the background, after which a byte is flipped."""

    pending: Pending
    byte: torch.Tensor
    seconds: float = 0.0
    flipped: bool = False

    def wait(self) -> None:
        self.pending.wait()
        if not self.flipped:
            self.byte.bitwise_xor_(1)
            self.flipped = True


@contextmanager
def flipped_on_arrival(group: Communicator, tensor: int, byte: int) -> Iterator[list[int]]:
    """In every broadcast with that many tensors and bytes one bit of that byte of that tensor is
    flipped right after it has arrived, on a GPU by work on the broadcast's stream. Gives how many
    broadcasts were met, as the only item of a list."""
    start = group.start_broadcast
    met = [0]

    def flipping(operands: Operands, src: int) -> Any:
        pending = start(operands, src)
        if len(operands.tensors) <= tensor or operands.tensors[tensor].nbytes <= byte:
            return pending
        met[0] += 1
        target = contiguous_bytes(operands.tensors[tensor], "flip")[byte : byte + 1]
        if pending is not None:
            return _Flipping(pending, target)
        target.bitwise_xor_(1)
        return None

    group.start_broadcast = flipping  # type: ignore[method-assign]
    try:
        yield met
    finally:
        group.start_broadcast = start  # type: ignore[method-assign]
