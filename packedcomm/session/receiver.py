"""A receiver's end of a session: comes, joins communicators, takes messages and answers them."""

from __future__ import annotations

import contextlib
import random
import time
from collections.abc import Callable
from functools import partial
from itertools import count

import torch

from packedcomm.communicators import Communicator, GlooCommunicator, NcclCommunicator
from packedcomm.communicators.listener import Address
from packedcomm.errors import (
    ContextLost,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    ProtocolError,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session import agreement
from packedcomm.session.frames import encode
from packedcomm.session.inbox import Inbox
from packedcomm.session.messages import (
    Assemble,
    Beat,
    Cancel,
    Close,
    Commit,
    Connect,
    Connected,
    Failure,
    Hello,
    Message,
    NoChange,
    Offer,
    Present,
    Refused,
    Transport,
    Welcome,
)
from packedcomm.session.phases import deadline_after
from packedcomm.session.receiver_channel import ReceiverChannel
from packedcomm.session.remote_errors import described, remote_error
from packedcomm.session.states import AT_REST
from packedcomm.session.told import Told
from packedcomm.settings import Settings

__all__ = ["ReceiverSession"]

# Between two attempts to connect to a sender that cuts connections off.
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 1.0

_ANSWERED = (Assemble, Offer, NoChange, Commit)


class ReceiverSession(Inbox):
    """A receiver's end of a session; a context manager. Make one with `Session.connect`.

    Belongs to one thread at a time; `abort`, `failure` and `state` are for any.
    """

    def __init__(
        self, address: str, secret: str | None, device: torch.device, settings: Settings
    ) -> None:
        """Use `Session.connect`."""
        super().__init__(address, settings, device)
        self._closed = True
        hello = agreement.own_hello(device, settings)
        deadline = deadline_after(settings.connect_timeout_s)
        self.rank, self.world_size = 0, 0
        self._owes = False
        self.told = Told()
        """What senders know of what is held here."""
        connect = partial(ReceiverChannel, address, secret, settings, deadline)
        self._channel = connect()
        welcome = self._introduce(hello, deadline) or self._come_again(connect, hello, deadline)
        self.epoch = welcome.epoch
        self.rank, self.world_size = welcome.rank, welcome.world_size
        self.wire_format = welcome.wire_format
        self.buffer_size_bytes = welcome.buffer_size_bytes
        self._transport = welcome.transport
        self.decided = welcome.decided
        """Number of the last sync of this epoch that had been committed when this end came."""
        self._closed = False
        self.flight.note("welcome", rank=self.rank, decided=self.decided)
        self.start_supervisor()

    @property
    def communicator(self) -> Communicator:
        """The communicator of all ranks; the sender is rank 0. The session ends it.

        Raises:
            SessionStateError: there is none: `receive` connects it before the first sync.
        """
        self._check_open("communicator")
        if self._communicator is None:
            raise SessionStateError("communicator on the receiver: none is connected yet")
        return self._communicator

    @property
    def transport(self) -> Transport:
        """As `SessionEnd.transport`."""
        assert self._transport is not None
        return self._transport

    @property
    def lasts(self) -> bool:
        """Whether more can come from the sender."""
        return self._ended is None and self._left is None and not self._channel.lost

    def receive(self, timeout_s: float | None = None) -> Message:
        """The sender's next message, in the order in which they were sent.

        Joins the communicator when the sender says so. `Cancel` and `Close` are messages too. After
        `Close` there is nothing more to come.

        Args:
            timeout_s: deadline in seconds; None waits for as long as the sender is there.

        Raises:
            DeadlineExceeded: nothing came, or the sender is stopped.
            PeerLost: the sender's process has ended, or the connection to it.
            ProtocolError: what came isn't a sender's message.
            SessionStateError: the session is closed, on either side, or was aborted.
            RendezvousTimeout, NcclError, RemoteError, ...: a communicator couldn't be connected;
                the session goes on.
        """
        message = self.poll(timeout_s)
        if message is None:
            raise DeadlineExceeded(f"{self._whom()} has said nothing within {timeout_s:.3g} s")
        return message

    def poll(self, timeout_s: float | None) -> Message | None:
        """As `receive`, but None if nothing came in time."""
        deadline = deadline_after(timeout_s)
        # Whoever is told to receive is often about to be sent something.
        soon = True
        while True:
            self._check_open("receive")
            if (first := self._first()) is not None:
                number, message = first
                # Before it is taken, so that whoever is interrupted knows of it.
                self._number, self._owes = number, isinstance(message, _ANSWERED)
                self._drop_first()
                if isinstance(message, ProtocolError):
                    raise message
                if isinstance(message, Close):
                    self._left = message.reason
                if not isinstance(message, Assemble):
                    return message
                if not self.withdrawn:
                    self._join(message)
                continue
            if self._left is not None:
                raise SessionStateError(
                    f"receive: the sender has ended the session here: {self._left}"
                )
            if self._channel.lost:
                raise PeerLost(f"{self._whom()} has ended the connection")
            if self._silent() is not None:
                # Unless nobody has looked for so long.
                self._pump(0.0)
                if (silent := self._silent()) is not None:
                    self._complained = time.monotonic()
                    raise silent
                continue
            remaining = deadline - time.monotonic()
            if remaining <= 0:
                return None
            self._pump(remaining, soon=soon or self.state not in AT_REST)
            soon = False

    def reply(self, message: Message) -> None:
        """Answer the message that `receive` returned last.

        Raises:
            PeerLost: the sender's process has ended, or the connection to it.
            SessionStateError: the session is closed or was aborted.
            ProtocolError: the message is too large.
        """
        self._check_open("reply")
        self._channel.send(encode(message, self._number, self.settings))
        self._owes = False

    def fail(self, error: BaseException, *, ended: bool = False) -> None:
        """Tell the sender that this receiver failed. Never raises: the error matters more.

        The sender raises the same class if it is one of packedcomm's, else a `RemoteError`.

        Args:
            error: what happened.
            ended: whether this receiver can't take part in the session any more.
        """
        with contextlib.suppress(PackedCommError):
            self.reply(Failure(*described(error, self.settings.max_frame_bytes), ended))

    def _failed(self) -> PackedCommError | None:
        for _, message in self._inbox:
            if isinstance(message, ProtocolError):
                return message
            if isinstance(message, Cancel):
                return remote_error(message, "cancelled by the sender")
            if isinstance(message, Close):
                return PeerLost(f"{self._whom()} has ended the session here: {message.reason}")
        if self._left is not None:
            return PeerLost(f"{self._whom()} has ended the session here: {self._left}")
        if self._channel.lost:
            return PeerLost(f"{self._whom()} has ended the connection{self._during()}")
        return self._silent()

    @property
    def number(self) -> int:
        """The number of the message that `receive` or `poll` returned last."""
        return self._number

    @property
    def owes(self) -> bool:
        """Whether the sender waits for an answer to that message."""
        return self._owes

    @property
    def withdrawn(self) -> bool:
        """Whether the sender has given up meanwhile what that message was about."""
        return any(isinstance(m, Cancel) for _, m in self._inbox)

    @property
    def untouched(self) -> bool:
        """Whether the sender has given up what this end waits for before it sent any data. What it
        says first counts: whatever it says after that is of no sync any more."""
        cancels = (m for _, m in self._inbox if isinstance(m, Cancel))
        return next((m.untouched for m in cancels), False)

    def _say_to_all(self, message: Message) -> None:
        with contextlib.suppress(PackedCommError):
            number = 0 if isinstance(message, Beat) else self._number
            self._channel.send(encode(message, number, self.settings))

    def _introduce(self, hello: Hello, deadline: float) -> Welcome | None:
        """Say what this end is, and wait for the answer. None if the connection was cut before that
        came, and may be made again: the channel is closed then, as when this raises."""
        try:
            welcome = self._await_welcome(hello, deadline)
        except BaseException:
            self._channel.close()
            raise
        if welcome is None:
            self._channel.close()
            if not self._channel.listened_to():
                raise PeerLost(f"{self._whom()} has ended the connection before it has answered")
        return welcome

    def _come_again(
        self, connect: Callable[[], ReceiverChannel], hello: Hello, deadline: float
    ) -> Welcome:
        """After the connection was cut, by a sender to which too many come at once: connect again
        until there is an answer, ever more seldom."""
        for cuts in count(1):
            longest = min(LONGEST_PAUSE_S, FIRST_PAUSE_S * 2.0 ** min(cuts, 10))
            pause = longest * random.uniform(0.5, 1.0)  # noqa: S311
            time.sleep(max(0.0, min(pause, deadline - time.monotonic())))
            try:
                self._channel = connect()
                if (welcome := self._introduce(hello, deadline)) is not None:
                    return welcome
            except RendezvousTimeout as error:
                raise PeerLost(
                    f"{self._whom()} has ended the connection {cuts} times before it has answered"
                ) from error
        raise AssertionError("it counts for ever")

    def _await_welcome(self, hello: Hello, deadline: float) -> Welcome | None:
        frame = encode(hello, 0, self.settings)
        again = 0.0
        while (first := self._first()) is None:
            if self._channel.lost:
                return None
            if time.monotonic() >= deadline:
                raise RendezvousTimeout(
                    f"{self._whom()} has not answered within "
                    f"{self.settings.connect_timeout_s:.3g} s"
                )
            if time.monotonic() >= again:
                # More than once: a sender that is interrupted may lose it.
                with contextlib.suppress(PeerLost):
                    self._channel.send(frame)
                again = time.monotonic() + self.settings.heartbeat_interval_s
            self._pump(deadline - time.monotonic())
        self._number, message = first
        self._drop_first()
        if isinstance(message, ProtocolError):
            raise message
        if isinstance(message, Refused):
            raise remote_error(message, f"refused by {self._whom()}")
        if isinstance(message, Close):
            raise PeerLost(f"{self._whom()} has ended the session here: {message.reason}")
        if not isinstance(message, Welcome):
            raise ProtocolError(f"{self._whom()} has answered Hello with {type(message).__name__}")
        return message

    def _join(self, assemble: Assemble) -> None:
        """Connect another communicator, together with all other members."""
        self.flight.note("assemble", rank=assemble.rank, world_size=assemble.world_size)
        try:
            self.drop_communicator("the members of the session have changed")
            self.reply(Present())
            message = self._await_connect()
            if message is None:
                return
            self.rank, self.world_size = assemble.rank, assemble.world_size
            deadline = deadline_after(self.settings.connect_timeout_s)
            self._adopt(self._warm_up(self._connect(message, deadline), deadline))
            self.reply(Connected())
        except BaseException as error:
            cause = self.phases.interruption or self._failed()
            if cause is None:
                self.fail(error, ended=isinstance(error, ContextLost))
                raise
            raise cause from error

    def _await_connect(self) -> Connect | None:
        """The sender's word that everybody is present; None if it has given that up."""
        deadline = deadline_after(self.settings.agree_timeout_s)
        while (first := self._first()) is None:
            self._check_failure()
            if time.monotonic() >= deadline:
                raise DeadlineExceeded(
                    f"{self._whom()} has not let this end connect within "
                    f"{self.settings.agree_timeout_s:.3g} s: another receiver may be busy"
                )
            self._pump(deadline - time.monotonic())
        # What else has come may take it back.
        self._check_failure()
        number, message = first
        if not isinstance(message, Connect):
            return None
        self._number = number
        self._drop_first()
        return message

    def _connect(self, message: Connect, deadline: float) -> Communicator:
        remaining = max(0.1, deadline - time.monotonic())
        if message.unique_id:
            return NcclCommunicator.from_unique_id(
                message.unique_id,
                self.rank,
                self.world_size,
                device=self.device,
                timeout_s=remaining,
                settings=self.settings,
                check=self._check_failure,
            )
        meeting = Address.parse(message.address)
        if meeting.all_interfaces:
            # Only this end knows by which address it reaches the sender's machine.
            meeting = Address(self._channel.reached, meeting.port)
        return GlooCommunicator.connect(
            str(meeting),
            self.rank,
            self.world_size,
            timeout_s=remaining,
            settings=self.settings,
            check=self._check_failure,
        )
