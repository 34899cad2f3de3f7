"""A receiver's channel for control messages: a DEALER connected to the sender, once."""

from __future__ import annotations

import contextlib
import errno
import socket
import threading
import time
from collections.abc import Callable

import zmq

from packedcomm.communicators.bounded_store import wait_for_server
from packedcomm.communicators.listener import Address
from packedcomm.errors import ArgumentError, AuthenticationError, PeerLost, RendezvousTimeout
from packedcomm.session.authentication import Keys, check_secret
from packedcomm.session.channel import BATCH, DISCONNECTED, EVENTS, NOW, READABLE, Channel
from packedcomm.settings import Settings

__all__ = ["ReceiverChannel"]

# Refused handshakes in a row that mean a wrong secret. A sender that is just ending refuses once;
# one to which too many connect at once resets connections, and ZeroMQ tells about every second of
# these as if it were refused.
REFUSALS = 6

# The arguments of a single call.
_ONCE = (NOW,)

LISTENED_TO_S = 1.0

# How often a name that means nothing yet is looked up again.
RETRY_S = 0.2


class ReceiverChannel(Channel):
    """A receiver's end: one connection to the sender, never made anew once it is lost.

    Every method takes the channel for at most 50 ms at a time and may be called from any thread.
    """

    _monitored = int(
        zmq.EVENT_CONNECTED
        | zmq.EVENT_HANDSHAKE_SUCCEEDED
        | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        | zmq.EVENT_DISCONNECTED
    )

    def __init__(
        self, address: str, secret: str | None, settings: Settings, deadline: float
    ) -> None:
        """Connect and prove that both sides have the same secret.

        Args:
            address: the sender's, "host:port".
            secret: the job's secret; None for loopback addresses only.
            settings: `max_frame_bytes`.
            deadline: on the monotonic clock, in seconds.

        Raises:
            ArgumentError: address or secret are malformed or don't go together.
            RendezvousTimeout: no sender was there by the deadline.
            AuthenticationError: the sender has another secret.
            TooManyOpenFiles: fewer descriptors are free than a channel needs.
        """
        self.address = address
        self.lost = False
        """Whether the sender's connection has ended. What it said before can still be taken."""
        parsed = Address.parse(address)
        if parsed.port == 0:
            raise ArgumentError(f"address {address!r} has no port to connect to")
        begin = time.monotonic()

        def reach() -> str:
            check_secret(secret, _resolved(parsed, deadline))
            return wait_for_server(parsed, deadline)[1]

        try:
            self.reached = _bounded(reach, deadline)
        except TimeoutError as error:
            raise RendezvousTimeout(
                f"no sender listens on {address} after {time.monotonic() - begin:.1f} s ({error})"
            ) from None
        super().__init__(zmq.DEALER, settings)
        if secret is not None:
            keys = Keys.of_receivers(secret)
            self._socket.curve_serverkey = Keys.of_sender(secret).public
            self._socket.curve_publickey = keys.public
            self._socket.curve_secretkey = keys.private
        self._port = parsed.port
        self._descriptor = -1
        self._endpoint = f"tcp://{Address(self.reached, parsed.port)}"
        self._socket.connect(self._endpoint)
        try:
            self._shake_hands(begin, deadline)
        except BaseException:
            self.close()
            raise

    def _shake_hands(self, begin: float, deadline: float) -> None:
        refusals = 0
        while True:
            with self._lock:
                self._held.check()
                self._poll(deadline - time.monotonic())
                told = list(self._events())
                events = [event for event, _ in told]
                if zmq.EVENT_HANDSHAKE_SUCCEEDED in events:
                    since = events[events.index(zmq.EVENT_HANDSHAKE_SUCCEEDED) :]
                    self.lost = DISCONNECTED in since
                for event, value in told:
                    if event == zmq.EVENT_CONNECTED:
                        self._descriptor = value
                    elif event in (
                        zmq.EVENT_HANDSHAKE_FAILED_AUTH,
                        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                    ):
                        refusals = REFUSALS
                    elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                        refusals = 0 if value == errno.ECONNRESET else refusals + 1
            if zmq.EVENT_HANDSHAKE_SUCCEEDED in events:
                self._inflow.begin(self._descriptor)
                return
            if refusals >= REFUSALS:
                raise AuthenticationError(
                    f"{self.address} refuses this receiver: the sender has another secret, or "
                    "one side has none; or it is no sender of packedcomm's that listens there"
                )
            if time.monotonic() >= deadline:
                raise RendezvousTimeout(
                    f"what listens on {self.address} has not answered as a sender after "
                    f"{time.monotonic() - begin:.1f} s"
                )

    def listened_to(self) -> bool:
        """Whether something still listens where this end was connected: a sender to which too many
        connect at once cuts the oldest connections. Waits for that for a second at most."""
        try:
            socket.create_connection((self.reached, self._port), LISTENED_TO_S).close()
        except ConnectionRefusedError:
            return False
        except OSError:
            pass  # cut off again, or busy
        return True

    def send(self, frame: bytes) -> None:
        """Hand a frame over to be sent.

        Raises:
            PeerLost: the sender's connection has ended.
        """
        with self._lock:
            self._held.check()
            self._notice_loss()
            if self.lost:
                raise PeerLost(f"the sender at {self.address} has ended the connection")
            try:
                self._socket.send(frame, NOW)
            except zmq.Again:
                raise PeerLost(f"the sender at {self.address} takes no messages") from None

    def wait(self, timeout_s: float, *, soon: bool = False) -> None:
        """Wait for frames, which `received` has then, or for the end of the connection (`lost`),
        for at most 50 ms.

        Args:
            timeout_s: may be shorter, in seconds.
            soon: whether something is about to come.
        """
        with self._lock:
            self._held.check()
            if not self.lost:
                readable, eventful = self._poll(timeout_s, soon=soon)
                if eventful:
                    self._notice_loss()
                if readable:
                    self._take(BATCH)
                if self._inflow.excessive(time.monotonic()):
                    self._lose()

    def _take(self, most: int) -> None:
        receive = self._socket.recv
        for _ in range(most):
            if not self._socket.getsockopt(EVENTS) & READABLE:
                break
            # One instruction of the interpreter's takes a frame from ZeroMQ and keeps it: whoever
            # is interrupted before or after it loses none. pyzmq looks for signals inside.
            self.received.extend(map(receive, _ONCE))
            self._inflow.hear(self._descriptor)

    def _notice_loss(self) -> None:
        if not self.lost and any(e == DISCONNECTED for e, _ in self._events()):
            self._lose()

    def _lose(self) -> None:
        if not self.lost:
            self.lost = True
            self._inflow.end(self._descriptor)
            # What came before the end, all of it: `disconnect` drops it. Without that ZeroMQ would
            # connect to whoever listens there next.
            self._take(3 * BATCH)
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)


def _bounded(function: Callable[[], str], deadline: float) -> str:
    """What a function returns or raises by a deadline. On a thread that is left behind then: the
    system's look-up of names knows no deadline."""
    returned: list[str] = []
    raised: list[BaseException] = []

    def run() -> None:
        try:
            returned.append(function())
        except BaseException as error:  # noqa: BLE001  (raised again on the caller's thread)
            raised.append(error)

    thread = threading.Thread(target=run, name="packedcomm-reach", daemon=True)
    thread.start()
    # What it finds itself at the deadline says more.
    thread.join(max(0.0, deadline - time.monotonic()) + 0.1)
    if raised:
        raise raised[0]
    if not returned:
        raise TimeoutError("looking its name up takes longer")
    return returned[0]


def _resolved(address: Address, deadline: float) -> list[str]:
    """The IP addresses that a name means. As its sender, it may come later."""
    while True:
        try:
            found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
            return [str(entry[4][0]) for entry in found]
        except UnicodeError as error:
            raise ArgumentError(f"can't connect to {address}: {error}") from error
        except OSError as error:
            if time.monotonic() + RETRY_S >= deadline:
                raise TimeoutError(f"the name {address.host!r} means nothing: {error}") from error
        time.sleep(RETRY_S)
