"""Measuring ways side by side: checked first and last, timed round-robin in between."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from benchmarks.content import Content, as_bytes, poison
from benchmarks.world import World

__all__ = [
    "Measurement",
    "Row",
    "Transfer",
    "gigabytes_per_second",
    "measure",
    "percentile_95",
    "row",
]

Row = dict[str, Any]
"""One line of a result's JSON."""

_MIN_REPEATS = 5
_SLOW_S = 2.0


@dataclass(frozen=True, slots=True)
class Transfer:
    """One way made ready for one case on this rank."""

    run: Callable[[], Any]
    """Does the whole transfer; on a GPU it may return once everything is enqueued."""
    delivered: Callable[[], Sequence[torch.Tensor]]
    """Where content 0, 1, 2, ... is after `run`; called anew each time."""
    family: str
    """What the way is one variant of; reports show a family's best."""
    receives: bool = True
    """False where this rank's memory is the source, which must not be poisoned."""
    checked_run: Callable[[], Any] | None = None
    """What a check runs, where timed runs leave out bringing the true bytes; None is `run`."""
    count_wrong: Callable[[], int] | None = None
    """Counts what isn't as it must be, where that isn't content 0, 1, 2, ... in `delivered`."""
    stages: Callable[[], Mapping[str, float]] | None = None
    """Seconds by stage of the last run, on rank 0."""


@dataclass(slots=True)
class Measurement:
    """Times and check of one way."""

    family: str
    seconds: list[float] = field(default_factory=list)
    host_seconds: list[float] = field(default_factory=list)
    """Until the call returned on rank 0, which on a GPU can be long before the work is done."""
    stages: list[Mapping[str, float]] = field(default_factory=list)
    wrong: int = 0
    """Bytes that differed from the reference, over all ranks and both checks."""


def measure(
    world: World,
    transfers: Mapping[str, Transfer],
    content: Content,
    *,
    repeats: int,
    corrupt: str | None = None,
    on_device: bool = False,
) -> dict[str, Measurement]:
    """Check every way, time all of them in turn, check every way again.

    The check's pass is the warm-up as well; one more follows. Rounds take the ways in rotating
    order, so that neither drift of the machine nor what the way before left in the caches favours
    one. A way that has used up its time share stops after five repeats.

    Args:
        transfers: name to way; the same names in the same order on every rank.
        repeats: timed runs of each way.
        on_device: on a GPU, time by CUDA events instead of the host's clock.
        corrupt: flip a byte of what this way delivered on the last rank before it is compared: to
            show that the check works.
    """
    timed = world.timed_on_device if on_device and world.device.type == "cuda" else world.timed
    results = {name: Measurement(transfer.family) for name, transfer in transfers.items()}
    # What exists now stays: a collection between two runs then doesn't walk through all of it.
    gc.collect()
    gc.freeze()

    def check(name: str, transfer: Transfer) -> None:
        if transfer.receives:
            poison(transfer.delivered())
        world.timed(transfer.checked_run or transfer.run)
        delivered = transfer.delivered()
        if name == corrupt and world.rank == world.size - 1:
            as_bytes(delivered[-1])[-1] ^= 1
        count = transfer.count_wrong
        wrong = content.count_wrong(delivered) if count is None else count()
        results[name].wrong += world.total(wrong)

    def run_once(name: str, transfer: Transfer) -> None:
        result = results[name]

        def run() -> None:
            begin = time.perf_counter()
            transfer.run()
            result.host_seconds.append(time.perf_counter() - begin)

        result.seconds.append(timed(run))
        if transfer.stages is not None:
            result.stages.append(transfer.stages())

    for name, transfer in transfers.items():
        world.progress(name)
        check(name, transfer)
        world.timed(transfer.run)
    names = list(transfers)
    for number in range(repeats):
        turn = number % len(names)
        for name in names[turn:] + names[:turn]:
            seconds = results[name].seconds
            slow = sum(seconds) > _SLOW_S
            if slow and len(seconds) >= _MIN_REPEATS:
                continue
            world.progress(name)
            run_once(name, transfers[name])
    for name, transfer in transfers.items():
        world.progress(name)
        check(name, transfer)
    world.progress(None)
    gc.unfreeze()
    return results


def row(
    suite: str,
    case: str,
    world_size: int,
    tensors: int,
    nbytes: int,
    way: str,
    result: Measurement,
    **details: Any,
) -> Row:
    """A result as a line of the JSON; the limit's columns are filled in once all ways are known.

    Args:
        nbytes: what the speed is counted in.
        details: what only this suite has.
    """
    median = statistics.median(result.seconds)
    if result.stages:
        details["stages_us"] = {
            stage: round(statistics.median(run.get(stage, 0.0) for run in result.stages) * 1e6, 2)
            for stage in result.stages[-1]
        }
    speed = gigabytes_per_second(nbytes, median)
    return {
        "suite": suite,
        "case": case,
        "world": world_size,
        "way": way,
        "family": result.family,
        "tensors": tensors,
        "nbytes": nbytes,
        "median_us": round(median * 1e6, 2),
        "p95_us": round(percentile_95(result.seconds) * 1e6, 2),
        "host_us": round(statistics.median(result.host_seconds or result.seconds) * 1e6, 2),
        "algbw_gb_s": round(speed, 3),
        # As nccl-tests define it: a broadcast's bus bandwidth is its algorithm bandwidth. Copies on
        # one device have none.
        "busbw_gb_s": round(speed, 3) if suite == "broadcast" else None,
        "limit": None,
        "fraction_of_limit": None,
        "repeats": len(result.seconds),
        "wrong": result.wrong,
        "details": details,
    }


def gigabytes_per_second(nbytes: int, seconds: float) -> float:
    """Payload over time, in units of 10^9 bytes per second."""
    return nbytes / seconds / 1e9


def percentile_95(values: Sequence[float]) -> float:
    """The smallest value that at least 95 % of the values don't exceed."""
    return sorted(values)[math.ceil(0.95 * len(values)) - 1]
