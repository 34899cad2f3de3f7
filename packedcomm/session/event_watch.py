"""A thread that acts on what a ZeroMQ socket has to tell while nobody polls it."""

from __future__ import annotations

import logging
import os
import select
import threading
import weakref
from collections.abc import Callable
from typing import Any

from packedcomm.threads import Thread

__all__ = ["EventWatch"]

logger = logging.getLogger("packedcomm")


class EventWatch:
    """Calls a method of an object whenever a socket's descriptor is readable, on a daemon thread,
    until `stop`.

    It holds the object weakly: one that is forgotten is not kept alive.
    """

    def __init__(self, descriptor: int, look: Callable[[], bool], name: str) -> None:
        """Start the thread.

        Args:
            descriptor: what ZeroMQ gives as `ZMQ_FD`. It is duplicated: ZeroMQ may close its own.
            look: a bound method that takes whatever the socket has, and says whether to go on. What
                it raises is logged.
            name: of the thread.
        """
        self._look: weakref.WeakMethod[Any] = weakref.WeakMethod(look)
        self._lock = threading.Lock()
        self._descriptor = os.dup(descriptor)
        try:
            self._stopped = os.eventfd(0)
        except OSError:
            os.close(self._descriptor)
            raise
        self._ended = False
        self._thread = Thread(self._run, name)
        try:
            self._thread.start()
        except BaseException:
            self._close()
            raise

    def _run(self) -> None:
        poller = select.poll()
        poller.register(self._descriptor, select.POLLIN)
        poller.register(self._stopped, select.POLLIN)
        try:
            while True:
                # Also at first: ZeroMQ signals only what comes after somebody has found nothing.
                if (look := self._look()) is None:
                    return
                try:
                    if not look():
                        return
                except Exception:
                    logger.exception("watching the connections of a session failed")
                del look
                if any(descriptor == self._stopped for descriptor, _ in poller.poll()):
                    return
        finally:
            self._close()

    def _close(self) -> None:
        with self._lock:
            self._ended = True
            os.close(self._descriptor)
            os.close(self._stopped)

    def stop(self) -> None:
        """End the thread soon. Idempotent; any thread."""
        with self._lock:
            if not self._ended:
                os.eventfd_write(self._stopped, 1)

    def join(self, timeout_s: float) -> None:
        """Wait until the thread has ended, for so many seconds at most."""
        self._thread.join(timeout_s)
