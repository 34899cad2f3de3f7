"""The TCP connections that Gloo made: which rank is at the other end, and how to cut them.

Gloo offers no way to interrupt an operation. Shutting its sockets down does: both ends see the
connection closed, at once, and every operation on it ends with an error.
"""

from __future__ import annotations

import json
import os
import socket
import stat
import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, TypeVar

from packedcomm.errors import ProtocolError

__all__ = [
    "Endpoint",
    "PeerSockets",
    "cut_connections_to",
    "listening_since",
    "socket_inodes",
]

Value = TypeVar("Value")

# (IP, port)
Endpoint = tuple[str, int]

# (local IP, local port, remote IP, remote port)
Endpoints = tuple[str, int, str, int]

DESCRIPTORS = "/proc/self/fd"

MAX_ENDPOINTS_BYTES = 1 << 20

# Held while descriptors are listed, and while one is duplicated for a moment: a duplicate that
# another thread lists would be taken for a second connection. A signal handler may cut connections
# in the middle of either.
_duplicating = threading.RLock()


def _renew_lock() -> None:
    global _duplicating
    _duplicating = threading.RLock()


os.register_at_fork(after_in_child=_renew_lock)


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
        listening: Endpoint,
        rank: int,
        world_size: int,
        publish: Callable[[str, bytes], object],
        published: Callable[[str, int], bytes],
    ) -> PeerSockets:
        """Find the group's connections and learn whose they are.

        One end of each is where a rank's Gloo listens, which no other group shares: the process may
        have other groups, and be making them at the same time. Every rank publishes where it
        listens, then both ends of its connections; the peer of a connection is the rank that
        published the same one the other way round.

        Args:
            before: `socket_inodes` from before the group was made.
            listening: where this rank's Gloo listens.
            rank: this rank.
            world_size: number of ranks.
            publish: gives something to the other ranks, under a name.
            published: returns what another rank gives under a name, waiting for it.

        Raises:
            ProtocolError: what another rank published is malformed.
        """
        others = [other for other in range(world_size) if other != rank]
        publish("listening", _to_json(listening))
        peers = {_parse(published("listening", other), other, _to_endpoint) for other in others}
        mine = [
            (descriptor, ends)
            for descriptor, ends in _inspected(before, _ends)
            if ends[:2] == listening or ends[2:] in peers
        ]
        publish("connections", _to_json([ends for _, ends in mine]))
        owners: dict[Endpoints, int] = {}
        for other in others:
            theirs = _parse(published("connections", other), other, _to_connections)
            for local, port, remote, remote_port in theirs:
                owners[remote, remote_port, local, port] = other
        return cls(_PeerSocket(owners.get(ends), fd, ends) for fd, ends in mine)

    def closed_ranks(self) -> list[int]:
        """The ranks whose connection is closed, at either end."""
        closed = {peer.rank for peer in self._sockets if not _apply(peer, _is_open)}
        return sorted(rank for rank in closed if rank is not None)

    def cut(self) -> None:
        """Shut all connections down. Does nothing to those that are closed."""
        for peer in self._sockets:
            _apply(peer, _shut_down)


def cut_connections_to(port: int) -> None:
    """Shut down this process's connections to a port that it listens on itself."""
    # By their ports, since one end may write an IPv4 address as the other does, or as IPv6.
    accepted = {ends[3] for _, ends in _inspected(set(), _ends) if ends[1] == port}

    def cut(connection: socket.socket) -> bool:
        _, local, _, remote = _ends(connection)
        return remote == port and local in accepted and _shut_down(connection)

    _inspected(set(), cut)


def socket_inodes() -> set[int]:
    """Identities of all sockets that this process has open now."""
    return {inode for _, inode in _sockets()}


def _inspected(
    before: set[int], function: Callable[[socket.socket], Value | None]
) -> list[tuple[int, Value]]:
    """What `function` finds out about each TCP socket since `before`, with its descriptor."""
    with _duplicating:
        found = [(fd, _inspect(fd, function)) for fd, inode in _sockets() if inode not in before]
    return [(fd, value) for fd, value in found if value is not None]


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


def listening_since(before: set[int]) -> list[Endpoint]:
    """Where the process has come to listen for TCP connections since `before`."""
    return [endpoint for _, endpoint in _inspected(before, _listening)]


def _inspect(descriptor: int, function: Callable[[socket.socket], Value | None]) -> Value | None:
    """What `function` finds out about a TCP socket; None for anything else."""
    try:
        with socket.socket(fileno=os.dup(descriptor)) as duplicate:
            internet = duplicate.family in (socket.AF_INET, socket.AF_INET6)
            if not internet or duplicate.type != socket.SOCK_STREAM:
                return None
            return function(duplicate)
    except OSError:
        return None


def _listening(found: socket.socket) -> Endpoint | None:
    listens = found.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    return _numeric(found.getsockname()) if listens else None


def _ends(connection: socket.socket) -> Endpoints:
    return _numeric(connection.getsockname()) + _numeric(connection.getpeername())


def _numeric(address: Any) -> Endpoint:
    # A link-local address names this machine's interface, which is another one on the other end.
    return address[0].partition("%")[0], address[1]


def _apply(peer: _PeerSocket, action: Callable[[socket.socket], bool]) -> bool:
    """Run `action` on the connection if it is still open; False where it isn't."""
    try:
        # Duplicated first and compared then: Gloo may close the descriptor at any moment and the
        # number may come to mean another socket.
        with _duplicating, socket.socket(fileno=os.dup(peer.descriptor)) as duplicate:
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


def _to_json(value: Any) -> bytes:
    return json.dumps(value).encode("ascii")


def _to_endpoint(value: Any) -> Endpoint:
    host, port = value
    return str(host), int(port)


def _to_connections(value: Any) -> list[Endpoints]:
    return [(str(a), int(b), str(c), int(d)) for a, b, c, d in value]


def _parse(data: bytes, rank: int, convert: Callable[[Any], Value]) -> Value:
    try:
        if len(data) > MAX_ENDPOINTS_BYTES:
            raise ValueError(f"{len(data)} bytes")
        return convert(json.loads(data))
    except (ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"connections of rank {rank} are malformed: {error}") from None
