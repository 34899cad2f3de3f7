"""What a sender hears: which receivers there are, and what each of them has said."""

from __future__ import annotations

import abc
import contextlib
import time
from typing import Any, ClassVar

import torch

from packedcomm.errors import PackedCommError, ProtocolError
from packedcomm.session.base import SessionEnd
from packedcomm.session.frames import decode, encode
from packedcomm.session.members import Member, Members
from packedcomm.session.messages import Failure, Hello, Message, Refused
from packedcomm.session.remote_errors import described
from packedcomm.session.sender_channel import SenderChannel
from packedcomm.session.states import SyncState
from packedcomm.settings import Settings

__all__ = ["Hearing"]

# Beats that a peer has missed when a deadline passes, if it is to be the reason.
MISSED_BEATS = 2


class Hearing(SessionEnd):
    """The sender's end of a session, as far as it listens.

    Args:
        channel: the sender's.
        settings, device: as for `SessionEnd`.
    """

    _role: ClassVar[str] = "the sender"

    def __init__(self, channel: SenderChannel, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self._channel: SenderChannel = channel
        self.address = channel.address
        self.members = Members()
        # Of the last message sent: an answer to an earlier question is of no interest any more.
        self._number = 0

    @abc.abstractmethod
    def _take_in(self, peer: bytes, hello: Message) -> None:
        """Admit a receiver that has just come, or tell it why not."""

    def _take(self, timeout_s: float, *, soon: bool = False) -> None:
        gone = self._channel.wait(timeout_s, self.members.peers, soon=soon)
        # Whoever is interrupted from here on leaves what it hasn't sorted to the next one.
        received = self._channel.received
        while received:
            try:
                peer, frame = received[0]
                if len(frame):
                    self._sort(peer.bytes, frame.bytes)
            except Exception:
                received.popleft()
                raise
            received.popleft()
        for peer in gone:
            if (member := self.members.get(peer)) is not None:
                member.disconnect(self._during())

    def _sort(self, peer: bytes, frame: bytes) -> None:
        """Act on what a peer has said, or keep it for whoever waits for it."""
        member = self.members.get(peer)
        try:
            number, message = decode(frame, self.settings)
            if not message.from_receiver:
                raise ProtocolError(f"{type(message).__name__} is not for receivers to say")
            if member is None:
                self._take_in(peer, message)
                return
            if isinstance(message, Hello):
                if message == member.hello:
                    return  # whoever took it in was interrupted
                raise ProtocolError("Hello was said before")
        except ProtocolError as error:
            if member is None:
                self._refuse(peer, error)
                return
            number = self._number
            message = Failure(*described(error, self.settings.max_frame_bytes))
        member.hear(number, message)

    def _refuse(self, peer: bytes, error: BaseException) -> None:
        """Tell a peer why the session has no place for it. Never raises."""
        kind, text, _ = described(error, self.settings.max_frame_bytes)
        with contextlib.suppress(PackedCommError):
            self._channel.send(peer, encode(Refused(kind, text), 0, self.settings))

    def _during(self) -> str:
        return f", in chunk {self.chunk}" if self.state is SyncState.MOVING else ""

    def _check_silence(self) -> None:
        for member in self.members.present:
            member.check_silence(self.settings.heartbeat_timeout_s, self._during())

    def _give_more_time(self, seconds: float) -> None:
        now = time.monotonic()
        for member in self.members:
            member.heard = min(member.heard + seconds, now)

    def _give_up_silent_peers(self, error: PackedCommError) -> None:
        for member in self._silent():
            member.give_up(error)

    def _silent(self) -> list[Member]:
        """Those with a place that have missed several beats."""
        late = self.settings.heartbeat_interval_s * MISSED_BEATS
        return [m for m in self.members.connected if m.silence_s > late]

    def _peers(self) -> list[dict[str, Any]]:
        return [member.as_dict() for member in self.members]

    def _waited_for(self) -> list[dict[str, Any]]:
        """Receivers that are gone or silent, else those that haven't finished."""
        members = self.members.connected
        silent = self._silent()
        suspects = [m for m in members if m.lost is not None or m in silent]
        late = suspects or [m for m in members if m.awaited and not m.inbox]
        return [m.as_dict() for m in late]
