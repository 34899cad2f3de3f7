"""A TCP proxy between two sockets of this machine, which records what passes and can be cut."""

from __future__ import annotations

import contextlib
import os
import socket
import threading

__all__ = ["Proxy", "cut_connections"]


def cut_connections(address: str) -> None:
    """End this process's connections to "host:port"."""
    host, _, port = address.rpartition(":")
    for name in os.listdir("/proc/self/fd"):  # noqa: PTH208  (descriptors, not files)
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as found:
            there = found.getpeername()
            # ZeroMQ's sockets are IPv6 ones.
            if there and (there[0].removeprefix("::ffff:"), there[1]) == (host, int(port)):
                found.shutdown(socket.SHUT_RDWR)


class Proxy:
    """Passes bytes on in both directions, for any number of connections.

    Args:
        address: "host:port" to which connections are passed on.
    """

    def __init__(self, address: str) -> None:
        host, _, port = address.rpartition(":")
        self._beyond = (host, int(port))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._sockets: list[socket.socket] = []
        self._lock = threading.Lock()
        self.said: list[bytearray] = []
        """What each connection's client has said."""
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                try:
                    far = socket.create_connection(self._beyond)
                except OSError:
                    near.close()
                    continue
                said = bytearray()
                with self._lock:
                    self._sockets += [near, far]
                    self.said.append(said)
                threading.Thread(target=self._pass_on, args=(near, far, said), daemon=True).start()
                threading.Thread(
                    target=self._pass_on, args=(far, near, bytearray()), daemon=True
                ).start()

    @staticmethod
    def _pass_on(origin: socket.socket, destination: socket.socket, said: bytearray) -> None:
        with contextlib.suppress(OSError):
            while data := origin.recv(1 << 16):
                said += data
                destination.sendall(data)
        for end in (origin, destination):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def cut(self) -> None:
        """End every connection now, on both sides."""
        with self._lock:
            for end in self._sockets:
                with contextlib.suppress(OSError):
                    end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Cut, and listen no more."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self.cut()
        with self._lock:
            for end in self._sockets:
                end.close()
