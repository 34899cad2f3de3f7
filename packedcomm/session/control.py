"""The channels that control messages travel on: one ROUTER at the sender, a DEALER per receiver.

A frame of no bytes says nothing: it is sent only to learn whether a peer is still connected.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Collection
from typing import Any

import zmq
from zmq.utils.monitor import recv_monitor_message

from packedcomm.communicators.bounded_store import wait_for_server
from packedcomm.communicators.listener import Address, Listener
from packedcomm.errors import (
    ArgumentError,
    AuthenticationError,
    PeerLost,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session.authentication import Gate, Keys, check_secret
from packedcomm.settings import Settings

__all__ = ["ReceiverChannel", "SenderChannel"]

# How long a wait may keep the channel to itself: `close` from another thread comes in between.
SLICE_S = 0.05

# How long a peer may take over ZeroMQ's handshake, and how long closing waits for the last words.
HANDSHAKE_MS = 10_000
LINGER_MS = 1000

# After a connection has ended: how long peers are asked whether it was theirs. ZeroMQ reports the
# end a little before it forgets the peer.
SUSPECT_S = 1.0
SUSPECT_PAUSE_S = 0.04

# Refused handshakes in a row that mean a wrong secret. A sender that is just ending refuses once.
REFUSALS = 3

# Frames taken in one go; one peer can't keep the others waiting.
BATCH = 256

# A machine that vanishes without closing its connections is noticed after about half a minute. A
# process that is only stopped isn't: its kernel still answers.
KEEPALIVE = {"TCP_KEEPALIVE": 1, "TCP_KEEPALIVE_IDLE": 15, "TCP_KEEPALIVE_INTVL": 5} | {
    "TCP_KEEPALIVE_CNT": 3
}


class _Channel:
    """What both ends have in common: a context, a socket, its monitor, and one lock for them."""

    def __init__(self, kind: int, settings: Settings) -> None:
        self.settings = settings
        self._lock = threading.Lock()
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._socket: Any = self._context.socket(kind)
        options = {
            **KEEPALIVE,
            "IPV6": 1,
            "LINGER": LINGER_MS,
            "HANDSHAKE_IVL": HANDSHAKE_MS,
            "MAXMSGSIZE": settings.max_frame_bytes,
            "RCVHWM": BATCH,
        }
        for name, value in options.items():
            self._socket.setsockopt(getattr(zmq, name), value)
        self._monitor: Any = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED
            | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_DISCONNECTED
        )
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _poll(self, timeout_s: float) -> None:
        # An end of the process by Ctrl-C must find the lock free: a poll is never long.
        self._poller.poll(round(max(0.0, min(timeout_s, SLICE_S)) * 1000))

    def _events(self) -> list[int]:
        events = []
        while self._monitor.poll(0):
            events.append(int(recv_monitor_message(self._monitor, zmq.NOBLOCK)["event"]))
        return events

    def _check_open(self) -> None:
        if self._closed:
            raise SessionStateError("the control channel is closed")

    def close(self) -> None:
        """Send what is on its way, for a second at most, and release everything. Idempotent; may be
        called from any thread."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._socket.disable_monitor()
            self._monitor.close(0)
            self._socket.close()
            self._close_further()
        self._context.term()

    def _close_further(self) -> None:
        """Release what only this kind of channel has, before the context ends."""


class SenderChannel(_Channel):
    """The sender's end: listens on one address and talks to any number of receivers.

    Every method takes the channel for at most 50 ms at a time and may be called from any thread.
    """

    def __init__(self, address: str, secret: str | None, settings: Settings) -> None:
        """Bind and listen.

        Args:
            address: "host:port" of this machine; port 0 lets the system choose.
            secret: the job's secret; None on loopback addresses only.
            settings: `max_frame_bytes`.

        Raises:
            ArgumentError: address or secret are malformed or don't go together.
            AddressInUse: another socket listens there.
        """
        self._gate: Gate | None = None
        self._suspect_until = 0.0
        self._next_question = 0.0
        listener = Listener.bind(address)
        try:
            check_secret(secret, [listener.host])
        except ArgumentError:
            listener.close()
            raise
        self.address = listener.address
        super().__init__(zmq.ROUTER, settings)
        if secret is not None:
            keys = Keys.of_sender(secret)
            self._socket.curve_server = True
            self._socket.curve_publickey = keys.public
            self._socket.curve_secretkey = keys.private
            self._gate = Gate(self._context, Keys.of_receivers(secret).public)
        # Without it frames to a peer that has gone would be dropped silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # ZeroMQ takes over the socket that is bound already: its own would find ports in use late,
        # and listen on every interface for some spellings of an address.
        self._socket.setsockopt(zmq.USE_FD, listener.detach())
        self._socket.bind(f"tcp://{self.address}")

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Hand a frame over to be sent.

        Returns:
            Whether the peer is still connected, and takes what it is sent.
        """
        with self._lock:
            self._check_open()
            return self._try_to_send(peer, frame)

    def wait(
        self, timeout_s: float, peers: Collection[bytes]
    ) -> tuple[list[tuple[bytes, bytes]], set[bytes]]:
        """Wait for frames or for the end of a connection, for at most 50 ms.

        Args:
            timeout_s: may be shorter, in seconds.
            peers: those of whom to tell whether they are still there.

        Returns:
            The frames that came, with their peers; and which of `peers` have gone.
        """
        with self._lock:
            self._check_open()
            self._poll(timeout_s)
            frames = self._take()
            gone = set()
            now = time.monotonic()
            if zmq.EVENT_DISCONNECTED in self._events():
                # The event doesn't say whose connection it was.
                self._suspect_until = now + SUSPECT_S
                self._next_question = now
            if self._next_question <= now < self._suspect_until:
                self._next_question = now + SUSPECT_PAUSE_S
                gone = {peer for peer in peers if not self._try_to_send(peer, b"")}
                # What they said before they went.
                frames += self._take()
        return frames, gone

    def _take(self) -> list[tuple[bytes, bytes]]:
        frames: list[tuple[bytes, bytes]] = []
        with contextlib.suppress(zmq.Again):
            while len(frames) < BATCH:
                peer = self._socket.recv(zmq.NOBLOCK)
                frame = self._socket.recv(zmq.NOBLOCK) if self._socket.rcvmore else b""
                while self._socket.rcvmore:
                    # Nothing of ours has several parts: dropped as they come, and the frame with
                    # them, by the codec.
                    self._socket.recv(zmq.NOBLOCK)
                    frame = b"\xc1"
                if frame:
                    frames.append((peer, frame))
        return frames

    def _try_to_send(self, peer: bytes, frame: bytes) -> bool:
        try:
            self._socket.send_multipart([peer, frame], zmq.NOBLOCK)
        except zmq.Again:
            # A thousand frames are waiting for it already.
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return False
        return True

    def _close_further(self) -> None:
        if self._gate is not None:
            self._gate.close()


class ReceiverChannel(_Channel):
    """A receiver's end: one connection to the sender, never made anew once it is lost.

    Every method takes the channel for at most 50 ms at a time and may be called from any thread.
    """

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
        """
        self.address = address
        self.lost = False
        """Whether the sender's connection has ended. What it said before can still be taken."""
        self._last_words: list[bytes] = []
        parsed = Address.parse(address)
        if parsed.port == 0:
            raise ArgumentError(f"address {address!r} has no port to connect to")
        check_secret(secret, _resolved(parsed))
        begin = time.monotonic()
        try:
            _, self.reached = wait_for_server(parsed, deadline)
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
                self._poll(deadline - time.monotonic())
                events = self._events()
                if zmq.EVENT_HANDSHAKE_SUCCEEDED in events:
                    since = events[events.index(zmq.EVENT_HANDSHAKE_SUCCEEDED) :]
                    self.lost = zmq.EVENT_DISCONNECTED in since
                    return
                for event in events:
                    if event in (
                        zmq.EVENT_HANDSHAKE_FAILED_AUTH,
                        zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL,
                    ):
                        refusals = REFUSALS
                    elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
                        refusals += 1
            if refusals >= REFUSALS:
                raise AuthenticationError(
                    f"{self.address} refuses this receiver: the sender has another secret, or "
                    "one side has none"
                )
            if time.monotonic() >= deadline:
                raise RendezvousTimeout(
                    f"what listens on {self.address} has not answered as a sender after "
                    f"{time.monotonic() - begin:.1f} s"
                )

    def send(self, frame: bytes) -> None:
        """Hand a frame over to be sent.

        Raises:
            PeerLost: the sender's connection has ended.
        """
        with self._lock:
            self._check_open()
            self._notice_loss()
            if self.lost:
                raise PeerLost(f"the sender at {self.address} has ended the connection")
            try:
                self._socket.send(frame, zmq.NOBLOCK)
            except zmq.Again:
                raise PeerLost(f"the sender at {self.address} takes no messages") from None

    def wait(self, timeout_s: float) -> list[bytes]:
        """Wait for frames or for the end of the connection (`lost`), for at most 50 ms.

        Args:
            timeout_s: may be shorter, in seconds.
        """
        with self._lock:
            self._check_open()
            if not self.lost:
                self._poll(timeout_s)
                self._notice_loss()
            frames = self._last_words or self._take(BATCH)
            self._last_words = []
        return frames

    def _take(self, most: int) -> list[bytes]:
        frames: list[bytes] = []
        with contextlib.suppress(zmq.Again):
            while len(frames) < most:
                if frame := self._socket.recv(zmq.NOBLOCK):
                    frames.append(frame)
        return frames

    def _notice_loss(self) -> None:
        if not self.lost and zmq.EVENT_DISCONNECTED in self._events():
            self.lost = True
            # What came before the end, all of it: `disconnect` drops it. Without that ZeroMQ would
            # connect to whoever listens there next.
            self._last_words += self._take(2 * BATCH)
            with contextlib.suppress(zmq.ZMQError):
                self._socket.disconnect(self._endpoint)


def _resolved(address: Address) -> list[str]:
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise ArgumentError(f"can't connect to {address}: {error}") from error
    return [str(entry[4][0]) for entry in found]
