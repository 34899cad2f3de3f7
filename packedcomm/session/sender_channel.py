"""The sender's channel for control messages: a ROUTER that admits whoever has the secret."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection

import zmq

from packedcomm.communicators.listener import Listener
from packedcomm.errors import ArgumentError, SessionStateError
from packedcomm.session.authentication import Gate, Keys, check_secret
from packedcomm.session.channel import BATCH, EVENTS, MORE, NOW, READABLE, Channel
from packedcomm.settings import Settings

__all__ = ["SenderChannel"]

# After a connection has ended: how long peers are asked whether it was theirs. ZeroMQ reports the
# end a little before it forgets the peer.
SUSPECT_S = 1.0
SUSPECT_PAUSE_S = 0.04


class SenderChannel(Channel):
    """The sender's end: listens on one address and talks to any number of receivers.

    Every method takes the channel for at most 50 ms at a time and may be called from any thread.
    """

    _monitored = int(zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED)

    def __init__(self, address: str, secret: str | None, settings: Settings) -> None:
        """Bind and listen.

        Args:
            address: "host:port" of this machine; port 0 lets the system choose.
            secret: the job's secret; None on loopback addresses only.
            settings: `max_frame_bytes`, `max_pending_connections`.

        Raises:
            ArgumentError: address or secret are malformed or don't go together.
            AddressInUse: another socket listens there.
        """
        self._half_sent = False
        self._suspect_until = 0.0
        self._next_question = 0.0
        # Descriptors of connections that nothing has come from, and since when they are there.
        self._pending: dict[int, float] = {}
        listener = Listener.bind(address)
        try:
            check_secret(secret, [listener.host])
        except ArgumentError:
            listener.close()
            raise
        self.address = listener.address
        self._port = listener.port
        super().__init__(zmq.ROUTER, settings)
        if secret is not None:
            keys = Keys.of_sender(secret)
            self._socket.curve_server = True
            self._socket.curve_publickey = keys.public
            self._socket.curve_secretkey = keys.private
            gate = Gate(self._context, Keys.of_receivers(secret).public)
            self._held.endings.append(gate.close)
        # Without it frames to a peer that has gone would be dropped silently.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        # ZeroMQ takes over the socket that is bound already: its own would find ports in use late,
        # and listen on every interface for some spellings of an address.
        self._socket.setsockopt(zmq.USE_FD, listener.detach())
        self._socket.bind(f"tcp://{self.address}")

    def hang_up(self) -> None:
        """Send what is on its way, end every connection and stop listening. Idempotent."""
        with self._lock, contextlib.suppress(SessionStateError, zmq.ZMQError):
            self._held.check()
            self._socket.unbind(self._socket.getsockopt(zmq.LAST_ENDPOINT))

    def send(self, peer: bytes, frame: bytes) -> bool:
        """Hand a frame over to be sent.

        Returns:
            Whether the peer is still connected, and takes what it is sent.
        """
        with self._lock:
            self._held.check()
            return self._try_to_send(peer, frame)

    def wait(
        self, timeout_s: float, peers: Collection[bytes], *, soon: bool = False
    ) -> tuple[list[tuple[bytes, bytes]], set[bytes]]:
        """Wait for frames or for the end of a connection, for at most 50 ms.

        Args:
            timeout_s: may be shorter, in seconds.
            peers: those of whom to tell whether they are still there.
            soon: whether something is about to come.

        Returns:
            The frames that came, with their peers; and which of `peers` have gone.
        """
        with self._lock:
            self._held.check()
            readable, eventful = self._poll(timeout_s, soon=soon)
            frames = self._take() if readable else []
            gone = set()
            now = time.monotonic()
            if eventful and self._note_connections(now):
                # The event doesn't say whose connection it was.
                self._suspect_until = now + SUSPECT_S
                self._next_question = now
            if self._next_question <= now < self._suspect_until:
                self._next_question = now + SUSPECT_PAUSE_S
                gone = {peer for peer in list(peers) if not self._try_to_send(peer, b"")}
                # What they said before they went.
                frames += self._take()
        return frames, gone

    @property
    def pending(self) -> int:
        """Connections that haven't said anything yet that this end would listen to."""
        return len(self._pending)

    def _note_connections(self, now: float) -> bool:
        """Keep count of connections; whether one has ended."""
        ended = False
        for event, descriptor in self._events():
            if event == zmq.EVENT_ACCEPTED:
                self._pending[descriptor] = now
            elif event == zmq.EVENT_DISCONNECTED:
                self._pending.pop(descriptor, None)
                ended = True
        while len(self._pending) > self.settings.max_pending_connections:
            # The oldest: whoever has the secret is through with the handshake in milliseconds.
            oldest = next(iter(self._pending))
            del self._pending[oldest]
            _cut(oldest, self._port)
        return ended

    def _take(self) -> list[tuple[bytes, bytes]]:
        frames: list[tuple[bytes, bytes]] = []
        receive = self._socket.recv
        while len(frames) < BATCH and self._socket.getsockopt(EVENTS) & READABLE:
            peer = receive(NOW, copy=False)
            part = receive(NOW, copy=False) if peer.more else peer
            frame = part.bytes if part is not peer else b""
            if self._pending:
                # A peer of an old version of the protocol, or whose bytes look like one, has none.
                with contextlib.suppress(zmq.ZMQError):
                    self._pending.pop(part.get(zmq.SRCFD), None)
            while part.more:
                # Nothing of ours has several parts: dropped as they come, and the frame with them,
                # by the codec.
                part = receive(NOW, copy=False)
                frame = b"\xc1"
            if frame:
                frames.append((peer.bytes, frame))
        return frames

    def _try_to_send(self, peer: bytes, frame: bytes) -> bool:
        if self._half_sent:
            # Whoever sent the peer's name was interrupted, or is interrupted just now by this: what
            # comes next mustn't be taken for the frame.
            self._half_sent = False
            self._socket.send(b"", NOW)
        self._half_sent = True
        try:
            self._socket.send(peer, MORE)
            self._socket.send(frame, NOW)
        except zmq.Again:
            # A thousand frames are waiting for it already.
            sent = False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            sent = False
        else:
            sent = True
        self._half_sent = False
        return sent


def _cut(descriptor: int, port: int) -> None:
    """End a connection to a port of this process that ZeroMQ has the descriptor of."""
    # ZeroMQ may close the descriptor at any moment, and the number come to mean another socket.
    with contextlib.suppress(OSError), socket.socket(fileno=os.dup(descriptor)) as connection:
        if connection.getsockname()[1] == port:
            connection.shutdown(socket.SHUT_RDWR)
