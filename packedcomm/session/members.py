"""The receivers of a session as its sender knows them: who is there, who has gone, and why."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Collection, Iterator
from typing import Any

from packedcomm.errors import DeadlineExceeded, PackedCommError, PeerLost, ProtocolError
from packedcomm.session.messages import Beat, Close, Failure, Hello, Message
from packedcomm.session.remote_errors import remote_error
from packedcomm.session.states import SyncState

__all__ = ["Member", "Members"]


# Messages of a receiver that wait to be looked at; it has no reason for more than a few.
MOST_MESSAGES = 64


class Member:
    """One receiver, from its Hello until it has gone."""

    def __init__(self, rank: int, peer: bytes, hello: Hello) -> None:
        self.rank = rank
        self.peer = peer
        self.hello = hello
        self.inbox: deque[tuple[int, Message]] = deque()
        self.heard = time.monotonic()
        self.state = SyncState.IDLE
        self.waits_for = ""
        self.asked = 0
        """Number of the last message that was sent to it, which an answer repeats."""
        self.said = 0
        """That number as soon as the message is on its way; 0 once it has been taken back."""
        self.awaited = True
        """Whether it hasn't answered yet what it was asked last."""
        self.connected = False
        """Whether it has a place in the present communicator."""
        self.lost: PackedCommError | None = None
        """Why nothing more is to be expected from it."""
        self.left = False
        """Whether it said goodbye in order."""
        self.reported = False
        """Whether an error has told the caller that it has gone."""

    @property
    def name(self) -> str:
        """What it is called in messages."""
        return f"receiver rank {self.rank}"

    @property
    def place(self) -> str:
        """Where it runs."""
        return f"process {self.hello.pid} on {self.hello.host}"

    def hear(self, number: int, message: Message) -> None:
        """Sort what it has said."""
        self.heard = time.monotonic()
        if isinstance(message, Beat):
            self.state, self.waits_for = SyncState(message.state), message.waits_for
        elif isinstance(message, Close):
            self.left = message.in_order
            self.give_up(PeerLost(f"{self.name}: it has left the session: {message.reason}"))
        elif isinstance(message, Failure) and message.ended:
            self.give_up(remote_error(message, self.name))
        elif len(self.inbox) >= MOST_MESSAGES:
            self.give_up(ProtocolError(f"{self.name}: it says too much without being asked"))
        else:
            self.inbox.append((number, message))

    def disconnect(self, during: str) -> None:
        """Its connection has ended."""
        self.give_up(PeerLost(f"{self.name}: the connection to {self.place} has ended{during}"))

    def check_silence(self, limit_s: float, during: str) -> None:
        """Give it up if nothing was heard of it for so long."""
        silence = self.silence_s
        if silence > limit_s:
            self.give_up(
                DeadlineExceeded(
                    f"{self.name}: {self.place} has been silent for {silence:.1f} s{during}: it "
                    "is stopped or hangs"
                )
            )

    def give_up(self, error: PackedCommError) -> None:
        """Expect nothing more from it, because of an error."""
        self.lost = self.lost or error

    @property
    def silence_s(self) -> float:
        """Seconds since it was heard last."""
        return time.monotonic() - self.heard

    def failure_since(self, number: int) -> PackedCommError | None:
        """What it has reported, not counting answers to questions before a number; its last words
        say more than that it has gone."""
        for said, message in list(self.inbox):
            if isinstance(message, Failure) and said >= number:
                return remote_error(message, self.name)
        return self.lost

    def as_dict(self) -> dict[str, Any]:
        """What a flight record says of it."""
        return {
            "rank": self.rank,
            "name": self.name,
            "pid": self.hello.pid,
            "host": self.hello.host,
            "state": str(self.state),
            "waits_for": self.waits_for,
            "silent_s": round(self.silence_s, 3),
            "lost": None if self.lost is None else str(self.lost)[:500],
        }


class Members:
    """All receivers that have come and haven't been dropped, in the order in which they came."""

    def __init__(self) -> None:
        self._by_peer: dict[bytes, Member] = {}

    def __iter__(self) -> Iterator[Member]:
        return iter(list(self._by_peer.values()))

    def __len__(self) -> int:
        return len(self._by_peer)

    @property
    def peers(self) -> Collection[bytes]:
        """The connections of all."""
        return self._by_peer.keys()

    def get(self, peer: bytes) -> Member | None:
        """The member with this connection."""
        return self._by_peer.get(peer)

    @property
    def next_rank(self) -> int:
        """The rank of whoever comes next, until all are numbered anew."""
        return max((member.rank for member in self), default=0) + 1

    def add(self, member: Member) -> None:
        """Take a receiver in."""
        self._by_peer[member.peer] = member

    @property
    def present(self) -> list[Member]:
        """Those that haven't gone."""
        return [member for member in self if member.lost is None]

    @property
    def connected(self) -> list[Member]:
        """Those with a place in the present communicator, gone or not, by rank."""
        # Not by way of the iterator: it is asked a dozen times a sync.
        return [member for member in list(self._by_peer.values()) if member.connected]

    def take_out_gone(self) -> list[Member]:
        """Drop those that have gone, and return those of them that didn't leave in order."""
        gone = [member for member in self if member.lost is not None]
        for member in gone:
            del self._by_peer[member.peer]
        return [member for member in gone if not member.left]

    def rank_anew(self) -> None:
        """Number those that are there from 1 on; none has a place in a communicator any more."""
        for rank, member in enumerate(self, 1):
            member.rank = rank
            member.connected = False
            member.inbox.clear()
