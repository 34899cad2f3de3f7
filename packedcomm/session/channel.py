"""What both channels for control messages have in common: a ZeroMQ socket, its events, one lock.

A frame of no bytes says nothing: it is sent only to learn whether a peer is still connected.
"""

from __future__ import annotations

import os
import struct
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

import zmq

from packedcomm.descriptors import check_descriptors
from packedcomm.errors import SessionStateError
from packedcomm.session.event_watch import EventWatch
from packedcomm.session.inflow import Inflow
from packedcomm.settings import Settings
from packedcomm.threads import Thread

__all__ = ["BATCH", "DISCONNECTED", "EVENTS", "MORE", "NOW", "READABLE", "Channel"]

# How long a wait may keep the channel to itself: `close` from another thread comes in between.
SLICE_S = 0.05

# How long a peer may take over ZeroMQ's handshake, and how long closing waits for the last words.
HANDSHAKE_MS = 10_000
LINGER_MS = 1000

# For how long an answer that is about to come is looked for again and again, where that takes
# nothing from the process that is to send it.
SPIN_S = 0.0005
SPINS = len(os.sched_getaffinity(0)) >= 8

# What a channel has at most, before anybody is connected.
DESCRIPTORS = 24

# Each channel has a context of its own, so one name does for all monitors.
MONITOR = "inproc://monitor"

# As plain numbers: the enumerations of pyzmq cost a microsecond per use.
EVENTS = int(zmq.EVENTS)
READABLE = int(zmq.POLLIN)
NOW = int(zmq.NOBLOCK)
MORE = int(zmq.SNDMORE) | NOW
DISCONNECTED = int(zmq.EVENT_DISCONNECTED)

# What a monitor tells of an event: its number, and a value.
EVENT = struct.Struct("=Hi")

# Frames taken in one go; one peer can't keep the others waiting.
BATCH = 256

# A stranger's machine that vanishes without closing its connection is forgotten after 30 s.
# Whoever takes part beats, and is missed after `heartbeat_timeout_s`.
KEEPALIVE = {"TCP_KEEPALIVE": 1, "TCP_KEEPALIVE_IDLE": 15, "TCP_KEEPALIVE_INTVL": 5} | {
    "TCP_KEEPALIVE_CNT": 3
}


class _Held:
    """A context and what is done before it ends. One thread at a time."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]]) -> None:
        self.context = context
        self.endings: list[Callable[[], object]] = []
        self.closed = False
        """Whether nobody may use it any more."""
        self.released = False
        """Whether everything has been ended."""

    def check(self) -> None:
        """Raise if it is closed."""
        if self.closed:
            raise SessionStateError("the control channel is closed")

    def release(self) -> None:
        """End everything. Idempotent."""
        self.closed = True
        if not self.released:
            for end in self.endings:
                end()
            self.context.term()
            self.released = True


class Channel:
    """A context, a socket, its monitor, and one lock for them."""

    _monitored: ClassVar[int]
    """What of connections the monitor tells."""

    def __init__(self, kind: int, settings: Settings) -> None:
        """Make the socket; binding or connecting it follows.

        Raises:
            TooManyOpenFiles: fewer descriptors are free than a channel needs.
        """
        # ZeroMQ ends the process where it gets none.
        check_descriptors(DESCRIPTORS, "a control channel")
        self.settings = settings
        self.received: deque[Any] = deque()
        """What came. Whoever acts on it takes it out then, not before: one that is interrupted
        loses nothing."""
        self._inflow = Inflow(settings.max_frame_bytes)
        self._watch: EventWatch | None = None
        # What the monitor has told and nobody has acted on.
        self._told: deque[bytes] = deque()
        # A signal handler may say the last words in the middle of a poll.
        self._lock = threading.RLock()
        # Tells whether this thread has the lock.
        self._own = threading.Condition(self._lock)
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
        self._socket.monitor(MONITOR, self._monitored)
        self._monitor: Any = self._context.socket(zmq.PAIR)
        # Without a limit. Strangers could fill any other, and ZeroMQ's thread would then wait until
        # somebody reads, with a lock that `close` needs.
        self._monitor.setsockopt(zmq.RCVHWM, 0)
        self._monitor.connect(MONITOR)
        # What is done in this order before the context ends. A socket must never be collected
        # together with its context, whose end would wait for it for ever: they are held from here
        # until `close`, or until nobody has the channel any more.
        self._held = _Held(self._context)
        self._held.endings += [
            partial(self._socket.monitor, None, 0),
            partial(self._monitor.close, 0),
            self._socket.close,
        ]
        self._forgotten = weakref.finalize(self, _release_aside, self._held)
        self._forgotten.atexit = False
        self._poller = zmq.Poller()
        self._poller.register(self._socket, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)

    def _poll(self, timeout_s: float, *, soon: bool = False) -> tuple[bool, bool]:
        """Wait for frames or events; whether there are any.

        Args:
            timeout_s: in seconds.
            soon: whether something is about to come.
        """
        # An end of the process by Ctrl-C must find the lock free: a poll is never long.
        timeout_ms = round(max(0.0, min(timeout_s, SLICE_S)) * 1000)
        ready = []
        if soon and SPINS:
            # Waking up costs as much as a message takes.
            end = time.monotonic() + SPIN_S
            while not (ready := self._poller.poll(0)) and time.monotonic() < end:
                pass
        found = [socket for socket, _ in ready or self._poller.poll(timeout_ms)]
        return self._socket in found, self._monitor in found or bool(self._told)

    def _events(self) -> Iterator[tuple[int, int]]:
        """What has happened to connections: events, each with its value, a descriptor for some.
        Each counts as seen when the next one is asked for."""
        receive, told = self._monitor.recv, self._told
        while told or self._monitor.getsockopt(EVENTS) & READABLE:
            if not told:
                # With the address, which has another length.
                told.extend(map(receive, (NOW, NOW)))
            if len(told[0]) == EVENT.size:
                yield EVENT.unpack(told[0])
            told.popleft()

    def hang_up(self) -> None:
        """Send what is on its way, and end every connection that others have made; a receiver has
        none of these. Idempotent."""

    def close(self) -> None:
        """Send what is on its way, for a second at most, and release everything. Idempotent; may be
        called from any thread, and from a signal handler in the middle of any other call."""
        self._held.closed = True
        if self._held.released:
            return
        # A thread of its own isn't interrupted half-way. It waits for the end of whatever call has
        # the channel, since nothing is taken away under ZeroMQ; the interpreter's end waits for it.
        thread = Thread(self._release, "packedcomm-release", daemon=False)
        try:
            thread.start()
        except RuntimeError:
            # The interpreter is ending, and starts no more threads.
            self._release()
            return
        if not self._in_a_call():
            thread.join()

    def _in_a_call(self) -> bool:
        """Whether this thread has the channel."""
        try:
            self._own.notify()
        except RuntimeError:
            return False
        return True

    def _release(self) -> None:
        with self._lock:
            self._held.release()
        self._forgotten.detach()
        if self._watch is not None:
            self._watch.join(LINGER_MS / 1000)

    def leave_to_parent(self) -> None:
        """In a process that was forked: never touch again what is the parent's."""
        self._lock = threading.RLock()
        self._own = threading.Condition(self._lock)
        self._forgotten.detach()
        self._held.closed = self._held.released = True


def _release_aside(held: _Held) -> None:
    """Release what a forgotten channel had, on a thread of its own: whichever has just collected
    garbage can't wait, and may be one that is to end."""
    Thread(held.release, "packedcomm-release").start()
