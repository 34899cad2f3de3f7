"""Makes README.md's benchmark tables and `docs/benchmark.svg` from `benchmarks/results/*.json`.

python -m benchmarks.report            writes both
python -m benchmarks.report --check    exit status 1 unless README.md has the current tables
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.measure import Row
from benchmarks.result_files import Result, load_results

__all__ = ["main", "render_tables", "replace_section"]

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- benchmark:begin -->"
END = "<!-- benchmark:end -->"

_BROADCAST_FAMILIES = (
    "packedcomm native",
    "packedcomm vLLM format",
    "vLLM packed",
    "vLLM packed, tuned",
    "per tensor",
    "grouped",
    "raw broadcast",
)
_PACK_FAMILIES = (
    "packedcomm CopyPlan",
    "packedcomm pack",
    "torch.cat",
    "foreach",
    "copy_ per tensor",
    "memcpy",
)
_LIMITS = ("raw broadcast", "memcpy")


def render_tables(results: Sequence[Result]) -> str:
    """Markdown: for every machine the broadcasts, packing and applying."""
    parts = [
        "GB/s of payload (10⁹ bytes), median; every way's result was compared bit by bit in the "
        "same run. packedcomm and tuned vLLM are shown at the fastest of the chunk sizes tried, "
        "packedcomm's ratios take the faster of its two formats, vLLM packed is at its default of "
        "1 GiB. One receiver means two GPUs or processes; p95 is in the JSON."
    ]
    for result in results:
        parts.append(f"### {result.title}\n\n{result.details}")
        for suite, text, families, ours, theirs in (
            (
                "broadcast",
                "Broadcast into the receivers' parameters",
                _BROADCAST_FAMILIES,
                ("packedcomm native", "packedcomm vLLM format"),
                "vLLM packed",
            ),
            ("pack", "Packing into one buffer", _PACK_FAMILIES, _PACK_FAMILIES[:1], "torch.cat"),
            (
                "apply",
                "Unpacking into parameters",
                _PACK_FAMILIES,
                _PACK_FAMILIES[:1],
                "copy_ per tensor",
            ),
        ):
            if result.groups(suite):
                parts.append(f"**{text}**\n\n{_table(result, suite, families, ours, theirs)}")
    return "\n\n".join(parts)


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


def _table(
    result: Result, suite: str, known: Sequence[str], ours: Sequence[str], theirs: str
) -> str:
    families = result.families(suite, known)
    limit = next((family for family in families if family in _LIMITS), None)
    receivers = ["1 to"] if suite == "broadcast" else []
    header = ["model", "tensors", "GB", *receivers, *families, f"packedcomm / {theirs}"]
    header += [f"of {limit}"] if limit else []
    lines = [header, ["---"] + ["---:"] * (len(header) - 1)]
    for case, world in result.groups(suite):
        speeds = {family: result.best(suite, case, world, family) for family in families}
        some = next(row for row in speeds.values() if row is not None)
        best = max(_speed(speeds.get(family)) for family in ours)
        kept = result.kept("broadcast" if suite == "broadcast" else "pack", case)
        cells = [
            case if kept == 1 else f"{case}, {kept:.0%} of its bytes",
            f"{some['tensors']:,}",
            f"{some['nbytes'] / 1e9:.3g}",
        ]
        cells += [str(world - 1)] if suite == "broadcast" else []
        cells += [_number(_speed(speeds[family])) for family in families]
        cells.append(_ratio(best, _speed(speeds.get(theirs))))
        if limit:
            cells.append(_ratio(best, _speed(speeds[limit])))
        lines.append(cells)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _speed(row: Row | None) -> float:
    return row["algbw_gb_s"] if row else 0.0


def _number(value: float) -> str:
    if not value:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def _ratio(ours: float, theirs: float) -> str:
    return f"{ours / theirs:.2f}" if ours and theirs else "-"


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
