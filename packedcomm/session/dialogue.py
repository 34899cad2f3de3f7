"""What a sender says to its receivers, and what they answer."""

from __future__ import annotations

import abc
import contextlib
import threading
import time
from collections.abc import Container, Sequence

import torch

from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    DeadlineExceeded,
    PackedCommError,
    ProtocolError,
    text_of,
)
from packedcomm.session.frames import encode
from packedcomm.session.hearing import Hearing
from packedcomm.session.members import Member
from packedcomm.session.messages import Beat, Cancel, Failure, Message
from packedcomm.session.phases import Phase, deadline_after
from packedcomm.session.remote_errors import combined, described, remote_error
from packedcomm.session.sender_channel import SenderChannel
from packedcomm.session.states import AT_REST, SyncState
from packedcomm.settings import Settings

__all__ = ["Dialogue"]

# How long after a receiver's loss, while data moves also after its failure, the others are still
# waited for. They may be busy for long, or be waiting themselves: for what it would have passed on,
# or for this end's word.
_CUT_SHORT_S = 0.2


class Dialogue(Hearing):
    """The sender's end of a session, as far as it is about messages.

    Args:
        channel: the sender's.
        settings, device: as for `SessionEnd`.
    """

    def __init__(self, channel: SenderChannel, settings: Settings, device: torch.device) -> None:
        super().__init__(channel, settings, device)
        # Of the last `Cancel`: a failure from before it is of no interest any more.
        self._cancelled = 0
        # What a sync that waits for receivers to come is to raise.
        self._given_up: PackedCommError | None = None
        self._saying = threading.RLock()

    @property
    def said(self) -> int:
        """The number of the last message that was said to receivers."""
        return self._number

    @abc.abstractmethod
    def _first_wait(self) -> None:
        """Wait for the receivers if none has a place yet."""

    def ask(
        self,
        message: Message | Sequence[Message],
        expect: type[Message] | tuple[type[Message], ...],
        timeout_s: float | None = None,
        *,
        ranks: Container[int] | None = None,
    ) -> list[Message]:
        """Say something to every receiver and wait for all answers.

        Args:
            message: the question; or one for each receiver, in the order of their ranks.
            expect: the kind of answer, or several.
            timeout_s: deadline in seconds; None is `Settings.agree_timeout_s`.
            ranks: who is asked; None is everybody.

        Returns:
            The answers, in the order of the ranks.

        Raises:
            As `answers`.
            ProtocolError: the message is too large.
        """
        self._first_wait()
        gone = {m.rank: m.lost for m in self.members.connected if m.lost is not None}
        if gone:
            raise self._reported(gone)
        self._check_open(_name(message))
        self._say(message, ranks)
        return self.answers(expect, _name(message), timeout_s, ranks=ranks)

    def answers(
        self,
        expect: type[Message] | tuple[type[Message], ...],
        what: str,
        timeout_s: float | None = None,
        *,
        ranks: Container[int] | None = None,
        decided: bool = False,
    ) -> list[Message]:
        """Wait for every receiver's answer to the last message that it was sent.

        A receiver that fails doesn't cut the wait for the others short, except while data moves, so
        that none of them is in the middle of something when this raises. One that is lost does.

        Args:
            expect: the kind of answer, or several.
            what: what was asked, for messages.
            timeout_s, ranks: as for `ask`.
            decided: whether what was asked can't be taken back, so that all the others are waited
                for even if one is lost.

        Raises:
            PackedCommError: a receiver failed: the same class as there if it is one of
                packedcomm's, else `RemoteError`. The message names the rank; where several failed
                all are listed. The cause has the remote traceback.
            PeerLost: a receiver has left or died.
            DeadlineExceeded: a receiver hasn't answered, or is stopped.
            ProtocolError: a receiver answered something else.
            SessionStateError: the session is closed or was aborted.
        """
        seconds = self.settings.agree_timeout_s if timeout_s is None else timeout_s
        deadline = deadline_after(seconds)
        everybody = self.members.connected
        members = everybody if ranks is None else self._members(ranks)
        for member in members:
            member.awaited = True
        failures: dict[int, PackedCommError] = {}
        found: dict[int, Message] = {}
        cut_at: float | None = None
        waiting = members
        while True:
            for member in waiting:
                if (answer := self._answer(member, expect, what)) is None:
                    continue
                if isinstance(answer, PackedCommError):
                    failures[member.rank] = answer
                else:
                    found[member.rank] = answer
                    member.awaited = False
            lost = {} if decided else {m.rank: m.lost for m in everybody if m.lost}
            # Also of those that have answered; their last words say more.
            failures = {**lost, **failures}
            waiting = [m for m in members if m.rank not in found and m.rank not in failures]
            if not waiting:
                break
            if (interruption := self.phases.interruption) is not None:
                # The supervisor has heard it first, and what it has cancelled isn't looked at here.
                raise interruption
            now = time.monotonic()
            remaining = deadline - now
            if lost or (failures and self.state is SyncState.MOVING):
                cut_at = cut_at or now + _CUT_SHORT_S
                if now >= cut_at:
                    break
            if remaining <= 0:
                for member in waiting:
                    late = DeadlineExceeded(
                        f"{member.name}: no answer to {what} within {seconds:.3g} s{_why(what)}"
                    )
                    failures[member.rank] = late
                    self._give_up_silent_peers(late)
                break
            self._check_open(what)
            self._pump(remaining, soon=True)
        if failures:
            raise self._reported(failures)
        for member in members:
            # Until the next question: whatever comes next is awaited from everybody.
            member.awaited = True
        return [found[rank] for rank in sorted(found)]

    def tell(self, message: Message | Sequence[Message]) -> None:
        """Say something to every receiver that is still there, without waiting.

        A receiver that has gone is noticed by the next `answers` or `failure`.

        Args:
            message: as for `ask`.

        Raises:
            SessionStateError: the session is closed or was aborted.
            ProtocolError: the message is too large.
        """
        self._first_wait()
        self._check_open(_name(message))
        self._say(message)

    def cancel(self, error: BaseException) -> None:
        """Tell every receiver that what is under way is given up, and why; the session goes on.

        Failures that receivers have reported up to here are forgotten. Never raises for receivers
        that have gone or a session that has ended: the error matters more. May be called from any
        thread.
        """
        self._cancel(error, untouched=self.state in AT_REST or self.state is SyncState.AGREED)

    def _cancel(self, error: BaseException, *, untouched: bool) -> None:
        self._given_up = None
        if self._ended is None:
            # Those without a place yet may have been told by other means to wait for this sync.
            with contextlib.suppress(PackedCommError):
                members = self.members.present
                caps = [member.hello.max_frame_bytes for member in members]
                fitting = min([self.settings.max_frame_bytes, *caps])
                message = Cancel(*described(error, fitting), untouched)
                self._cancelled = self._say(message, members=members)

    def interrupt(self, error: PackedCommError) -> None:
        """End the sync that is under way as if every receiver that hasn't reported a failure had
        reported this one, where it has become known by other means. May be called from any thread,
        and again: a report is lost where places in a new communicator are just being given. When
        the sync is over `cancel` must follow, or the next one hears of it.

        Args:
            error: what the sync is to raise.
        """
        self._given_up = error
        for member in self.members.connected:
            if member.failure_since(self._cancelled) is None:
                member.hear(self._number, Failure(*described(error, self.settings.max_frame_bytes)))

    def known_failure(self) -> PackedCommError | None:
        """As `failure`, of what has come already."""
        return self.phases.interruption or self._failed()

    def _failed(self) -> PackedCommError | None:
        failures = {}
        for member in self.members.connected:
            found = member.failure_since(self._cancelled)
            if found is not None:
                failures[member.rank] = found
        return combined(failures) if failures else None

    def _reported(self, failures: dict[int, PackedCommError]) -> PackedCommError:
        error = combined(failures)
        self._note_reported(error)
        return error

    def _note_reported(self, error: BaseException) -> None:
        """The caller gets to know of everybody whom this error names."""
        for member in self.members:
            if member.lost is not None and str(member.lost) in text_of(error):
                member.reported = True

    def _members(self, ranks: Container[int] | None) -> list[Member]:
        """Those with a place, all of them or some."""
        members = self.members.connected
        return members if ranks is None else [m for m in members if m.rank in ranks]

    def _say(
        self,
        message: Message | Sequence[Message],
        ranks: Container[int] | None = None,
        *,
        members: list[Member] | None = None,
    ) -> int:
        """Send to members with a place, or to given ones; returns the number that answers will
        have."""
        members = self._members(ranks) if members is None else members
        if not isinstance(message, Message) and len(message) != len(members):
            raise ArgumentError(f"{len(message)} messages for {len(members)} receivers")
        with self._saying:
            number = self._number = self._number + 1
            if isinstance(message, Message):
                # One frame for all: with a manifest it has megabytes.
                frames = [encode(message, number, self.settings)] * len(members)
            else:
                frames = [encode(each, number, self.settings) for each in message]
            for member, frame in zip(members, frames, strict=True):
                self._check_size(member, len(frame))
                member.asked = number
                if member.lost is None and not self._channel.send(member.peer, frame):
                    member.disconnect(self._during())
                # Not before: a beat must not overtake it.
                member.said = 0 if isinstance(message, Cancel) else number
            return number

    def _check_size(self, member: Member, nbytes: int) -> None:
        # ZeroMQ would end the connection without a word.
        if nbytes > member.hello.max_frame_bytes:
            raise ConfigMismatch(
                f"a message has {nbytes:,} bytes, max_frame_bytes of {member.name} is "
                f"{member.hello.max_frame_bytes:,}, of the sender {self.settings.max_frame_bytes:,}"
            )

    def _answer(
        self, member: Member, expect: type[Message] | tuple[type[Message], ...], what: str
    ) -> Message | PackedCommError | None:
        """The receiver's answer to the last question, or why there is none; None is not yet."""
        while member.inbox:
            number, message = member.inbox.popleft()
            if isinstance(message, Failure):
                if number >= self._cancelled:
                    return remote_error(message, member.name)
            elif number == member.asked:
                if isinstance(message, expect):
                    return message
                return ProtocolError(
                    f"{member.name} has answered {what} with {type(message).__name__}"
                )
        return member.lost

    def _say_to_all(self, message: Message) -> None:
        with contextlib.suppress(PackedCommError):
            frames: dict[int, bytes] = {}
            for member in self.members.present:
                # A beat has the number of what was said last, so that a receiver which has lost
                # that knows it.
                number = member.said if isinstance(message, Beat) else self._number
                if number not in frames:
                    frames[number] = encode(message, number, self.settings)
                if not self._channel.send(member.peer, frames[number]):
                    member.disconnect(self._during())

    def _interrupt(self, phase: Phase, error: PackedCommError) -> bool:
        # Whoever finds the mark speaks after this: the receivers must not take it for a word on
        # what comes next.
        with self._saying:
            interrupted = super()._interrupt(phase, error)
            if interrupted:
                # What moves has moved, whatever the session's own thread does meanwhile.
                self._cancel(error, untouched=False)
            return interrupted


def _why(what: str) -> str:
    """What is the reason mostly, where whoever is asked need not be in the middle of anything."""
    if what not in ("Assemble", "NoChange"):
        return ""
    return ": it has connected to the session, but is it told to receive?"


def _name(message: Message | Sequence[Message]) -> str:
    first = message if isinstance(message, Message) else message[0]
    return type(first).__name__
