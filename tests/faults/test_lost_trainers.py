"""Processes of a sharded trainer that are killed or stopped: the others and the receivers get a
typed error before their deadlines, with the right name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from packedcomm import FullWeightSender, Session, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.errors import (
    CapacityError,
    DeadlineExceeded,
    PeerLost,
    RemoteError,
    SessionStateError,
)
from packedcomm.sources import DTensorSource, gathering, rounds
from tests.helpers.operations import raised
from tests.helpers.peers import PATIENT, SECRET
from tests.helpers.ranks import pipes, run_ranks
from tests.helpers.sharded_models import join

LEADER, TRAINER, RECEIVER = range(3)
TENSORS = 6

MOVE_S = 3.0
COMMIT_S = 2.0
AGREE_S = 3.0

SIGNALS = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}
EXPECTED = {"killed": PeerLost, "stopped": DeadlineExceeded}


def _settings(where):
    """Deadlines that are short where something is waited for, and long elsewhere."""
    if where == "snapshot":
        return replace(PATIENT, agree_timeout_s=AGREE_S)
    return replace(PATIENT, move_timeout_s=MOVE_S, commit_timeout_s=COMMIT_S)


def _tensors(world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    # Every tensor is a round of its own.
    gathering._ROUND_BYTES = 64
    return {
        f"w{index}": distribute_tensor(torch.rand(9, 4), mesh, [Shard(0)])
        for index in range(TENSORS)
    }


def _fall_in_gather(how, tensor=3):
    """End or stop this process when it is to read its shard of a certain tensor."""
    real = rounds.Gathered.local

    def local(self):
        if self.item.name == f"w{tensor}":
            os.kill(os.getpid(), SIGNALS[how])
        return real(self)

    rounds.Gathered.local = local


def _trainer(rank, store, meeting, settings):
    """A process of a trainer of two: its session, if it leads, and its sender."""
    join(rank, 2, store)
    session = None
    if rank == LEADER:
        session = Session.listen(
            "127.0.0.1:0", receivers=1, secret=SECRET, device="cpu", settings=settings
        )
        meeting[RECEIVER][1].send(session.address)
    return session, FullWeightSender(DTensorSource(_tensors(2)), session)


def _sync(rank, world_size, store, meeting, victim, where, how):
    """The second sync loses a process; returns what the others make of it."""
    settings = _settings(where)
    if rank == RECEIVER:
        return _receive(meeting, settings)
    session, sender = _trainer(rank, store, meeting, settings)
    sender.sync()
    if rank == victim:
        if where == "snapshot":
            os.kill(os.getpid(), SIGNALS[how])
        _fall_in_gather(how)
    found = raised(sender.sync)
    again = raised(sender.sync)
    if rank == LEADER and where == "gather":
        assert meeting[LEADER][0].poll(20.0), "the receiver has raised nothing"
    # Neither the group nor the session keeps the process.
    begin = time.monotonic()
    dist.destroy_process_group()
    if session is not None:
        session.close()
    return found, again, time.monotonic() - begin


def _receive(meeting, settings):
    address = meeting[RECEIVER][0].recv()
    live = {f"w{index}": torch.zeros(9, 4) for index in range(TENSORS)}
    with Session.connect(address, secret=SECRET, device="cpu", settings=settings) as session:
        receiver = WeightReceiver(StagedTarget(TensorTarget(live)), session)
        assert receiver.receive().version == 0
        found = raised(receiver.receive)
        status = receiver.status()
        meeting[LEADER][1].send("raised")
        closed = receiver.receive() is None if status.connected else None
    return found, (status.version, status.ready), closed


def _run(tmp_path, victim, where, how, lost):
    store = str(tmp_path / "store")
    return run_ranks(_sync, 3, store, pipes(3), victim, where, how, lost=lost)


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("how", SIGNALS)
def test_a_trainer_process_lost_in_a_gather_is_named_to_leader_and_receiver(how, tmp_path):
    results = _run(tmp_path, TRAINER, "gather", how, lost=(TRAINER,))
    (kind, text, seconds), (again, later, waited), ended = results[LEADER]
    assert kind is EXPECTED[how]
    assert text.startswith("gather: ")
    assert "rank 1 of the source" in text
    assert "its group of torch.distributed can't be used any more" in text
    # At the deadlines of the data the receiver would be named, on either side.
    assert seconds < (MOVE_S + 2.0 if how == "stopped" else 2.0)
    assert again is SessionStateError
    assert "can't be used any more" in later
    assert "rank 1 of the source" in later
    assert waited < 1.0
    assert ended < 5.0
    (kind, heard, _), state, closed = results[RECEIVER]
    assert kind is EXPECTED[how]
    assert text in heard
    # Its session goes on until the leader closes it, and the old weights are whole.
    assert state == (0, True)
    assert closed


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("how", SIGNALS)
def test_a_trainer_process_lost_before_the_agreement_is_named_to_the_leader(how, tmp_path):
    results = _run(tmp_path, TRAINER, "snapshot", how, lost=(TRAINER,))
    (kind, text, seconds), (again, *_), ended = results[LEADER]
    assert kind is EXPECTED[how]
    assert text.startswith("snapshot: ")
    assert "rank 1 of the source" in text
    assert seconds < AGREE_S + 3.0
    assert again is SessionStateError
    assert ended < 5.0
    # The receiver has never heard of the sync: the session is closed in order.
    (kind, *_), state, _ = results[RECEIVER]
    assert kind is None
    assert state == (0, True)


@pytest.mark.fault(2)
@pytest.mark.fault(3)
@pytest.mark.parametrize("how", SIGNALS)
def test_a_leader_lost_in_a_gather_is_named_to_the_other_trainer_process(how, tmp_path):
    # What a receiver does without its sender is tested elsewhere.
    results = _run(tmp_path, LEADER, "gather", how, lost=(LEADER, RECEIVER))
    (kind, text, seconds), (again, *_), ended = results[TRAINER]
    assert kind is EXPECTED[how]
    assert text.startswith("gather: ")
    assert "rank 0 of the source" in text
    # It has no settings of its own: the leader has told it how long to wait.
    assert seconds < (2 * MOVE_S + COMMIT_S + 4.0 if how == "stopped" else 2.0)
    assert again is SessionStateError
    assert ended < 5.0


def _gather(rank, world_size, store, task):
    join(rank, world_size, store)
    tensors = _tensors(world_size)
    if task == "sum":
        mesh = tensors["w0"].device_mesh
        tensors = {"w3": DTensor.from_local(torch.ones(2), mesh, [Partial()])}
    source = DTensorSource(tensors)
    source.set_timeout(1.0, 4.0)
    snapshot = source.snapshot()
    if rank == 1:
        _fall_in_gather("stopped")
        if task == "sum":
            # When all have come to the gather.
            prepare = source._exchange.prepare
            source._exchange.prepare = lambda device: (
                prepare(device),
                os.kill(os.getpid(), signal.SIGSTOP),
            )
    gathered = source.gather(snapshot)
    if task == "close" and rank == 0:
        next(gathered)
        found = raised(gathered.close)
    else:
        found = raised(lambda: list(gathered))
    return found, raised(lambda: source.share(None))


@pytest.mark.fault(3)
class FailsOnce(TensorTarget):
    """Its second commit fails."""

    commits = 0

    def commit(self, manifest):
        self.commits += 1
        if self.commits == 2:
            raise CapacityError("this time")


def _version_of(call):
    try:
        return call().version
    except (CapacityError, RemoteError):
        return None


def _versions(rank, world_size, store, meeting):
    if rank == RECEIVER:
        assert meeting[RECEIVER][0].poll(20.0)
        address = meeting[RECEIVER][0].recv()
        with Session.connect(address, secret=SECRET, device="cpu", settings=PATIENT) as end:
            receiver = WeightReceiver(
                FailsOnce({f"w{i}": torch.zeros(9, 4) for i in range(TENSORS)}), end
            )
            return [_version_of(receiver.receive) for _ in range(5)]
    session, sender = _trainer(rank, store, meeting, PATIENT)
    calls = [sender.sync] * 3 + [sender.no_change, lambda: sender.sync(9)]
    found = [_version_of(call) for call in calls]
    dist.barrier()
    if session is not None:
        session.close()
    return found


def test_all_trainer_processes_know_the_version_that_was_committed(tmp_path):
    """Also after one that was decided, and may be shown somewhere, although its sync has failed."""
    found = run_ranks(_versions, 3, tmp_path / "store", pipes(3))
    assert found[LEADER] == [0, None, 2, 3, 9]
    assert found[TRAINER] == found[LEADER]
    assert found[RECEIVER] == found[LEADER]


def test_closing_a_gather_early_waits_no_longer_than_its_deadline(tmp_path):
    [(closed, (after, text, _)), _] = run_ranks(
        _gather, 2, str(tmp_path / "store"), "close", lost=(1,)
    )
    assert closed[0] is None
    assert closed[2] < 3.0
    assert after is SessionStateError
    assert "gather: not done within 1 s, waiting for rank 1 of the source" in text


@pytest.mark.fault(3)
def test_sums_that_torch_gathers_have_the_deadline_too(tmp_path):
    [((kind, text, seconds), _), _] = run_ranks(
        _gather, 2, str(tmp_path / "store"), "sum", lost=(1,)
    )
    assert kind is DeadlineExceeded
    assert text.startswith("gather: not done within 1 s, waiting for rank 1 of the source")
    assert seconds < 3.0


@pytest.mark.fault(3)
def test_a_third_process_is_let_go_by_the_leader_that_gives_up(tmp_path):
    results = run_ranks(_gather, 3, str(tmp_path / "store"), "take", lost=(1,))
    (kind, text, _), _ = results[0]
    assert kind is DeadlineExceeded
    assert "waiting for rank 1 of the source" in text
    (kind, text, seconds), (after, *_) = results[2]
    assert kind is PeerLost
    assert text.startswith("gather: lost the connection to ")
    assert seconds < 3.0
    assert after is SessionStateError
