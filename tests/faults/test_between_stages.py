"""Failures between two stages of a sync, and what a decision means afterwards."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest
import torch

from packedcomm import FullWeightSender, ModuleSource, Session, TensorTarget, WeightReceiver
from packedcomm.errors import PackedCommError, PeerLost, SessionStateError
from packedcomm.session.messages import Committed
from tests.helpers.in_process import Round, join, sessions
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
