"""What a receiver holds and how that changes: its votes, the sender's decisions, its commits."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from packedcomm.completion import wait_for_device
from packedcomm.errors import PackedCommError, PeerLost, ProtocolError, SessionStateError
from packedcomm.holding import Holding, Vote, Writing
from packedcomm.manifest import Manifest
from packedcomm.session import ReceiverSession
from packedcomm.session.messages import (
    Cancel,
    Close,
    Commit,
    Committed,
    NoChange,
    Ready,
    Staged,
)
from packedcomm.session.remote_errors import remote_error

__all__ = ["Decisions"]


class Decisions:
    """Goes with a receiver from session to session.

    Args:
        session: the first one.
    """

    def __init__(self, session: ReceiverSession) -> None:
        self._session = session
        self.holding = Holding()
        """What is held. Any thread may look."""
        # A vote of which it isn't known what was decided.
        self._doubt: Vote | None = None
        self.sender_knows = False
        """Whether the sender needn't be told of a failure: it was its own, or all is committed."""

    def attach(self, session: ReceiverSession) -> int | None:
        """As `Following.attach`."""
        doubt, self._doubt = self._doubt, None
        self._session = session
        if doubt is None or session.epoch != doubt.epoch or session.decided > doubt.number:
            return None
        if session.decided < doubt.number:
            # The sender may not know yet that the connection was lost, and decide it still.
            self._doubt = doubt
            return None
        self._commit(doubt)
        return doubt.version

    def in_doubt_of(self, decided: Commit) -> bool:
        """Whether this receiver has voted for a sync, and hasn't heard what was decided."""
        return self._doubt is not None and self._doubt.is_of(decided)

    def has_committed(self, number: int) -> bool:
        """Whether that sync of the session was committed here last."""
        held = self.holding
        return (held.epoch, held.number) == (self._session.epoch, number)

    def forget_doubt(self) -> None:
        """The sender has begun something else, so it hasn't decided what is in doubt."""
        self._doubt = None

    def begin(self, writing: Writing) -> None:
        """Old weights are overwritten from here on."""
        self.holding = self.holding.begun(writing)

    def settle(self) -> None:
        """After a failure: nothing is written any more."""
        self.holding = self.holding.failed()
        self._session.phases.settle(self.holding.state)

    def lose(self) -> None:
        """All memory has been given other contents."""
        self._doubt = None
        self.holding = self.holding.lost()
        self._session.phases.settle(self.holding.state)

    def confirm(self, message: NoChange) -> None:
        """Give the weights that are held another version."""
        held = self.holding
        held_now = self.has_committed(message.since_number) and held.version == message.since
        if held.torn or not held_now:
            version = None if held.torn else held.version
            other = " of another sync" if version == message.since else ""
            raise SessionStateError(
                f"version {message.version} has the weights of version {message.since}, but this "
                f"receiver is {held.state} at version {version}{other}"
            )
        self.vote(Vote(self._session.epoch, message.number, message.version), Ready())

    def vote(self, vote: Vote, message: Staged | Ready) -> None:
        """Tell the sender that all is there, and commit it when it says so. Whoever loses it
        between the two can't know what it has decided."""
        # Before it is on its way: the sender may decide it whatever happens here.
        self._doubt = vote
        self._session.reply(message)
        decided = self.expect("commit", vote.nbytes, Commit)
        if not vote.is_of(decided):
            raise ProtocolError(
                f"the sender commits version {decided.version} of sync {decided.number}, offered "
                f"was {vote.version} of sync {vote.number}"
            )
        self.commit_in_doubt()

    def commit_in_doubt(self) -> Vote:
        """Commit what this receiver has voted for: the sender says so, now or late."""
        vote = self._doubt
        assert vote is not None
        try:
            self._commit(vote)
        except Exception:
            self._doubt = None
            raise
        self._doubt = None
        # It is committed, whether or not the sender hears it; the next call tells if it is lost.
        with contextlib.suppress(PackedCommError):
            self._session.reply(Committed(vote.version))
        self.sender_knows = True
        return vote

    def _commit(self, vote: Vote) -> None:
        """Make what was received the weights, and show their version."""
        session, target, writing = self._session, vote.target, vote.writing
        zeroed: Any = tuple
        if writing is not None:
            if target is not None:
                self.begin(writing)
                target.commit(writing.manifest)
                zeroed = partial(getattr(target, "zeroed", _nothing), writing.manifest)
            # Decided: whatever happens to the sender now changes nothing.
            allowed = session.settings.commit_seconds(vote.nbytes)
            wait_for_device(session.device, allowed, lambda: None, "commit")
        self.holding = self.holding.after(vote, zeroed)
        session.phases.settle(self.holding.state)

    def expect(self, stage: str, nbytes: int, *kinds: type[Any]) -> Any:
        """The sender's next message.

        Args:
            stage: what it belongs to, "agree" or "commit", which has a deadline.
            nbytes: of the sync; other receivers may still be receiving them.
            kinds: what is expected.
        """
        settings = self._session.settings
        if stage == "agree":
            allowed = settings.agree_timeout_s
        else:
            allowed = settings.move_seconds(nbytes) + settings.commit_seconds(nbytes)
        message = self._session.receive(allowed)
        if isinstance(message, Cancel):
            self.sender_knows = True
            self._doubt = None
            raise remote_error(message, "cancelled by the sender")
        if isinstance(message, Close):
            self.sender_knows = True
            raise PeerLost(f"the sender has ended the session here: {message.reason}")
        if not isinstance(message, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ProtocolError(f"the sender sent {type(message).__name__}, expected {expected}")
        return message


def _nothing(manifest: Manifest) -> Sequence[torch.Tensor]:  # noqa: ARG001
    return ()
