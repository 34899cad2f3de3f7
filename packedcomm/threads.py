"""Threads whose end is waited for, whatever interrupts that, and before the interpreter ends."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from typing import Any

__all__ = ["Thread"]

# How long the interpreter waits for all threads that are in torch when it ends.
AT_EXIT_S = 1.0


class Thread(threading.Thread):
    """A thread that `join` waits for also after it was interrupted.

    CPython up to 3.12 takes a thread for ended once Ctrl-C has come in the middle of `join`.

    Args:
        target, name, args, daemon: as for `threading.Thread`.
        let_end: for a daemon thread that may be inside torch, which takes the whole process down
            if the interpreter ends meanwhile: it is waited for before, for a second. Called then,
            to let it end.
    """

    def __init__(
        self,
        target: Callable[..., object],
        name: str,
        args: tuple[Any, ...] = (),
        *,
        daemon: bool = True,
        let_end: Callable[[], object] | None = None,
    ) -> None:
        super().__init__(target=target, name=name, args=args, daemon=daemon)
        self._let_end = let_end
        self._through = False
        # Held until it is.
        self._running = threading.Lock()
        self._running.acquire()

    def start(self) -> None:
        """As `threading.Thread.start`."""
        if self._let_end is not None:
            _in_torch[self] = self._let_end
        try:
            super().start()
        except BaseException:
            _in_torch.pop(self, None)
            raise

    def run(self) -> None:
        """As `threading.Thread.run`; what the arguments hold is gone when the thread counts as
        ended."""
        try:
            super().run()
        finally:
            _in_torch.pop(self, None)
            self._through = True
            self._running.release()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, for so many seconds at most."""
        # One that is interrupted in between leaves the lock, and nobody needs it any more.
        if self._through:
            return
        if self._running.acquire(timeout=-1 if timeout is None else max(0.0, timeout)):
            self._running.release()


# Those that haven't ended, and what lets them.
_in_torch: dict[Thread, Callable[[], object]] = {}


def _await_all() -> None:
    deadline = time.monotonic() + AT_EXIT_S
    for let_end in list(_in_torch.values()):
        let_end()
    for thread in list(_in_torch):
        thread.join(deadline - time.monotonic())


atexit.register(_await_all)
# A child has none of its parent's threads.
os.register_at_fork(after_in_child=_in_torch.clear)
