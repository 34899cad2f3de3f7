"""Benchmark results as written by `benchmarks.run`, read back for tables and charts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.measure import Row

__all__ = ["Result", "load_results"]


class Result:
    """One JSON file: its rows, and what was measured where."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.device: str = document["device"]
        self.machine: dict[str, Any] = document["machine"]
        self.date: str = document["date"]
        self.command: str = document["command"]
        self.rows: list[Row] = document["rows"]
        self._kept = {
            (entry["suite"], entry["case"]): float(entry["kept"]) for entry in document["cases"]
        }

    @property
    def title(self) -> str:
        """The machine in a few words."""
        if self.device == "cuda":
            names = self.machine["gpus"]
            return f"{names[0]}, {len(names)} GPUs"
        return f"CPU, {self.machine['cores']} cores"

    @property
    def details(self) -> str:
        """What the figures depend on, in one line."""
        facts = [self.machine["cpu"]] if self.device == "cpu" else []
        for name in ("torch", "nccl", "driver", "packedcomm"):
            if self.machine.get(name):
                facts.append(f"{name} {self.machine[name]}")
        return f"{', '.join(facts)}; {self.date}; `{self.command}`"

    def kept(self, suite: str, case: str) -> float:
        """Fraction of the model's bytes that a suite's case has."""
        return self._kept[suite, case]

    def groups(self, suite: str) -> list[tuple[str, int]]:
        """(case, world) pairs of a suite in the order of the run."""
        return list(
            dict.fromkeys((row["case"], row["world"]) for row in self.rows if row["suite"] == suite)
        )

    def best(self, suite: str, case: str, world: int, family: str) -> Row | None:
        """The fastest correct way of a family; None where there is none."""
        rows = [
            row
            for row in self.rows
            if (row["suite"], row["case"], row["world"], row["family"])
            == (suite, case, world, family)
            and not row["wrong"]
        ]
        return max(rows, key=lambda row: row["algbw_gb_s"], default=None)

    def ways(self, suite: str, case: str, world: int) -> dict[str, Row]:
        """The correct rows of one case by way."""
        return {
            row["way"]: row
            for row in self.rows
            if (row["suite"], row["case"], row["world"]) == (suite, case, world)
            and not row["wrong"]
        }

    def families(self, suite: str, known: Sequence[str]) -> list[str]:
        """The known families that a suite measured."""
        present = {row["family"] for row in self.rows if row["suite"] == suite}
        return [family for family in known if family in present]


def load_results(folder: Path) -> list[Result]:
    """All results of `benchmarks.run` in a folder, CPUs first; what other programs wrote there is
    left out.

    Raises:
        ValueError: there is none.
    """
    paths = sorted(folder.glob("*.json"), key=lambda path: (not path.name.startswith("cpu"), path))
    documents = [json.loads(path.read_text()) for path in paths]
    results = [Result(document) for document in documents if "rows" in document]
    if not results:
        raise ValueError("no benchmark results: run python -m benchmarks.run first")
    return results
