"""Makes README.md's benchmark tables and `docs/benchmark.svg` from `benchmarks/results/*.json`.

python -m benchmarks.report            writes both
python -m benchmarks.report --check    exit status 1 unless README.md has the current tables
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.result_files import load_results
from benchmarks.tables import render_tables

__all__ = ["main", "replace_section"]

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"


def replace_section(text: str, section: str) -> str:
    """The text with what stands between the markers replaced.

    Raises:
        ValueError: the markers are missing or not in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README.md needs the lines {BEGIN} and {END}")
    return f"{before}{begin}\n{section}\n{end}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__)
    parser.add_argument("--check", action="store_true", help="write nothing, compare README.md")
    parser.add_argument("--results", type=Path, default=ROOT / "benchmarks" / "results")
    parser.add_argument("--readme", type=Path, default=ROOT / "README.md")
    parser.add_argument("--chart", type=Path, default=ROOT / "docs" / "benchmark.svg")
    arguments = parser.parse_args(argv)
    try:
        results = load_results(arguments.results)
        text = arguments.readme.read_text()
        current = replace_section(text, render_tables(results))
    except (OSError, ValueError) as error:
        print(f"report: {error}", file=sys.stderr)
        return 1
    if arguments.check:
        if current != text:
            print(
                f"report: {arguments.readme.name} differs from the results: "
                "run python -m benchmarks.report",
                file=sys.stderr,
            )
            return 1
        return 0
    # Drawing needs matplotlib, the tables and the check don't.
    from benchmarks.chart import draw_chart

    arguments.readme.write_text(current)
    draw_chart(results, arguments.chart)
    print(f"wrote {arguments.readme.name} and {arguments.chart.name} from {len(results)} results")
    return 0


if __name__ == "__main__":
    sys.exit(main())
