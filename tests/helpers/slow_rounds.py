"""A trainer whose processes reach each other over a slow network."""

from __future__ import annotations

import time

from packedcomm.sources.bounded_group import BoundedGroup

__all__ = ["slow_rounds"]


def slow_rounds(seconds: float) -> None:
    """Let each round of this process's gathers take some time from now on."""
    real = BoundedGroup.start

    def start(self, operations):
        time.sleep(seconds)
        return real(self, operations)

    BoundedGroup.start = start
