"""Votes and reports of earlier syncs: without effect on whoever has gone on since."""

from __future__ import annotations

import threading
from dataclasses import replace

import pytest
import torch

from packedcomm import FullWeightSender, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.errors import DeadlineExceeded, PeerLost, RemoteError
from packedcomm.session.messages import Failure
from tests.helpers.in_process import Round, join, sessions
from tests.helpers.interrupted import Interrupted
from tests.helpers.peers import eventually
from tests.helpers.sessions import QUICK

NAMES = "abcdef"


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((8,), value) for name in NAMES}


def fill(tensors: dict[str, torch.Tensor], value: float) -> None:
    for tensor in tensors.values():
        tensor.fill_(value)


def values(live: dict[str, torch.Tensor]) -> set[float]:
    return {value for tensor in live.values() for value in tensor.tolist()}


def after_the_votes(session, act):
    """Do something when all have voted and nothing is decided yet, as the sender sees it."""
    known_failure = session.known_failure

    def acting():
        session.known_failure = known_failure
        assert known_failure() is None
        act()

    session.known_failure = acting


class Flapping:
    """A receiver whose vote has arrived when its connection ends; before the decision it is there
    again, on another connection, which no word on that vote comes over."""

    def __init__(self, session, end, live):
        self.session = session
        self.receiver = WeightReceiver(StagedTarget(TensorTarget(live)), end)
        self.reconnected = None
        self.left = threading.Event()

    def receive(self):
        try:
            return self.receiver.receive(20)
        finally:
            self.left.set()

    def flap(self):
        self.left.clear()
        self.receiver.session._channel.close()
        assert self.left.wait(10)
        self.reconnect()

    def reconnect(self):
        self.reconnected = self.receiver.reconnect(join(self.session))


@pytest.fixture
def flapping():
    """Holds version 0, has voted for version 1, which was decided when it had come again."""
    live = weights(0.0)
    # A chunk for each tensor.
    with sessions(1, replace(QUICK, buffer_size_bytes=32)) as (session, (end,)):
        sent = weights(1.0)
        source = Interrupted(sent)
        sender = FullWeightSender(source, session)
        one = Flapping(session, end, live)
        assert Round(sender.sync, [one]).sent.version == 0
        fill(sent, 2.0)
        after_the_votes(session, one.flap)
        outcome = Round(sender.sync, [one])
        assert isinstance(outcome.sent, PeerLost)
        assert one.reconnected is None  # it wasn't decided yet
        assert session.decided == 2
        assert (one.receiver.status().version, values(live)) == (0, {1.0})
        yield one, live, sender, source, sent
        one.receiver.session.close()


@pytest.mark.fault(20)
def test_who_came_again_before_the_decision_learns_it_when_it_comes_once_more(flapping):
    one, live, *_ = flapping
    one.reconnect()
    assert one.reconnected == 1
    assert (one.receiver.status().version, values(live)) == (1, {2.0})


@pytest.mark.fault(20, 22)
def test_who_has_begun_a_later_sync_commits_no_earlier_vote(flapping):
    one, live, sender, source, sent = flapping

    def fail():
        raise ZeroDivisionError("of the source")

    # What was staged for the vote is overwritten in part.
    fill(sent, 3.0)
    source.when(4, fail)
    outcome = Round(sender.sync, [one])
    assert isinstance(outcome.sent, ZeroDivisionError)
    assert isinstance(outcome.received[0], RemoteError)
    # The last sync that was decided is the one that it had voted for.
    one.reconnect()
    assert one.reconnected is None
    assert (one.receiver.status().version, values(live)) == (0, {1.0})
    assert Round(sender.sync, [one]).sent.version == 2
    assert (one.receiver.status().version, values(live)) == (2, {3.0})


@pytest.mark.fault(21, 22)
def test_what_failed_late_in_a_decided_sync_fails_none_with_other_members():
    live = [weights(0.0), weights(0.0)]
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(TensorTarget(live[0])), end)
        sent = weights(1.0)
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, [receiver]).sent.version == 0
        given_up = threading.Event()
        target = receiver._following._target
        commit = target.commit

        def late(manifest):
            target.commit = commit
            assert given_up.wait(20)
            raise ZeroDivisionError("of a commit")

        def sync():
            try:
                return sender.sync()
            finally:
                given_up.set()

        target.commit = late
        fill(sent, 2.0)
        usual = session.settings
        session.settings = replace(usual, commit_timeout_s=0.5)
        outcome = Round(sync, [receiver])
        session.settings = usual
        assert isinstance(outcome.sent, DeadlineExceeded)
        assert isinstance(outcome.received[0], ZeroDivisionError)
        (member,) = session.members
        # It is told when nobody waits for it any more.
        eventually(lambda: any(isinstance(m, Failure) for _, m in list(member.inbox)))
        fill(sent, 3.0)
        with join(session) as other:
            newcomer = WeightReceiver(StagedTarget(TensorTarget(live[1])), other)
            done = Round(sender.sync, [receiver, newcomer])
            assert getattr(done.sent, "receivers", done.sent) == 2
            assert [r.status().version for r in (receiver, newcomer)] == [2, 2]
            assert [values(held) for held in live] == [{3.0}, {3.0}]
