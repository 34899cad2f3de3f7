"""Descriptors of open files and sockets: whether enough are free, and the error where they aren't.

ZeroMQ and Gloo may end the process where they get none, so they are counted before.
"""

from __future__ import annotations

import contextlib
import errno
import os
import resource
import sys
import time
from collections.abc import Iterator

from packedcomm.errors import TooManyOpenFiles

__all__ = ["check_descriptors", "most_descriptors", "naming_the_limit"]

# How long some are waited for: those of connections that are just being cut off come free.
PATIENCE_S = 1.0
PAUSE_S = 0.02

_EXHAUSTED = (errno.EMFILE, errno.ENFILE)


def check_descriptors(count: int, what: str) -> None:
    """Check that so many descriptors are free, or come free within a second.

    Args:
        count: how many are needed.
        what: what they are needed for, for the message.

    Raises:
        TooManyOpenFiles: fewer are; the message names the limit.
    """
    end = time.monotonic() + PATIENCE_S
    while (free := _free()) < count:
        if time.monotonic() >= end:
            raise TooManyOpenFiles(f"{what} needs {count} descriptors, {free} {_limit()}")
        time.sleep(PAUSE_S)


@contextlib.contextmanager
def naming_the_limit(what: str) -> Iterator[None]:
    """Raise `TooManyOpenFiles` for an error inside that says so.

    Args:
        what: what is done inside, for the message.
    """
    try:
        yield
    except TooManyOpenFiles:
        raise
    except Exception as error:
        # Also ZeroMQ's, which is no OSError.
        if getattr(error, "errno", None) not in _EXHAUSTED:
            raise
        raise TooManyOpenFiles(f"{what}: none {_limit()}") from error


def _free() -> int:
    limit = most_descriptors()
    try:
        taken = os.listdir("/proc/self/fd")  # noqa: PTH208  (Path.iterdir would stat each)
    except OSError as error:
        if error.errno in _EXHAUSTED:
            return 0
        raise
    # What was opened under a higher limit doesn't count.
    return limit - sum(int(name) < limit for name in taken)


def most_descriptors() -> int:
    """How many this process may have."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return sys.maxsize if limit == resource.RLIM_INFINITY else limit


def _limit() -> str:
    most = most_descriptors()
    return f"of the {most:,} that this process may have (RLIMIT_NOFILE, ulimit -n) are free"
