"""The supervisor: a thread that looks after a session while the session's own is blocked."""

from __future__ import annotations

import contextlib
import logging
import threading
import weakref
from collections.abc import Callable
from typing import Any

from packedcomm.threads import Thread

__all__ = ["LOOK_S", "Supervisor"]

logger = logging.getLogger("packedcomm")

# How often it looks. A peer's death is noticed within this time and what ZeroMQ needs.
LOOK_S = 0.05


class Supervisor:
    """Calls a method of an object every 50 ms, on a daemon thread, until `stop`.

    It holds the object weakly: one that is forgotten is not kept alive, and ends the thread.
    """

    def __init__(self, look: Callable[[], object], name: str) -> None:
        """Start the thread.

        Args:
            look: a bound method. It must not wait for long; what it raises is logged.
            name: of the thread.
        """
        self._look: weakref.WeakMethod[Any] = weakref.WeakMethod(look)
        # Held until `stop`. An event's lock would stay held by whoever is interrupted in its `set`.
        self._running = threading.Lock()
        self._running.acquire()
        self._thread = Thread(self._run, name)
        self._thread.start()

    def _run(self) -> None:
        while not self._running.acquire(timeout=LOOK_S):
            look = self._look()
            if look is None:
                return
            try:
                look()
            except Exception:
                # It must go on: the next look may be the one that ends a hang.
                logger.exception("the supervisor of a session failed")
            del look

    def stop(self, timeout_s: float) -> None:
        """End the thread and wait for that; from the thread itself it only ends. Idempotent."""
        with contextlib.suppress(RuntimeError):
            self._running.release()
        if self._thread is not threading.current_thread():
            self._thread.join(timeout_s)
