"""What the Gloo communicator's thread does with failed batches, over a group that is told how."""

from __future__ import annotations

import gc
import threading
import time
import weakref

import pytest
import torch

from packedcomm import GlooCommunicator, Settings
from packedcomm.communicators.gloo_transfers import Transfer, TransferThread
from packedcomm.errors import PeerLost

TIMEOUT_S = 10.0


class _Work:
    def __init__(self):
        self.waited_for = threading.Event()
        self.ended = threading.Event()
        self.error = None

    def wait(self, timeout):
        self.waited_for.set()
        assert self.ended.wait(TIMEOUT_S)
        if self.error is not None:
            raise self.error


class _Group:
    """Receives by rank; keeps no tensors."""

    def __init__(self):
        self.works = {1: _Work(), 2: _Work()}
        self.posted = []

    def recv(self, tensors, rank, tag):
        self.posted.append(rank)
        return self.works[rank]


class _Sockets:
    """Rank 1 hangs up; its last bytes arrive late, as the loss is about to be reported."""

    def __init__(self, group, late):
        self.group, self.late = group, late
        self.looks = 0

    def closed_ranks(self):
        self.looks += 1
        if self.looks == 2 and self.late:
            self.group.works[1].ended.set()
            time.sleep(0.3)
        return [1]

    def cut(self):
        for work in self.group.works.values():
            work.ended.set()


def _receive(rank):
    return Transfer(f"recv from rank {rank}", torch.zeros(1000), receive_from=rank)


def test_tensors_outlive_what_gloo_may_still_write_into_them():
    group = _Group()
    thread = TransferThread(group, 30.0)
    transfers = [_receive(1), _receive(2)]
    alive = [weakref.ref(transfer.tensor) for transfer in transfers]
    batch = thread.start(transfers)
    group.works[1].error = RuntimeError("connection closed")
    group.works[1].ended.set()
    assert batch.wait(TIMEOUT_S)
    assert str(batch.error) == "connection closed"
    del transfers, batch
    assert group.works[2].waited_for.wait(1.0), "the second receive is not waited for"
    gc.collect()
    assert alive[1]() is not None
    group.works[2].ended.set()
    thread.stop(TIMEOUT_S)
    gc.collect()
    assert [reference() for reference in alive] == [None, None]


def test_nothing_is_started_after_a_failed_batch():
    group = _Group()
    thread = TransferThread(group, 30.0)
    first, second = thread.start([_receive(1)]), thread.start([_receive(2)])
    group.works[1].error = RuntimeError("connection closed")
    for work in group.works.values():
        work.ended.set()
    assert second.wait(TIMEOUT_S)
    thread.stop(TIMEOUT_S)
    assert second.error is first.error is not None
    assert group.posted == [1]


@pytest.mark.parametrize("late", [True, False])
def test_what_is_done_is_not_reported_as_lost(late):
    group = _Group()
    communicator = GlooCommunicator(group, _Sockets(group, late), 0, 2, Settings())
    with communicator:
        if late:
            communicator.recv(torch.zeros(4), 1)
        else:
            with pytest.raises(PeerLost):
                communicator.recv(torch.zeros(4), 1)


@pytest.mark.parametrize("close", [True, False])
def test_a_forgotten_communicator_warns_and_lets_go_of_its_group(close, recwarn):
    group = _Group()
    communicator = GlooCommunicator(group, _Sockets(group, late=False), 0, 2, Settings())
    released = weakref.ref(group)
    if close:
        communicator.close()
    else:
        thread = communicator._thread._thread
    del group, communicator
    gc.collect()
    if not close:
        thread.join(TIMEOUT_S)
        assert not thread.is_alive()
    warned = [str(w.message) for w in recwarn if w.category is ResourceWarning]
    expected = [] if close else ["GlooCommunicator(rank=0, world_size=2) was never closed"]
    assert warned == expected
    # The recorded warning has the communicator itself.
    recwarn.clear()
    gc.collect()
    assert released() is None
