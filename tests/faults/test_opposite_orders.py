"""Two senders whose receivers have joined them in opposite orders: no cycle, in no case."""

from __future__ import annotations

import threading
import time
from dataclasses import replace

import pytest

from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver
from packedcomm.errors import DeadlineExceeded, PackedCommError
from tests.helpers.peers import PATIENT, SECRET, Outcome, Peer, checksum, failure, weights

SENDERS = 2
SMALL = {"count": 4, "elements": 1 << 16}


def _receive_from_both(connection, addresses, settings, background):
    """Receive from two senders, in the order of the addresses; or from both at once."""
    live = [weights(0.0, **SMALL) for _ in addresses]
    receivers = [
        WeightReceiver(
            TensorTarget(tensors),
            Session.connect(address, secret=SECRET, settings=settings, device="cpu"),
        )
        for tensors, address in zip(live, addresses, strict=True)
    ]
    connection.send(Outcome("joined"))
    if background:
        for receiver in receivers:
            receiver.start()
        while any(receiver.status().version is None for receiver in receivers):
            time.sleep(0.01)
        connection.send(Outcome("received", detail=[checksum(tensors) for tensors in live]))
        connection.recv()
    for receiver, tensors in zip(receivers, live, strict=True):
        try:
            result = receiver.receive()
        except PackedCommError as error:
            connection.send(failure(error, at=time.monotonic()))
        else:
            connection.send(Outcome("received", version=result.version, checksum=checksum(tensors)))
    connection.recv()


class _Both:
    """Two senders here, each in a thread, and two receivers that come in opposite orders."""

    def __init__(self, stack, settings, *, background):
        self.sessions = [
            stack.enter_context(
                Session.listen(
                    "127.0.0.1:0", receivers=2, secret=SECRET, settings=settings, device="cpu"
                )
            )
            for _ in range(SENDERS)
        ]
        self.sent = [weights(1.0, **SMALL), weights(2.0, **SMALL)]
        self.senders = [
            FullWeightSender(tensors, session)
            for tensors, session in zip(self.sent, self.sessions, strict=True)
        ]
        addresses = [session.address for session in self.sessions]
        self.peers = [
            Peer(_receive_from_both, order, settings, background)
            for order in (addresses, addresses[::-1])
        ]
        for peer in self.peers:
            stack.callback(peer.end)
        assert [peer.outcome().kind for peer in self.peers] == ["joined", "joined"]

    def sync(self):
        """Both senders at once; what each of them raised."""
        raised = [None] * SENDERS

        def one(index):
            try:
                self.senders[index].sync()
            except PackedCommError as error:
                raised[index] = error

        threads = [threading.Thread(target=one, args=(index,)) for index in range(SENDERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert not any(thread.is_alive() for thread in threads), "a sender hangs"
        return raised


@pytest.fixture
def stack():
    from contextlib import ExitStack

    with ExitStack() as stack:
        yield stack


@pytest.mark.fault(6)
def test_receivers_in_the_background_take_both_senders_in_any_order(stack):
    both = _Both(stack, PATIENT, background=True)
    assert both.sync() == [None, None]
    sums = [checksum(tensors) for tensors in both.sent]
    assert both.peers[0].outcome().detail == sums
    assert both.peers[1].outcome().detail == sums[::-1]


@pytest.mark.fault(6)
def test_receivers_that_take_turns_are_refused_by_name_before_their_deadline_and_no_cycle(stack):
    # Each receiver waits for the sender that the other one leaves waiting.
    settings = replace(PATIENT, agree_timeout_s=2.0)
    both = _Both(stack, settings, background=False)
    begin = time.monotonic()
    raised = both.sync()
    assert time.monotonic() - begin < 2.0 + 8
    late = [error for error in raised if isinstance(error, DeadlineExceeded)]
    assert late
    assert all("receiver rank" in str(error) for error in raised if error is not None)
    # The receivers have all come to an end as well.
    for peer in both.peers:
        first = peer.outcome()
        assert first.kind in ("failed", "received")
        if first.kind == "failed":
            assert first.error in ("DeadlineExceeded", "RemoteError", "PeerLost")
