"""Processes that are stopped, not dead: reported as late, left behind, and told so on waking."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from dataclasses import replace

import pytest

from packedcomm.errors import DeadlineExceeded, PeerLost
from tests.helpers.peers import (
    PATIENT,
    Peer,
    Receiving,
    checksum,
    in_place,
    receive_on,
    send_on,
    staged,
    training,
    weights,
)

# The silence after which a process counts as stopped.
SILENCE_S = 3.0
QUICK = replace(PATIENT, heartbeat_interval_s=0.5, heartbeat_timeout_s=SILENCE_S)

OLD = checksum(weights(1.0))


@pytest.mark.fault(3)
@pytest.mark.parametrize("target", [staged, in_place])
def test_a_stopped_receiver_is_late_not_dead_and_the_others_go_on_without_it(target):
    with training(3, Receiving(target, settings=QUICK), settings=QUICK) as group:
        stopped = group.peers[1]
        others = [peer for peer in group.peers if peer is not stopped]
        group.source.when(12, stopped.stop)
        with pytest.raises(DeadlineExceeded, match=f"receiver rank {stopped.rank}: ") as caught:
            group.sync(2.0)
        assert time.monotonic() - group.source.acted_at < SILENCE_S + 4
        assert not isinstance(caught.value, PeerLost)
        assert "stopped or hangs" in str(caught.value)
        assert "in chunk" in str(caught.value)
        for peer in others:
            outcome = peer.outcome()
            assert outcome.error == "DeadlineExceeded"
            assert f"receiver rank {stopped.rank}: " in outcome.text
            if target is staged:
                assert (outcome.shown, outcome.checksum) == (0, OLD)
        new = group.sync(3.0)
        assert [peer.outcome().checksum for peer in others] == [new, new]
        # It wakes up, and learns that it is no member any more.
        stopped.wake()
        outcome = stopped.outcome()
        assert outcome.error in ("PeerLost", "DeadlineExceeded")
        while outcome.lasts:
            outcome = stopped.outcome()
        assert outcome.error in ("PeerLost", "RemoteError")
        assert "it goes on without this receiver" in outcome.text
        assert outcome.shown == (0 if target is staged else None)
        # It may come again.
        stopped.tell("reconnect", group.session.address)
        assert stopped.outcome().kind == "reconnected"
        newest = group.sync(4.0)
        assert [peer.outcome().checksum for peer in group.peers] == [newest] * 3


@pytest.mark.fault(3)
def test_a_receiver_that_is_stopped_for_less_than_its_deadline_delays_and_nothing_else():
    with training(2, Receiving(settings=QUICK), settings=QUICK) as group:
        slow = group.peers[0]

        def pause():
            slow.stop()
            time.sleep(0.5)
            slow.wake()

        group.source.when(12, pause)
        new = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [new, new]


@pytest.mark.fault(3)
def test_a_slow_receiver_that_is_well_is_named_at_the_deadline_of_the_data():
    settings = replace(PATIENT, move_timeout_s=2.0)
    with training(2, settings=settings) as group:
        slow = group.add(Receiving(_never_done, settings=settings))
        begin = time.monotonic()
        with pytest.raises(DeadlineExceeded, match="receiver rank 3") as caught:
            group.sync(2.0)
        assert time.monotonic() - begin < 2.0 + 6
        assert "moving for more than" in str(caught.value) or "no answer" in str(caught.value)
        for peer in group.peers[:2]:
            outcome = peer.outcome()
            assert outcome.error == "DeadlineExceeded"
            assert (outcome.shown, outcome.checksum) == (0, OLD)
        slow.kill()
        new, told = group.sync_at_last(3.0)
        assert [type(error) for error in told] == [PeerLost]
        assert [peer.received().checksum for peer in group.peers[:2]] == [new, new]


def _never_done(tensors):
    def on_weights(version, items):
        time.sleep(3600)

    return on_weights


@pytest.mark.fault(3)
def test_a_stopped_sender_is_late_not_dead_and_goes_on_when_it_wakes():
    sender = Peer(send_on, 2, None, QUICK)
    address, _ = sender.outcome().detail
    receivers = [Peer(receive_on, address, Receiving(settings=QUICK)) for _ in range(2)]
    processes = [sender, *receivers]
    try:
        assert [peer.outcome().kind for peer in receivers] == ["joined", "joined"]
        sender.tell("sync", 0, 0.0)
        old = sender.outcome().checksum
        assert [peer.outcome().checksum for peer in receivers] == [old, old]
        sender.stop()
        begin = time.monotonic()
        for peer in receivers:
            outcome = peer.outcome()
            assert outcome.error == "DeadlineExceeded"
            assert "the sender" in outcome.text
            assert "stopped or hangs" in outcome.text
            assert outcome.at - begin < SILENCE_S + 4
            assert outcome.shown == 0
        # It wakes up, and all is well again.
        sender.wake()
        sender.tell("sync", 1, 5.0)
        new = sender.outcome().checksum
        for peer in receivers:
            outcome = peer.received()
            assert (outcome.version, outcome.checksum) == (1, new)
    finally:
        for process in processes:
            process.end()


@contextlib.contextmanager
def _sender_and_two_receivers(prepare=None):
    """Processes that have all received version 0; stopped ones are ended too."""
    sender = Peer(send_on, 2, prepare, QUICK)
    processes = [sender]
    try:
        address, _ = sender.outcome().detail
        receivers = [Peer(receive_on, address, Receiving(settings=QUICK)) for _ in range(2)]
        processes += receivers
        assert [peer.outcome().kind for peer in receivers] == ["joined", "joined"]
        sender.tell("sync", 0, 0.0)
        old = sender.outcome().checksum
        assert [peer.outcome().checksum for peer in receivers] == [old, old]
        yield sender, receivers
    finally:
        for process in processes:
            process.end()


# As long as nobody runs: longer than the silence after which a peer counts as stopped.
ASLEEP_S = SILENCE_S + 0.7

# From there on until the others run too.
LATER_S = 0.7


def _sleep(first, others):
    """Let no process run for a while, as on a machine that is suspended; then the first ones wake
    up, and have heard nothing of the others yet."""
    for peer in (*first, *others):
        peer.stop()
    time.sleep(ASLEEP_S)
    for peer in first:
        peer.wake()
    time.sleep(LATER_S)
    for peer in others:
        peer.wake()


@pytest.mark.fault(3)
def test_receivers_that_were_asleep_give_the_sender_that_time_before_they_call_it_silent():
    with _sender_and_two_receivers() as (sender, receivers):
        _sleep(receivers, [sender])
        sender.tell("sync", 1, 5.0)
        new = sender.outcome()
        assert (new.kind, new.version) == ("sent", 1)
        outcomes = [peer.outcome() for peer in receivers]
        assert [(o.kind, o.text, o.checksum) for o in outcomes] == [
            ("received", "", new.checksum)
        ] * 2


@pytest.mark.fault(3)
def test_a_sender_that_was_asleep_while_it_waited_gives_receivers_that_time_too():
    with _sender_and_two_receivers() as (sender, receivers):
        for peer in receivers:
            peer.stop()
        sender.tell("sync", 1, 5.0)
        time.sleep(0.3)  # it has asked them, and waits
        _sleep([sender], receivers)
        new = sender.outcome()
        assert (new.kind, new.version, new.text) == ("sent", 1, "")
        assert [peer.outcome().checksum for peer in receivers] == [new.checksum] * 2


def _stops_in_the_data(sender):
    sender.source.when(12, lambda: os.kill(os.getpid(), signal.SIGSTOP))


@pytest.mark.fault(3)
@pytest.mark.parametrize("first", ["sender", "receivers"])
def test_all_that_were_asleep_in_the_data_go_on_with_the_same_sync(first):
    with _sender_and_two_receivers(_stops_in_the_data) as (sender, receivers):
        sender.tell("sync", 1, 5.0)
        sender.await_stop()
        if first == "sender":
            _sleep([sender], receivers)
        else:
            _sleep(receivers, [sender])
        new = sender.outcome()
        assert (new.kind, new.version, new.text) == ("sent", 1, "")
        assert [peer.outcome().checksum for peer in receivers] == [new.checksum] * 2
