"""Callbacks, iterators and hooks that raise: everybody learns it, and the next sync works."""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial

import pytest
import torch

from packedcomm import FullWeightSender, Session, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.communicators import GlooCommunicator
from packedcomm.errors import (
    CapacityError,
    ContextLost,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    RemoteError,
    SessionStateError,
)
from packedcomm.session.messages import Failure, Proceed
from packedcomm.session.remote_errors import described, remote_error
from packedcomm.settings import DEFAULTS
from tests.helpers.in_process import Round, sessions
from tests.helpers.peers import (
    Receiving,
    checksum,
    eventually,
    in_place,
    staged,
    training,
    weights,
)
from tests.helpers.sessions import QUICK

OLD = checksum(weights(1.0))
TENSORS = 60


# The chunk in which a callback raises, and how many more the others may have by then: what was on
# its way in slots and in buffers of the system.
RAISING = 10
ON_ITS_WAY = 10


def _raises_once(when, tensors):
    """A callback that raises once, in its second sync."""
    chunks = []

    def on_weights(version, items):
        chunks.append(version)
        if version == 1 and chunks.count(1) == RAISING and not when.exists():
            when.write_text(repr(time.monotonic()))
            raise ZeroDivisionError("of the callback")
        for name, tensor in items:
            tensors[name].copy_(tensor)

    return on_weights


def many(value=0.0):
    return weights(value, TENSORS)


def _checksum_of_the_first(count):
    """Of version 0 with so many tensors of version 1, in the order in which they are sent."""
    old, new = many(1.0), many(2.0)
    return checksum({n: (new if i < count else old)[n] for i, n in enumerate(old)})


@pytest.mark.fault(7, 19)
@pytest.mark.parametrize("target", [staged, in_place])
def test_a_callback_that_raises_stops_all_at_its_chunk_and_its_traceback_reaches_all(
    target, tmp_path
):
    when = tmp_path / "raised"
    with training(2, Receiving(target, make=many), sent=many(1.0)) as group:
        raises = group.add(Receiving(partial(_raises_once, when), make=many))
        generation = group.session.generation
        with pytest.raises(RemoteError, match="receiver rank 3: ZeroDivisionError: of the") as e:
            group.sync(2.0)
        assert "on_weights" in str(e.value.__cause__)
        assert "Traceback" in str(e.value.__cause__)
        sent = group.session.chunk
        assert RAISING - 1 <= sent <= RAISING + ON_ITS_WAY
        raised = raises.outcome()
        assert raised.error == "ZeroDivisionError"
        for other in (peer.outcome() for peer in group.peers[:2]):
            assert other.error == "RemoteError"
            assert "receiver rank 3: ZeroDivisionError: of the callback" in other.text
            assert "on_weights" in other.cause
            assert other.at - float(when.read_text()) < 2.0
            # They stop there too, and have written no more than what had come.
            assert other.chunk <= RAISING + ON_ITS_WAY
            if target is staged:
                assert (other.shown, other.checksum) == (0, checksum(many(1.0)))
            else:
                assert (other.shown, other.state) == (None, "torn")
                # One is written while the next one comes.
                written = range(other.chunk - 2, other.chunk + 1)
                assert other.checksum in [_checksum_of_the_first(count) for count in written]
        new = group.sync(3.0)
        assert [peer.outcome().checksum for peer in group.peers] == [new] * 3
        assert group.session.generation > generation


@pytest.mark.fault(9, 19)
@pytest.mark.parametrize("target", [staged, in_place])
def test_an_iterator_that_raises_half_way_reaches_all_and_the_next_sync_works(target):
    def fail():
        raise ZeroDivisionError("of the source")

    with training(2, Receiving(target)) as group:
        group.source.when(12, fail)
        with pytest.raises(ZeroDivisionError, match="of the source"):
            group.sync(2.0)
        for peer in group.peers:
            outcome = peer.outcome()
            assert outcome.error == "RemoteError"
            assert "cancelled by the sender: ZeroDivisionError: of the source" in outcome.text
            assert outcome.at - group.source.acted_at < 2.5
            if target is staged:
                assert (outcome.shown, outcome.checksum) == (0, OLD)
            else:
                assert (outcome.shown, outcome.state) == (None, "torn")
        new = group.sync(3.0)
        assert [peer.outcome().checksum for peer in group.peers] == [new, new]


def _small(value=0.0):
    return weights(value, 4, 100)


@pytest.mark.fault(8)
def test_a_background_receiver_that_fails_shows_it_everywhere():
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(_small()), end)

        def hook(version):
            raise ZeroDivisionError("in the hook")

        receiver.start(hook)
        sender = FullWeightSender(_small(1.0), session)
        sender.sync()
        eventually(lambda: receiver.status().state == "failed")
        assert isinstance(receiver.status().error, ZeroDivisionError)
        with pytest.raises(RemoteError, match="ZeroDivisionError: in the hook"):
            sender.sync()
        with pytest.raises(ZeroDivisionError, match="in the hook"):
            receiver.close()


@pytest.mark.fault(8)
@pytest.mark.parametrize("kind", [CapacityError, DeadlineExceeded])
def test_a_sync_that_failed_is_on_a_background_receivers_status_until_the_next_one(kind):
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(TensorTarget(_small()), end)
        receiver.start()
        sender = FullWeightSender(_small(1.0), session)
        tell = session.tell

        def telling(message):
            if isinstance(message, Proceed):
                session.tell = tell
                raise kind("for this once")
            tell(message)

        session.tell = telling
        with pytest.raises(kind):
            sender.sync()
        eventually(lambda: receiver.status().error is not None)
        assert isinstance(receiver.status().error, kind)
        sender.sync()
        eventually(lambda: receiver.status().version == 0)
        assert receiver.status().error is None
        session.close()
        receiver.close()


def _cannot_abort(receiver):
    abort = GlooCommunicator.abort

    def hanging(self, reason):
        abort(self, reason)
        if receiver.status().version is not None:
            time.sleep(1.5)
            raise ContextLost("the abort hangs: this process must restart")

    GlooCommunicator.abort = hanging


@pytest.mark.fault(4)
def test_only_the_process_whose_abort_hangs_must_restart():
    def fail():
        raise ZeroDivisionError("of the source")

    with training(1) as group:
        lost = group.add(Receiving(prepare=_cannot_abort))
        first = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        group.source.when(12, fail)
        with pytest.raises(ZeroDivisionError):
            group.sync(3.0)
        assert group.peers[0].outcome().error == "RemoteError"
        assert lost.outcome().error == "ContextLost"
        # The trainer tries again at once, while that abort still hangs.
        new, told = group.sync_at_last(4.0)
        assert [type(error) for error in told] == [PeerLost]
        assert "receiver rank 2: ContextLost: the abort hangs" in str(told[0])
        assert group.session.world_size == 2
        healthy = group.peers[0]
        while (outcome := healthy.outcome()).kind == "failed":
            assert (outcome.error, outcome.lasts) == ("PeerLost", True)
        assert outcome.checksum == new


@pytest.mark.fault(4, 8)
def test_receivers_in_the_background_go_on_when_another_process_must_restart():
    with sessions(2) as (session, ends):
        drop = ends[1].drop_communicator

        def drop_communicator(reason, **options):
            ends[1].drop_communicator = drop
            drop(reason, **options)
            raise ContextLost("the abort hangs: this process must restart")

        lives = [{"w": torch.zeros(4)} for _ in ends]
        receivers = [
            WeightReceiver(StagedTarget(TensorTarget(live)), end)
            for live, end in zip(lives, ends, strict=True)
        ]
        for receiver in receivers:
            receiver.start()
        sent = torch.ones(4)
        sender = FullWeightSender({"w": sent}, session)
        sender.sync()
        ends[1].drop_communicator = drop_communicator
        ends[1].communicator.abort("something fails there")
        # As the trainer's loop of docs/failures.md.
        for _ in range(4):
            sent += 1
            try:
                result = sender.sync()
            except (ContextLost, SessionStateError):
                raise
            except PackedCommError:
                continue
        assert result.receivers == 1
        healthy, lost = receivers
        eventually(lambda: healthy.status().version == result.version)
        assert healthy.status().ready
        assert isinstance(lost.status().error, ContextLost)
        healthy.close()


@pytest.mark.parametrize(
    ("raised", "found"),
    [(ContextLost, PeerLost), (SessionStateError, RemoteError), (CapacityError, CapacityError)],
)
def test_an_error_of_another_process_never_says_that_this_one_is_at_its_end(raised, found):
    error = remote_error(
        Failure(*described(raised("a word on it"), DEFAULTS.max_frame_bytes)), "receiver rank 3"
    )
    assert type(error) is found
    assert "receiver rank 3: " in str(error)
    assert "a word on it" in str(error)
    assert found is raised or raised.__name__ in str(error)


class UnspeakableError(Exception):
    def __str__(self):
        raise KeyError("no text")


# What a file name becomes that is no valid text.
NO_TEXT = b"caf\xe9 ".decode("utf-8", "surrogateescape")


@pytest.mark.fault(7, 9)
@pytest.mark.parametrize(
    "error",
    [
        UnspeakableError(),
        RuntimeError(NO_TEXT),
        RuntimeError("\udcff" * 70_000),
        CapacityError("é" * 99999),
    ],
    ids=["no text", "invalid", "invalid and long", "long"],
)
def test_whatever_an_error_says_it_reaches_the_other_side(error):
    failing = [error]

    class Failing(TensorTarget):
        def place(self, manifest):
            if failing:
                raise failing.pop()
            return super().place(manifest)

    kind = type(error) if isinstance(error, CapacityError) else RemoteError
    live, sent = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    with sessions(2) as (session, ends):
        receivers = [
            WeightReceiver(target(live), end)
            for target, end in zip((Failing, TensorTarget), ends, strict=True)
        ]
        sender = FullWeightSender(sent, session)
        failed = Round(sender.sync, receivers)
        assert type(failed.sent) is kind
        assert failed.received[0] is error
        assert type(failed.received[1]) is kind
        assert Round(sender.sync, receivers).sent.receivers == 2
        assert live["w"].tolist() == [1.0] * 4


@pytest.mark.parametrize("error", [UnspeakableError(), RuntimeError(NO_TEXT * 9999)])
@pytest.mark.fault(9)
def test_whatever_an_error_says_it_ends_the_session_and_is_raised(error):
    with pytest.raises(type(error)) as caught, sessions(1) as (session, (end,)):
        raise error
    assert caught.value is error
    for closed in (session, end):
        assert not closed._supervisor._thread.is_alive()
    Session.listen(session.address, receivers=1, device="cpu").close()


def receive_twice(end):
    assert not end.receive(5).in_order
    end.receive(5)


def test_the_other_side_is_told_of_an_end_whatever_its_reason_is():
    with sessions(1) as (session, (end,)):
        session.abort(NO_TEXT * 9999)
        with pytest.raises(SessionStateError, match="aborted: caf"):
            receive_twice(end)


@pytest.mark.fault(7)
@pytest.mark.parametrize("raising", [0, 1])
def test_an_error_that_is_larger_than_a_message_may_be_is_cut_and_reaches_all(raising):
    def fail(version, items):
        raise ZeroDivisionError("too long " * 10_000)

    small = replace(QUICK, max_frame_bytes=4096)
    with ExitStack() as stack:
        session = stack.enter_context(
            Session.listen("127.0.0.1:0", receivers=2, device="cpu", settings=QUICK)
        )
        ends = [
            stack.enter_context(Session.connect(session.address, device="cpu", settings=settings))
            for settings in (small, QUICK)
        ]
        targets = [TensorTarget({"w": torch.zeros(4)}) for _ in ends]
        targets[raising] = fail
        receivers = [WeightReceiver(t, end) for t, end in zip(targets, ends, strict=True)]
        begin = time.monotonic()
        done = Round(FullWeightSender({"w": torch.ones(4)}, session).sync, receivers)
        assert time.monotonic() - begin < QUICK.agree_timeout_s / 2
        assert isinstance(done.sent, RemoteError)
        assert "ZeroDivisionError: too long" in str(done.sent)
        other = done.received[1 - raising]
        assert isinstance(other, RemoteError)
        assert "ZeroDivisionError: too long" in str(other)
