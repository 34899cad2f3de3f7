"""What each row is compared with: the raw broadcast, the link or the plain copy of the same run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import Row

__all__ = ["fill_limits"]


def fill_limits(rows: Sequence[Row], link: Row | None) -> None:
    """Set the limit and the fraction of it in the rows of one case in one world.

    Packing is limited by the fastest plain copy of the same bytes, a broadcast by one raw broadcast
    of the same bytes, and that one by the link between two GPUs where it was measured.
    """
    for row in rows:
        if row["suite"] == "broadcast":
            family = "raw broadcast"
        elif row["suite"] in ("pack", "apply"):
            family = "memcpy"
        else:
            continue
        limit = max(
            (
                other
                for other in rows
                if (other["suite"], other["family"]) == (row["suite"], family)
            ),
            key=lambda other: other["algbw_gb_s"],
            default=None,
        )
        if row["family"] == "raw broadcast":
            limit = link
        if limit is not None and limit is not row:
            row["limit"] = limit["way"]
            row["fraction_of_limit"] = round(row["algbw_gb_s"] / limit["algbw_gb_s"], 4)
