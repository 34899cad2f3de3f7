"""Ctrl-C, or an error out of nowhere, at many points of a sync: what is shown is what is held, and
the next sync works at once."""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import replace
from operator import itemgetter

import pytest
import torch
import zmq

from packedcomm import (
    FullWeightSender,
    Session,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
    decisions,
    following,
    holding,
    leading,
    receivers,
    senders,
)
from packedcomm.errors import DeadlineExceeded, PackedCommError, RemoteError
from packedcomm.session import base, dialogue, hearing, inbox, receiver_channel
from packedcomm.session import receiver as receiver_session
from packedcomm.session.states import SyncState
from tests.helpers.in_process import Round, sessions
from tests.helpers.interrupts import Interrupt
from tests.helpers.sessions import QUICK

# What a sync may take after an interrupt; nobody may be waited for until its deadline.
SOON_S = 3.0

SENDER = (senders, leading, dialogue, hearing)
RECEIVER = (receivers, following, decisions, holding, receiver_session, inbox)


class Pair:
    """A sender and two receivers in threads of their own, which go on whatever they raise."""

    def __init__(self, session, ends, staged):
        self.live = [{name: torch.zeros(8) for name in "ab"} for _ in ends]
        targets = [TensorTarget(live) for live in self.live]
        self.receivers = [
            WeightReceiver(StagedTarget(target) if staged else target, end)
            for target, end in zip(targets, ends, strict=True)
        ]
        self.source = {name: torch.zeros(8) for name in "ab"}
        self.sender = FullWeightSender(self.source, session, verify=True)
        self.values = {}
        self.interrupt = None
        self._value = 0.0
        self._threads = [
            threading.Thread(target=self._loop, args=(i,), daemon=True) for i in range(len(ends))
        ]
        for thread in self._threads:
            thread.start()

    def _loop(self, index):
        receiver = self.receivers[index]
        while receiver.session.lasts:
            interrupt = self.interrupt if index == 0 and self.interrupt else Interrupt((), 0)
            interrupt.run(lambda: receiver.receive(0.2))

    def sync(self, interrupt=None):
        """Send other weights; how long it took, and what it raised."""
        self._value += 1.0
        for tensor in self.source.values():
            tensor.fill_(self._value)
        begin = time.monotonic()
        error = (interrupt or Interrupt((), 0)).run(self.sender.sync)
        decided = self.sender._leading.decided_version
        self.values.setdefault(decided, self._value)
        return time.monotonic() - begin, error

    def check(self):
        """Whoever shows a version holds the weights that were decided under it."""
        for receiver, live in zip(self.receivers, self.live, strict=True):
            before = receiver.status()
            held = {value for tensor in live.values() for value in tensor.tolist()}
            if before.state == "committed" and receiver.status() == before:
                assert held == {self.values[before.version]}

    def end(self):
        self.sender._session.close()
        for thread in self._threads:
            thread.join(10)
            assert not thread.is_alive()


# Every so many lines, so that all of them together are a few dozen points.
@pytest.mark.fault(19, 20)
@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("first", [1, 8])
def test_a_sender_interrupted_anywhere_costs_that_sync_and_nobodys_time(staged, first):
    settings = replace(QUICK, heartbeat_interval_s=10.0)
    with sessions(2, settings) as (session, ends):
        pair = Pair(session, ends, staged)
        pair.sync()
        for number in range(first, 10_000, 14):
            interrupt = Interrupt(SENDER, number)
            for spent, error in (pair.sync(interrupt), pair.sync()):
                assert spent < SOON_S, (interrupt.where, error)
            assert error is None, interrupt.where
            pair.check()
            if interrupt.where is None:
                break
        assert number > 100
        pair.end()


@pytest.mark.fault(19, 20)
@pytest.mark.parametrize("staged", [True, False])
@pytest.mark.parametrize("first", [1, 8])
def test_a_receiver_interrupted_anywhere_shows_what_it_holds_and_is_waited_for_by_nobody(
    staged, first
):
    settings = replace(QUICK, heartbeat_interval_s=10.0)
    with sessions(2, settings) as (session, ends):
        pair = Pair(session, ends, staged)
        pair.sync()
        for number in range(first, 300, 14):
            pair.interrupt = Interrupt(RECEIVER, number)
            deadline = time.monotonic() + 10
            while pair.interrupt.where is None and time.monotonic() < deadline:
                spent, error = pair.sync()
                assert spent < SOON_S, (pair.interrupt.where, error)
            assert pair.interrupt.where is not None
            # The failure may be known only now.
            told = [pair.sync() for _ in range(2)]
            assert max(spent for spent, _ in told) < SOON_S, (pair.interrupt.where, told)
            assert told[-1][1] is None, (pair.interrupt.where, told)
            pair.check()
        pair.end()


@pytest.mark.fault(19, 20)
@pytest.mark.parametrize("staged", [True, False])
def test_what_fails_after_the_commit_leaves_the_new_version_over_the_new_weights(staged):
    live = {"w": torch.zeros(4)}
    sent = {"w": torch.ones(4)}
    with sessions(1) as (session, (end,)):
        target = TensorTarget(live)
        receiver = WeightReceiver(StagedTarget(target) if staged else target, end)
        sender = FullWeightSender(sent, session, verify=True)
        assert Round(sender.sync, [receiver]).sent.version == 0
        sent["w"].fill_(9.0)

        def fail(*arguments):
            raise MemoryError("no memory to count")

        receiver._following._changes.count = fail
        outcome = Round(sender.sync, [receiver])
        assert outcome.sent.version == 1
        assert isinstance(outcome.received[0], MemoryError)
        status = receiver.status()
        assert (status.version, status.ready, live["w"].tolist()) == (1, True, [9.0] * 4)


@pytest.mark.fault(19, 20)
def test_what_fails_while_the_commit_copies_is_torn_and_the_sender_hears_of_it():
    live, sent = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    with sessions(1) as (session, (end,)):
        target = StagedTarget(TensorTarget(live))
        receiver = WeightReceiver(target, end)
        sender = FullWeightSender(sent, session, verify=True)
        assert Round(sender.sync, [receiver]).sent.version == 0
        commit = target.commit

        def fail(manifest):
            target.commit = commit
            raise ZeroDivisionError("half-way")

        target.commit = fail
        begin = time.monotonic()
        assert "half-way" in str(Round(sender.sync, [receiver]).sent)
        assert time.monotonic() - begin < SOON_S
        assert (receiver.status().state, receiver.status().version) == ("torn", None)
        sent["w"].fill_(2.0)
        assert Round(sender.sync, [receiver]).sent.version == 2
        assert receiver.status().version == 2


def test_whoever_comes_when_the_sender_is_interrupted_is_taken_in(monkeypatch):
    with sessions(1) as (session, _):
        take_in, interrupted = session._take_in, []

        def interrupt(peer, hello):
            # The supervisor may be the one that looks; it goes on.
            if threading.current_thread() is threading.main_thread() and not interrupted:
                interrupted.append(peer)
                raise KeyboardInterrupt
            take_in(peer, hello)

        monkeypatch.setattr(session, "_take_in", interrupt)
        came = []
        thread = threading.Thread(
            target=lambda: came.append(Session.connect(session.address, settings=QUICK))
        )
        thread.start()
        deadline = time.monotonic() + 5
        while not came and time.monotonic() < deadline:
            with contextlib.suppress(KeyboardInterrupt):
                session._pump(0.05)
        thread.join()
        assert len(session.members) == 2
        came[0].close()


class _Losing:
    """A socket whose `recv` is interrupted like pyzmq's own: what it had taken is lost."""

    def __init__(self, socket, expected):
        self._socket = socket
        self._expected = expected
        self.lost = None

    def __getattr__(self, name):
        return getattr(self._socket, name)

    def __eq__(self, other):
        # What a poller finds.
        return other is self._socket

    __hash__ = None

    def recv(self, *arguments, **options):
        taken = self._socket.recv(*arguments, **options)
        said = bytes(taken.buffer) if isinstance(taken, zmq.Frame) else taken
        if self.lost is None and self._expected in said:
            self.lost = said
            raise KeyboardInterrupt
        return taken


@pytest.mark.fault(20)
def test_a_receiver_interrupted_between_any_two_instructions_loses_no_message():
    functions = {"_take", "_read", "_first", "_drop_first", "wait", "poll"}
    settings = replace(QUICK, heartbeat_interval_s=10.0)
    live, sent = {"w": torch.zeros(4)}, {"w": torch.zeros(4)}
    with sessions(1, settings) as (session, (end,)):
        # Nobody but the thread that is interrupted takes what comes.
        end._supervisor.stop(5)
        receiver = WeightReceiver(TensorTarget(live), end)
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, [receiver]).sent.version == 0
        interrupt = Interrupt((), 0)
        spent, lasts = [], True

        def receive():
            while lasts:
                interrupt.run(lambda: receiver.receive(0.05))

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        for number in range(1, 80):
            interrupt = Interrupt((base, receiver_session, receiver_channel), number, functions)
            begin = time.monotonic()
            with contextlib.suppress(PackedCommError):
                sender.sync()
            spent.append((time.monotonic() - begin, interrupt.where))
        lasts = False
        thread.join()
        assert max(spent, key=itemgetter(0))[0] < SOON_S, max(spent, key=itemgetter(0))


@pytest.mark.fault(20)
def test_a_message_lost_to_an_interrupt_inside_pyzmq_is_missed_within_a_beat():
    settings = replace(QUICK, heartbeat_interval_s=0.2)
    sent = {"w": torch.ones(4)}
    with sessions(1, settings) as (session, (end,)):
        end._supervisor.stop(5)
        receiver = WeightReceiver(TensorTarget({"w": torch.zeros(4)}), end)
        sender = FullWeightSender(sent, session)
        assert Round(sender.sync, [receiver]).sent.version == 0
        end._channel._socket = losing = _Losing(end._channel._socket, b"Offer")
        raised, lasts = [], True

        def receive():
            while lasts:
                try:
                    receiver.receive(0.05)
                except (PackedCommError, KeyboardInterrupt) as error:
                    raised.append(error)

        thread = threading.Thread(target=receive, daemon=True)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(RemoteError, match="receiver rank 1: interrupted while it took"):
            sender.sync()
        assert losing.lost is not None
        assert time.monotonic() - begin < SOON_S
        assert sender.sync().version is not None
        lasts = False
        thread.join()
        assert {type(error) for error in raised} <= {KeyboardInterrupt, DeadlineExceeded}


@pytest.mark.fault(21)
def test_a_receiver_says_again_what_the_sender_lost_to_an_interrupt():
    settings = replace(QUICK, heartbeat_interval_s=0.2)
    with sessions(1, settings) as (session, _):
        session._supervisor.stop(5)
        losing = session._channel._socket = _Losing(session._channel._socket, b"Hello")
        came = []
        thread = threading.Thread(
            target=lambda: came.append(Session.connect(session.address, settings=settings))
        )
        thread.start()
        deadline = time.monotonic() + 5
        while not came and time.monotonic() < deadline:
            with contextlib.suppress(KeyboardInterrupt):
                session._pump(0.05)
        thread.join()
        assert losing.lost is not None
        assert len(session.members) == 2
        came[0].close()


@pytest.mark.parametrize("where", ["_cause", "settle"])
def test_a_receiver_interrupted_while_it_clears_up_takes_part_in_the_next_sync(where):
    with sessions(1) as (session, (end,)):
        calls = []

        def take(version, items):
            calls.append(version)
            if version == 1:
                raise ValueError("not this one")

        sender = FullWeightSender({"w": torch.ones(1000)}, session)
        receiver = WeightReceiver(take, end)
        assert Round(sender.sync, [receiver]).received[0].version == 0
        owner = receiver._following if where == "_cause" else receiver._following.decisions
        original = getattr(owner, where)

        def interrupted(*_):
            setattr(owner, where, original)
            raise KeyboardInterrupt

        setattr(owner, where, interrupted)
        raised = []

        def receive():
            for _ in range(4):
                try:
                    if receiver.receive(20).version == 2:
                        return
                except BaseException as error:  # noqa: BLE001 - it is what the test looks at
                    raised.append((type(error), end.state))

        thread = threading.Thread(target=receive)
        thread.start()
        begin = time.monotonic()
        with pytest.raises(PackedCommError):
            sender.sync(1)
        assert sender.sync(2).version == 2
        assert time.monotonic() - begin < SOON_S
        thread.join(20)
        assert not thread.is_alive()
        assert raised[0] == (KeyboardInterrupt, SyncState.MOVING)
        assert calls == [0, 1, 2]


def receive_until(receiver, version, received):
    """Versions, and classes of errors, up to a version or the third error."""
    while version not in received and len(received) < 3:
        try:
            received.append(receiver.receive(20).version)
        except PackedCommError as error:
            received.append(type(error))


@pytest.mark.parametrize(
    ("stage", "state"), [("verify", SyncState.MOVING), ("move", SyncState.AGREED)]
)
def test_a_sender_interrupted_while_it_clears_up_goes_on_with_the_next_sync(stage, state):
    with sessions(1) as (session, (end,)):
        live = {"w": torch.zeros(1000)}
        sender = FullWeightSender({"w": torch.ones(1000)}, session)
        receiver = WeightReceiver(TensorTarget(live), end)
        assert Round(sender.sync, [receiver]).received[0].version == 0
        other = FullWeightSender({"w": torch.full((1000,), 2.0)}, session)
        fail_sync = session.fail_sync

        def interrupted(*_, **__):
            session.fail_sync = fail_sync
            raise KeyboardInterrupt

        def fail(*_):
            delattr(sender._leading, stage)
            raise ValueError("in the middle")

        setattr(sender._leading, stage, fail)
        session.fail_sync = interrupted
        received = []

        thread = threading.Thread(target=receive_until, args=(receiver, 5, received))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            sender.sync(1)
        assert session.state is state
        # Another sender of the session finds it so.
        assert other.sync(5).version == 5
        thread.join(20)
        assert received == [RemoteError, 5]
        assert live["w"].eq(2).all()


def test_an_agreement_of_which_nobody_was_told_the_end_is_ended_by_the_next_sync():
    with sessions(1) as (session, (end,)):
        live = {"w": torch.zeros(1000)}
        sender = FullWeightSender({"w": torch.ones(1000)}, session)
        receiver = WeightReceiver(TensorTarget(live), end)
        assert Round(sender.sync, [receiver]).received[0].version == 0
        fail_sync, remember = session.fail_sync, sender._leading._remember

        def interrupted(*_, **__):
            session.fail_sync = fail_sync
            raise KeyboardInterrupt

        def fail(*_):
            sender._leading._remember = remember
            raise ValueError("once all have agreed")

        sender._leading._remember = fail
        session.fail_sync = interrupted
        received = []

        thread = threading.Thread(target=receive_until, args=(receiver, 1, received))
        thread.start()
        with pytest.raises(KeyboardInterrupt):
            sender.sync(1)
        assert session.state is SyncState.COMMITTED
        begin = time.monotonic()
        assert sender.sync(1).version == 1
        assert time.monotonic() - begin < SOON_S
        thread.join(20)
        assert received == [RemoteError, 1]
