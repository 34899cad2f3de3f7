"""How the Gloo communicator fails: lost, stopped and missing peers, deadlines, aborts."""

from __future__ import annotations

import gc
import os
import re
import signal
import threading
import time

import psutil
import pytest
import torch

from packedcomm import GlooCommunicator
from packedcomm.errors import (
    DeadlineExceeded,
    PeerLost,
    RendezvousTimeout,
    SessionStateError,
)
from tests.helpers.operations import connect_gloo as connect
from tests.helpers.operations import raised
from tests.helpers.ranks import AddressBox, run_ranks


def _connect_without_the_last(rank, world_size, box):
    endpoint = box.endpoint(rank)
    if rank == world_size - 1:
        return None
    return raised(lambda: GlooCommunicator.connect(endpoint, rank, world_size, timeout_s=1.0))


@pytest.mark.fault(1)
def test_a_peer_that_never_comes_is_named():
    for kind, message, seconds in run_ranks(_connect_without_the_last, 3, AddressBox(3))[:2]:
        assert kind is RendezvousTimeout
        assert "ranks [2] are missing" in message
        assert seconds < 2.5


def _killed(rank, world_size, box, operation):
    with connect(box, rank, world_size) as communicator:
        communicator.all_reduce(torch.zeros(1))
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        # Larger than what fits into the sockets on the way.
        tensor = torch.zeros(30_000_000)
        if operation == "recv" and rank == 0:
            first = raised(lambda: communicator.recv(tensor, world_size - 1))
        elif operation == "recv":
            first = raised(lambda: communicator.recv(tensor, 0))
        elif operation == "broadcast":
            # A rank that owes the dead one nothing is done with the first one.
            first = raised(lambda: [communicator.broadcast(tensor, 0) for _ in range(3)])
        else:
            first = raised(lambda: communicator.all_reduce(tensor))
        second = raised(lambda: communicator.broadcast(tensor, 0))
    return first, second, repr(communicator)


@pytest.mark.fault(2)
@pytest.mark.parametrize("operation", ["broadcast", "recv", "all_reduce"])
def test_a_killed_peer_is_lost_on_every_other_rank(operation):
    results = run_ranks(_killed, 3, AddressBox(3), operation, lost=(2,))
    for first, second, text in results[:2]:
        kind, message, seconds = first
        assert kind is PeerLost
        assert operation in message
        assert seconds < 10
        assert second[0] is SessionStateError
        assert "PeerLost" in second[1]
        assert "PeerLost" in text
    assert re.search(r"ranks \[(1, )?2\]", results[0][0][1])


def _stopped(rank, world_size, box):
    with connect(box, rank, world_size, operation_timeout_s=1.0) as communicator:
        communicator.all_reduce(torch.zeros(1))
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        tensor = torch.zeros(30_000_000)
        return raised(lambda: communicator.broadcast(tensor, world_size - 1))


@pytest.mark.fault(3)
def test_a_stopped_peer_is_a_deadline_that_names_it():
    (kind, message, seconds), _ = run_ranks(_stopped, 2, AddressBox(2), lost=(1,))
    assert kind is DeadlineExceeded
    assert "broadcast from rank 1 on rank 0 of 2" in message
    assert "waiting for rank 1" in message
    assert 0.9 < seconds < 2.5


def _aborted(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        tensor = torch.zeros(1000)
        if rank == 0:
            threading.Timer(0.3, communicator.abort, ["enough"]).start()
            first = raised(lambda: communicator.recv(tensor, 1))
            communicator.abort("a second reason")
            return first, raised(lambda: communicator.send(tensor, 1))
        return raised(lambda: communicator.recv(tensor, 0)), None


def test_an_abort_from_another_thread_ends_both_sides_at_once():
    ours, theirs = run_ranks(_aborted, 2, AddressBox(2))
    for kind, message, seconds in ours:
        assert kind is SessionStateError
        assert "enough" in message
        assert seconds < 2
    kind, message, seconds = theirs[0]
    assert kind is PeerLost
    assert "ranks [0]" in message
    assert seconds < 2


def _abandoned(rank, world_size, box):
    process = psutil.Process()
    before = process.num_threads(), process.num_fds()
    communicator = connect(box, rank, world_size, operation_timeout_s=0.3)
    kind = None
    if rank == 0:
        kind, _, _ = raised(lambda: communicator.all_reduce(torch.zeros(1000)))
        gc.collect()
    else:
        time.sleep(1.0)
    communicator.close()
    end = time.monotonic() + 5
    while (process.num_threads(), process.num_fds()) > before and time.monotonic() < end:
        time.sleep(0.05)
    return kind, process.num_threads() <= before[0], process.num_fds() <= before[1]


def test_an_operation_that_was_given_up_leaves_nothing_behind():
    results = run_ranks(_abandoned, 2, AddressBox(2))
    assert results == [(DeadlineExceeded, True, True), (None, True, True)]
