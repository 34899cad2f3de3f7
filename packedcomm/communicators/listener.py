"""Addresses of the form host:port, and the socket that rank 0 listens on."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from packedcomm.descriptors import check_descriptors, naming_the_limit
from packedcomm.errors import AddressInUse, ArgumentError, SessionStateError

__all__ = ["Address", "Listener", "closing_on_error"]

# The only two spellings that listen on every interface.
ALL_INTERFACES = ("0.0.0.0", "::")  # noqa: S104  (compared with, never a default)

# Ranks may connect before rank 0 serves; they wait in the backlog.
BACKLOG = 1024

# The socket's, and what the look-up of a name may need.
DESCRIPTORS = 4


@dataclass(frozen=True, slots=True)
class Address:
    """A host name or IP address and a port; IPv6 addresses are written in brackets."""

    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """Read "host:port" or "[IPv6]:port".

        Raises:
            ArgumentError: the text has another form; the message quotes it.
        """
        if type(text) is not str:
            raise ArgumentError(f"address must be a string 'host:port', got {text!r}")
        host, colon, port = text.rpartition(":")
        bracketed = host.startswith("[") and host.endswith("]")
        if bracketed:
            host = host[1:-1]
        if not colon or not host or any(c in host for c in "[]/@ \t\n"):
            raise ArgumentError(f"address {text!r} is not of the form host:port or [IPv6]:port")
        if bracketed != (":" in host):
            raise ArgumentError(f"address {text!r}: an IPv6 address goes in brackets, nothing else")
        if not (port.isascii() and port.isdigit() and len(port) <= 5 and int(port) <= 65535):
            raise ArgumentError(f"address {text!r}: the port must be in 0..65535, got {port!r}")
        return cls(host, int(port))

    @property
    def all_interfaces(self) -> bool:
        """Whether this is 0.0.0.0 or ::, where a listener hears every interface."""
        return self.host in ALL_INTERFACES

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Listener:
    """A socket that listens on one address, for rank 0 to hand to `connect`.

    Binding first and connecting later lets the system choose the port (port 0) while it is held
    all along: `address` is what the other ranks connect to. `connect` takes the socket over and
    closes it, whether it succeeds or fails; `close` is for a listener that was never used.

    Belongs to one thread at a time.
    """

    def __init__(self, bound: socket.socket) -> None:
        """Use `Listener.bind`."""
        host, port = bound.getsockname()[:2]
        self._socket: socket.socket | None = bound
        self._address = Address(host, port)

    @classmethod
    def bind(cls, address: str) -> Listener:
        """Bind and listen.

        Args:
            address: "host:port" or "[IPv6]:port" of this machine. Port 0 lets the system choose.
                Every interface is listened on only where the host is literally 0.0.0.0 or ::.

        Raises:
            ArgumentError: the address is malformed, unknown, or not one of this machine's.
            AddressInUse: another socket listens there; the message names the address.
            TooManyOpenFiles: no descriptor is free.
        """
        wanted = Address.parse(address)
        what = f"listening on {address}"
        check_descriptors(DESCRIPTORS, what)
        with naming_the_limit(what):
            return cls._bind(address, wanted)

    @classmethod
    def _bind(cls, address: str, wanted: Address) -> Listener:
        try:
            found = socket.getaddrinfo(
                wanted.host, wanted.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
            )
        except (OSError, UnicodeError) as error:
            if getattr(error, "errno", None) == errno.EMFILE:
                raise
            raise ArgumentError(f"can't listen on {address}: {error}") from error
        family, _, _, _, resolved = found[0]
        if _is_unspecified(str(resolved[0])) and not wanted.all_interfaces:
            raise ArgumentError(
                f"can't listen on {address}: it means every interface; say 0.0.0.0 or [::] for that"
            )
        bound = socket.socket(family, socket.SOCK_STREAM)
        try:
            # Lets a port be taken again while old connections linger; a second listener still
            # fails.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(resolved)
            bound.listen(BACKLOG)
        except OSError as error:
            bound.close()
            if error.errno == errno.EADDRINUSE:
                raise AddressInUse(f"can't listen on {address}: the address is in use") from error
            raise ArgumentError(f"can't listen on {address}: {error.strerror}") from error
        return cls(bound)

    @property
    def address(self) -> str:
        """The numeric "host:port" that is bound, with the port that the system chose."""
        return str(self._address)

    @property
    def host(self) -> str:
        """The numeric host that is bound."""
        return self._address.host

    @property
    def port(self) -> int:
        """The port that is bound."""
        return self._address.port

    @property
    def closed(self) -> bool:
        """Whether the socket was closed or taken over."""
        return self._socket is None

    def detach(self) -> int:
        """Hand the file descriptor over; this listener is closed from then on.

        Raises:
            SessionStateError: it was closed or handed over before.
        """
        if self._socket is None:
            raise SessionStateError(f"listener on {self.address} is closed or was used before")
        descriptor = self._socket.detach()
        self._socket = None
        return descriptor

    def close(self) -> None:
        """Stop listening. Idempotent."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"Listener({self.address!r}{', closed' if self.closed else ''})"


@contextlib.contextmanager
def closing_on_error(listener: object) -> Iterator[None]:
    """Keep the promise that a listener is taken over whatever happens; takes anything else too."""
    try:
        yield
    except BaseException:
        if isinstance(listener, Listener):
            listener.close()
        raise


def _is_unspecified(host: str) -> bool:
    # "0", "0x0" and the like resolve to 0.0.0.0, and ::ffff:0.0.0.0 means it too.
    ip = ipaddress.ip_address(host.partition("%")[0])
    mapped = ip.ipv4_mapped if isinstance(ip, ipaddress.IPv6Address) else None
    return ip.is_unspecified or (mapped is not None and mapped.is_unspecified)
