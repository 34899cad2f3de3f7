"""Runs everything again and again and writes what was seen: `python -m tests.soak.run`.

Kills of receivers in the middle of syncs, many syncs, many sessions, and the fuzzer. The exit
status is 1 where something was seen that must not be, or something grew.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.machine import describe_machine
from tests.soak.footprints import Footprints
from tests.soak.kills import left_behind, soak_kills
from tests.soak.repeats import soak_connections, soak_syncs

__all__ = ["main"]

# From the kill of a receiver to the typed error on every other rank.
MOST_SECONDS = 2.0


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.soak.run", description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--syncs", type=int, default=1000)
    parser.add_argument("--cycles", type=int, default=200, help="of connecting and closing")
    parser.add_argument("--fuzz-seconds", type=int, default=600, help="0 leaves the fuzzer out")
    parser.add_argument("--seed", type=int, default=0, help="of the kills")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    arguments = parser.parse_args()
    # Every kill is a warning.
    logging.getLogger("packedcomm").setLevel(logging.ERROR)
    document: dict[str, Any] = {
        "machine": describe_machine("cpu"),
        "date": f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC",
        "command": f"python -m tests.soak.run --kills {arguments.kills} "
        f"--syncs {arguments.syncs} --cycles {arguments.cycles} "
        f"--fuzz-seconds {arguments.fuzz_seconds} --seed {arguments.seed}",
    }
    document["syncs"] = soak_syncs(arguments.syncs)
    document["connections"] = soak_connections(arguments.cycles)
    before = Footprints()
    before.take({"sender": os.getpid()})
    begin = time.monotonic()
    kills = soak_kills(arguments.kills, arguments.seed).as_dict()
    kills["seconds"] = round(time.monotonic() - begin, 1)
    problems = list(kills["wrong"])
    for who, spread in kills["seconds_to_error"].items():
        if spread.get("max", 0.0) > MOST_SECONDS:
            problems.append(f"{who}: {spread['max']} s from a kill to the error")
    document["kills"] = kills | {"left_behind": left_behind(before).as_dict()}
    problems += [f"kills: {entry}" for entry in document["kills"]["left_behind"]["grown"]]
    for name in ("syncs", "connections"):
        problems += [f"{name}: {entry}" for entry in document[name]["grown"]]
        problems += [f"{name}: wrong bytes"] * (document[name]["wrong"] > 0)
    if arguments.fuzz_seconds:
        document["fuzz"] = fuzz(arguments.fuzz_seconds)
        problems += ["the fuzzer found something"] * (document["fuzz"]["crashes"] > 0)
    document["problems"] = problems
    print(json.dumps(document, indent=1))
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(json.dumps(document, indent=1) + "\n")
    return 1 if problems else 0


def fuzz(seconds: int) -> dict[str, Any]:
    """Run the fuzzer, and say in short what it did."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "fuzz.json")
        command = [sys.executable, "-m", "tests.fuzz.run", "--seconds", str(seconds)]
        subprocess.run([*command, "--out", str(out)], check=False, stdout=subprocess.DEVNULL)
        found = json.loads(out.read_text())
    executions = {name: figures["executions"] for name, figures in found["targets"].items()}
    return {"seconds": seconds, "crashes": found["crashes"], "executions": executions}


if __name__ == "__main__":
    sys.exit(main())
