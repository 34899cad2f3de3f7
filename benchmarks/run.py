"""Command line of the benchmarks: runs suites in worlds of processes, prints rows, writes the JSON.

    python -m benchmarks.run --device cpu --worlds 2,3
    python -m benchmarks.run --device cuda --worlds 2,4

Exit status 1 when a byte arrived wrong or a way failed, 2 when nothing could be measured; bars that
aren't met are only reported.
"""

from __future__ import annotations

import argparse
import datetime
import json
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import compute_bars
from benchmarks.broadcasting import broadcast_suite
from benchmarks.cases import CASES, EXPERTS, Case, load_case, parse_size, tiny_experts
from benchmarks.experts import experts_suite
from benchmarks.limits import fill_limits
from benchmarks.link import LINK, link_suite
from benchmarks.machine import available_bytes, describe_machine, processor_count, without_paths
from benchmarks.measure import Row
from benchmarks.memory_passes import casting_suite
from benchmarks.packing import packing_suite
from benchmarks.peers import BUFFER_SIZES, NUM_BUFFERS, VLLM_FILES
from benchmarks.syncing import SYNC_CASES, sync_suite
from benchmarks.world import WorldFailure, run_world

__all__ = ["Results", "main", "run_cases"]

RESULTS = Path(__file__).resolve().parent / "results"
_SUITES = ("pack", "cast", "experts", "broadcast", "sync")
_CAST_CASES = ("llama-3-8b", "minilm")
_REPEATS = {"cpu": 9, "cuda": 15}
# On a CPU the others are cut down to a few layers: they take minutes and tell no more.
_DEFAULT_CASES = {"cpu": ("llama-3-8b-lora-r16", "llama-3-8b", "minilm"), "cuda": CASES}
_PACKING_LIMIT = 2 << 30
# Far beyond any cache. A CPU moves about a gigabyte per second: more would cost minutes and tell no
# more.
_CPU_LIMIT = 500_000_000
_GPU_RESERVE = 12 << 30


class Results:
    """The JSON document; written anew at every addition, so that a crash loses nothing."""

    def __init__(self, path: Path, document: dict[str, Any]) -> None:
        self.path = path
        self.document = document | {
            "cases": [], "rows": [], "skipped": [], "failures": [], "bars": []
        }  # fmt: skip
        path.parent.mkdir(parents=True, exist_ok=True)

    @property
    def rows(self) -> list[Row]:
        """Every measured way so far."""
        rows: list[Row] = self.document["rows"]
        return rows

    @property
    def succeeded(self) -> bool:
        """True when no byte was wrong and nothing failed."""
        return not self.document["failures"] and not any(row["wrong"] for row in self.rows)

    def add(self, section: str, entries: Sequence[Row]) -> None:
        """Append to a section of the document and write it."""
        self.document[section] += entries
        whole = json.dumps(self.document, indent=1) + "\n"
        partial = self.path.with_suffix(".partial")
        partial.write_text(whole)
        partial.replace(self.path)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    arguments = _parser().parse_args(argv)
    device = arguments.device
    if device == "cuda" and not torch.cuda.is_available():
        print("benchmarks: --device cuda, but torch sees no GPU", file=sys.stderr)
        return 2
    devices = torch.cuda.device_count() if device == "cuda" else processor_count()
    worlds = arguments.worlds or ([2, 3] if device == "cpu" else [2, 4])
    repeats = arguments.repeats or _REPEATS[device]
    names = arguments.cases or _DEFAULT_CASES[device]
    limit = arguments.max_bytes or _fitting_bytes(device, max(worlds))
    threads = min(8, processor_count())
    buffer_sizes = arguments.buffer_sizes or BUFFER_SIZES[device]
    out = arguments.out
    results = Results(
        out if out.suffix == ".json" else out / f"{device}-{devices}.json",
        {
            "schema": 1,
            "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "command": _command(argv),
            "device": device,
            "machine": describe_machine(device),
            "settings": {
                "worlds": worlds,
                "repeats": repeats,
                "scale": arguments.scale,
                "max_bytes": limit,
                "packing_threads": threads,
                "buffer_sizes": list(buffer_sizes),
                "num_buffers": NUM_BUFFERS,
                "vllm": VLLM_FILES.name if VLLM_FILES.exists() else None,
            },
        },
    )
    print(_HEADER)
    common = {"results": results, "device": device, "silence_s": arguments.silence_s}
    rest = (repeats, threads, arguments.corrupt)
    packing_limit = min(limit, _PACKING_LIMIT)
    if "pack" in arguments.suite:
        cases = _load(arguments, names, packing_limit, "pack", results)
        run_cases(packing_suite, 1, cases, **common, rest=rest)
    if "cast" in arguments.suite:
        chosen = [name for name in names if name in _CAST_CASES]
        cases = _load(arguments, chosen, packing_limit, "cast", results)
        run_cases(casting_suite, 1, cases, **common, rest=rest)
    if "experts" in arguments.suite and EXPERTS in (arguments.cases or [EXPERTS]):
        if device == "cpu":
            cases = _recorded([tiny_experts()], "experts", results)
        else:
            cases = _load(arguments, [EXPERTS], limit, "experts", results)
        run_cases(experts_suite, 1, cases, **common, rest=rest)
    fitting = [world for world in worlds if device == "cpu" or world <= devices]
    for world in worlds:
        if world not in fitting:
            _skip(results, f"world of {world}", f"this machine has {devices} GPUs")
    if "broadcast" in arguments.suite:
        if device == "cuda" and devices > 1:
            run_cases(link_suite, 1, None, **common, rest=(repeats, arguments.corrupt))
        if not VLLM_FILES.exists():
            _skip(results, "vLLM packed", "its files are missing: python -m benchmarks.fetch_peers")
        cases = _load(arguments, names, limit, "broadcast", results)
        for world in fitting:
            run_cases(
                broadcast_suite, world, cases, **common,
                rest=(buffer_sizes, repeats, max(1, threads // world), arguments.corrupt),
            )  # fmt: skip
    if "sync" in arguments.suite:
        chosen = [name for name in names if name in SYNC_CASES]
        cases = _load(arguments, chosen, limit, "sync", results)
        for world in fitting:
            run_cases(
                sync_suite, world, cases, **common,
                rest=(repeats, max(1, threads // world), arguments.corrupt),
            )  # fmt: skip
    _finish(results, device, worlds)
    if arguments.corrupt and not any(row["way"] == arguments.corrupt for row in results.rows):
        print(f"benchmarks: no way is called {arguments.corrupt!r}", file=sys.stderr)
        return 2
    if not results.rows:
        print("benchmarks: nothing was measured", file=sys.stderr)
        return 2
    return 0 if results.succeeded else 1


def run_cases(
    body: Callable[..., None],
    size: int,
    cases: Sequence[Case] | None,
    *,
    rest: tuple[Any, ...],
    results: Results,
    device: str,
    silence_s: float,
) -> None:
    """Run a suite over its cases; after a failure start anew without the way that failed.

    Args:
        cases: None for a suite without cases.
        rest: the suite's further arguments.
    """
    if cases is not None and not cases:
        return
    pending = [] if cases is None else list(cases)
    excluded: dict[str, frozenset[str]] = {}
    without_a_way = 0
    while True:
        failure: WorldFailure | None = None
        first = () if cases is None else (tuple(pending), excluded)
        for outcome in run_world(body, size, device, (*first, *rest), silence_s=silence_s):
            if isinstance(outcome, WorldFailure):
                failure = outcome
                continue
            _, rows = outcome
            if pending:
                pending.pop(0)
            link = next((row for row in results.rows if row["way"] == LINK), None)
            fill_limits(rows, link)
            for row in rows:
                print(_line(row), flush=True)
            results.add("rows", rows)
        if failure is None:
            return
        case = pending[0].name if pending else None
        entry = {
            "suite": body.__name__,
            "case": case,
            "world": size,
            "way": failure.way,
            "error": without_paths(failure.error),
        }
        results.add("failures", [entry])
        print(f"FAILED: {entry}", file=sys.stderr, flush=True)
        if case is None:
            return
        if failure.way is not None:
            excluded[case] = excluded.get(case, frozenset()) | {failure.way}
            continue
        # The case's memory, or the set-up of the world, which no other case would get past.
        pending.pop(0)
        without_a_way += 1
        if without_a_way == 2 or not pending:
            return


def _load(
    arguments: argparse.Namespace, names: Sequence[str], limit: int, suite: str, results: Results
) -> list[Case]:
    cases = []
    for name in names:
        try:
            cases.append(load_case(name, max_bytes=limit, scale=arguments.scale))
        except ValueError as error:
            _skip(results, f"{suite} {name}", str(error))
    return _recorded(cases, suite, results)


def _recorded(cases: list[Case], suite: str, results: Results) -> list[Case]:
    results.add("cases", [{"suite": suite} | case.as_dict() for case in cases])
    return cases


def _skip(results: Results, what: str, reason: str) -> None:
    results.add("skipped", [{"what": what, "reason": reason}])
    print(f"skipped: {what}: {reason}", flush=True)


def _finish(results: Results, device: str, worlds: Sequence[int]) -> None:
    results.add("bars", compute_bars(device, worlds, results.rows))
    print(f"\n{'required':>8} {'measured':>8}  bar")
    for bar in results.document["bars"]:
        measured = "-" if bar["measured"] is None else f"{bar['measured']:.2f}"
        verdict = {None: "not measured", True: "met", False: "NOT MET"}[bar["met"]]
        print(f"{bar['required']:8.2f} {measured:>8}  {bar['bar']}: {verdict}")
    wrong = sum(row["wrong"] for row in results.rows)
    print(f"wrong bytes: {wrong}; failures: {len(results.document['failures'])}")


def _fitting_bytes(device: str, ranks: int) -> int:
    """Payload per rank that fits the free memory.

    A rank holds the parameters and another buffer (a raw broadcast's, staging, received experts);
    on a CPU, where all ranks share the
    memory and chunks can be as large as the payload, two more on top of it.
    """
    free = available_bytes(device)
    if device == "cuda":
        return (free - _GPU_RESERVE) // 2
    return min(_CPU_LIMIT, int(free * 0.7) // (4 * ranks))


_HEADER = (
    f"{'suite':9} {'case':26} {'ranks':>5} {'way':32} {'tensors':>7} {'size (B)':>14} "
    f"{'time (us)':>12} {'p95 (us)':>12} {'host (us)':>12} {'algbw (GB/s)':>12} "
    f"{'busbw (GB/s)':>12} {'of limit':>8}  {'limit':18} {'wrong':>5}"
)


def _line(row: Row) -> str:
    bus = "-" if row["busbw_gb_s"] is None else f"{row['busbw_gb_s']:.3f}"
    fraction = "-" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.3f}"
    return (
        f"{row['suite']:9} {row['case']:26} {row['world']:5} {row['way']:32} {row['tensors']:7} "
        f"{row['nbytes']:14} {row['median_us']:12.1f} {row['p95_us']:12.1f} {row['host_us']:12.1f} "
        f"{row['algbw_gb_s']:12.3f} {bus:>12} {fraction:>8}  {row['limit'] or '-':18} "
        f"{row['wrong']:5}"
    )


def _command(argv: Sequence[str]) -> str:
    """The command line, without where the result went."""
    shown = list(argv)
    if "--out" in shown:
        del shown[shown.index("--out") : shown.index("--out") + 2]
    return shlex.join(["python", "-m", "benchmarks.run", *shown])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    add = parser.add_argument
    add("--device", choices=("cpu", "cuda"), default="cpu")
    add("--worlds", type=_integers, help="ranks of each broadcast; default 2,3 or, on GPUs, 2,4")
    add(
        "--suite",
        type=_choices(_SUITES),
        default=list(_SUITES),
        help=f"default: {','.join(_SUITES)}",
    )
    add("--cases", type=_choices(CASES), help="default: all of them, on a CPU a few")
    add("--scale", type=float, default=1.0, help="keep at most this fraction of each model")
    add("--max-bytes", type=parse_size, help="and at most so many bytes; default: what fits")
    add("--buffer-sizes", type=_sizes, help="chunk sizes of the packed ways, such as 1GiB,64MiB")
    add("--repeats", type=int, help="timed runs of each way; default 9, on GPUs 15")
    add("--silence-s", type=float, default=90.0, help="end a world that is silent for so long")
    add("--out", type=Path, default=RESULTS, help="x.json, or a folder for DEVICE-COUNT.json")
    add("--corrupt", metavar="WAY", help="damage what a way delivered, to see the run fail")
    return parser


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _sizes(text: str) -> list[int]:
    return [parse_size(part) for part in text.split(",")]


def _choices(known: Sequence[str]) -> Callable[[str], list[str]]:
    def parse(text: str) -> list[str]:
        names = text.split(",")
        unknown = [name for name in names if name not in known]
        if unknown:
            raise argparse.ArgumentTypeError(f"unknown {unknown}; known: {', '.join(known)}")
        return names

    return parse


if __name__ == "__main__":
    sys.exit(main())
