"""What a receiver hears: messages in order, none of which is lost, and how the sender is."""

from __future__ import annotations

import contextlib
import time
from typing import Any, ClassVar

import torch

from packedcomm.errors import DeadlineExceeded, PackedCommError, ProtocolError, RemoteError
from packedcomm.session.base import SessionEnd
from packedcomm.session.frames import decode, encode
from packedcomm.session.messages import Beat, Failure, Message, Welcome
from packedcomm.session.receiver_channel import ReceiverChannel
from packedcomm.session.remote_errors import described
from packedcomm.session.states import SyncState
from packedcomm.settings import Settings

__all__ = ["Inbox"]

# A message's number and the message, or what came instead of one.
Received = tuple[int, Message | ProtocolError]


class Inbox(SessionEnd):
    """The receiver's end of a session, as far as it listens.

    Args:
        address: the sender's.
        settings, device: as for `SessionEnd`.
    """

    _role: ClassVar[str] = "the receiver"
    _channel: ReceiverChannel

    def __init__(self, address: str, settings: Settings, device: torch.device) -> None:
        super().__init__(settings, device)
        self.address = address
        # Of the message that was taken last, and the highest of what has come.
        self._number = 0
        self._come = 0
        # Whether something has come that can't be read.
        self._unread = False
        # Why the sender has ended the session here.
        self._left: str | None = None
        self._heard = time.monotonic()
        # When it was last said that nothing is heard.
        self._complained = self._heard
        self._sender_state = SyncState.IDLE
        self._sender_waits_for = ""

    @property
    def _inbox(self) -> list[Received]:
        """Messages that nobody has taken yet, and what came instead of one."""
        return [item for item in list(self._channel.received) if type(item) is tuple]

    def _first(self) -> Received | None:
        """The first of these."""
        received = self._channel.received
        while received:
            try:
                first = received[0]
            except IndexError:
                return None  # it was a beat
            if type(first) is tuple:
                return first
            # Another thread is about to read it, or whoever was has been interrupted.
            self._pump(0.0)
        return None

    def _take(self, timeout_s: float, *, soon: bool = False) -> None:
        self._channel.wait(timeout_s, soon=soon)
        received = self._channel.received
        # Each frame is read where it is: whoever is interrupted leaves it to the next one. Others
        # only put more at the end.
        index = 0
        while index < len(received):
            if type(received[index]) is not bytes:
                index += 1
            elif (read := self._read(received[index])) is not None:
                received[index] = read
            else:
                del received[index]

    def _read(self, frame: bytes) -> Received | None:
        """The message of a frame, or what is wrong with it; None if nobody has to take it."""
        if not frame:
            return None
        self._heard = time.monotonic()
        try:
            number, message = decode(frame, self.settings)
            if not message.from_sender:
                raise ProtocolError(f"{self._whom()} has sent {type(message).__name__}")
        except ProtocolError as error:
            # Nor can its number: what the sender says it has said isn't missed for that.
            self._unread = True
            return self._number, error
        if isinstance(message, Beat):
            self._sender_state = SyncState(message.state)
            self._sender_waits_for = message.waits_for
            self._report_lost(number)
            return None
        self._come = max(self._come, number)
        # Said again where the sender was interrupted.
        return None if self.epoch and isinstance(message, Welcome) else (number, message)

    def _report_lost(self, said: int) -> None:
        """Tell the sender if something that it says it has said never came: a signal's handler has
        raised inside pyzmq, while that was being taken from ZeroMQ. It waits for the answer."""
        if said <= self._come:
            return
        if not self._unread:
            error = RemoteError("interrupted while it took a message, which is lost")
            failure = Failure(*described(error, self.settings.max_frame_bytes))
            with contextlib.suppress(PackedCommError):
                self._channel.send(encode(failure, said, self.settings))
        self._come = said
        self._unread = False

    def _give_more_time(self, seconds: float) -> None:
        self._heard = min(self._heard + seconds, time.monotonic())

    def _silent(self) -> DeadlineExceeded | None:
        """Said once in so long a silence, so that who asks again has to wait again."""
        # As of the last look: who was asleep since then hasn't listened.
        looked = self._last_look
        if looked - max(self._heard, self._complained) <= self.settings.heartbeat_timeout_s:
            return None
        silence = looked - self._heard
        return DeadlineExceeded(
            f"{self._whom()} has been silent for {silence:.1f} s{self._during()}: its process is "
            "stopped or hangs"
        )

    def _during(self) -> str:
        return f", in chunk {self.chunk}" if self.state is SyncState.MOVING else ""

    def _peers(self) -> list[dict[str, Any]]:
        return [
            {
                "rank": 0,
                "name": self._whom(),
                "state": str(self._sender_state),
                "waits_for": self._sender_waits_for,
                "silent_s": round(time.monotonic() - self._heard, 3),
                "lost": self._left or ("the connection has ended" if self._channel.lost else None),
            }
        ]

    def _waited_for(self) -> list[dict[str, Any]]:
        return [] if self.state is SyncState.AGREED else self._peers()

    def _whom(self) -> str:
        return f"the sender at {self.address}"
