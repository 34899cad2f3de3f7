"""Decisions that come late, or never, on a connection that lasts; and those of `no_change`."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace

import pytest
import torch

from packedcomm import FullWeightSender, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.errors import DeadlineExceeded, PackedCommError, PeerLost, RemoteError
from packedcomm.session.messages import Commit, Staged
from tests.helpers.in_process import Round, join, sessions
from tests.helpers.sessions import QUICK

# Nothing is said between votes and decision for longer than this.
SILENT_S = 0.5


def in_place(live):
    return TensorTarget(live)


def staged(live):
    return StagedTarget(TensorTarget(live))


def receivers_of(ends, target=staged):
    live = [{"w": torch.zeros(4)} for _ in ends]
    return live, [WeightReceiver(target(w), end) for w, end in zip(live, ends, strict=True)]


def received(receiver):
    """What it gets at last, however often it says that the sender is silent."""
    while True:
        with contextlib.suppress(DeadlineExceeded):
            return receiver.receive(10)


def silently(session, seconds):
    """A sender that is stopped between the last vote and the decision."""
    known_failure, say_to_all = session.known_failure, session._say_to_all

    def stopped():
        session.known_failure = known_failure
        found = known_failure()
        session._say_to_all = lambda message: None
        time.sleep(seconds)
        session._say_to_all = say_to_all
        return found

    session.known_failure = stopped


@pytest.mark.fault(3, 20)
@pytest.mark.parametrize("target", [in_place, staged])
def test_a_commit_that_comes_when_the_sender_wakes_is_committed_by_who_had_given_it_up(target):
    settings = replace(QUICK, heartbeat_interval_s=0.2, heartbeat_timeout_s=SILENT_S)
    with sessions(2, settings) as (session, ends):
        live, receivers = receivers_of(ends, target)
        sent = {"w": torch.ones(4)}
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, receivers).sent.version == 0
        sent["w"].fill_(2.0)
        silently(session, 3 * SILENT_S)
        outcome = Round(sender.sync, receivers)
        assert isinstance(outcome.sent, DeadlineExceeded)
        for receiver, given_up in zip(receivers, outcome.received, strict=True):
            assert isinstance(given_up, DeadlineExceeded)
            assert receiver.status().version == (0 if target is staged else None)
            assert received(receiver).version == 1
            assert (receiver.status().state, receiver.status().version) == ("committed", 1)
        assert [w["w"].tolist() for w in live] == [[2.0] * 4] * 2
        sent["w"].fill_(3.0)
        assert Round(sender.sync, receivers).sent.version == 2


@pytest.mark.fault(3)
def test_a_loop_around_receive_does_not_spin_while_the_sender_is_silent():
    settings = replace(QUICK, heartbeat_interval_s=0.2, heartbeat_timeout_s=SILENT_S)
    with sessions(1, settings) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget({"w": torch.zeros(4)}), end)
        session._say_to_all = lambda message: None
        deadline = time.monotonic() + 3 * SILENT_S
        count = 0
        while time.monotonic() < deadline:
            count += 1
            with pytest.raises(DeadlineExceeded, match="silent for"):
                receiver.receive()
        assert 2 <= count <= 3


@pytest.mark.fault(20)
def test_a_version_without_data_is_shown_by_nobody_where_one_receiver_fails():
    with sessions(2) as (session, ends):
        live, receivers = receivers_of(ends)
        sent = {"w": torch.ones(4)}
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, receivers).sent.version == 0

        def fail(message):
            raise ZeroDivisionError("not this one")

        receivers[1]._following.decisions.confirm = fail
        outcome = Round(sender.no_change, receivers)
        for error in (outcome.sent, outcome.received[0]):
            assert isinstance(error, RemoteError)
            assert "not this one" in str(error)
        assert [receiver.status().version for receiver in receivers] == [0, 0]
        sent["w"].fill_(7.0)
        assert Round(sender.sync, receivers).sent.version == 1
        assert [receiver.status().version for receiver in receivers] == [1, 1]
        assert [w["w"].tolist() for w in live] == [[7.0] * 4] * 2


@pytest.mark.fault(20)
def test_a_version_without_data_that_was_decided_is_not_given_to_other_weights():
    with sessions(2) as (session, ends):
        live, receivers = receivers_of(ends)
        sent = {"w": torch.ones(4)}
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, receivers).sent.version == 0
        tell = session.tell

        def losing_one(message):
            if isinstance(message, Commit):
                session.tell = tell
                ends[1]._channel.close()
                deadline = time.monotonic() + 10
                while len(session.members.present) > 1 and time.monotonic() < deadline:
                    session._pump(0.05)
            tell(message)

        session.tell = losing_one
        outcome = Round(sender.no_change, receivers)
        assert isinstance(outcome.sent, PeerLost)
        assert (sender.version, receivers[0].status().version) == (0, 1)
        # Who had voted learns it when it comes again.
        with join(session) as again:
            assert receivers[1].reconnect(again) == 1
            assert receivers[1].status().version == 1
            sent["w"].fill_(7.0)
            assert Round(sender.sync, receivers).sent.version == 2
        assert [w["w"].tolist() for w in live] == [[7.0] * 4] * 2


@pytest.mark.fault(20, 22)
@pytest.mark.parametrize("syncs", [2, 3])
def test_what_another_trainer_has_decided_commits_nobodys_vote(syncs):
    with sessions(1) as (session, (end,)), sessions(1) as (other, (others,)):
        (live,), (receiver,) = receivers_of([end])
        sent = {"w": torch.ones(4)}
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, [receiver]).sent.version == 0
        sent["w"].fill_(2.0)

        def lost():
            # It dies between the vote and its decision.
            end._channel.close()
            raise ZeroDivisionError

        session.known_failure = lost
        outcome = Round(sender.sync, [receiver])
        assert isinstance(outcome.sent, ZeroDivisionError)
        assert receiver._following.decisions.in_doubt_of(Commit(1, 2))
        _, theirs = receivers_of([others])
        successor = FullWeightSender({"w": torch.full((4,), 7.0)}, other)
        for _ in range(syncs):
            Round(successor.sync, theirs)
        assert other.decided == syncs
        with join(other) as again:
            assert receiver.reconnect(again) is None
            assert live["w"].tolist() == [1.0] * 4
            assert receiver.status().version == 0
            assert Round(successor.sync, [*theirs, receiver]).received[1].version == syncs
            assert live["w"].tolist() == [7.0] * 4


class Dying:
    """A receiver that stops to exist at a moment of a sync."""

    def __init__(self, end):
        self.at = 0.0
        self._end = end

    def __call__(self, *arguments):
        self.at = time.monotonic()
        self._end._channel.close()
        raise PeerLost("killed")


@pytest.mark.fault(2)
@pytest.mark.parametrize("when", ["asked", "answered", "connecting"])
def test_one_that_dies_while_another_is_busy_is_known_at_once_and_named_alone(when):
    with sessions(3) as (session, ends):
        _, receivers = receivers_of(ends)
        sent = {"w": torch.ones(4)}
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, receivers).sent.version == 0
        busy, waiting, dying = receivers
        dies = Dying(ends[2])
        if when == "asked":
            dying._following._manifest = dies
        elif when == "answered":
            dying._following.decisions.expect = dies
            # No data at once: it answers and waits for the others' answers.
            sender._leading._agreed.clear()
        else:
            session.drop_communicator("for this test")
            ends[2]._await_connect = dies
        outcome = Round(sender.sync, [waiting, dying])
        known = time.monotonic() - dies.at
        assert known < 2.0
        for error in (outcome.sent, outcome.received[0]):
            assert isinstance(error, PeerLost)
            assert "receiver rank 3: " in str(error)
            assert "rank 1" not in str(error)
        # Whoever is only told of another's loss goes on; the busy one hasn't missed anything.
        assert [r.status().connected for r in (busy, waiting)] == [True, True]
        assert [r.status().state for r in (busy, waiting)] == ["committed", "committed"]
        while not ends[0].withdrawn:
            time.sleep(0.01)
        sent["w"].fill_(2.0)
        again = Round(sender.sync, [busy, waiting])
        assert [getattr(r, "version", str(r)) for r in (again.sent, *again.received)] == [1] * 3


@pytest.mark.fault(2, 20)
def test_one_that_dies_after_the_decision_lets_the_others_commit_first():
    with sessions(2) as (session, ends):
        live, receivers = receivers_of(ends)
        sent = {"w": torch.ones(4)}
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, receivers).sent.version == 0
        slow = receivers[0]._following._target
        commit, done = slow.commit, threading.Event()

        def slowly(manifest):
            time.sleep(0.6)
            commit(manifest)
            done.set()

        slow.commit = slowly
        receivers[1]._following._target.commit = Dying(ends[1])
        sent["w"].fill_(2.0)
        outcome = Round(sender.sync, receivers)
        assert isinstance(outcome.sent, PackedCommError)
        assert "receiver rank 2: " in str(outcome.sent)
        assert done.is_set()
        assert (receivers[0].status().version, live[0]["w"].tolist()) == (1, [2.0] * 4)


@pytest.mark.fault(21)
def test_a_communicator_that_only_the_receiver_has_lost_is_made_anew():
    with sessions(1) as (session, (end,)):
        live, (receiver,) = receivers_of([end])
        assert Round(FullWeightSender({"w": torch.ones(4)}, session).sync, [receiver]).sent
        end.drop_communicator("for this test")
        # Of another sender, which doesn't know that the receiver knows the manifest.
        failed = Round(FullWeightSender({"w": torch.ones(4)}, session).sync, [receiver])
        assert isinstance(failed.sent, RemoteError)
        done = Round(FullWeightSender({"w": torch.full((4,), 2.0)}, session).sync, [receiver])
        assert done.sent.receivers == 1
        assert live[0]["w"].eq(2).all()


@pytest.mark.fault(20)
def test_a_vote_that_is_interrupted_when_it_is_on_its_way_is_remembered():
    with sessions(1) as (session, (end,)):
        live, (receiver,) = receivers_of([end])
        reply = end.reply

        def interrupted(message):
            reply(message)
            if isinstance(message, Staged):
                end.reply = reply
                raise KeyboardInterrupt

        end.reply = interrupted
        fail, end.fail = end.fail, lambda error, **options: None  # nor can it say so
        caught = []

        def receive():
            try:
                receiver.receive(10)
            except KeyboardInterrupt as error:
                caught.append(error)

        thread = threading.Thread(target=receive)
        thread.start()
        session.settings = replace(session.settings, commit_timeout_s=1.0)
        with pytest.raises(PackedCommError):
            FullWeightSender({"w": torch.ones(4)}, session).sync()
        thread.join(10)
        end.fail = fail
        assert caught
        # The decision came meanwhile.
        assert receiver.receive(5).version == 0
        assert live[0]["w"].eq(1).all()
