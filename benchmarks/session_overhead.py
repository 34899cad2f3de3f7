"""What a session adds to a transfer: syncs of one small tensor beside bare broadcasts of it.

    python -m benchmarks.session_overhead --receivers 2

Bare broadcasts and syncs take turns, from one start on all ranks to the end of the slowest; every
receiver's values are compared after each. The median must be at most a millisecond more.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import warnings
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.groups import connect_session
from benchmarks.machine import describe_machine
from benchmarks.world import World, WorldFailure, run_world
from packedcomm import (
    FullWeightSender,
    TensorTarget,
    UnchangedWeightsWarning,
    WeightReceiver,
    broadcast_consumer,
    broadcast_producer,
)
from packedcomm.session import ReceiverSession

_ELEMENTS = 256
_WARM_UP = 20
_MOST_US = 1000.0


def _measure(world: World, repeats: int) -> None:
    """Run by every rank."""
    warnings.simplefilter("ignore", UnchangedWeightsWarning)
    torch.set_num_threads(1)
    session = connect_session(world)
    weights = {"w": torch.zeros(_ELEMENTS, device=world.device)}
    stages: list[dict[str, float]] = []
    bare: Callable[[], object]
    sync: Callable[[], object]
    if isinstance(session, ReceiverSession):
        target = TensorTarget(weights)
        metadata = [("w", ((_ELEMENTS,), torch.float32))]
        sync = WeightReceiver(target, session).receive

        def bare() -> None:
            broadcast_consumer(
                metadata,
                session.communicator,
                post_unpack_func=target,
                device=world.device,
                wire_format=session.wire_format,
            )
    else:
        sender = FullWeightSender(weights, session, verify=False)

        def sync() -> None:
            stages.append(dict(sender.sync().seconds))

        def bare() -> None:
            broadcast_producer(
                weights.items(), session.communicator, wire_format=session.wire_format
            )

    seconds: dict[str, list[float]] = {"bare": [], "sync": []}
    wrong = 0
    for turn in range(_WARM_UP + repeats):
        for way, run in (("bare", bare), ("sync", sync)):
            value = float(2 * turn + (way == "sync"))
            weights["w"].fill_(value if world.rank == 0 else -1.0)
            spent = world.timed(run)
            wrong += int((weights["w"] != value).sum())
            if turn >= _WARM_UP:
                seconds[way].append(spent)
    wrong = world.total(wrong)
    world.result((seconds, stages[_WARM_UP:], wrong))
    world.barrier()
    session.close()


def _percentiles(seconds: Sequence[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {
        "median_us": round(statistics.median(ordered) * 1e6, 1),
        "p95_us": round(ordered[int(len(ordered) * 0.95)] * 1e6, 1),
    }


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status: 1 when values are wrong or the bar is missed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.session_overhead", description=__doc__
    )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--receivers", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=400)
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    arguments = parser.parse_args(argv)
    outcome: Any = None
    world = run_world(
        _measure, arguments.receivers + 1, arguments.device, (arguments.repeats,), silence_s=120.0
    )
    for outcome in world:
        if isinstance(outcome, WorldFailure):
            print(f"session_overhead: {outcome.error}", file=sys.stderr)
            return 1
    seconds, stages, wrong = outcome
    ways = {way: _percentiles(spent) for way, spent in seconds.items()}
    overhead = round(ways["sync"]["median_us"] - ways["bare"]["median_us"], 1)
    record = {
        "program": "benchmarks.session_overhead",
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": describe_machine(arguments.device),
        "receivers": arguments.receivers,
        "syncs": arguments.repeats,
        "wrong_values": wrong,
        **ways,
        "overhead_us": overhead,
        "most_us": _MOST_US,
        "stages": {
            stage: _percentiles([each[stage] for each in stages])
            for stage in ("agree", "verify", "commit")
        },
    }
    print(json.dumps(record, indent=2))
    if arguments.out is not None:
        cores = record["machine"]["cores"]
        name = f"session-overhead-{arguments.device}-{cores}cores-{arguments.receivers}.json"
        arguments.out.mkdir(parents=True, exist_ok=True)
        (arguments.out / name).write_text(json.dumps(record, indent=2) + "\n")
    return 1 if wrong or overhead > _MOST_US else 0


if __name__ == "__main__":
    sys.exit(main())
