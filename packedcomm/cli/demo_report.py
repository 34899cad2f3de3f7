"""Comparing what the demo's processes hold, and reporting it as a table and as JSON."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from packedcomm.cli.demo_messages import Snapshot
from packedcomm.cli.sizes import format_size
from packedcomm.manifest import Manifest

__all__ = ["DemoReport", "compare", "compare_start", "compare_versions"]

_LISTED = 5
_STAGES = ("pack", "wire", "unpack", "total")


def compare(trainer: Snapshot, receiver: Snapshot) -> list[str]:
    """What differs between a receiver and the trainer at one version; empty when nothing does."""
    who = f"version {trainer.version}, receiver {receiver.rank}"
    problems = []
    if trainer.version != receiver.version:
        problems.append(f"{who}: it holds version {receiver.version}")
    if trainer.digests.keys() != receiver.digests.keys():
        names = sorted(trainer.digests.keys() ^ receiver.digests.keys())
        problems.append(f"{who}: only one side has {_listed(names)}")
    different = [
        name
        for name, digest in trainer.digests.items()
        if receiver.digests.get(name, digest) != digest
    ]
    if different:
        problems.append(f"{who}: {len(different)} tensors differ: {_listed(different)}")
    if trainer.output != receiver.output:
        problems.append(f"{who}: the outputs differ")
    elif trainer.output is not None and not trainer.output.finite:
        problems.append(f"{who}: the outputs are not finite, so that their equality says nothing")
    return problems


def compare_start(trainer: Snapshot, receiver: Snapshot) -> list[str]:
    """Why the comparison at the first version could not have failed, if that is so.

    Args:
        trainer: at version 1.
        receiver: before it received anything.
    """
    if trainer.digests == receiver.digests:
        return [f"receiver {receiver.rank} held the trainer's weights before they were sent"]
    if trainer.output is not None and trainer.output == receiver.output:
        return [f"receiver {receiver.rank} gave the trainer's outputs before the weights were sent"]
    return []


def compare_versions(before: Snapshot, after: Snapshot) -> list[str]:
    """Why two versions of the trainer say less than they should, if that is so."""
    if before.digests == after.digests:
        return [f"version {after.version}: the training step changed no tensor"]
    return []


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(names[:_LISTED]) + more


@dataclass
class DemoReport:
    """What a demo has shown so far. Filled by one thread."""

    checkpoint: str
    transport: str
    wire_format: str
    receivers: int
    manifest: Manifest | None = None
    notes: list[str] = field(default_factory=list)
    rows: list[dict[str, Any]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add_version(
        self, snapshots: dict[int, Snapshot], previous: dict[int, Snapshot]
    ) -> dict[str, Any]:
        """Compare the processes at one version and add its row.

        Args:
            snapshots: of every rank at this version, the trainer's first.
            previous: of every rank at the version before; at version 0 there is no trainer's.
        """
        trainer, receivers = snapshots[0], [s for rank, s in snapshots.items() if rank]
        assert self.manifest is not None
        problems = [line for receiver in receivers for line in compare(trainer, receiver)]
        if 0 in previous:
            problems += compare_versions(previous[0], trainer)
            changed = sum(previous[0].digests[n] != d for n, d in trainer.digests.items())
        else:
            problems += [x for s in previous.values() for x in compare_start(trainer, s)]
            changed = len(trainer.digests)
        total = max(snapshot.seconds["total"] for snapshot in snapshots.values())
        row = {
            "step": trainer.version - 1,
            "version": trainer.version,
            "tensors": len(self.manifest),
            "changed_tensors": changed,
            "bytes": self.manifest.nbytes,
            "seconds": {
                "pack": trainer.seconds["pack"],
                "wire": trainer.seconds["wire"],
                "unpack": max(receiver.seconds["unpack"] for receiver in receivers),
                "total": total,
            },
            "gb_per_s": self.manifest.nbytes / total / 1e9,
            "loss": trainer.loss,
            "outputs_compared": trainer.output is not None,
            "verified": not problems,
            "digests": trainer.digests,
        }
        self.rows.append(row)
        self.problems += problems
        return row

    def table(self) -> Table:
        """One row per version; step 0 is the initial sync.

        Pack and wire are the trainer's, unpack is the slowest receiver's, the total the slowest
        process's. Stages overlap. GB/s is of payload, to each receiver.
        """
        table = Table(box=SIMPLE_HEAD, padding=0, show_edge=False)  # fits 80 columns
        for heading in ("step", "version", "tensors", "bytes", *_STAGES, "GB/s"):
            seconds = " s" if heading in _STAGES else ""
            table.add_column(heading + seconds, justify="right", no_wrap=True)
        table.add_column("verified", no_wrap=True)
        for row in self.rows:
            compared = "yes" if row["outputs_compared"] else "tensors only"
            table.add_row(
                str(row["step"]),
                str(row["version"]),
                f"{row['tensors']:,}",
                format_size(row["bytes"]),
                *(f"{row['seconds'][stage]:.4f}" for stage in _STAGES),
                f"{row['gb_per_s']:.2f}",
                compared if row["verified"] else "NO",
            )
        return table

    def as_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {
            "checkpoint": self.checkpoint,
            "transport": self.transport,
            "format": self.wire_format,
            "receivers": self.receivers,
            "manifest_digest": self.manifest.digest if self.manifest else None,
            "notes": self.notes,
            "rows": self.rows,
            "problems": self.problems,
            "verified": bool(self.rows) and not self.problems,
        }
