"""`packedcomm doctor`: what packedcomm runs on here, and in plain words what is wrong with it."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

from packedcomm.cli.doctor_probes import PROBES
from packedcomm.cli.doctor_problems import find_problems

__all__ = ["add_arguments", "collect", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `packedcomm doctor`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> int:
    """Print the report; returns 0 whatever it says, for it is a description."""
    report = collect()
    if arguments.json:
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    else:
        from packedcomm.cli.doctor_text import print_report

        print_report(report)
    return 0


def collect(probes: Mapping[str, Callable[[], Any]] = PROBES) -> dict[str, Any]:
    """Run every probe; one that fails leaves `{"error": "..."}` in its place.

    Returns:
        A section per probe, and "problems": a list of sentences.
    """
    report: dict[str, Any] = {}
    for name, probe in probes.items():
        try:
            report[name] = probe()
        except Exception as error:  # noqa: BLE001 - a broken machine is what is being described
            report[name] = {"error": f"{type(error).__name__}: {error}"}
    report["problems"] = find_problems(report)
    return report
