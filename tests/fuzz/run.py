"""Runs the fuzzer on all targets and writes what it did: `python -m tests.fuzz.run --seconds 600`.

Each target starts from the generated seeds and the corpus in the repository. `--keep` replaces that
corpus by the smallest set of inputs that covers the same. An input that breaks a check is left in
`build/fuzz/`, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from tests.fuzz.checks import CHECKS
from tests.fuzz.corpus import read_corpus, write_corpus
from tests.fuzz.seeds import SEEDS, dictionary

ROOT = Path(__file__).resolve().parents[2]
ARTIFACTS = ROOT / "build" / "fuzz"

# More than the nesting that msgpack and JSON can read; a longer input shows nothing new.
MOST_BYTES = 8192
LIMITS = ["-timeout=10", "-rss_limit_mb=1024", "-malloc_limit_mb=256", f"-max_len={MOST_BYTES}"]

# What the kept inputs may have in the repository, per target.
KEPT_BYTES = 90_000

STATUS = re.compile(r"^#\d+\s+(?:DONE|INITED)\s+cov: (\d+) ft: (\d+) corp: (\d+)/(\S+)", re.M)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz.run", description=__doc__)
    parser.add_argument("--seconds", type=int, default=600, help="for all targets together")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    parser.add_argument("--keep", action="store_true", help="replace the corpus in the repository")
    arguments = parser.parse_args()
    if arguments.seconds < len(CHECKS):
        parser.error(f"--seconds must be at least {len(CHECKS)}")
    each = arguments.seconds // len(CHECKS)
    targets = {target: fuzz(target, each, keep=arguments.keep) for target in CHECKS}
    crashes = sum(figures["crashes"] for figures in targets.values())
    document = {
        "machine": describe_machine("cpu") | {"atheris": version("atheris")},
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"python -m tests.fuzz.run --seconds {arguments.seconds}"
        + " --keep" * arguments.keep,
        "crashes": crashes,
        "targets": targets,
    }
    print(json.dumps(targets, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if crashes else 0


def fuzz(target: str, seconds: int, *, keep: bool) -> dict[str, Any]:
    """Run one target and say what came of it."""
    ARTIFACTS.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        found, words, small = (Path(folder, name) for name in ("found", "words", "small"))
        found.mkdir()
        small.mkdir()
        _write_inputs(found, [*SEEDS[target](), *read_corpus(target)])
        words.write_text(dictionary(target))
        begin = time.monotonic()
        status, log = _target(
            target,
            [
                f"-max_total_time={seconds}",
                f"-dict={words}",
                f"-artifact_prefix={ARTIFACTS}/{target}-",
                # Long inputs from the beginning: deep nesting is long.
                "-len_control=0",
                "-print_final_stats=1",
                found,
            ],
        )
        figures = {
            "seconds": round(time.monotonic() - begin),
            **_figures(log),
            "crashes": 0 if status == 0 else 1,
        }
        if status != 0:
            print(f"{target}: exit status {status}; the end of what it said:\n{log[-6000:]}")
        elif keep:
            status, log = _target(target, ["-merge=1", small, found])
            if status != 0:
                raise RuntimeError(f"merging {target} failed:\n{log[-6000:]}")
            kept = _smallest(small)
            write_corpus(target, kept)
            figures |= {"kept_inputs": len(kept), "kept_bytes": sum(map(len, kept))}
    return figures


def _target(target: str, options: list[str | Path]) -> tuple[int, str]:
    done = subprocess.run(
        [sys.executable, "-m", "tests.fuzz.target", target, *LIMITS, *options],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    return done.returncode, done.stdout


def _figures(log: str) -> dict[str, Any]:
    executed = re.search(r"number_of_executed_units: (\d+)", log)
    memory = re.search(r"peak_rss_mb:\s+(\d+)", log)
    figures: dict[str, Any] = {
        "executions": int(executed[1]) if executed else None,
        "peak_rss_mb": int(memory[1]) if memory else None,
    }
    if status := STATUS.findall(log):
        coverage, features, inputs, _ = status[-1]
        figures |= {
            "coverage": int(coverage),
            "features": int(features),
            "corpus_inputs": int(inputs),
        }
    return figures


def _write_inputs(folder: Path, inputs: Iterable[bytes]) -> None:
    for data in inputs:
        (folder / hashlib.sha256(data).hexdigest()[:16]).write_bytes(data)


def _smallest(folder: Path) -> list[bytes]:
    kept: list[bytes] = []
    for data in sorted((path.read_bytes() for path in folder.iterdir()), key=len):
        if sum(map(len, kept)) + len(data) <= KEPT_BYTES * 3 // 4:
            kept.append(data)
    return kept


if __name__ == "__main__":
    sys.exit(main())
