"""Which sources a sender takes, and what it tells them of its session's deadlines."""

from __future__ import annotations

import pytest
import torch

from packedcomm import FullWeightSender, TensorTarget, WeightReceiver
from packedcomm.errors import ArgumentError, PackedCommError, ProtocolError, RemoteError
from packedcomm.leading import Leading
from packedcomm.settings import Settings
from packedcomm.sources import BoundedSource, LoraSource, ModuleSource, ShardedSource, Source
from tests.helpers.in_process import Round, sessions
from tests.helpers.sessions import QUICK


class Own:
    """A user's own source: nothing but the protocol."""

    def __init__(self, tensors):
        self.leader = True
        self.calls = []
        self._inner = ModuleSource(lambda: tensors)

    def snapshot(self):
        self.calls.append("snapshot")
        return self._inner.snapshot()

    def gather(self, snapshot):
        self.calls.append("gather")
        return self._inner.gather(snapshot)

    def share(self, outcome):
        self.calls.append("share" if outcome is None else outcome)
        return outcome


class OwnBounded(Own):
    def set_timeout(self, timeout_s, others_s):
        self.calls.append((timeout_s, others_s))


def _calls(source_class, fails=False):
    source = source_class({"w": torch.ones(250)})
    live = {"w": torch.zeros(250)}
    if fails:
        source.gather = lambda snapshot: _failing(source, snapshot)
    with sessions(1) as (session, [end]):
        sender = FullWeightSender(source, session)
        receivers = [WeightReceiver(TensorTarget(live), end)]
        done = Round(sender.sync, receivers)
        if not fails:
            assert not isinstance(done.sent, Exception), done.sent
            assert torch.equal(live["w"], torch.ones(250))
            done = Round(sender.no_change, receivers)
            assert not isinstance(done.sent, Exception), done.sent
    return source.calls


def _failing(source, snapshot):
    source.calls.append("gather")
    raise ValueError("odd")
    yield


def test_a_users_own_source_needs_no_deadlines():
    assert isinstance(Own({}), Source)
    assert not isinstance(Own({}), BoundedSource)
    assert _calls(Own)[:4] == ["snapshot", "share", "gather", "committed as version 0"]


@pytest.mark.parametrize("kind", [ModuleSource, ShardedSource])
def test_sources_of_one_process_have_no_deadlines(kind):
    assert not hasattr(kind, "set_timeout")


def test_sources_of_several_processes_have_deadlines():
    assert isinstance(OwnBounded({}), BoundedSource)
    assert hasattr(LoraSource, "set_timeout")


def test_a_source_is_told_each_stages_deadlines():
    data = QUICK.gather_seconds(1000), QUICK.transfer_seconds(1000)
    begin = QUICK.agree_timeout_s, QUICK.assembly_seconds()
    end = QUICK.agree_timeout_s, None
    calls = _calls(OwnBounded)
    committed = [f"committed as version {version}" for version in range(2)]
    assert calls[:7] == [begin, "snapshot", data, "share", "gather", end, committed[0]]
    # Nothing but the outcome is shared of a version without data.
    assert calls[7:] == [end, committed[1]]


def test_after_a_failure_the_rest_of_a_gather_has_time_anew():
    data = QUICK.gather_seconds(1000), QUICK.transfer_seconds(1000)
    calls = _calls(OwnBounded, fails=True)
    assert calls[4:] == ["gather", data, (QUICK.agree_timeout_s, None), "ValueError: odd"]


def test_a_leader_has_time_for_whatever_it_may_do_before_the_data():
    settings = Settings(connect_timeout_s=7.0, agree_timeout_s=100.0)
    # Receivers come, say that they are there, connect, take the offer, and then the manifest.
    assert settings.assembly_seconds() > 7.0 + 100.0 + 7.0 + 100.0 + 100.0


def test_a_leader_has_time_for_the_data_and_for_what_follows():
    settings = Settings(move_timeout_s=50.0, commit_timeout_s=3.0, least_bytes_per_second=10**12)
    # The data fail at their deadline, and then all that is still gathered must come.
    assert settings.transfer_seconds(0) > 50.0 + settings.gather_seconds(0)
    assert settings.transfer_seconds(0) > 50.0 + 3.0


def test_a_source_that_fails_when_the_sync_has_failed_is_not_why():
    with sessions(1) as (session, _):
        leading = Leading(session, "never", False)
        leading.failed_here(PackedCommError("late"))
        assert leading._of_source is None
        leading._under_way = True
        leading.failed_here(error := PackedCommError("late"))
        assert leading._of_source is error


class Elsewhere(Own):
    """A process that doesn't lead, of a trainer whose leader shares given outcomes."""

    def __init__(self, *outcomes):
        super().__init__({"w": torch.ones(2)})
        self.leader = False
        self.outcomes = list(outcomes)

    def share(self, outcome):
        return self.outcomes.pop(0)


def test_a_process_that_doesnt_lead_has_the_leaders_version():
    sender = FullWeightSender(
        Elsewhere(None, "committed as version 7", "committed as version 9"), None
    )
    assert sender.sync().version == 7
    assert sender.no_change().version == 9
    assert sender.version == 9


@pytest.mark.parametrize(
    ("outcomes", "error"),
    [
        (["committed as version 3"], ProtocolError),
        ([None, None], ProtocolError),
        (["ValueError: odd"], RemoteError),
        ([None, "ValueError: odd"], RemoteError),
    ],
    ids=["no change there", "begun again there", "failed before", "failed after"],
)
def test_a_process_whose_leader_does_something_else_says_so(outcomes, error):
    sender = FullWeightSender(Elsewhere(*outcomes), None)
    with pytest.raises(error, match="another call" if error is ProtocolError else "odd"):
        sender.sync()
    assert sender.version is None


@pytest.mark.parametrize(
    ("session", "text"),
    [(None, "needs a session"), ("127.0.0.1:1234", "must be a sender's.*not str")],
)
def test_a_session_of_another_kind_is_refused_at_once(session, text):
    with pytest.raises(ArgumentError, match=text):
        FullWeightSender({"w": torch.zeros(1)}, session)
