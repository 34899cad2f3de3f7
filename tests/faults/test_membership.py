"""Receivers that come, go and restart; trainers that restart, or never came to an end."""

from __future__ import annotations

import signal

import pytest

from packedcomm import FullWeightSender, Session
from packedcomm.errors import PeerLost, RendezvousTimeout
from packedcomm.settings import Settings
from tests.helpers.peers import (
    PATIENT,
    SECRET,
    Peer,
    Receiving,
    checksum,
    eventually,
    receive_on,
    send_on,
    training,
    weights,
)


@pytest.mark.fault(21)
def test_a_late_receiver_holds_no_version_until_a_sync_and_the_others_go_on():
    with training(2) as group:
        late = group.add()
        # It has joined, and nothing is committed there until the next sync.
        new = group.sync(2.0)
        outcomes = [peer.outcome() for peer in group.peers]
        assert [outcome.checksum for outcome in outcomes] == [new] * 3
        assert [outcome.shown for outcome in outcomes] == [1, 1, 1]
        assert group.peers[2] is late


def _shows_nothing(receiver):
    status = receiver.status()
    assert (status.state, status.version) == ("idle", None)


@pytest.mark.fault(21)
def test_a_restarted_receiver_is_not_ready_until_it_holds_a_committed_version():
    with training(2) as group:
        old = group.peers[0]
        old.kill()
        assert old.exit_code == -signal.SIGKILL
        restarted = group.add(Receiving(prepare=_shows_nothing))
        new, told = group.sync_at_last(2.0)
        assert [type(error) for error in told] in ([PeerLost], [])
        assert restarted.received().checksum == new
        assert group.peers[1].received().checksum == new
        assert group.session.world_size == 3


@pytest.mark.fault(21)
def test_no_change_gives_a_late_receiver_no_version_that_it_does_not_hold():
    with training(1) as group:
        late = group.add()
        with pytest.raises(Exception, match="receivers have come or gone"):
            group.sender.no_change()
        new = group.sync(2.0)
        assert [peer.received().checksum for peer in group.peers] == [new, new]
        assert late is group.peers[1]


@pytest.mark.fault(21)
def test_one_receiver_comes_and_goes_often_and_the_other_has_every_version():
    with training(1) as group:
        steady = group.peers[0]
        for round_ in range(1, 5):
            guest = group.add()
            new, _ = group.sync_at_last(1.0 + round_)
            assert guest.received().checksum == steady.received().checksum == new
            group.peers.remove(guest)
            guest.end()


@pytest.mark.fault(22, 23)
def test_a_trainer_that_restarts_with_an_older_version_is_a_new_epoch_and_no_deadlock():
    first = Peer(send_on, 2)
    address, epoch = first.outcome().detail
    receivers = [Peer(receive_on, address, Receiving()) for _ in range(2)]
    processes = [first, *receivers]
    try:
        assert [peer.outcome().kind for peer in receivers] == ["joined", "joined"]
        first.tell("sync", 100, 1.0)
        old = first.outcome().checksum
        assert [(p.outcome().shown, old) for p in receivers] == [(100, old), (100, old)]
        first.kill()
        for peer in receivers:
            outcome = peer.outcome()
            assert (outcome.error, outcome.lasts) == ("PeerLost", False)
            # The weights are whole, so the version stays.
            assert (outcome.shown, outcome.checksum) == (100, old)
        # The same address again, although the old session was never closed.
        second = Peer(send_on, 2, None, PATIENT, address)
        processes.append(second)
        again, new_epoch = second.outcome().detail
        assert again == address
        assert new_epoch != epoch
        for peer in receivers:
            peer.tell("reconnect", address)
            outcome = peer.outcome()
            assert (outcome.kind, outcome.version, outcome.shown) == ("reconnected", None, 100)
        second.tell("sync", 7, 2.0)
        new = second.outcome().checksum
        for peer in receivers:
            outcome = peer.outcome()
            assert (outcome.version, outcome.shown, outcome.checksum) == (7, 7, new)
    finally:
        for process in processes:
            process.end()


@pytest.mark.fault(23)
def test_a_receiver_that_never_heard_its_sender_die_ends_the_old_session_by_connecting():
    dead = Peer(send_on, 1)
    address, _ = dead.outcome().detail
    sent = weights(3.0)
    with Session.connect(address, secret=SECRET, settings=PATIENT, device="cpu") as left_open:
        dead.kill()
        dead.end()
        with Session.listen(
            "127.0.0.1:0", receivers=1, secret=SECRET, settings=PATIENT, device="cpu"
        ) as session:
            peer = Peer(receive_on, session.address, Receiving())
            try:
                assert peer.outcome().kind == "joined"
                FullWeightSender(sent, session).sync(1)
                assert peer.outcome().checksum == checksum(sent)
            finally:
                peer.end()
        with pytest.raises(PeerLost, match="has ended the connection"):
            left_open.receive(20)


@pytest.mark.fault(1, 27)
def test_a_receiver_that_never_comes_is_counted_and_the_port_is_free_again():
    settings = Settings(connect_timeout_s=1.5)
    with Session.listen(
        "127.0.0.1:0", receivers=2, secret=SECRET, settings=settings, device="cpu"
    ) as session:
        address = session.address
        peer = Peer(receive_on, address, Receiving())
        try:
            assert peer.outcome().kind == "joined"
            with pytest.raises(RendezvousTimeout, match="1 of 2 receivers came"):
                FullWeightSender(weights(1.0), session).sync()
            outcome = peer.outcome()
            assert outcome.error in ("RemoteError", "PeerLost")
            assert "1 of 2 receivers came" in outcome.text
        finally:
            peer.end()
    with Session.listen(address, receivers=1, secret=SECRET, device="cpu") as again:
        assert again.address == address


@pytest.mark.fault(1, 21)
def test_one_that_died_before_the_first_sync_is_replaced_without_anybody_missing_it():
    with Session.listen(
        "127.0.0.1:0", receivers=2, secret=SECRET, settings=PATIENT, device="cpu"
    ) as session:
        sent = weights(1.0)
        peers = [Peer(receive_on, session.address, Receiving()) for _ in range(2)]
        try:
            assert [peer.outcome().kind for peer in peers] == ["joined", "joined"]
            peers[0].kill()
            assert peers[0].exit_code == -signal.SIGKILL
            eventually(lambda: len(session.members.present) == 1)
            peers.append(Peer(receive_on, session.address, Receiving()))
            FullWeightSender(sent, session).sync()
            assert peers[2].outcome().kind == "joined"
            assert [peer.outcome().checksum for peer in peers[1:]] == [checksum(sent)] * 2
            assert session.world_size == 3
        finally:
            for peer in peers:
                peer.end()
