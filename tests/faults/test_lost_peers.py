"""Processes that are killed: who learns of it, how soon, and what works afterwards."""

from __future__ import annotations

import os
import signal
import time
from functools import partial

import pytest

from packedcomm.communicators import GlooCommunicator
from packedcomm.errors import PeerLost
from packedcomm.session.messages import Staged
from tests.helpers.peers import (
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

# How soon every other rank must know that a process has been killed, with the default settings for
# heartbeats.
KNOWN_S = 2.0

OLD = checksum(weights(1.0))


def end_now() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.fault(2, 19)
@pytest.mark.parametrize("target", [staged, in_place])
@pytest.mark.parametrize("killed", [1, 2, 3])
def test_a_receiver_killed_in_the_data_is_named_with_its_chunk_and_the_others_go_on(killed, target):
    with training(3, Receiving(target)) as group:
        victim = next(peer for peer in group.peers if peer.rank == killed)
        survivors = [peer for peer in group.peers if peer is not victim]
        group.source.when(12, victim.kill)
        with pytest.raises(PeerLost, match=rf"receiver rank {killed}: .*, in chunk \d+"):
            group.sync(2.0)
        assert group.sender.version == 0
        for peer in survivors:
            outcome = peer.outcome()
            assert outcome.error == "PeerLost"
            assert f"receiver rank {killed}: " in outcome.text
            assert ", in chunk " in outcome.text
            assert outcome.at - group.source.acted_at < KNOWN_S
            if target is staged:
                assert (outcome.state, outcome.shown, outcome.checksum) == ("committed", 0, OLD)
            else:
                assert (outcome.state, outcome.shown) == ("torn", None)
            assert outcome.ready is (target is staged)
        # The next one works, and nobody has been restarted.
        new = group.sync(3.0)
        for peer in survivors:
            outcome = peer.outcome()
            assert (outcome.version, outcome.state, outcome.checksum) == (1, "committed", new)
            assert outcome.ready


@pytest.mark.fault(2)
def test_a_receiver_killed_when_all_is_on_its_way_is_known_as_soon():
    # All tensors are one chunk, which the sender has handed over by then; rank 1 passes it on.
    with training(3, wire_format="native") as group:
        ranks = {peer.rank: peer for peer in group.peers}
        group.source.when(23, ranks[3].kill)
        with pytest.raises(PeerLost, match=r"receiver rank 3: "):
            group.sync(2.0)
        for rank in (1, 2):
            outcome = ranks[rank].outcome()
            assert outcome.error == "PeerLost"
            assert "receiver rank 3: " in outcome.text
            assert outcome.at - group.source.acted_at < KNOWN_S
        new = group.sync(3.0)
        assert [ranks[rank].outcome().checksum for rank in (1, 2)] == [new, new]


@pytest.mark.fault(2, 20)
def test_of_two_that_are_killed_at_once_both_are_named_and_the_last_one_goes_on():
    with training(3) as group:
        *victims, survivor = group.peers
        group.source.when(12, lambda: [victim.kill() for victim in victims])
        new, told = group.sync_at_last(2.0)
        # The second may have been noticed after the first was told.
        assert 1 <= len(told) <= 2
        assert {type(error) for error in told} == {PeerLost}
        # Which has another rank by then.
        assert all(f"process {victim.pid} on " in str(told) for victim in victims)
        assert group.session.world_size == 2
        outcome = survivor.received()
        assert (outcome.version, outcome.checksum) == (1, new)


def _dies_before_its_vote(receiver):
    reply = receiver.session.reply
    votes = []

    def replying(message):
        if isinstance(message, Staged):
            votes.append(message)
            if len(votes) == 2:
                end_now()
        reply(message)

    receiver.session.reply = replying


@pytest.mark.fault(20)
@pytest.mark.parametrize("target", [staged, in_place])
def test_nobody_commits_where_one_was_killed_before_it_voted(target):
    with training(1, Receiving(target)) as group:
        victim = group.add(Receiving(target, _dies_before_its_vote))
        first = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        with pytest.raises(PeerLost, match="receiver rank 2: "):
            group.sync(3.0)
        assert group.sender.version == 1
        outcome = group.peers[0].outcome()
        assert outcome.error == "PeerLost"
        if target is staged:
            assert (outcome.shown, outcome.checksum) == (1, first)
        else:
            assert (outcome.shown, outcome.state) == (None, "torn")
        assert victim.exit_code == -signal.SIGKILL
        new = group.sync(4.0)
        assert group.peers[0].outcome().checksum == new


def _dies_while_it_connects(receiver):
    GlooCommunicator.connect = lambda *arguments, **options: end_now()


@pytest.mark.fault(1)
def test_one_that_dies_while_it_connects_is_named_and_the_others_go_on():
    with training(2) as group:
        healthy = list(group.peers)
        victim = group.add(Receiving(prepare=_dies_while_it_connects))
        with pytest.raises(PeerLost, match="receiver rank 3: "):
            group.sync(2.0)
        assert victim.exit_code == -signal.SIGKILL
        for peer in healthy:
            outcome = peer.outcome()
            # From the sender, or from the meeting that it has ended.
            assert outcome.error in ("PeerLost", "RemoteError")
            assert "rank 3" in outcome.text
            assert (outcome.shown, outcome.checksum) == (0, OLD)
        new = group.sync(3.0)
        assert [peer.outcome().checksum for peer in healthy] == [new, new]


def _dies_in_the_data(when, sender):
    def die():
        when.write_text(repr(time.monotonic()))
        end_now()

    sender.source.when(12, die)


@pytest.mark.fault(2, 19)
@pytest.mark.parametrize("target", [staged, in_place])
def test_a_sender_killed_in_the_data_is_known_soon_and_the_receivers_go_on_with_the_next_one(
    target, tmp_path
):
    when = tmp_path / "killed"
    sender = Peer(send_on, 2, partial(_dies_in_the_data, when))
    address, _ = sender.outcome().detail
    receivers = [Peer(receive_on, address, Receiving(target)) for _ in range(2)]
    processes = [sender, *receivers]
    try:
        assert [peer.outcome().kind for peer in receivers] == ["joined", "joined"]
        sender.tell("sync", 0, 0.0)
        old = sender.outcome().checksum
        assert [peer.outcome().checksum for peer in receivers] == [old, old]
        sender.tell("sync", 1, 5.0)
        assert sender.exit_code == -signal.SIGKILL
        killed_at = float(when.read_text())
        for peer in receivers:
            outcome = peer.outcome()
            assert (outcome.error, outcome.lasts) == ("PeerLost", False)
            assert "the sender" in outcome.text
            assert "in chunk" in outcome.text
            assert 0 < outcome.at - killed_at < KNOWN_S
            if target is staged:
                # Its session is over, its weights aren't.
                assert (outcome.shown, outcome.ready, outcome.checksum) == (0, True, old)
            else:
                assert (outcome.shown, outcome.ready, outcome.state) == (None, False, "torn")
        again = Peer(send_on, 2)
        processes.append(again)
        address, _ = again.outcome().detail
        for peer in receivers:
            peer.tell("reconnect", address)
            outcome = peer.outcome()
            assert (outcome.version, outcome.ready) == (None, target is staged)
        again.tell("sync", 0, 6.0)
        new = again.outcome().checksum
        for peer in receivers:
            outcome = peer.outcome()
            assert (outcome.version, outcome.shown, outcome.checksum) == (0, 0, new)
            assert outcome.ready
    finally:
        for process in processes:
            process.end()
