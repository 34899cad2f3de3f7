"""Between the votes and the decision: a version is shown only where it was decided."""

from __future__ import annotations

import contextlib
import signal

import pytest

from packedcomm.errors import PeerLost
from packedcomm.session.messages import Commit, Staged
from tests.faults.test_lost_peers import end_now
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
from tests.helpers.proxies import Proxy, cut_connections

OLD = checksum(weights(1.0))


def _dies_before_it_decides(sender):
    tell = sender._session.tell
    sender._session.tell = lambda m: end_now() if isinstance(m, Commit) else tell(m)


def _dies_when_one_has_committed(sender):
    channel = sender._session._channel
    committed = []
    send = channel.send
    tell = sender._session.tell

    def send_to_one(peer, frame):
        if committed and peer != committed[0]:
            return True
        committed[:] = [peer]
        return send(peer, frame)

    def telling(message):
        if not isinstance(message, Commit):
            return tell(message)
        channel.send = send_to_one
        tell(message)
        members = sender._session.members
        while all(str(member.state) != "committed" or member.waits_for for member in members):
            if any(member.inbox for member in members):
                end_now()
            sender._session._pump(0.05)
        return end_now()

    sender._session.tell = telling


@contextlib.contextmanager
def _sender_that_dies(how, target):
    """Two receivers that hold version 0, and have voted for version 1 when the sender is killed."""
    sender = Peer(send_on, 2, how)
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
        yield receivers, old, processes
    finally:
        for process in processes:
            process.end()


@pytest.mark.fault(20, 22)
@pytest.mark.parametrize("target", [staged, in_place])
def test_votes_without_a_decision_are_no_version(target):
    with _sender_that_dies(_dies_before_it_decides, target) as (receivers, old, processes):
        for peer in receivers:
            outcome = peer.outcome()
            assert (outcome.error, outcome.lasts) == ("PeerLost", False)
            if target is staged:
                assert (outcome.shown, outcome.checksum) == (0, old)
            else:
                assert (outcome.shown, outcome.state) == (None, "torn")
        # The trainer comes again, in another epoch: it can't know, so nobody commits late.
        processes.append(Peer(send_on, 2))
        address, _ = processes[-1].outcome().detail
        for peer in receivers:
            peer.tell("reconnect", address)
            outcome = peer.outcome()
            assert (outcome.kind, outcome.version) == ("reconnected", None)
            assert outcome.shown == (0 if target is staged else None)
        processes[-1].tell("sync", 1, 7.0)
        new = processes[-1].outcome().checksum
        for peer in receivers:
            outcome = peer.outcome()
            assert (outcome.shown, outcome.state, outcome.checksum) == (1, "committed", new)


@pytest.mark.fault(20)
def test_where_the_decision_reached_one_only_that_one_shows_it():
    with _sender_that_dies(_dies_when_one_has_committed, staged) as (receivers, old, _):
        outcomes = [peer.outcome() for peer in receivers]
        new = checksum(weights(5.0))
        shown = sorted((outcome.shown, outcome.checksum) for outcome in outcomes)
        assert shown == [(0, old), (1, new)]


class _Cut:
    """A session whose last receiver comes through a proxy, which is cut at a moment of a sync."""

    def __init__(self, group, how):
        self.group = group
        self.proxy = Proxy(group.session.address)
        self.peer = group.add(how, self.proxy.address)

    def when_told(self, kind):
        """Cut the connection when the sender is about to say this."""
        session = self.group.session
        tell = session.tell

        def telling(message):
            if isinstance(message, kind):
                session.tell = tell
                self.proxy.cut()
            tell(message)

        session.tell = telling


@pytest.mark.fault(20)
@pytest.mark.parametrize("target", [staged, in_place])
def test_a_receiver_cut_off_after_its_vote_learns_the_decision_when_it_comes_again(target):
    with training(1, Receiving(target)) as group:
        cut = _Cut(group, Receiving(target))
        first = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        cut.when_told(Commit)
        with pytest.raises(PeerLost, match="receiver rank 2: "):
            group.sync(3.0)
        decided = checksum(group.sent)
        assert group.peers[0].outcome().checksum == decided
        lost = cut.peer.outcome()
        assert (lost.error, lost.lasts) == ("PeerLost", False)
        if target is staged:
            assert (lost.shown, lost.checksum) == (1, first)
        else:
            assert (lost.shown, lost.state) == (None, "torn")
        cut.peer.tell("reconnect", group.session.address)
        again = cut.peer.outcome()
        assert (again.kind, again.version, again.shown) == ("reconnected", 2, 2)
        assert (again.checksum, again.state) == (decided, "committed")
        newest = group.sync(4.0)
        assert [peer.outcome().checksum for peer in group.peers] == [newest, newest]


def _cut_after_its_vote(receiver):
    """The sender never gets the second vote of this receiver, whose connection ends there."""
    reply = receiver.session.reply
    votes = []

    def replying(message):
        if isinstance(message, Staged):
            votes.append(message)
            if len(votes) == 2:
                cut_connections(receiver.session.address)
                return
        reply(message)

    receiver.session.reply = replying


@pytest.mark.fault(20)
def test_a_receiver_whose_vote_never_came_keeps_the_old_weights_when_it_comes_again():
    with training(1) as group:
        cut = group.add(Receiving(prepare=_cut_after_its_vote))
        first = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        with pytest.raises(PeerLost, match="receiver rank 2: "):
            group.sync(3.0)
        assert group.sender.version == 1
        for peer in group.peers:
            outcome = peer.outcome()
            assert outcome.error == "PeerLost"
            assert (outcome.shown, outcome.checksum) == (1, first)
        cut.tell("reconnect", group.session.address)
        again = cut.outcome()
        assert (again.kind, again.version, again.shown) == ("reconnected", None, 1)
        assert again.checksum == first
        newest = group.sync(4.0)
        assert [peer.outcome().checksum for peer in group.peers] == [newest, newest]


@pytest.mark.fault(20, 22)
@pytest.mark.parametrize("target", [staged, in_place])
def test_a_vote_that_was_never_decided_stays_so_when_later_ones_were(target):
    with training(1, Receiving(target)) as group:
        cut = group.add(Receiving(target, _cut_after_its_vote))
        first = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        with pytest.raises(PeerLost, match="receiver rank 2: "):
            group.sync(3.0)
        assert group.peers[0].outcome().error == "PeerLost"
        # The trainer goes on: the same version, other weights.
        later = group.sync(4.0)
        outcome = group.peers[0].outcome()
        assert (outcome.shown, outcome.checksum) == (2, later)
        assert cut.outcome().error == "PeerLost"
        cut.tell("reconnect", group.session.address)
        again = cut.outcome()
        assert (again.kind, again.version) == ("reconnected", None)
        if target is staged:
            assert (again.shown, again.checksum) == (1, first)
        else:
            assert (again.shown, again.state) == (None, "torn")
        newest = group.sync(5.0)
        assert [peer.outcome().checksum for peer in group.peers] == [newest, newest]
