"""The TCP connections that Gloo made: which rank is at the other end, and how to cut them.

Gloo offers no way to interrupt an operation. Shutting its sockets down does: both ends see the
connection closed, at once, and every operation on it ends with an error.
"""

from __future__ import annotations

import json
import os
import socket
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from packedcomm.errors import ProtocolError

__all__ = ["PeerSockets", "socket_inodes"]

# (local IP, local port, remote IP, remote port)
Endpoints = tuple[str, int, str, int]

DESCRIPTORS = "/proc/self/fd"

MAX_ENDPOINTS_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class _PeerSocket:
    rank: int | None
    descriptor: int
    endpoints: Endpoints


class PeerSockets:
    """The connections of one Gloo group on this rank. `cut` may be called from any thread."""

    def __init__(self, sockets: Iterable[_PeerSocket]) -> None:
        """Use `PeerSockets.find`."""
        self._sockets = tuple(sockets)

    @classmethod
    def find(
        cls,
        before: set[int],
        rank: int,
        world_size: int,
        publish: Callable[[bytes], object],
        published: Callable[[int], bytes],
    ) -> PeerSockets:
        """Find the connections made since `before` and learn whose they are.

        Every rank publishes both ends of its new connections; the peer of a connection is the rank
        that published the same one the other way round.

        Args:
            before: `socket_inodes` from before the group was made.
            rank: this rank.
            world_size: number of ranks.
            publish: gives this rank's list to the others.
            published: returns another rank's list, waiting for it.

        Raises:
            ProtocolError: another rank's list is malformed.
        """
        mine = [
            (descriptor, endpoints)
            for descriptor, inode in _sockets()
            if inode not in before and (endpoints := _endpoints(descriptor)) is not None
        ]
        publish(json.dumps([endpoints for _, endpoints in mine]).encode("ascii"))
        owners: dict[Endpoints, int] = {}
        for other in range(world_size):
            if other != rank:
                for local, port, remote, remote_port in _parse(published(other), other):
                    owners[remote, remote_port, local, port] = other
        matched = [_PeerSocket(owners.get(ends), fd, ends) for fd, ends in mine]
        if len(matched) != world_size - 1:
            # Sockets of other threads are among them: keep what is surely Gloo's.
            matched = [peer for peer in matched if peer.rank is not None]
        return cls(matched)

    def closed_ranks(self) -> list[int]:
        """The ranks whose connection is closed, at either end."""
        closed = {peer.rank for peer in self._sockets if not _apply(peer, _is_open)}
        return sorted(rank for rank in closed if rank is not None)

    def cut(self) -> None:
        """Shut all connections down. Does nothing to those that are closed."""
        for peer in self._sockets:
            _apply(peer, _shut_down)


def socket_inodes() -> set[int]:
    """Identities of all sockets that this process has open now."""
    return {inode for _, inode in _sockets()}


def _sockets() -> list[tuple[int, int]]:
    found = []
    for name in os.listdir(DESCRIPTORS):  # noqa: PTH208  (Path.iterdir would stat each)
        try:
            status = os.stat(int(name))  # noqa: PTH116  (a descriptor, not a path)
        except OSError:
            continue
        if stat.S_ISSOCK(status.st_mode):
            found.append((int(name), status.st_ino))
    return found


def _endpoints(descriptor: int) -> Endpoints | None:
    """Both ends of a connected TCP socket, None for anything else."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            return _ends(duplicate)
    except OSError:
        return None


def _ends(connection: socket.socket) -> Endpoints | None:
    internet = connection.family in (socket.AF_INET, socket.AF_INET6)
    if not internet or connection.type != socket.SOCK_STREAM:
        return None
    local, remote = connection.getsockname(), connection.getpeername()
    return (local[0], local[1], remote[0], remote[1])


def _apply(peer: _PeerSocket, action: Callable[[socket.socket], bool]) -> bool:
    """Run `action` on the connection if it is still open; False where it isn't."""
    try:
        # Duplicated first and compared then: Gloo may close the descriptor at any moment and the
        # number may come to mean another socket.
        with socket.socket(fileno=os.dup(peer.descriptor)) as duplicate:
            return _ends(duplicate) == peer.endpoints and action(duplicate)
    except OSError:
        return False


def _is_open(connection: socket.socket) -> bool:
    try:
        return connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT) != b""
    except BlockingIOError:
        return True


def _shut_down(connection: socket.socket) -> bool:
    connection.shutdown(socket.SHUT_RDWR)
    return True


def _parse(data: bytes, rank: int) -> list[Endpoints]:
    try:
        if len(data) > MAX_ENDPOINTS_BYTES:
            raise ValueError(f"{len(data)} bytes")
        return [(str(a), int(b), str(c), int(d)) for a, b, c, d in json.loads(data)]
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"connections of rank {rank} are malformed: {error}") from None
