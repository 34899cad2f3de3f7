"""`ShownDigests`: what a receiver's callback was shown, digested before it saw it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from packedcomm.digests import DigestPlan
from packedcomm.manifest import Manifest
from packedcomm.transports.digest_sums import digest_blocks

__all__ = ["ShownDigests"]


class ShownDigests:
    """Wraps a callback: digests of the tensors that it is shown, by name."""

    def __init__(
        self, version: int, callback: Callable[..., Any], on_shown: Callable[[], None]
    ) -> None:
        self._version = version
        self._callback = callback
        self._on_shown = on_shown
        self._found: list[tuple[list[str], torch.Tensor]] = []
        self.digesting = False

    def __call__(self, items: list[tuple[str, torch.Tensor]]) -> None:
        if self.digesting:
            tensors = [tensor for _, tensor in items]
            plan = DigestPlan(tensors, blocks=digest_blocks(tensors[0].device) if tensors else 0)
            self._found.append(([name for name, _ in items], plan.run()))
        # What the callback makes of it can't be known: until the commit it may be part of two
        # versions.
        self._on_shown()
        self._callback(self._version, items)

    def take(self, manifest: Manifest) -> torch.Tensor:
        """The digests as int64 in the manifest's order; waits for a GPU."""
        found = {
            name: digest
            for names, digests in self._found
            for name, digest in zip(names, digests.tolist(), strict=True)
        }
        return torch.tensor([found[spec.name] for spec in manifest.specs], dtype=torch.int64)
