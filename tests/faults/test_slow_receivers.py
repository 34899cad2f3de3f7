"""Receivers that are slow or stuck cost a sharded trainer that sync, but not its processes."""

from __future__ import annotations

import time
from dataclasses import replace

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from packedcomm import FullWeightSender, Session, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.communicators.gloo import GlooCommunicator
from packedcomm.errors import DeadlineExceeded, RemoteError
from packedcomm.sources import DTensorSource, gathering
from tests.helpers.operations import raised
from tests.helpers.peers import PATIENT, SECRET
from tests.helpers.ranks import pipes, run_ranks
from tests.helpers.sharded_models import join
from tests.helpers.slow_rounds import slow_rounds

LEADER, TRAINER, RECEIVER = range(3)
TENSORS, SHAPE = 12, (60, 4096)

MOVE_S = 3.0
# More than a wait that begins after its deadline has. Every tensor is a chunk too, so several
# rounds are left when the receiver is stuck.
ROUND_S = 0.15
STUCK_S = MOVE_S + 1.0

SETTINGS = replace(
    PATIENT, move_timeout_s=MOVE_S, buffer_size_bytes=1 << 20, least_bytes_per_second=10**12
)


def _sync(rank, world_size, store, meeting):
    if rank == RECEIVER:
        return _receive(meeting)
    join(rank, 2, store)
    # Every tensor is a round of its own.
    gathering._ROUND_BYTES = 1 << 19
    if rank == TRAINER:
        slow_rounds(ROUND_S)
    mesh = init_device_mesh("cpu", (2,))
    tensors = {
        f"w{index}": distribute_tensor(torch.ones(SHAPE), mesh, [Shard(0)])
        for index in range(TENSORS)
    }
    session = None
    if rank == LEADER:
        session = Session.listen(
            "127.0.0.1:0", receivers=1, secret=SECRET, device="cpu", settings=SETTINGS
        )
        meeting[RECEIVER][1].send(session.address)
    sender = FullWeightSender(DTensorSource(tensors), session)
    found = raised(sender.sync)[:2]
    again = raised(sender.sync)[:2]
    if session is not None:
        session.close()
    return found, again


def _receive(meeting):
    live = {f"w{index}": torch.zeros(SHAPE) for index in range(TENSORS)}
    real = GlooCommunicator._issue
    issued = []

    def issue(self, *arguments, **options):
        issued.append(None)
        if len(issued) == 2:
            time.sleep(STUCK_S)
        return real(self, *arguments, **options)

    GlooCommunicator._issue = issue
    address = meeting[RECEIVER][0].recv()
    with Session.connect(address, secret=SECRET, device="cpu", settings=SETTINGS) as session:
        receiver = WeightReceiver(StagedTarget(TensorTarget(live)), session)
        return raised(receiver.receive)[:2], raised(receiver.receive)[:2]


@pytest.mark.fault(3)
def test_a_receiver_that_is_stuck_is_named_and_the_trainer_goes_on(tmp_path):
    results = run_ranks(_sync, 3, str(tmp_path / "store"), pipes(3))
    kind, text = results[LEADER][0]
    assert kind is DeadlineExceeded
    assert text.endswith("waiting for receiver rank 1")
    kind, heard = results[TRAINER][0]
    assert kind is RemoteError
    assert text in heard
    assert results[RECEIVER][0][0] is DeadlineExceeded
    assert [again for _, again in results] == [(None, "")] * 3
