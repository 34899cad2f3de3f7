"""What a process uses, where nothing must grow."""

from __future__ import annotations

import gc
import time

import psutil

__all__ = ["files_and_threads"]

# A thread that has ended is counted for a moment more, on a busy machine for longer.
_SETTLING_S = 5.0


def files_and_threads(at_most: tuple[int, int] | None = None) -> tuple[int, int]:
    """Descriptors and threads of this process; waits some seconds for them to go down to
    `at_most`."""
    process = psutil.Process()
    deadline = time.monotonic() + _SETTLING_S
    while True:
        gc.collect()
        files, threads = process.num_fds(), process.num_threads()
        settled = at_most is None or (files <= at_most[0] and threads <= at_most[1])
        if settled or time.monotonic() >= deadline:
            return files, threads
        time.sleep(0.02)
