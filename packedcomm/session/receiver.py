"""A receiver's end of a session: comes, agrees, takes messages and answers them."""

from __future__ import annotations

import contextlib
import time
from collections import deque
from typing import ClassVar

import torch

from packedcomm.communicators import Communicator, GlooCommunicator, NcclCommunicator
from packedcomm.communicators.listener import Address
from packedcomm.errors import (
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    ProtocolError,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session import agreement
from packedcomm.session.base import SessionEnd, deadline_after
from packedcomm.session.control import ReceiverChannel
from packedcomm.session.frames import decode, encode
from packedcomm.session.messages import (
    Cancel,
    Close,
    Failure,
    Message,
    Refused,
    Transport,
    Welcome,
)
from packedcomm.session.remote_errors import described, remote_error
from packedcomm.settings import Settings

__all__ = ["ReceiverSession"]


class ReceiverSession(SessionEnd):
    """A receiver's end of a session; a context manager. Make one with `Session.connect`.

    Belongs to one thread at a time; only `abort` may be called from another.
    """

    _role: ClassVar[str] = "the receiver"

    def __init__(
        self, address: str, secret: str | None, device: torch.device, settings: Settings
    ) -> None:
        """Use `Session.connect`."""
        super().__init__(settings, device)
        self._closed = True
        hello = agreement.own_hello(device, settings)
        deadline = deadline_after(settings.connect_timeout_s)
        self.address = address
        self._inbox: deque[tuple[int, Message]] = deque()
        self._number = 0
        self._left: str | None = None
        self._channel: ReceiverChannel = ReceiverChannel(address, secret, settings, deadline)
        try:
            self._channel.send(encode(hello, 0, settings))
            welcome = self._await_welcome(deadline)
            self.epoch = welcome.epoch
            self.rank, self.world_size = welcome.rank, welcome.world_size
            self.wire_format = welcome.wire_format
            self.buffer_size_bytes = welcome.buffer_size_bytes
            self._transport = welcome.transport
            self._communicator = self._warm_up(self._join(welcome, deadline), deadline)
        except BaseException as error:
            if isinstance(error, PackedCommError):
                with contextlib.suppress(PackedCommError):
                    failure = Failure(*described(error))
                    self._channel.send(encode(failure, self._number, settings))
            self._channel.close()
            raise
        self._closed = False

    @property
    def communicator(self) -> Communicator:
        """As `SessionEnd.communicator`."""
        self._check_open("communicator")
        assert self._communicator is not None
        return self._communicator

    @property
    def transport(self) -> Transport:
        """As `SessionEnd.transport`."""
        assert self._transport is not None
        return self._transport

    def receive(self, timeout_s: float | None = None) -> Message:
        """The sender's next message, in the order in which they were sent.

        `Cancel` and `Close` are messages too. After `Close` there is nothing more to come.

        Args:
            timeout_s: deadline in seconds; None waits for as long as the sender is there.

        Raises:
            DeadlineExceeded: nothing came.
            PeerLost: the sender's process has ended, or the connection to it.
            ProtocolError: what came isn't a sender's message.
            SessionStateError: the session is closed, on either side, or was aborted.
        """
        deadline = deadline_after(timeout_s)
        while True:
            self._check_open("receive")
            if self._inbox:
                self._number, message = self._inbox.popleft()
                if isinstance(message, Close):
                    self._left = message.reason
                return message
            if self._left is not None:
                raise SessionStateError(f"receive: the sender has left the session: {self._left}")
            if self._channel.lost:
                raise PeerLost(f"{self._whom()} has ended the connection")
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                raise DeadlineExceeded(f"{self._whom()} has said nothing within {timeout_s:.3g} s")
            self._take(remaining)

    def reply(self, message: Message) -> None:
        """Answer the message that `receive` returned last.

        Raises:
            PeerLost: the sender's process has ended, or the connection to it.
            SessionStateError: the session is closed or was aborted.
            ProtocolError: the message is too large.
        """
        self._check_open("reply")
        self._channel.send(encode(message, self._number, self.settings))

    def fail(self, error: BaseException, *, ended: bool = False) -> None:
        """Tell the sender that this receiver failed. Never raises: the error matters more.

        The sender raises the same class if it is one of packedcomm's, else a `RemoteError`.

        Args:
            error: what happened.
            ended: whether this receiver can't take part in the session any more; then the sender
                raises the error at whatever it asks later, too.
        """
        with contextlib.suppress(PackedCommError):
            self.reply(Failure(*described(error), ended))

    def failure(self) -> PackedCommError | None:
        """What has ended the sync that is under way, or None; looks and doesn't wait.

        Returns:
            The error of a `Cancel` that has come, which `receive` will still return; a `PeerLost`
            if the sender has gone or closed; a `SessionStateError` if this end was aborted.
        """
        if self._ended is not None:
            return SessionStateError(f"{self._role}: {self._ended}")
        try:
            self._take(0.0)
        except PackedCommError as error:
            return error
        for _, message in self._inbox:
            if isinstance(message, Cancel):
                return remote_error(message, "cancelled by the sender")
            if isinstance(message, Close):
                return PeerLost(f"{self._whom()} has left the session: {message.reason}")
        if self._channel.lost:
            return PeerLost(f"{self._whom()} has ended the connection")
        return None

    def _take(self, timeout_s: float) -> None:
        for frame in self._channel.wait(timeout_s):
            number, message = decode(frame, self.settings)
            if not message.from_sender:
                raise ProtocolError(f"{self._whom()} has sent {type(message).__name__}")
            self._inbox.append((number, message))

    def _await_welcome(self, deadline: float) -> Welcome:
        while not self._inbox:
            if self._channel.lost:
                raise PeerLost(f"{self._whom()} has ended the connection before all were there")
            if time.monotonic() >= deadline:
                raise RendezvousTimeout(
                    f"{self._whom()} has not begun the session within "
                    f"{self.settings.connect_timeout_s:.3g} s: other receivers may be missing"
                )
            self._take(deadline - time.monotonic())
        self._number, message = self._inbox.popleft()
        if isinstance(message, Refused):
            raise remote_error(message, f"refused by {self._whom()}")
        if isinstance(message, Close):
            raise PeerLost(f"{self._whom()} has left the session: {message.reason}")
        if not isinstance(message, Welcome):
            raise ProtocolError(f"{self._whom()} has answered Hello with {type(message).__name__}")
        return message

    def _join(self, welcome: Welcome, deadline: float) -> Communicator:
        remaining = max(0.1, deadline - time.monotonic())
        if welcome.transport == "nccl":
            return NcclCommunicator.from_unique_id(
                welcome.unique_id,
                welcome.rank,
                welcome.world_size,
                device=self.device,
                timeout_s=remaining,
                settings=self.settings,
            )
        meeting = Address.parse(welcome.address)
        if meeting.all_interfaces:
            # Only this end knows by which address it reaches the sender's machine.
            meeting = Address(self._channel.reached, meeting.port)
        return GlooCommunicator.connect(
            str(meeting),
            welcome.rank,
            welcome.world_size,
            timeout_s=remaining,
            settings=self.settings,
        )

    def _whom(self) -> str:
        return f"the sender at {self.address}"

    def _farewell(self, message: Message) -> None:
        with contextlib.suppress(PackedCommError):
            self._channel.send(encode(message, self._number, self.settings))
