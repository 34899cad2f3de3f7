"""What is true after syncs that went wrong: states, versions, and whether the next one works."""

from __future__ import annotations

import copy
import pickle
import time
import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from packedcomm import (
    FullWeightSender,
    StagedTarget,
    SyncPolicy,
    SyncResult,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.copying import Part
from packedcomm.errors import (
    ArgumentError,
    CapacityError,
    IntegrityError,
    ManifestError,
    PeerLost,
    RemoteError,
    SessionStateError,
    TensorError,
)
from packedcomm.manifest import Manifest
from packedcomm.region_digests import RegionDigests
from packedcomm.targets.staged import StagedPart
from packedcomm.verification import ChangeCount, change_statistics
from tests.helpers.in_process import Round, sessions
from tests.helpers.sessions import QUICK


def weights(value: float, names: str = "ab") -> dict[str, torch.Tensor]:
    return {name: torch.full((4,), value) for name in names}


def eventually(holds: Callable[[], bool]) -> None:
    """Wait until something holds, for ten seconds at most."""
    deadline = time.monotonic() + 10
    while not holds() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert holds()


def corrupting(receiver: WeightReceiver, name: str) -> None:
    """The next verification finds that a tensor isn't what was sent."""
    following = receiver._following
    digests = following._digests

    def once(manifest, shown):
        following._digests = digests
        found = digests(manifest, shown)
        found[list(manifest.by_name).index(name)] += 1
        return found

    following._digests = once


@pytest.mark.fault(19)
def test_torn_weights_stay_torn_until_all_of_them_are_written_again():
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(live, partial=True), end)
        corrupting(receiver, "b")
        sender = FullWeightSender(weights(1.0), session, verify=True)
        first = Round(sender.sync, [receiver])
        assert isinstance(first.sent, IntegrityError)
        assert receiver.status().state == "torn"
        some = FullWeightSender(weights(2.0, "a"), session)
        assert Round(lambda: some.sync(5), [receiver]).sent.version == 5
        status = receiver.status()
        assert (status.state, status.version) == ("torn", None)
        assert Round(lambda: sender.sync(6), [receiver]).sent.version == 6
        assert receiver.status().state == "committed"
        assert receiver.status().version == 6


def test_no_change_is_refused_where_another_sender_has_sent_since():
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(live), end)
        first, second = (FullWeightSender(weights(value), session) for value in (1.0, 2.0))
        for sender in (first, second):
            assert Round(sender.sync, [receiver]).sent.version == 0
        with pytest.raises(SessionStateError, match="another sender"):
            first.no_change()
        assert Round(second.no_change, [receiver]).sent.version == 1
        assert {value for tensor in live.values() for value in tensor.flatten().tolist()} == {2.0}
        assert Round(first.sync, [receiver]).sent.version == 1
        assert Round(first.no_change, [receiver]).sent.version == 2


def test_no_change_is_refused_where_there_is_nothing_to_keep():
    live = [weights(0.0), weights(0.0)]
    with sessions(2) as (session, ends):
        receivers = [
            WeightReceiver(TensorTarget(tensors), end)
            for tensors, end in zip(live, ends, strict=True)
        ]
        sender = FullWeightSender(weights(1.0), session, verify=True)
        with pytest.raises(SessionStateError, match="there was none"):
            sender.no_change()
        assert Round(sender.sync, receivers).sent.version == 0
        same = Round(lambda: sender.no_change(3), receivers).sent
        assert (same.version, same.receivers) == (3, 2)
        assert [receiver.status().version for receiver in receivers] == [3, 3]
        corrupting(receivers[1], "a")
        assert isinstance(Round(sender.sync, receivers).sent, IntegrityError)
        with pytest.raises(SessionStateError, match="failed"):
            sender.no_change()
        # Another sender knows nothing of that, but the receivers do.
        other = FullWeightSender(weights(1.0), session)
        other.version, other._in_step = 3, True
        other._leading._committed = session.committed_number
        outcome = Round(lambda: other.no_change(9), receivers)
        assert isinstance(outcome.sent, RemoteError)
        assert "SessionStateError: " in str(outcome.sent)
        assert "torn at version None" in str(outcome.sent)


def test_several_senders_share_a_session():
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(live), end)
        for value in (1.0, 2.0):
            sender = FullWeightSender(weights(value), session, verify=True)
            assert Round(sender.sync, [receiver]).sent.verified
            assert live["b"].tolist() == [value] * 4


LOWERED = [
    ({"max_tensors": 1}, "2 tensors, at most 1"),
    ({"max_name_bytes": 5}, "more than 5 bytes"),
    ({"max_dimensions": 1}, "2 dimensions, at most 1"),
]


@pytest.mark.parametrize(("limit", "text"), LOWERED)
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_limits_of_settings_hold_for_manifests(who, limit, text):
    sent = {"a": torch.ones(2), "longer": torch.ones(2, 2)}
    live = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
    with sessions(1) as (session, (end,)):
        limited = session if who == "sender" else end
        limited.settings = replace(QUICK, **limit)
        receiver = WeightReceiver(TensorTarget(live), end)
        receiver.start()
        sender = FullWeightSender(sent, session)
        with pytest.raises(ManifestError, match=text):
            sender.sync()
        if who == "receiver":
            eventually(lambda: isinstance(receiver.status().error, ManifestError))
        limited.settings = QUICK
        assert sender.sync().version == 0
        assert torch.equal(live["longer"], sent["longer"])
        receiver.close()


class Pair(torch.nn.Module):
    """Two parameters that may be one."""

    def __init__(self, value):
        super().__init__()
        self.a = torch.nn.Parameter(torch.full((8, 8), value))
        self.b = self.a

    def untie(self):
        self.b = torch.nn.Parameter(self.a.detach().clone())


def test_each_sender_of_a_session_is_told_what_is_held_anew():
    live = Pair(0.0)
    sent = [Pair(1.0), Pair(7.0)]
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(live), end)
        senders = [FullWeightSender(model, session, verify=True) for model in sent]
        for untie in (False, True):
            if untie:
                live.untie()
            for model, sender in [*zip(sent, senders, strict=True)] * 2:
                with torch.no_grad():
                    model.a += 1
                assert Round(sender.sync, [receiver]).sent.verified
                assert torch.equal(live.a, model.a)
                assert torch.equal(live.b, model.a)
        assert session.generation == 1


@pytest.mark.fault(21)
def test_a_receiver_that_knows_nothing_joins_one_that_does():
    live = [weights(0.0), weights(0.0)]
    with sessions(2) as (session, ends):
        sent = weights(1.0)
        sender = FullWeightSender(sent, session, verify=True)
        first = WeightReceiver(TensorTarget(live[0]), ends[0])
        for value in (1.0, 2.0):
            sent["a"].fill_(value)
            second = WeightReceiver(TensorTarget(live[1]), ends[1])
            outcome = Round(sender.sync, [first, second])
            assert outcome.sent.verified
            assert [result.verified for result in outcome.received] == [True, True]


class Refusing(TensorTarget):
    """Has no memory, once."""

    refuse = True

    def place(self, manifest):
        if self.refuse:
            self.refuse = False
            raise CapacityError("for now")
        return super().place(manifest)


def test_a_refusal_costs_one_sync_and_nobody_ends():
    with sessions(2) as (session, ends):
        healthy = WeightReceiver(TensorTarget(weights(0.0)), ends[0])
        healthy.start()
        refusing = WeightReceiver(Refusing(weights(0.0)), ends[1])
        sender = FullWeightSender(weights(1.0), session, verify=True)
        first = Round(sender.sync, [refusing])
        assert isinstance(first.sent, CapacityError)
        assert isinstance(first.received[0], CapacityError)
        eventually(lambda: isinstance(healthy.status().error, CapacityError))
        assert Round(sender.sync, [refusing]).sent.verified
        eventually(lambda: (healthy.status().version, healthy.status().error) == (0, None))
        session.close()
        healthy.close()


def test_a_failure_after_the_data_leaves_no_messages_behind():
    live = weights(0.0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(TensorTarget(live)), end)
        sender = FullWeightSender(weights(1.0), session, verify=True)
        following = receiver._following
        digests = following._digests

        def fail(manifest, shown):
            following._digests = digests
            raise ZeroDivisionError("no memory for digests")

        following._digests = fail
        first = Round(sender.sync, [receiver])
        assert isinstance(first.received[0], ZeroDivisionError)
        assert "no memory for digests" in str(first.sent)
        assert Round(sender.sync, [receiver]).received[0].version == 0
        assert live["a"].tolist() == [1.0] * 4


def test_a_sender_that_fails_after_the_data_says_why(monkeypatch):
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(TensorTarget(weights(0.0))), end)
        sender = FullWeightSender(weights(1.0), session, verify=True)

        def fail(digests):
            monkeypatch.undo()
            raise ZeroDivisionError("on the sender")

        monkeypatch.setattr(RegionDigests, "take", fail)
        first = Round(sender.sync, [receiver])
        assert isinstance(first.sent, ZeroDivisionError)
        assert "ZeroDivisionError: on the sender" in str(first.received[0])
        assert Round(sender.sync, [receiver]).sent.verified


def test_an_interrupted_sender_is_named_as_the_reason():
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(TensorTarget(weights(0.0))), end)
        sender = FullWeightSender(weights(1.0), session)

        def interrupted(seconds):
            session.abort("KeyboardInterrupt")
            raise ZeroDivisionError

        sender._leading.verify = interrupted
        outcome = Round(sender.sync, [receiver])
        assert isinstance(outcome.received[0], PeerLost)
        assert "KeyboardInterrupt" in str(outcome.received[0])


def test_a_receiver_that_ended_is_named_once_and_then_the_others_go_on():
    with sessions(2) as (session, (end, other)):
        survivor = WeightReceiver(TensorTarget(weights(0.0)), other)
        receiver = WeightReceiver(TensorTarget(weights(0.0)), end)

        def hook(version):
            raise ZeroDivisionError("in the hook")

        receiver.start(hook)
        sender = FullWeightSender(weights(1.0), session)
        assert Round(sender.sync, [survivor]).sent.receivers == 2
        eventually(lambda: session.failure() is not None)
        with pytest.raises(RemoteError, match="rank 1: ZeroDivisionError: in the hook"):
            sender.sync()
        assert Round(sender.sync, [survivor]).sent.receivers == 1
        with pytest.raises(ZeroDivisionError):
            receiver.close()
        assert isinstance(receiver.status().error, ZeroDivisionError)


def test_staged_destinations_that_were_replaced_get_the_next_sync():
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    old = parameter.data
    with sessions(1) as (session, (end,)):
        target = StagedTarget(TensorTarget({"a": parameter}))
        receiver = WeightReceiver(target, end)
        sent = weights(1.0, "a")
        sender = FullWeightSender(sent, session, verify=True)
        Round(sender.sync, [receiver])
        parameter.data = torch.zeros(4)
        sent["a"].fill_(2.0)
        assert Round(sender.sync, [receiver]).sent.verified
        assert parameter.tolist() == [2.0] * 4
        assert old.tolist() == [1.0] * 4


def test_staged_destinations_that_are_replaced_before_the_commit_are_an_error():
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    target = StagedTarget(TensorTarget({"a": parameter}))
    manifest = Manifest.from_tensors({"a": parameter})
    target.place(manifest)
    parameter.data = torch.zeros(4)
    with pytest.raises(TensorError, match="given other memory"):
        target.commit(manifest)
    with pytest.raises(SessionStateError, match="no transfer"):
        target.commit(Manifest.from_tensors({"b": parameter}))


def test_a_callback_cannot_be_staged():
    with pytest.raises(ArgumentError, match="place and commit"):
        StagedTarget(lambda version, items: None)


def test_many_manifests_over_one_staged_target_are_all_committed():
    names = "abcdefghijkl"
    live = weights(0.0, names)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(TensorTarget(live, partial=True)), end)
        for turn in (1.0, 2.0):
            for name in names:
                sender = FullWeightSender(weights(turn, name), session, verify=True)
                assert Round(sender.sync, [receiver]).sent.verified
            assert all(tensor.tolist() == [turn] * 4 for tensor in live.values())


@pytest.mark.parametrize("staged", [False, True])
def test_destinations_that_share_memory_but_are_sent_apart_are_refused(staged):
    memory = torch.zeros(9)
    for target in (
        TensorTarget({"a": memory[:6], "b": memory[3:9]}),
        TensorTarget({"a": memory[:6], "b": memory[:6]}),
    ):
        with sessions(1) as (session, (end,)):
            receiver = WeightReceiver(StagedTarget(target) if staged else target, end)
            sender = FullWeightSender({"a": torch.ones(6), "b": torch.zeros(6)}, session)
            outcome = Round(sender.sync, [receiver])
            assert isinstance(outcome.sent, ManifestError)
            assert "'a' and 'b' share memory" in str(outcome.sent)


def test_a_target_that_places_something_else_is_a_typed_error():
    class Odd:
        def place(self, manifest):
            return [[torch.zeros(4)] for _ in manifest.specs]

        def commit(self, manifest): ...

    class Unhashable:
        __hash__ = None
        fixed_destinations = True

        def __init__(self):
            self.tensor = torch.zeros(4)

        def place(self, manifest):
            return [[Part(self.tensor)] for _ in manifest.specs]

        def commit(self, manifest): ...

    with sessions(1) as (session, (end,)):
        sender = FullWeightSender(weights(1.0, "a"), session)
        odd = Round(sender.sync, [WeightReceiver(Odd(), end)])
        assert isinstance(odd.sent, TensorError)
        target = Unhashable()
        assert Round(sender.sync, [WeightReceiver(target, end)]).sent.version == 0
        assert target.tensor.tolist() == [1.0] * 4


def test_statistics_are_exact_for_float64_and_large_changes():
    old = torch.zeros(8, dtype=torch.float64)
    tiny = change_statistics([StagedPart("w", old + 1e-9, old)])["w"]
    assert tiny.mean == pytest.approx(1e-9)
    large = change_statistics([StagedPart("w", torch.full((4,), 1e25), torch.zeros(4))])["w"]
    assert large.maximum == pytest.approx(1e25)
    assert large.std == pytest.approx(0.0, abs=1e18)
    assert change_statistics([StagedPart("w", torch.zeros(0), torch.zeros(0))]) == {}


def test_changes_are_counted_across_manifests_and_old_names_are_forgotten():
    count = ChangeCount()
    both = Manifest.from_tensors(weights(0.0))
    one = Manifest.from_tensors(weights(0.0, "b"))
    assert count.count(both, torch.tensor([1, 2])) is None
    assert count.count(both, torch.tensor([1, 3])) == 1
    assert count.count(one, torch.tensor([3])) == 0
    assert count.count(one, torch.tensor([4])) == 1
    assert count.count(both, torch.tensor([1, 4])) == 0
    for number in range(30):
        name = f"n{number}"
        count.count(Manifest.from_tensors({name: torch.zeros(1)}), torch.tensor([number]))
    assert len(count._older) <= 32


def test_versions_are_integers_that_fit():
    with sessions(1) as (session, (end,)):
        sender = FullWeightSender(weights(1.0), session)
        for version in (-1, 1 << 63, 1.0, True, "1"):
            with pytest.raises(ArgumentError, match="version"):
                sender.sync(version)
        assert end.rank == 1


def test_a_policy_that_makes_no_sense_is_refused():
    for every in (0, -1, 1.5, True):
        with pytest.raises(ArgumentError, match="every"):
            SyncPolicy(every=every)
    with pytest.raises(ArgumentError, match="step"):
        SyncPolicy().due(-1)
    assert not SyncPolicy(initial=False).due(0)
    assert not SyncPolicy(every=2, final=False).due(3, last=True)


def test_a_result_is_a_record_that_can_be_logged_copied_and_sent_on():
    result = SyncResult(1, "e", "gloo", 2, 3_000_000_000, {"wire": 1.0, "total": 1.5})
    assert dict(result) == result.as_dict()
    assert result["seconds/wire"] == 1.0
    assert result.gb_per_s == 2.0
    assert pickle.loads(pickle.dumps(result)) == copy.deepcopy(result) == result
    with pytest.raises(AttributeError):
        result.version = 2
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert {**result}["version"] == 1


def test_a_sync_that_failed_during_the_data_is_followed_by_one_that_succeeds():
    live = weights(0.0)
    failing = [True]

    def raising(version, items):
        if failing[0]:
            raise ZeroDivisionError("in the callback")

    with sessions(2) as (session, ends):
        receivers = [
            WeightReceiver(raising, ends[0]),
            WeightReceiver(StagedTarget(TensorTarget(live)), ends[1]),
        ]
        sender = FullWeightSender(weights(1.0), session)
        first = Round(sender.sync, receivers)
        for error in (first.sent, *first.received):
            assert "in the callback" in str(error)
        assert live["a"].tolist() == [0.0] * 4
        failing[0] = False
        generation = session.generation
        second = Round(sender.sync, receivers)
        assert [result.version for result in (second.sent, *second.received)] == [0, 0, 0]
        assert second.sent.seconds["connect"] > 0
        assert session.generation == generation + 1
        assert live["a"].tolist() == [1.0] * 4
        quick = FullWeightSender(weights(2.0), session)
        assert "connect" not in Round(quick.sync, receivers).sent.seconds
