"""Several receivers and senders that use one session, in turns."""

from __future__ import annotations

import dataclasses
import gc
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch

from packedcomm import FullWeightSender, Session, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.copying import Part
from packedcomm.errors import (
    DeadlineExceeded,
    IntegrityError,
    ProtocolError,
    RemoteError,
    SessionStateError,
)
from packedcomm.results import SyncResult
from packedcomm.session import ReceiverSession
from packedcomm.session.messages import Commit, Committed, Ready
from packedcomm.session.told import Told
from tests.helpers.in_process import Round, sessions
from tests.helpers.peers import eventually
from tests.helpers.sessions import QUICK


def weights(value):
    return {"a.weight": torch.full((50, 3), value), "b.bias": torch.full((7,), value + 0.5)}


def holds(tensors, value):
    return all(torch.equal(tensors[name], tensor) for name, tensor in weights(value).items())


@pytest.mark.parametrize("others", [0, 1])
def test_what_verifies_may_change_from_sync_to_sync(others):
    with sessions(1 + others) as (session, ends):
        live = [weights(0.0) for _ in ends]
        staged = [
            WeightReceiver(StagedTarget(TensorTarget(t)), e)
            for t, e in zip(live, ends, strict=True)
        ]
        in_place = WeightReceiver(TensorTarget(live[0]), ends[0])
        sent = weights(0.0)
        sender = FullWeightSender(sent, session)
        takes = [staged[0], in_place, in_place, staged[0], in_place, staged[0], staged[0]]
        for value, receiver in enumerate(takes, 1):
            for name, tensor in weights(float(value)).items():
                sent[name].copy_(tensor)
            outcome = Round(sender.sync, [receiver, *staged[1:]])
            assert outcome.sent.verified == (receiver is staged[0])
            assert all(holds(tensors, float(value)) for tensors in live)
            assert receiver.status().ready


class Kept:
    """Something that can be referred to weakly."""


class Rows:
    """A target of some rows of each tensor."""

    fixed_destinations = True

    def __init__(self, tensors, first):
        self._parts = [Part(t, (first,) + (0,) * (t.ndim - 1)) for t in tensors.values()]

    def place(self, manifest):
        return [[part] for part in self._parts]

    def commit(self, manifest):
        pass


def test_receivers_of_different_rows_each_tell_them():
    with sessions(1) as (session, (end,)):
        sent = weights(0.0)
        held = [
            {name: torch.zeros_like(tensor[rows]) for name, tensor in sent.items()}
            for rows in (slice(0, 2), slice(2, 5))
        ]
        receivers = [
            WeightReceiver(Rows(tensors, first), end)
            for tensors, first in zip(held, (0, 2), strict=True)
        ]
        sender = FullWeightSender(sent, session, verify=True)
        for value, which in enumerate([0, 1, 1, 0, 0, 1], 1):
            for tensor in sent.values():
                tensor.copy_(value + torch.arange(tensor.numel()).view_as(tensor))
            assert Round(sender.sync, [receivers[which]]).sent.verified
            rows = slice(2, 5) if which else slice(0, 2)
            for name, tensor in sent.items():
                assert torch.equal(held[which][name], tensor[rows])


def test_regions_are_told_once_to_each_sender(monkeypatch):
    told = []
    reply = ReceiverSession.reply

    def note(session, message):
        if isinstance(message, Ready):
            told.append(message.regions is not None and bool(message.regions))
        reply(session, message)

    monkeypatch.setattr(ReceiverSession, "reply", note)
    with sessions(1) as (session, (end,)):
        live = weights(0.0)
        in_place = WeightReceiver(TensorTarget(live), end)
        staged = WeightReceiver(StagedTarget(TensorTarget(live)), end)
        sent = weights(0.0)
        ways = [
            (FullWeightSender(sent, session, verify=True), in_place),
            (FullWeightSender(sent, session, verify=False), in_place),
            (FullWeightSender(sent, session), staged),
        ]
        for turn in range(3):
            for sender, receiver in ways:
                for tensor in sent.values():
                    tensor.add_(1.0)
                verified = sender is not ways[1][0]
                assert Round(sender.sync, [receiver]).sent.verified == verified
                assert all(torch.equal(live[name], tensor) for name, tensor in sent.items())
            assert told == [turn == 0, False, turn == 0], turn
            told.clear()


@pytest.mark.parametrize("wrong", ["interrupted", "mistaken"])
def test_a_sender_that_is_wrong_about_what_is_held_learns_it(monkeypatch, wrong):
    with sessions(1) as (session, (end,)):
        sent = weights(0.0)
        live = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
        rows = WeightReceiver(Rows({name: t[:2] for name, t in live.items()}, 0), end)
        whole = WeightReceiver(TensorTarget(live), end)
        sender = FullWeightSender(sent, session, verify=True)
        sync = partial(Round, sender.sync)
        for receiver in (whole, rows):
            sent["a.weight"].add_(1.0)
            assert sync([receiver]).sent.verified
        sent["a.weight"].add_(1.0)
        if wrong == "interrupted":
            # As over NCCL, where a communicator isn't given up for it.
            monkeypatch.setattr(session, "_transport", "nccl")

            def interrupted(*_):
                raise KeyboardInterrupt

            with monkeypatch.context() as patched:
                patched.setattr(sender._leading, "_remember", interrupted)

                def sync_and_be_interrupted():
                    with pytest.raises(KeyboardInterrupt):
                        sender.sync()

                assert isinstance(Round(sync_and_be_interrupted, [whole]).received[0], RemoteError)
        else:
            assert sync([whole]).sent.verified
            ((digest, (regions,)),) = sender._leading._held.items()
            sender._leading._held[digest] = [regions[:1]]
            sent["a.weight"].add_(1.0)
            failed = sync([whole])
            assert isinstance(failed.sent, (IntegrityError, ProtocolError)), failed.sent
        for _ in range(2):
            sent["a.weight"].add_(1.0)
            outcome = sync([whole])
            assert outcome.sent.verified, outcome.received
            assert all(torch.equal(live[name], tensor) for name, tensor in sent.items())


def test_a_version_without_data_is_of_one_senders_weights():
    hasty = dataclasses.replace(QUICK, commit_timeout_s=0.5)
    with sessions(1, hasty) as (session, (end,)):
        live = weights(0.0)
        late = threading.Event()

        class Slow(TensorTarget):
            def commit(self, manifest):
                if late.is_set():
                    time.sleep(1.5)
                super().commit(manifest)

        receiver = WeightReceiver(StagedTarget(Slow(live)), end)
        policy, average = (FullWeightSender(weights(value), session) for value in (1.0, 2.0))
        assert Round(policy.sync, [receiver]).sent.version == 0
        late.set()
        assert isinstance(Round(average.sync, [receiver]).sent, DeadlineExceeded)
        eventually(lambda: receiver.status().update_count == 2)
        assert holds(live, 2.0)
        with pytest.raises(SessionStateError, match="another sender"):
            policy.no_change()
        assert (receiver.status().version, policy.version) == (0, 0)


def test_a_version_without_data_is_for_those_who_hold_its_weights():
    with sessions(1) as (session, (end,)):
        models = [{name: torch.zeros(4)} for name in ("model", "draft")]
        receivers = [WeightReceiver(TensorTarget(tensors), end) for tensors in models]
        senders = [FullWeightSender({name: torch.ones(4)}, session) for name in ("model", "draft")]
        for sender, receiver in zip(senders, receivers, strict=True):
            assert Round(sender.sync, [receiver]).sent.version == 0
        outcome = Round(senders[1].no_change, receivers[:1])
        assert isinstance(outcome.sent, RemoteError), outcome.sent
        assert "at version 0 of another sync" in str(outcome.sent)
        assert [receiver.status().version for receiver in receivers] == [0, 0]


def test_states_are_not_those_of_another_receiver_that_is_busy():
    with sessions(1) as (session, (end,)):
        begun, go_on = threading.Event(), threading.Event()

        def take(version, items):
            begun.set()
            assert go_on.wait(20)

        idle, busy = WeightReceiver(TensorTarget(weights(0.0)), end), WeightReceiver(take, end)
        assert Round(FullWeightSender(weights(1.0), session).sync, [idle]).sent.version == 0
        other = FullWeightSender({"d": torch.ones(3)}, session)
        thread = threading.Thread(target=lambda: Round(other.sync, [busy]))
        thread.start()
        assert begun.wait(20)
        assert (idle.status().state, busy.status().state) == ("committed", "moving")
        go_on.set()
        thread.join(30)
        assert [r.status().state for r in (idle, busy)] == ["committed", "committed"]


@pytest.mark.parametrize("torn", [False, True])
def test_an_interrupt_after_the_last_word_of_a_sync_is_none_of_the_next(monkeypatch, torn):
    with sessions(1) as (session, (end,)):
        failing = torn

        def take(version, items):
            if failing:
                raise ZeroDivisionError

        receiver = WeightReceiver(take, end)
        if torn:
            failed = Round(FullWeightSender({"other": torch.ones(3)}, session).sync, [receiver])
            assert isinstance(failed.sent, RemoteError)
            failing = False
        sender = FullWeightSender(weights(1.0), session)
        reply = end.reply

        def interrupted(message):
            reply(message)
            if isinstance(message, Committed):
                raise KeyboardInterrupt

        monkeypatch.setattr(end, "reply", interrupted)
        with ThreadPoolExecutor(1) as pool:
            sync = pool.submit(sender.sync)
            with pytest.raises(KeyboardInterrupt):
                receiver.receive(20)
            assert sync.result(20).version == 0
        assert receiver.status().ready is not torn
        monkeypatch.undo()
        outcome = Round(sender.sync, [receiver])
        assert isinstance(outcome.received[0], SyncResult), outcome.received
        assert outcome.sent.version == 1


def test_what_is_told_of_many_senders_is_bounded_and_told_again():
    told = Told()
    kept = [Kept() for _ in range(200)]
    assert all(told.note(number, "d", held) for number, held in enumerate(kept))
    assert told.note(0, "d", kept[0])
    assert not told.note(199, "d", kept[199])
    assert len(told._told) <= 64
    del kept
    gc.collect()
    assert not len(told._told)


def test_a_failure_of_one_receiver_says_nothing_of_another():
    def refuse(version, items):
        raise ZeroDivisionError

    with sessions(1) as (session, (end,)):
        live = weights(0.0)
        main, draft = WeightReceiver(TensorTarget(live), end), WeightReceiver(refuse, end)
        assert Round(FullWeightSender(weights(1.0), session).sync, [main]).sent.version == 0
        failed = Round(FullWeightSender({"d": torch.ones(3)}, session).sync, [draft])
        assert isinstance(failed.sent, RemoteError)
        assert (draft.status().state, draft.status().ready) == ("torn", False)
        assert (main.status().state, main.status().ready) == ("committed", True)
        assert holds(live, 1.0)


def test_a_decision_is_of_one_sync_and_not_of_others_with_its_version(monkeypatch):
    hasty = dataclasses.replace(QUICK, move_timeout_s=0.5, commit_timeout_s=0.5)
    with (
        Session.listen("127.0.0.1:0", receivers=2, device="cpu", settings=QUICK) as session,
        Session.connect(session.address, device="cpu", settings=hasty) as end,
        Session.connect(session.address, device="cpu", settings=QUICK) as other_end,
    ):
        first, second = ({name: torch.zeros(4)} for name in "ab")
        one, two = (WeightReceiver(StagedTarget(TensorTarget(t)), end) for t in (first, second))
        busy = threading.Event()
        others = WeightReceiver(lambda version, items: busy.wait(2.0), other_end)
        given_up = FullWeightSender({"b": torch.ones(4)}, session)
        assert isinstance(Round(lambda: given_up.sync(5), [two, others]).sent, DeadlineExceeded)
        busy.set()

        tell = session.tell

        def late(message):
            if isinstance(message, Commit):
                time.sleep(2.5)  # as a process that is stopped between the decision and its word
            tell(message)

        monkeypatch.setattr(session, "tell", late)
        decided = FullWeightSender({"a": torch.ones(4)}, session)
        thread = threading.Thread(target=lambda: Round(lambda: decided.sync(5), [one, others]))
        thread.start()
        eventually(lambda: one._following.decisions._doubt is not None)
        eventually(lambda: end.state in ("idle", "committed"))
        with pytest.raises(DeadlineExceeded):
            two.receive(4.0)
        thread.join(30)
        assert (two.status().version, second["b"].tolist()) == (None, [0.0] * 4)


class Whole(TensorTarget):
    whole = True


@pytest.mark.parametrize("staging", [lambda target: target, StagedTarget])
def test_what_is_all_that_there_is_makes_lost_weights_whole(staging):
    with sessions(1) as (session, (end,)):
        live = weights(0.0)
        receiver = WeightReceiver(staging(Whole(live)), end)
        sender = FullWeightSender(weights(1.0), session, verify=False)
        assert Round(sender.sync, [receiver]).sent.version == 0
        receiver.lose_weights()
        assert not receiver.status().ready
        assert Round(sender.sync, [receiver]).sent.version == 1
        assert receiver.status().ready
