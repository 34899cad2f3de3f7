"""Groups that aren't communicators of ours: any object with `broadcast(tensor, src=...)` serves."""

from __future__ import annotations

import torch


class RecordingGroup:
    """A sender's group: keeps the bytes of every broadcast."""

    def __init__(self) -> None:
        self.sent: list[bytes] = []

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        assert tensor.dtype == torch.uint8
        assert tensor.dim() == 1
        assert tensor.is_contiguous()
        self.sent.append(bytes(tensor.tolist()))


class ReplayingGroup:
    """A receiver's group: fills each broadcast with recorded bytes, whose lengths must agree."""

    def __init__(self, sent: list[bytes]) -> None:
        self._sent = list(sent)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        payload = self._sent.pop(0)
        assert len(payload) == tensor.nbytes, "the receiver cut another chunk than the sender"
        if payload:
            tensor.copy_(torch.frombuffer(bytearray(payload), dtype=torch.uint8))

    @property
    def unread(self) -> int:
        return len(self._sent)
