"""The link limit between two GPUs: one plain copy from the memory of one to that of the other."""

from __future__ import annotations

import torch

from benchmarks.content import Content
from benchmarks.measure import Transfer, measure, row
from benchmarks.world import World

__all__ = ["LINK", "link_suite"]

LINK = "link copy"
_NBYTES = 1 << 30


def link_suite(world: World, repeats: int, corrupt: str | None) -> None:
    """Measure GPU 0 to GPU 1, from one process, and report `(case name, rows)`."""
    there = torch.device("cuda", 1)
    source = torch.empty(_NBYTES, dtype=torch.uint8, device=world.device)
    destination = torch.empty(_NBYTES, dtype=torch.uint8, device=there)
    Content(world.device).write([source])

    def copy() -> None:
        destination.copy_(source)
        torch.cuda.synchronize(there)

    transfers = {LINK: Transfer(copy, lambda: [destination], LINK)}
    result = measure(world, transfers, Content(there), repeats=repeats, corrupt=corrupt)[LINK]
    case = "1 GiB peer copy"
    world.result((case, [row("link", case, 1, 1, _NBYTES, LINK, result)]))
