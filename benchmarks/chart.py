"""The bar chart of the benchmark results: one panel per machine and kind of transfer."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from benchmarks.result_files import Result

__all__ = ["draw_chart"]

# Two blues for packedcomm, warm colours for what it is compared with (Okabe and Ito's palette, told
# apart by colour-blind readers too). One grey for all text: 4.5 : 1 on white, 4.1 : 1 on the dark
# page of a forge, so one file serves both.
_COLOURS = {
    "packedcomm native": "#0072B2",
    "packedcomm vLLM format": "#56B4E9",
    "vLLM packed": "#D55E00",
    "vLLM packed, tuned": "#CC79A7",
    "per tensor": "#E69F00",
    "grouped": "#009E73",
    "packedcomm CopyPlan": "#0072B2",
    "packedcomm pack": "#56B4E9",
    "torch.cat": "#D55E00",
    "foreach": "#E69F00",
}
_LIMITS = {"broadcast": "raw broadcast", "pack": "memcpy"}
_TEXT = "#767676"
_WIDTH_IN = 10.0
_PANEL_HEIGHT_IN = 3.0


def draw_chart(results: Sequence[Result], path: Path) -> None:
    """Draw packing and every world's broadcasts of every result, as SVG; same input, same file."""
    panels = [
        (result, suite, world)
        for result in results
        for suite in _LIMITS
        for world in sorted({world for _, world in result.groups(suite)})
    ]
    style: dict[Any, object] = {
        "svg.hashsalt": "packedcomm",
        "font.size": 9,
        "text.color": _TEXT,
        "axes.labelcolor": _TEXT,
        "axes.edgecolor": _TEXT,
        "xtick.color": _TEXT,
        "ytick.color": _TEXT,
    }
    with mpl.rc_context(style):
        figure = Figure(figsize=(_WIDTH_IN, _PANEL_HEIGHT_IN * len(panels)), layout="constrained")
        FigureCanvasSVG(figure)
        all_axes = figure.subplots(len(panels), 1, squeeze=False)[:, 0]
        for axes, (result, suite, world) in zip(all_axes, panels, strict=True):
            _draw_panel(axes, result, suite, world)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})


def _draw_panel(axes: Axes, result: Result, suite: str, world: int) -> None:
    cases = [case for case, size in result.groups(suite) if size == world]
    families = result.families(suite, list(_COLOURS))
    width = 0.8 / len(families)
    for number, family in enumerate(families):
        rows = [result.best(suite, case, world, family) for case in cases]
        positions = [index - 0.4 + (number + 0.5) * width for index in range(len(cases))]
        heights = [row["algbw_gb_s"] if row else 0.0 for row in rows]
        axes.bar(positions, heights, width * 0.92, color=_COLOURS[family], label=family)
    limits = [result.best(suite, case, world, _LIMITS[suite]) for case in cases]
    for index, row in enumerate(limits):
        if row:
            label = f"limit: {_LIMITS[suite]}" if index == 0 else ""
            ends = (index - 0.45, index + 0.45)
            axes.hlines(row["algbw_gb_s"], *ends, colors=_TEXT, linestyles="dashed", label=label)
    what = "packing" if suite == "pack" else f"broadcast into parameters, 1 to {world - 1}"
    axes.set_title(f"{result.title}: {what}", loc="left", fontsize=10, pad=24)
    axes.set_xticks(range(len(cases)), [_label(result, suite, case) for case in cases])
    axes.tick_params(axis="x", labelsize=8)
    axes.set_ylabel("GB/s of payload, median")
    axes.spines[["top", "right"]].set_visible(False)
    legend = axes.legend(
        loc="lower left",
        bbox_to_anchor=(-0.01, 0.98),
        ncols=len(families) + 1,
        columnspacing=1.0,
        handlelength=1.2,
        fontsize=8,
        frameon=False,
        labelcolor=_TEXT,
    )
    # It may be wider than the axes, which must not shrink for it.
    legend.set_in_layout(False)


def _label(result: Result, suite: str, case: str) -> str:
    row = next(row for row in result.rows if (row["suite"], row["case"]) == (suite, case))
    return f"{case}\n{row['tensors']:,} tensors\n{row['nbytes'] / 1e9:.3g} GB"
