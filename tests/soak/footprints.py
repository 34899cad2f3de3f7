"""Memory, file descriptors and threads of processes, and whether they grow."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Footprints"]

# What an allocator may keep without anything leaking.
SLACK_BYTES = 24 << 20

# For threads that have ended to be gone, on a busy machine.
_SETTLING_S = 5.0


@dataclass
class Footprints:
    """Samples of several processes, first to last. The first ones are taken when warm."""

    samples: dict[str, list[tuple[int, int, int]]] = field(default_factory=dict)
    """By rank: resident bytes, descriptors, threads."""

    def take(self, pids: dict[str, int]) -> None:
        """Look at processes now; a thread that has ended is given a moment to be gone."""
        deadline = time.monotonic() + _SETTLING_S
        for name, pid in pids.items():
            samples = self.samples.setdefault(name, [])
            sample = _sample(pid)
            while samples and _more(sample, samples[0]) and time.monotonic() < deadline:
                time.sleep(0.02)
                sample = _sample(pid)
            samples.append(sample)

    def grown(self) -> list[str]:
        """What has grown between the first sample and the last."""
        found = []
        for name, samples in self.samples.items():
            (memory, files, threads), (memory_now, files_now, threads_now) = samples[0], samples[-1]
            if memory_now > memory + SLACK_BYTES:
                found.append(f"{name}: {memory:,} bytes became {memory_now:,}")
            if files_now > files:
                found.append(f"{name}: {files} descriptors became {files_now}")
            if threads_now > threads:
                found.append(f"{name}: {threads} threads became {threads_now}")
        return found

    def as_dict(self) -> dict[str, Any]:
        """First and last sample of each rank, and what has grown."""
        names = ("resident_mb", "descriptors", "threads")
        return {
            "first": {name: dict(zip(names, _in_mb(s[0]), strict=True)) for name, s in self._all()},
            "last": {name: dict(zip(names, _in_mb(s[-1]), strict=True)) for name, s in self._all()},
            "grown": self.grown(),
        }

    def _all(self) -> list[tuple[str, list[tuple[int, int, int]]]]:
        return list(self.samples.items())


def _more(sample: tuple[int, int, int], first: tuple[int, int, int]) -> bool:
    """Whether it has more descriptors or threads."""
    return sample[1] > first[1] or sample[2] > first[2]


def _in_mb(sample: tuple[int, int, int]) -> tuple[float, int, int]:
    return round(sample[0] / 1e6, 1), sample[1], sample[2]


def _sample(pid: int) -> tuple[int, int, int]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    values = dict(line.split(":", 1) for line in lines)
    resident = int(values["VmRSS"].split()[0]) * 1024
    return resident, len(os.listdir(f"/proc/{pid}/fd")), int(values["Threads"])  # noqa: PTH208
