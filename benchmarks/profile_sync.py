"""Shows that later syncs make no Python calls per tensor, on either side, and fails if they do.

    python -m benchmarks.profile_sync
    python -m benchmarks.profile_sync --device cuda

A module of many small parameters is synced between two processes. From the third sync on every call
that the main thread makes is counted, of Python functions and of C functions from Python code, and
in further syncs its processor time is taken, without waiting. Neither may grow with the number of
tensors: calls not at all, time by no more than the native passes over all tensors need.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import torch
from torch import nn

from benchmarks.content import poison
from benchmarks.groups import connect_session
from benchmarks.world import World, WorldFailure, run_world
from packedcomm import (
    FullWeightSender,
    StagedTarget,
    TensorTarget,
    UnchangedWeightsWarning,
    WeightReceiver,
)
from packedcomm.completion import wait_for_device
from packedcomm.session import ReceiverSession

__all__ = ["Profile", "growth_problems", "main"]

_VARIANTS = {
    "in place": (False, False),
    "in place, verified": (False, True),
    "staged, verified": (True, True),
}
_WARM_UP = 2
# Waiting for the other side takes more or fewer calls; the fewest are those of the sync itself.
_PROFILED = 25
_TIMED = 9
_ELEMENTS = 64

# The calls are the measure. The time is a coarse limit, which a busy machine mustn't reach.
_MOST_CALLS_PER_TENSOR = 0.02
_MOST_HOST_US_PER_TENSOR = 5.0


@dataclass(frozen=True, slots=True)
class Profile:
    """One side of one kind of sync."""

    variant: str
    side: str
    tensors: int
    calls: int
    """Of Python functions per sync, the main thread's."""
    c_calls: int
    """Of C functions from Python code."""
    host_us: float
    """Processor time of the main thread per sync, median."""
    most: str
    """The Python functions that were called most often."""


def growth_problems(profiles: Sequence[Profile]) -> list[str]:
    """What grows with the number of tensors, in words; empty if nothing does."""
    problems = []
    kinds: dict[tuple[str, str], list[Profile]] = {}
    for profile in profiles:
        kinds.setdefault((profile.variant, profile.side), []).append(profile)
    for (variant, side), found in kinds.items():
        for small, large in pairwise(sorted(found, key=lambda profile: profile.tensors)):
            more = large.tensors - small.tensors
            for what, growth, most in (
                ("Python calls", large.calls - small.calls, _MOST_CALLS_PER_TENSOR),
                ("C calls", large.c_calls - small.c_calls, _MOST_CALLS_PER_TENSOR),
                ("microseconds", large.host_us - small.host_us, _MOST_HOST_US_PER_TENSOR),
            ):
                if growth > most * more:
                    problems.append(
                        f"{variant}, {side}: {growth:.0f} more {what} for {more:,} more tensors, "
                        f"{growth / more:.2f} per tensor, at most {most:g}; "
                        f"called most: {large.most}"
                    )
    return problems


class _CallCounter:
    """Counts the calls that the current thread makes inside `counting`.

    Not those of `wait_for_device`, which looks again and again while a GPU works.
    """

    def __init__(self) -> None:
        self.by_function: Counter[CodeType] = Counter()
        self.c_calls = 0
        self._waiting: FrameType | None = None

    @property
    def calls(self) -> int:
        """Of Python functions."""
        return self.by_function.total()

    @property
    def most(self) -> str:
        """The three that were called most often."""
        return ", ".join(
            f"{Path(code.co_filename).name}:{code.co_qualname} {count}"
            for code, count in self.by_function.most_common(3)
        )

    def __call__(self, frame: FrameType, event: str, _: Any) -> None:
        """As `sys.setprofile` calls it."""
        if self._waiting is not None:
            if event == "return" and frame is self._waiting:
                self._waiting = None
        elif event == "call":
            self.by_function[frame.f_code] += 1
            if frame.f_code is wait_for_device.__code__:
                self._waiting = frame
        elif event == "c_call":
            self.c_calls += 1

    @contextmanager
    def counting(self) -> Iterator[None]:
        sys.setprofile(self)
        try:
            yield
        finally:
            sys.setprofile(None)


def _profile(world: World, counts: Sequence[int]) -> None:
    """Run by both ranks: profiles of every variant and number of tensors, from both sides."""
    # Here most syncs send the same bytes.
    warnings.simplefilter("ignore", UnchangedWeightsWarning)
    torch.set_num_threads(1)
    session = connect_session(world)
    for count in counts:
        model = _model(count, world.device)
        parameters = [parameter.detach() for parameter in model.parameters()]
        for variant, (staged, verify) in _VARIANTS.items():
            world.progress(f"{variant}, {count} tensors")
            run: Callable[[], object]
            if isinstance(session, ReceiverSession):
                target: Any = TensorTarget(model.state_dict())
                poison(parameters)
                run = WeightReceiver(StagedTarget(target) if staged else target, session).receive
            else:
                run = FullWeightSender(model, session, verify=verify).sync
            counter, host_us = _measured(run)
            wrong = sum(bool((p != i).any()) for i, p in enumerate(parameters))
            side = ("sender", "receiver")[world.rank]
            profile = Profile(
                variant, side, count, counter.calls, counter.c_calls, host_us, counter.most
            )
            world.result_of_each((profile, wrong))
    world.barrier()
    session.close()


def _measured(run: Callable[[], object]) -> tuple[_CallCounter, float]:
    """The calls of the sync with the fewest, and the median microseconds of a sync."""
    for _ in range(_WARM_UP):
        run()
    counters = []
    for _ in range(_PROFILED):
        counter = _CallCounter()
        with counter.counting():
            run()
        counters.append(counter)
    seconds = []
    for _ in range(_TIMED):
        begin = time.thread_time()
        run()
        seconds.append(time.thread_time() - begin)
    fewest = min(counters, key=lambda counter: counter.calls)
    return fewest, statistics.median(seconds) * 1e6


def _model(count: int, device: torch.device) -> nn.Module:
    """A module with that many small parameters, two each in many submodules; parameter i is
    full of i."""
    model = nn.Module()
    for first in range(0, count, 2):
        layer = nn.Module()
        for offset in range(min(2, count - first)):
            value = torch.full((_ELEMENTS,), float(first + offset), device=device)
            layer.register_parameter(("weight", "bias")[offset], nn.Parameter(value))
        model.add_module(f"layer{first // 2}", layer)
    return model


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 when something grows or arrived wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.profile_sync", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--tensors", type=int, nargs="+", default=[500, 5000])
    arguments = parser.parse_args(argv)
    profiles = []
    wrong = 0
    print(
        f"{'sync':20} {'side':9} {'tensors':>8} {'Python calls':>13} {'C calls':>8} "
        f"{'host (us)':>10}"
    )
    bodies = (sorted(arguments.tensors),)
    for outcome in run_world(_profile, 2, arguments.device, bodies, silence_s=90.0):
        if isinstance(outcome, WorldFailure):
            print(f"profile_sync: {outcome.way}: {outcome.error}", file=sys.stderr)
            return 1
        profile, wrong_tensors = outcome
        profiles.append(profile)
        wrong += wrong_tensors
        print(
            f"{profile.variant:20} {profile.side:9} {profile.tensors:8} {profile.calls:13} "
            f"{profile.c_calls:8} {profile.host_us:10.0f}",
            flush=True,
        )
    problems = growth_problems(profiles)
    if wrong:
        problems.append(f"{wrong} tensors arrived wrong")
    for problem in problems:
        print(f"FAILED: {problem}")
    if not problems:
        print("nothing grows with the number of tensors; all tensors arrived right")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
