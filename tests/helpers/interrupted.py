"""A source that does something in the middle of a sync: there a test injects its fault."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch

from packedcomm import ModuleSource

__all__ = ["Interrupted"]


class Interrupted(ModuleSource):
    """Does something when the tensor of a given index is asked for, once; then it goes on."""

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__(tensors)
        self.at: int | None = None
        self.action: Callable[[], Any] = lambda: None
        self.acted_at = 0.0

    def when(self, index: int, action: Callable[[], Any]) -> None:
        """What to do, and when."""
        self.at, self.action = index, action

    def snapshot(self) -> Any:
        whole = super().snapshot()
        self._whole = whole.parts
        return type(whole)(whole.manifest, None, ())

    def gather(self, snapshot: Any) -> Any:
        for number, parts in enumerate(self._whole or ()):
            if number == self.at:
                self.at = None
                self.acted_at = time.monotonic()
                self.action()
            yield parts
