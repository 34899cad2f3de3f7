"""What each row is compared with: the raw broadcast, the link or the plain copy of the same run."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.measure import Row

__all__ = ["fill_limits"]

_LIMITS = {
    "pack": "memcpy",
    "apply": "memcpy",
    "cast": "memcpy",
    "digest": "memcpy",
    "broadcast": "raw broadcast",
    "sync": "bare broadcast",
}


def fill_limits(rows: Sequence[Row], link: Row | None) -> None:
    """Set the limit and the fraction of it in the rows of one case in one world.

    A pass over memory is limited by the fastest plain copy of the same bytes (where reading and
    writing are counted apart, of as many altogether), a broadcast by one raw broadcast of the same
    bytes, that one by the link between two GPUs where it was measured, and a sync by the bare
    broadcast of the same tensors.
    """
    for row in rows:
        family = _LIMITS.get(row["suite"])
        if family is None:
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
