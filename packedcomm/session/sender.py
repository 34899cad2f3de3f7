"""The sender's end of a session: takes receivers in, asks them all, hears what they answer."""

from __future__ import annotations

import logging
import secrets
import time
from typing import Self

import torch

from packedcomm.communicators import (
    Communicator,
    GlooCommunicator,
    Listener,
    NcclCommunicator,
)
from packedcomm.communicators.listener import Address, closing_on_error
from packedcomm.errors import CapacityError, PackedCommError, PeerLost, RendezvousTimeout, summary
from packedcomm.planning.chunks import WireFormat
from packedcomm.session import agreement
from packedcomm.session.dialogue import Dialogue
from packedcomm.session.frames import encode
from packedcomm.session.members import Member
from packedcomm.session.messages import (
    Assemble,
    Close,
    Connect,
    Connected,
    Hello,
    Message,
    Present,
    Transport,
    Welcome,
)
from packedcomm.session.phases import deadline_after
from packedcomm.session.remote_errors import combined, valid_text
from packedcomm.session.sender_channel import SenderChannel
from packedcomm.session.states import SyncState
from packedcomm.settings import Settings

__all__ = ["MOST_RECEIVERS", "SenderSession"]

logger = logging.getLogger("packedcomm")

MOST_RECEIVERS = 1 << 16


class SenderSession(Dialogue):
    """The sender's end of a session; a context manager. Make one with `Session.listen`.

    It listens from the beginning, so `address` can be handed to the receivers, and takes them in
    whenever they come; those that come later take part from the next sync on. It waits for the
    first ones at its first use, or when `wait` is called.

    Belongs to one thread at a time; `abort`, `failure` and `state` are for any.
    """

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
        self._closed = True
        super().__init__(SenderChannel(address, secret, settings), settings, device)
        self._closed = True
        self.epoch = secrets.token_hex(16)
        self.rank, self.world_size = 0, receivers + 1
        self.wire_format = wire_format
        self.buffer_size_bytes = settings.buffer_size_bytes
        self.decided = 0
        """Number of the last sync that was decided to be committed."""
        self.committed_generation = 0
        """Generation of the communicator over which the last sync was committed."""
        self.committed_number = 0
        """Number of that sync; 0 while it isn't known what all receivers have."""
        self._first = receivers
        # Whether there has been a communicator of all that were waited for.
        self._begun = False
        self._syncs = 0
        self._senders = 0
        self._hello: Hello | None = None
        self._misfit: PackedCommError | None = None
        self._closed = False
        self.start_supervisor()

    @property
    def communicator(self) -> Communicator:
        """As `SessionEnd.communicator`; waits for the receivers and connects if need be."""
        if self._communicator is None:
            self.wait()
        self._check_open("communicator")
        assert self._communicator is not None
        return self._communicator

    @property
    def transport(self) -> Transport:
        """As `SessionEnd.transport`; waits for the receivers."""
        if self._transport is None:
            self.wait()
        assert self._transport is not None
        return self._transport

    def wait(self, receivers: int | None = None) -> Self:
        """Wait until so many receivers are there, and the communicator connects all that are.

        Returns at once when that is so. A session that not all come to, the first time, or with
        something that doesn't fit, ends, and every receiver that has come is told. Whatever else
        fails here is over when it is raised: the next call tries again.

        Args:
            receivers: how many; None is as many as `listen` was told at the first time, and any
                number later.

        Raises:
            RendezvousTimeout: not all came within `Settings.connect_timeout_s`; says how many did.
            ConfigMismatch: some are on GPUs and some on CPUs.
            VersionMismatch: versions of packedcomm or NCCL differ.
            PeerLost: a receiver has gone since the last sync, without leaving in order. It is told
                once; then the session goes on without it.
            DeadlineExceeded: a receiver is too busy to connect.
            NcclError, RemoteError, ...: the communicator couldn't be connected.
            SessionStateError: the session is closed or was aborted.
        """
        self._check_open("wait")
        if not self._begun:
            self._begin(receivers or self._first)
        self.assemble()
        if receivers is not None and len(self.members.present) < receivers:
            self._await_members(receivers, deadline_after(self.settings.connect_timeout_s))
            self.assemble()
        return self

    def _begin(self, wanted: int) -> None:
        """Connect the first communicator. A receiver that dies before is not missed yet: another
        may come in its place."""
        deadline = deadline_after(self.settings.connect_timeout_s)
        while not self._begun:
            try:
                self._await_members(wanted, deadline)
            except PackedCommError as error:
                if self._given_up is None:
                    self._end(SyncState.FAILED, summary(error), in_order=False)
                raise
            self.members.take_out_gone()
            if len(self.members) < wanted:
                continue
            try:
                self._assemble()
                self._begun = True
            except PeerLost:
                if time.monotonic() >= deadline:
                    raise

    def assemble(self) -> float:
        """Make sure that the communicator connects exactly the receivers that are there.

        Returns:
            The seconds that it took to connect another communicator; 0.0 if that wasn't needed.

        Raises:
            As `wait`.
        """
        self._check_open("assemble")
        self._pump(0.0)
        self.drop_gone()
        if not len(self.members):
            self._await_members(1, deadline_after(self.settings.connect_timeout_s))
        if self._communicator is not None and all(m.connected for m in self.members):
            return 0.0
        return self._assemble()

    def drop_gone(self) -> None:
        """Go on without the receivers that have gone.

        Raises:
            PeerLost, DeadlineExceeded: some have gone that nobody has heard of yet, without leaving
                in order.
        """
        gone = self.members.take_out_gone()
        for member in gone:
            # One that was only stopped learns it when it wakes up.
            farewell = Close(valid_text(f"it goes on without this receiver: {member.lost}"), False)
            self._channel.send(member.peer, encode(farewell, 0, self.settings))
            logger.warning("%s: goes on without %s: %s", self.epoch[:8], member.name, member.lost)
        if len(self.members.connected) + 1 != self.world_size:
            self.drop_communicator("the members of the session have changed")
        # Whoever came and went before a sync could be missed is no loss.
        untold = {m.rank: m.lost for m in gone if m.lost and m.connected and not m.reported}
        if untold:
            raise combined(untold)

    def _await_members(self, wanted: int, deadline: float) -> None:
        begin = time.monotonic()
        while len(self.members.present) < wanted:
            self._check_open("wait")
            if self._misfit is not None and not self._begun:
                raise self._misfit
            if self._given_up is not None:
                raise self._given_up
            now = time.monotonic()
            if now >= deadline:
                others = ""
                if self._channel.has_refused:
                    others = ", and others were refused, which have another secret or none"
                self._channel.has_refused = False
                raise RendezvousTimeout(
                    f"{len(self.members.present)} of {wanted} receivers came to {self.address} "
                    f"within {now - begin:.3g} s{others}"
                )
            self._pump(deadline - now)
            # Before the first sync nobody is missed: it may come again, or another in its place.
            if not self._begun:
                self.members.take_out_gone()
        self._channel.has_refused = False

    def replace_lost(self) -> None:
        """Go on without the receivers that are known to have gone, and don't tell of them: others
        have come in their place."""
        for member in self.members:
            if member.lost is not None:
                member.reported = True

    def _assemble(self) -> float:
        """Connect a communicator of all that are there, and give up the one before."""
        begin = time.monotonic()
        try:
            self.drop_communicator("the members of the session have changed")
            # Nobody is taken in meanwhile, with a rank after the old ones.
            with self._pumping:
                self.members.rank_anew()
                members = list(self.members)
            self.world_size = len(members) + 1
            self.flight.note("assemble", ranks=[m.as_dict() for m in members])
            for member in members:
                member.connected = True
            places = [Assemble(m.rank, self.world_size) for m in members]
            self.ask(places, Present, self.settings.agree_timeout_s)
            deadline = deadline_after(self.settings.connect_timeout_s)
            communicator = self._warm_up(
                self._connect(self._transport or "gloo", deadline), deadline
            )
            self._adopt(communicator)
            self.answers(Connected, "Connect", max(0.1, deadline - time.monotonic()))
        except BaseException as error:
            self.fail_sync(error)
            raise
        return time.monotonic() - begin

    def _connect(self, transport: Transport, deadline: float) -> Communicator:
        if transport == "nccl":
            unique_id = NcclCommunicator.unique_id(self.settings)
            self.tell(Connect(unique_id=unique_id))
            return NcclCommunicator.from_unique_id(
                unique_id,
                0,
                self.world_size,
                device=self.device,
                timeout_s=max(0.1, deadline - time.monotonic()),
                settings=self.settings,
                check=self._check_failure,
            )
        host = Address.parse(self.address).host
        listener = Listener.bind(str(Address(host, 0)))
        with closing_on_error(listener):
            self.tell(Connect(address=listener.address))
        return GlooCommunicator.connect(
            listener,
            0,
            self.world_size,
            timeout_s=max(0.1, deadline - time.monotonic()),
            settings=self.settings,
            check=self._check_failure,
        )

    def next_sync(self) -> int:
        """The number of a new sync of this epoch."""
        self._syncs += 1
        return self._syncs

    def next_sender(self) -> int:
        """A number for one of those that send over this session, from 1."""
        self._senders += 1
        return self._senders

    @property
    def last_sync(self) -> int:
        """The number of the last sync that was begun; 0 before the first one."""
        return self._syncs

    def fail_sync(
        self, error: BaseException, *, transport_too: bool = True, decided: bool = False
    ) -> None:
        """After a sync has failed: tell everybody, write the flight record, and be ready for the
        next one.

        Args:
            error: what has failed.
            transport_too: whether the communicator can't be used again.
            decided: whether the receivers have been told to commit, which can't be taken back.

        Raises:
            ContextLost: the communicator can't be given up.
        """
        if not decided:
            self.cancel(error)
        self.record_failure(error)
        self._note_reported(error)
        if transport_too:
            self.drop_communicator(summary(error))
        self.phases.rest()

    def _first_wait(self) -> None:
        if self.generation == 0 and not self.members.connected:
            self.wait()

    def _take_in(self, peer: bytes, hello: Message) -> None:
        """Admit a receiver that has just come, or tell it why not."""
        if not isinstance(hello, Hello):
            return  # the last words of somebody who was dropped
        try:
            if len(self.members) >= MOST_RECEIVERS:
                raise CapacityError(f"the session has {MOST_RECEIVERS:,} receivers already")
            if self._hello is None:
                self._hello = agreement.own_hello(self.device, self.settings)
            transport = agreement.agreed_transport(self._hello, hello, self.members.next_rank)
        except PackedCommError as error:
            logger.warning("session %s refuses a receiver: %s", self.epoch[:8], error)
            self._misfit = error
            self._refuse(peer, error)
            return
        self._transport = transport
        member = Member(self.members.next_rank, peer, hello)
        self.flight.note("receiver came", **member.as_dict())
        welcome = Welcome(
            epoch=self.epoch,
            rank=member.rank,
            world_size=max(self.world_size, member.rank + 1),
            transport=transport,
            wire_format=self.wire_format,
            buffer_size_bytes=self.buffer_size_bytes,
            decided=self.decided,
        )
        # Only then it may be asked anything.
        if self._channel.send(peer, encode(welcome, 0, self.settings)):
            self.members.add(member)
