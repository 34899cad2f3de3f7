"""Bytes that change between the wire and the receiver's memory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from packedcomm import GlooCommunicator, NcclCommunicator
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
def flipped_on_arrival(backend: str, tensor: int, byte: int) -> Iterator[list[int]]:
    """In every broadcast of this process with that many tensors and bytes one bit of that byte of
    that tensor is flipped right after it has arrived, on a GPU by work on the broadcast's stream.
    Gives how many broadcasts were met, as the only item of a list."""
    kind: Any = {"gloo": GlooCommunicator, "nccl": NcclCommunicator}[backend]
    start = kind.start_broadcast
    met = [0]

    def flipping(group: Communicator, operands: Operands, src: int) -> Any:
        pending = start(group, operands, src)
        if len(operands.tensors) <= tensor or operands.tensors[tensor].nbytes <= byte:
            return pending
        met[0] += 1
        target = contiguous_bytes(operands.tensors[tensor], "flip")[byte : byte + 1]
        if pending is not None:
            return _Flipping(pending, target)
        target.bitwise_xor_(1)
        return None

    kind.start_broadcast = flipping
    try:
        yield met
    finally:
        kind.start_broadcast = start
