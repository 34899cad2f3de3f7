"""How much has come over connections without a message that has come to its end.

ZeroMQ bounds each part of a message and counts whole messages; a message of endlessly many parts it
gathers until memory ends. TCP's own count of bytes tells.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct

__all__ = ["Inflow"]

# Between two looks at all connections: seconds at least, and for each one.
PAUSE_S = 0.05
PAUSE_PER_CONNECTION_S = 0.0005

# What the system may have received already of further messages.
SLACK_BYTES = 16 << 20

# `tcpi_bytes_received` of `struct tcp_info` in linux/tcp.h, 64 bits.
_OFFSET = 128
_SIZE = _OFFSET + 8


class Inflow:
    """Looks at connections from time to time. One thread at a time.

    Args:
        max_frame_bytes: what a message may have.
    """

    def __init__(self, max_frame_bytes: int) -> None:
        self._most = 2 * max_frame_bytes + SLACK_BYTES
        # By descriptor: what had been received when a message was last taken.
        self._since: dict[int, int] = {}
        self._heard: set[int] = set()
        self._next = 0.0

    def __contains__(self, descriptor: int) -> bool:
        return descriptor in self._since

    def begin(self, descriptor: int) -> None:
        """A connection has come."""
        self._since[descriptor] = 0

    def end(self, descriptor: int) -> None:
        """It has ended."""
        self._since.pop(descriptor, None)

    def hear(self, descriptor: int) -> None:
        """A whole message has come over it."""
        self._heard.add(descriptor)

    def excessive(self, now: float) -> list[int]:
        """Connections over which more has come without a whole message than any message has.

        Args:
            now: on the monotonic clock, in seconds; mostly it isn't time to look again yet.
        """
        if now < self._next:
            return []
        self._next = now + max(PAUSE_S, PAUSE_PER_CONNECTION_S * len(self._since))
        heard, self._heard = self._heard, set()
        found = []
        for descriptor, since in self._since.items():
            received = _received(descriptor)
            if received is None:
                # Looked at next time.
                self._heard |= heard & {descriptor}
            elif descriptor in heard or received < since:
                self._since[descriptor] = received
            elif received - since > self._most:
                found.append(descriptor)
        return found


def _received(descriptor: int) -> int | None:
    """Bytes that a connection has received; None where the system doesn't tell."""
    # ZeroMQ's descriptor may be closed by now, or mean another socket: whoever ends a connection
    # looks which it is. A socket object must not have it for a moment even: whoever is interrupted
    # there would leave it to the garbage collector, which closes it under ZeroMQ.
    with contextlib.suppress(OSError):
        own = os.dup(descriptor)
        try:
            duplicate = socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP, own)
        except OSError:
            # A file by now.
            os.close(own)
            raise
        with duplicate:
            told = duplicate.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, _SIZE)
        if len(told) == _SIZE:
            return int(struct.unpack_from("=Q", told, _OFFSET)[0])
    return None
