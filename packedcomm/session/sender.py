"""The sender's end of a session: waits for its receivers, asks them all, hears what they answer."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections import deque
from collections.abc import Sequence
from typing import ClassVar, Self

import torch

from packedcomm.communicators import (
    Communicator,
    GlooCommunicator,
    Listener,
    NcclCommunicator,
)
from packedcomm.communicators.listener import Address, closing_on_error
from packedcomm.errors import (
    ArgumentError,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    ProtocolError,
    SessionStateError,
)
from packedcomm.planning.chunks import WireFormat
from packedcomm.session import agreement
from packedcomm.session.base import SessionEnd, deadline_after
from packedcomm.session.control import SenderChannel
from packedcomm.session.frames import decode, encode
from packedcomm.session.gathering import gather, no_place, refuse
from packedcomm.session.messages import (
    Cancel,
    Close,
    Failure,
    Hello,
    Message,
    Transport,
    Welcome,
)
from packedcomm.session.remote_errors import combined, described, remote_error
from packedcomm.settings import Settings

__all__ = ["SenderSession"]


class _Receiver:
    """A receiver as the sender knows it."""

    def __init__(self, rank: int, peer: bytes) -> None:
        self.rank = rank
        self.peer = peer
        self.inbox: deque[tuple[int, Message]] = deque()
        self.lost: str | None = None
        """Why nothing more will come from it."""
        self.ended: Failure | None = None
        """What it failed with for good."""

    @property
    def name(self) -> str:
        return f"receiver rank {self.rank}"


class SenderSession(SessionEnd):
    """The sender's end of a session; a context manager. Make one with `Session.listen`.

    It listens from the beginning, so `address` can be handed to the receivers; it waits for them at
    its first use, or when `wait` is called.

    Belongs to one thread at a time; only `abort` may be called from another.
    """

    _role: ClassVar[str] = "the sender"

    def __init__(
        self,
        address: str,
        receivers: int,
        secret: str | None,
        device: torch.device,
        settings: Settings,
        wire_format: WireFormat,
    ) -> None:
        """Use `Session.listen`."""
        super().__init__(settings, device)
        self._closed = True
        self.epoch = secrets.token_hex(16)
        self.rank, self.world_size = 0, receivers + 1
        self.wire_format = wire_format
        self.buffer_size_bytes = settings.buffer_size_bytes
        self._receivers: list[_Receiver] = []
        # Of the last message sent, and of the last `Cancel`: an answer to an earlier question and a
        # failure from before a `Cancel` are of no interest any more.
        self._number = 0
        self._cancelled = 0
        self._channel: SenderChannel = SenderChannel(address, secret, settings)
        self.address = self._channel.address
        self._closed = False

    @property
    def communicator(self) -> Communicator:
        """As `SessionEnd.communicator`; waits for the receivers."""
        self.wait()
        assert self._communicator is not None
        return self._communicator

    @property
    def transport(self) -> Transport:
        """As `SessionEnd.transport`; waits for the receivers."""
        if self._transport is None:
            self.wait()
        assert self._transport is not None
        return self._transport

    def wait(self) -> Self:
        """Wait until all receivers have come and the communicator is connected.

        Returns at once when that is so. What fails here ends the session, and every receiver that
        has come is told.

        Raises:
            RendezvousTimeout: not all came within `Settings.connect_timeout_s`; says how many did.
            ConfigMismatch: some are on GPUs and some on CPUs.
            VersionMismatch: versions of packedcomm or NCCL differ.
            NcclError, PeerLost, RemoteError, ...: the communicator couldn't be connected.
            SessionStateError: the session is closed or was aborted.
        """
        self._check_open("wait")
        if self._communicator is not None:
            return self
        deadline = deadline_after(self.settings.connect_timeout_s)
        came: dict[bytes, Hello] = {}
        try:
            gather(self._channel, came, self.world_size - 1, deadline, self._check_waiting)
            hello = agreement.own_hello(self.device, self.settings)
            transport = agreement.agreed_transport(hello, list(came.values()))
            self._receivers = [_Receiver(rank, peer) for rank, peer in enumerate(came, 1)]
            communicator = self._warm_up(self._connect(transport, deadline), deadline)
        except BaseException as error:
            for peer in came:
                refuse(self._channel, peer, error)
            with self._ending:
                self._ended = self._ended or f"{type(error).__name__}: {error}"
            raise
        with self._ending:
            self._communicator, self._transport = communicator, transport
            aborted = self._ended
        if aborted is not None:
            communicator.abort(aborted)
        self._check_open("wait")
        return self

    def ask(
        self,
        message: Message | Sequence[Message],
        expect: type[Message] | tuple[type[Message], ...],
        timeout_s: float | None = None,
    ) -> list[Message]:
        """Say something to every receiver and wait for all answers.

        A receiver's failure doesn't cut the wait for the others short, so that none of them is in
        the middle of something when this raises.

        Args:
            message: the question; or one for each receiver, in the order of their ranks.
            expect: the kind of answer, or several.
            timeout_s: deadline in seconds; None is `Settings.operation_timeout_s`.

        Returns:
            The answers, in the order of the ranks.

        Raises:
            PackedCommError: a receiver failed: the same class as there if it is one of
                packedcomm's, else `RemoteError`. The message names the rank; where several failed
                all are listed. The cause has the remote traceback.
            PeerLost: a receiver has left or died.
            DeadlineExceeded: a receiver hasn't answered.
            ProtocolError: a receiver answered something else.
            SessionStateError: the session is closed or was aborted.
        """
        self.wait()
        seconds = self.settings.operation_timeout_s if timeout_s is None else timeout_s
        deadline = deadline_after(seconds)
        failures: dict[int, PackedCommError] = {}
        gone = {r.rank: why for r in self._receivers if (why := self._gone(r)) is not None}
        if gone:
            raise combined(gone)
        self._say(message)
        what = _name(message)
        answers: dict[int, Message] = {}
        waiting = list(self._receivers)
        while True:
            for receiver in waiting:
                found = self._answer(receiver, expect, what)
                if isinstance(found, PackedCommError):
                    failures[receiver.rank] = found
                elif found is not None:
                    answers[receiver.rank] = found
            waiting = [r for r in waiting if r.rank not in answers and r.rank not in failures]
            if not waiting:
                break
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                for receiver in waiting:
                    failures[receiver.rank] = DeadlineExceeded(
                        f"{receiver.name}: no answer to {what} within {seconds:.3g} s"
                    )
                break
            self._take(remaining, what)
        if failures:
            raise combined(failures)
        return [answers[rank] for rank in sorted(answers)]

    def tell(self, message: Message | Sequence[Message]) -> None:
        """Say something to every receiver that is still there, without waiting.

        A receiver that has gone is noticed by the next `ask` or `failure`.

        Args:
            message: as for `ask`.

        Raises:
            SessionStateError: the session is closed or was aborted.
            ProtocolError: the message is too large.
        """
        self.wait()
        self._say(message)

    def cancel(self, error: BaseException) -> None:
        """Tell every receiver that what is under way is given up, and why; the session goes on.

        Failures that receivers have reported up to here are forgotten. Never raises for receivers
        that have gone or a session that has ended: the error matters more.
        """
        if self._communicator is None or self._ended is not None:
            return
        with contextlib.suppress(PackedCommError):
            self._say(Cancel(*described(error)))
            self._cancelled = self._number

    @property
    def incomplete(self) -> bool:
        """Whether a receiver has ended or gone, without which nothing can be sent any more."""
        return any(self._gone(receiver) is not None for receiver in self._receivers)

    def failure(self) -> PackedCommError | None:
        """What a receiver has reported since the last `Cancel`, or None; looks and doesn't wait.

        Returns:
            The error, as `ask` would raise it, which it still does if it is called next; a
            `PeerLost` for a receiver that has gone; a `SessionStateError` if this end was aborted.
        """
        if self._ended is not None:
            return SessionStateError(f"{self._role}: {self._ended}")
        self._take(0.0, "failure")
        failures = {}
        for receiver in self._receivers:
            for number, message in receiver.inbox:
                if isinstance(message, Failure) and number >= self._cancelled:
                    failures[receiver.rank] = remote_error(message, receiver.name)
                    break
            else:
                gone = self._gone(receiver)
                if gone is not None:
                    failures[receiver.rank] = gone
        return combined(failures) if failures else None

    def _check_waiting(self) -> None:
        self._check_open("wait")

    def _connect(self, transport: Transport, deadline: float) -> Communicator:
        if transport == "nccl":
            unique_id = NcclCommunicator.unique_id(self.settings)
            self._welcome(transport, unique_id, "")
            return NcclCommunicator.from_unique_id(
                unique_id,
                0,
                self.world_size,
                device=self.device,
                timeout_s=max(0.1, deadline - time.monotonic()),
                settings=self.settings,
            )
        host = Address.parse(self.address).host
        listener = Listener.bind(str(Address(host, 0)))
        with closing_on_error(listener):
            self._welcome(transport, b"", listener.address)
        return GlooCommunicator.connect(
            listener,
            0,
            self.world_size,
            timeout_s=max(0.1, deadline - time.monotonic()),
            settings=self.settings,
        )

    def _welcome(self, transport: Transport, unique_id: bytes, address: str) -> None:
        for receiver in self._receivers:
            welcome = Welcome(
                epoch=self.epoch,
                rank=receiver.rank,
                world_size=self.world_size,
                transport=transport,
                unique_id=unique_id,
                address=address,
                buffer_size_bytes=self.buffer_size_bytes,
                wire_format=self.wire_format,
            )
            self._channel.send(receiver.peer, encode(welcome, 0, self.settings))

    def _say(self, message: Message | Sequence[Message]) -> None:
        count = len(self._receivers)
        messages = [message] * count if isinstance(message, Message) else list(message)
        if len(messages) != count:
            raise ArgumentError(f"{len(messages)} messages for {count} receivers")
        self._number += 1
        frames: dict[int, bytes] = {}
        for receiver, said in zip(self._receivers, messages, strict=True):
            # One message to all is one frame: with a manifest it has megabytes.
            if id(said) not in frames:
                frames[id(said)] = encode(said, self._number, self.settings)
            if receiver.lost is None and not self._channel.send(receiver.peer, frames[id(said)]):
                receiver.lost = "the connection has ended"

    def _take(self, timeout_s: float, operation: str) -> None:
        """Wait for at most 50 ms, and put what has come into the inboxes."""
        self._check_open(operation)
        present = {r.peer: r for r in self._receivers if r.lost is None}
        frames, gone = self._channel.wait(timeout_s, present)
        for peer, frame in frames:
            receiver = present.get(peer)
            if receiver is None:
                if all(known.peer != peer for known in self._receivers):
                    refuse(self._channel, peer, no_place(self.world_size - 1))
                continue
            try:
                number, message = decode(frame, self.settings)
                if not message.from_receiver:
                    raise ProtocolError(f"{type(message).__name__} is not for receivers to say")
            except ProtocolError as error:
                number, message = self._number, Failure(*described(error))
            if isinstance(message, Close):
                receiver.lost = f"it has left the session: {message.reason}"
            elif isinstance(message, Failure) and message.ended:
                receiver.ended = receiver.ended or message
            else:
                receiver.inbox.append((number, message))
        for peer in gone:
            present[peer].lost = present[peer].lost or "the connection has ended"

    def _answer(
        self, receiver: _Receiver, expect: type[Message] | tuple[type[Message], ...], what: str
    ) -> Message | PackedCommError | None:
        """The receiver's answer to the last question, or why there is none; None is not yet."""
        while receiver.inbox:
            number, message = receiver.inbox.popleft()
            if isinstance(message, Failure):
                if number >= self._cancelled:
                    return remote_error(message, receiver.name)
            elif number == self._number:
                if isinstance(message, expect):
                    return message
                return ProtocolError(
                    f"{receiver.name} has answered {what} with {type(message).__name__}"
                )
        return self._gone(receiver)

    def _gone(self, receiver: _Receiver) -> PackedCommError | None:
        """Why nothing more is to be expected of a receiver; None if there is."""
        if receiver.ended is not None:
            return remote_error(receiver.ended, receiver.name)
        if receiver.lost is None:
            return None
        for number, message in receiver.inbox:
            # Its last words say more than that it has gone.
            if isinstance(message, Failure) and number >= self._cancelled:
                return remote_error(message, receiver.name)
        return PeerLost(f"{receiver.name}: {receiver.lost}")

    def _farewell(self, message: Message) -> None:
        with contextlib.suppress(PackedCommError):
            frame = encode(message, self._number, self.settings)
            for receiver in self._receivers:
                self._channel.send(receiver.peer, frame)


def _name(message: Message | Sequence[Message]) -> str:
    first = message if isinstance(message, Message) else message[0]
    return type(first).__name__
