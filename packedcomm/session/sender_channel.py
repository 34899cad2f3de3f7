"""The sender's channel for control messages: a ROUTER that admits whoever has the secret."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Collection

import zmq

from packedcomm.communicators.listener import Listener
from packedcomm.descriptors import most_descriptors
from packedcomm.errors import ArgumentError, SessionStateError
from packedcomm.session.authentication import Gate, Keys, check_secret
from packedcomm.session.channel import BATCH, DISCONNECTED, EVENTS, MORE, NOW, READABLE, Channel
from packedcomm.session.event_watch import EventWatch
from packedcomm.settings import Settings

__all__ = ["SenderChannel"]

# After a connection has ended: how long peers are asked whether it was theirs. ZeroMQ reports the
# end a little before it forgets the peer.
SUSPECT_S = 1.0
SUSPECT_PAUSE_S = 0.04

# Where so much of the descriptors that this process may have is taken, fewer connections may wait.
SCARCE = 0.5
FEW_PENDING = 64

# As plain numbers: see `channel.EVENTS`.
ACCEPTED = int(zmq.EVENT_ACCEPTED)
REFUSED = int(zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL) | int(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
SOURCE = int(zmq.SRCFD)
NOWHERE = -1

# Parts of a message that are dropped in one go, which takes some milliseconds.
PARTS = 4096

# The arguments of a single call.
_ONCE, _NO_COPY = (NOW,), (False,)

# Instead of what can't be a frame; no message begins so.
_NO_FRAME = zmq.Frame(b"\xc1")

_FAMILIES = (socket.AF_INET, socket.AF_INET6)

# Closing then resets the connection.
_RESET = struct.pack("ii", 1, 0)


class SenderChannel(Channel):
    """The sender's end: listens on one address and talks to any number of receivers.

    Every method takes the channel for at most 50 ms at a time and may be called from any thread. A
    thread of its own looks after new connections while nobody waits.

    `received` has pairs of `zmq.Frame`: the peer's name, and a frame of its.
    """

    _monitored = ACCEPTED | REFUSED | DISCONNECTED

    def __init__(self, address: str, secret: str | None, settings: Settings) -> None:
        """Bind and listen.

        Args:
            address: "host:port" of this machine; port 0 lets the system choose.
            secret: the job's secret; None on loopback addresses only.
            settings: `max_frame_bytes`, `max_pending_connections`.

        Raises:
            ArgumentError: address or secret are malformed or don't go together.
            AddressInUse: another socket listens there.
            TooManyOpenFiles: fewer descriptors are free than a channel needs.
        """
        self.has_refused = False
        """Whether somebody came since the last wait whose secret is another."""
        self._half_sent = False
        # Whether more parts follow of a message that nothing is taken of.
        self._skipping = False
        self._suspect_until = 0.0
        self._next_question = 0.0
        # Descriptors of connections that nothing has come from, the oldest first.
        self._pending: dict[int, None] = {}
        # Of those that were cut for it, until they have ended.
        self._cut_off: set[int] = set()
        # What comes next in `received`.
        self._taken: deque[tuple[zmq.Frame, zmq.Frame]] = deque()
        listener = Listener.bind(address)
        try:
            check_secret(secret, [listener.host])
        except ArgumentError:
            listener.close()
            raise
        self.address = listener.address
        self._port = listener.port
        try:
            super().__init__(zmq.ROUTER, settings)
        except BaseException:
            listener.close()
            raise
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
        descriptor = self._monitor.getsockopt(zmq.FD)
        try:
            watch = EventWatch(descriptor, self._look_at_connections, "packedcomm-connections")
        except BaseException:
            self.close()
            raise
        self._watch = watch
        self._held.endings.insert(0, watch.stop)

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

    def wait(self, timeout_s: float, peers: Collection[bytes], *, soon: bool = False) -> set[bytes]:
        """Wait for frames, which `received` has then, or for the end of a connection, for at most
        50 ms.

        Args:
            timeout_s: may be shorter, in seconds.
            peers: those of whom to tell whether they are still there.
            soon: whether something is about to come.

        Returns:
            Which of `peers` have gone.
        """
        with self._lock:
            self._held.check()
            if self.received:
                timeout_s = 0.0
            elif (now := time.monotonic()) < self._suspect_until:
                timeout_s = min(timeout_s, max(0.0, self._next_question - now))
            readable, eventful = self._poll(timeout_s, soon=soon)
            if eventful:
                # Before the frames, which end the count of their connections.
                self._note_connections()
            if readable or self._taken:
                self._take()
            now = time.monotonic()
            if self._next_question <= now < self._suspect_until:
                self._next_question = now + SUSPECT_PAUSE_S
                gone = {peer for peer in list(peers) if not self._try_to_send(peer, b"")}
                # What they said before they went.
                self._take()
            else:
                gone = set()
            for descriptor in self._inflow.excessive(now):
                _cut(descriptor, self._port, socket.SHUT_RDWR)
        return gone

    @property
    def pending(self) -> int:
        """Connections that haven't said anything yet that this end would listen to."""
        return len(self._pending)

    def _look_at_connections(self) -> bool:
        """What the thread of its own does; whether it is to go on."""
        with self._lock:
            if not self._held.closed:
                self._note_connections()
        return not self._held.closed

    def _note_connections(self) -> None:
        """Keep count of connections, and cut the oldest of too many that have said nothing."""
        highest = self._note_events()
        most = self.settings.max_pending_connections
        # The system gives the lowest number that is free.
        if highest >= most_descriptors() * SCARCE:
            most = min(most, FEW_PENDING)
        if len(self._pending) > most:
            # Whoever has the secret is through with the handshake in milliseconds, and has spoken.
            self._take()
            while len(self._pending) > most:
                oldest = next(iter(self._pending))
                if not _cut(oldest, self._port):
                    break
                del self._pending[oldest]
                self._cut_off.add(oldest)

    def _note_events(self) -> int:
        """Keep count of connections; returns the highest descriptor of those that have come."""
        highest = -1
        for event, descriptor in self._events():
            if event == ACCEPTED:
                highest = max(highest, descriptor)
                self._cut_off.discard(descriptor)
                self._pending[descriptor] = None
                self._inflow.begin(descriptor)
            elif event & REFUSED:
                self.has_refused = True
            elif event == DISCONNECTED:
                self._cut_off.discard(descriptor)
                self._pending.pop(descriptor, None)
                self._inflow.end(descriptor)
                # It doesn't say whose connection it was.
                self._next_question = time.monotonic()
                self._suspect_until = self._next_question + SUSPECT_S
        return highest

    def _take(self) -> None:
        receive, taken = self._socket.recv, self._taken
        sources = []
        dropped = 0
        while taken or (
            len(self.received) + dropped < BATCH and self._socket.getsockopt(EVENTS) & READABLE
        ):
            if self._skipping and not self._skip(receive):
                break  # others want the channel, too
            try:
                if not taken:
                    # One instruction of the interpreter's takes both from ZeroMQ and keeps them:
                    # whoever is interrupted before or after it loses none. pyzmq looks for signals
                    # inside.
                    both = map(receive, _ONCE, _NO_COPY), map(receive, _ONCE, _NO_COPY)
                    taken.extend(zip(*both, strict=False))
                source = self._checked()
            except zmq.Again:
                continue  # it was the rest of what an interrupt has lost
            if source in self._cut_off:
                # Perhaps another one's by now, which has been told before its frames came.
                self._note_events()
            if source in self._cut_off:
                # It had spoken already. An answer might still reach it, and it would take itself
                # for a member: it comes again instead. Some send on and on, until `excessive` finds
                # them: others want the channel, too.
                taken.popleft()
                dropped += 1
                continue
            sources.append(source)
            self.received.extend(map(deque.popleft, (taken,)))
        if any(source not in self._inflow for source in sources):
            # A connection that is so new has come meanwhile.
            self._note_events()
        for source in sources:
            self._pending.pop(source, None)
            self._inflow.hear(source)

    def _checked(self) -> int:
        """See to it that what was taken is a peer's name and one frame; returns the descriptor that
        it came from."""
        receive, taken = self._socket.recv, self._taken
        name, frame = taken[0]
        if not name.more:
            # The rest of what an interrupt has lost, and the next name.
            taken.clear()
            name, frame = frame, receive(NOW, copy=False)
            taken.append((name, frame))
        source = _source(frame)
        if frame.more:
            # Nothing of ours has several parts. These may be millions, which are dropped some at a
            # time, and the frame with them, by the codec.
            taken[0] = (name, _NO_FRAME)
            self._skipping = True
            if source != NOWHERE:
                _cut(source, self._port, socket.SHUT_RDWR)
        return source

    def _skip(self, receive: Callable[..., zmq.Frame]) -> bool:
        """Drop parts of a message; whether all are."""
        with contextlib.suppress(zmq.Again):  # what an interrupt has lost was the last one
            for _ in range(PARTS):
                if not receive(NOW, copy=False).more:
                    break
            else:
                return False
        self._skipping = False
        return True

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


def _source(frame: zmq.Frame) -> int:
    """The descriptor that a frame came from. A peer of an old version of the protocol, or whose
    bytes look like one, has none."""
    try:
        return int(frame.get(SOURCE))
    except zmq.ZMQError:
        return NOWHERE


def _cut(descriptor: int, port: int, way: int = socket.SHUT_RD) -> bool:
    """Reset a connection to a port of this process that ZeroMQ has the descriptor of. Its peer is
    told apart so from one that is refused, and tries again. One that sends on and on is only ended
    by `SHUT_RDWR`.

    Returns:
        False if no descriptor was free to do it: the thread that watches connections will.
    """
    with contextlib.suppress(OSError):
        try:
            # ZeroMQ may close the descriptor at any moment, and the number come to mean another
            # socket, or a file.
            own = os.dup(descriptor)
        except OSError as error:
            if error.errno != errno.EMFILE:
                raise
            if threading.current_thread() is threading.main_thread():
                return False
            # A thread that no signal interrupts gives it back for certain.
            own = descriptor
        try:
            connection = socket.socket(fileno=own)
            try:
                ours = connection.family in _FAMILIES and connection.getsockname()[1] == port
                if ours:
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
                    # ZeroMQ finds that it has ended, and closes it.
                    connection.shutdown(way)
            finally:
                connection.detach()
        finally:
            if own != descriptor:
                os.close(own)
    return True
