"""Failures between two stages of a sync, and what a decision means afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time
from dataclasses import replace

import pytest
import torch

from packedcomm import FullWeightSender, ModuleSource, Session, TensorTarget, WeightReceiver
from packedcomm.errors import ManifestError, PackedCommError, PeerLost, SessionStateError
from packedcomm.session.messages import Cancel, Committed
from tests.helpers.in_process import Round, join, sessions
from tests.helpers.interrupted import Interrupted
from tests.helpers.sessions import QUICK


def weights(value: float) -> dict[str, torch.Tensor]:
    return {name: torch.full((8,), value) for name in "ab"}


class Ungatherable(ModuleSource):
    """Fails when it is asked for its parts, not when it is asked for the first one."""

    def snapshot(self):
        whole = super().snapshot()
        return type(whole)(whole.manifest, None, ())

    def gather(self, snapshot):
        raise ZeroDivisionError("no gather")


@pytest.mark.fault(9)
def test_a_gather_that_cannot_begin_costs_one_sync():
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(weights(0.0)), end)
        begin = time.monotonic()
        failed = Round(FullWeightSender(Ungatherable(weights(1.0)), session).sync, [receiver])
        assert isinstance(failed.sent, ZeroDivisionError)
        assert "no gather" in str(failed.received[0])
        assert time.monotonic() - begin < 5
        assert Round(FullWeightSender(weights(2.0), session).sync, [receiver]).sent.version == 0


class Unshareable(ModuleSource):
    """A source of a trainer whose other processes fail when all receivers have agreed."""

    failing = False

    def share(self, failure):
        if self.failing and failure is None:
            raise ZeroDivisionError("no other process")
        return failure


@pytest.mark.fault(9)
def test_a_trainer_that_fails_after_the_agreement_costs_one_sync():
    live = [weights(0.0), weights(0.0)]
    with sessions(2) as (session, ends):
        receivers = [WeightReceiver(TensorTarget(w), e) for w, e in zip(live, ends, strict=True)]
        source = Unshareable(weights(1.0))
        sender = FullWeightSender(source, session)
        assert Round(sender.sync, receivers).sent.version == 0
        source.failing = True
        begin = time.monotonic()
        failed = Round(sender.sync, receivers)
        assert isinstance(failed.sent, ZeroDivisionError)
        assert all("no other process" in str(error) for error in failed.received)
        assert time.monotonic() - begin < 5
        # No data was sent: nothing is torn.
        assert [r.status().version for r in receivers] == [0, 0]
        source.failing = False
        assert Round(sender.sync, receivers).sent.version == 1


@pytest.mark.fault(19)
@pytest.mark.parametrize("first", [False, True])
def test_the_first_word_says_whether_data_was_sent(first):
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(weights(0.0)), end)
        assert Round(FullWeightSender(weights(1.0), session).sync, [receiver]).sent.version == 0
        # A sender that has failed may say so again when it is at rest.
        for untouched in (first, not first):
            session.tell(Cancel("NcclError", "no more", untouched=untouched))
        deadline = time.monotonic() + 10
        while len(end._inbox) < 2 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert len(end._inbox) == 2
        assert end.untouched is first


@pytest.mark.fault(19)
def test_what_the_supervisor_says_of_a_sync_comes_before_the_next_one(monkeypatch):
    live = {name: torch.zeros(8) for name in "abcd"}
    sent = {name: torch.ones(8) for name in live}

    def fails(version, items):
        raise ZeroDivisionError("not this one")

    # A chunk for each tensor.
    with sessions(1, replace(QUICK, buffer_size_bytes=32)) as (session, (end,)):
        said, cancel = [], session._cancel

        def late(error, **options):
            if threading.current_thread() is not threading.main_thread():
                # The session's own thread has found the mark by then.
                time.sleep(0.6)
                said.append(options["untouched"])
            cancel(error, **options)

        monkeypatch.setattr(session, "_cancel", late)
        source = Interrupted(sent)

        def wait():
            deadline = time.monotonic() + 10
            while session.phases.interruption is None and time.monotonic() < deadline:
                time.sleep(0.01)

        # The third tensor comes when the supervisor has marked the sync as failed.
        source.when(2, wait)
        failed = Round(FullWeightSender(source, session).sync, [WeightReceiver(fails, end)])
        assert "not this one" in str(failed.sent)
        begin = time.monotonic()
        receiver = WeightReceiver(TensorTarget(live), end)
        done = Round(FullWeightSender(sent, session).sync, [receiver])
        assert [getattr(found, "version", found) for found in (done.sent, *done.received)] == [0, 0]
        assert time.monotonic() - begin < 5
        assert said == [False]
        assert float(live["a"][0]) == 1.0


@pytest.mark.fault(21)
def test_who_has_just_come_and_was_told_of_a_sync_hears_that_it_fails():
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        sender = FullWeightSender(weights(1.0), session)
        old = WeightReceiver(TensorTarget(weights(0.0)), end)
        assert Round(sender.sync, [old]).sent.version == 0
        end.abort("killed")
        with join(session) as other:
            new = WeightReceiver(TensorTarget(live), other)
            begin = time.monotonic()

            def sync():
                try:
                    # Tells of the one that has gone, before it asks anybody anything.
                    sender.sync()
                except PeerLost as error:
                    session.cancel(error)
                    raise

            told = Round(sync, [Told(new, session.said)])
            assert isinstance(told.sent, PeerLost)
            assert isinstance(told.received[0], PeerLost)
            assert time.monotonic() - begin < 5
            assert Round(sender.sync, [Told(new, session.said)]).sent.version == 1
            assert float(live["a"][0]) == 1.0


class Told:
    """A receiver that is told by other means that a sync begins."""

    def __init__(self, receiver, since):
        self.receive = lambda: receiver.receive(30, since=since)


@pytest.mark.fault(9)
def test_a_receiver_that_refuses_what_it_took_before_costs_nobody_the_weights():
    with sessions(2) as (session, (first, second)):
        live = weights(0.0)
        receivers = [
            WeightReceiver(TensorTarget(live), first),
            WeightReceiver(TensorTarget(weights(0.0)), second),
        ]
        sender = FullWeightSender(weights(1.0), session)
        assert Round(sender.sync, receivers).sent.version == 0
        # The first waits for the data by the time that the second says no.
        receivers[1] = WeightReceiver(TensorTarget({"a": torch.zeros(3)}), second)
        failed = Round(sender.sync, receivers)
        assert isinstance(failed.sent, ManifestError)
        assert all(isinstance(error, ManifestError) for error in failed.received)
        assert receivers[0].status().version == 0
        assert float(live["a"][0]) == 1.0
        receivers[1] = WeightReceiver(TensorTarget(weights(0.0)), second)
        assert Round(sender.sync, receivers).sent.version == 1


def test_a_receiver_made_anew_is_given_the_manifest_while_the_others_wait():
    live = [weights(0.0), weights(0.0)]
    with sessions(2) as (session, (first, second)):
        receivers = [
            WeightReceiver(TensorTarget(live[0]), first),
            WeightReceiver(TensorTarget(live[1]), second),
        ]
        sent = weights(0.5)
        sender = FullWeightSender(sent, session, verify=True)
        assert Round(sender.sync, receivers).sent.version == 0
        generation = session.generation
        for turn in (1, 2):
            receivers[1] = WeightReceiver(TensorTarget(live[1]), second)
            sent["b"].fill_(float(turn))
            again = Round(sender.sync, receivers)
            assert (again.sent.version, again.sent.verified) == (turn, True)
        assert [float(held["b"][0]) for held in live] == [2.0, 2.0]
        assert session.generation == generation


@pytest.mark.fault(20)
def test_a_version_that_was_decided_is_not_given_to_other_weights(monkeypatch):
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(live), end)
        sender = FullWeightSender(weights(1.0), session)
        reply = end.reply

        def lose_the_last_word(message):
            if isinstance(message, Committed):
                monkeypatch.undo()
                end.fail(ValueError("on the way"))
            else:
                reply(message)

        monkeypatch.setattr(end, "reply", lose_the_last_word)
        first = Round(sender.sync, [receiver])
        assert isinstance(first.sent, PackedCommError)
        assert (sender.version, receiver.status().version) == (None, 0)
        assert Round(sender.sync, [receiver]).sent.version == 1
        assert receiver.status().version == 1


@pytest.mark.fault(21)
def test_a_receiver_that_comes_and_goes_between_syncs_is_not_missed():
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(weights(0.0)), end)
        sender = FullWeightSender(weights(1.0), session)
        assert Round(sender.sync, [receiver]).sent.receivers == 1
        passing = join(session)
        passing.abort("crashed")
        passing.close()
        # One that the sender still takes for present when the sync begins is missed by it.
        deadline = time.monotonic() + 10
        while len(session.members.present) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert Round(sender.sync, [receiver]).sent.receivers == 1


@pytest.mark.fault(1)
def test_a_receiver_that_dies_before_the_first_sync_may_be_replaced():
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        first = join(session)
        first.abort("crashed")
        first.close()
        with join(session) as second:
            receiver = WeightReceiver(TensorTarget(weights(0.0)), second)
            sender = FullWeightSender(weights(1.0), session)
            assert Round(sender.sync, [receiver]).sent.receivers == 1


def test_a_signal_handler_may_abort_a_session_that_waits():
    with sessions(1) as (session, (end,)):
        before = signal.signal(signal.SIGUSR2, lambda number, frame: end.abort("signalled"))
        try:
            timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR2])
            timer.start()
            with pytest.raises(SessionStateError, match="signalled"):
                end.receive(10)
            timer.join()
        finally:
            signal.signal(signal.SIGUSR2, before)
        # The sender hears of it a moment later.
        deadline = time.monotonic() + 10
        while session.failure() is None and session.members.present and time.monotonic() < deadline:
            time.sleep(0.01)
        assert isinstance(session.failure(), PeerLost) or session.members.present == []


@pytest.mark.fault(30)
def test_a_receiver_that_says_too_much_is_given_up():
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(weights(0.0)), end)
        sender = FullWeightSender(weights(1.0), session)
        assert Round(sender.sync, [receiver]).sent.version == 0
        for _ in range(200):
            end.reply(Committed(0))
        deadline = time.monotonic() + 10
        while session.failure() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        with pytest.raises(PackedCommError, match="rank 1: it says too much"):
            sender.sync()
