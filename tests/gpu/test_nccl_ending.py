"""How the NCCL communicator ends: missing peers, deadlines, aborts, closing again and again."""

from __future__ import annotations

import threading
import time

import pytest
import torch

from packedcomm import Listener, NcclCommunicator
from packedcomm.communicators.nccl import abort_all
from packedcomm.errors import (
    CudaError,
    DeadlineExceeded,
    RendezvousTimeout,
    SessionStateError,
    TensorError,
)
from tests.helpers.operations import connect_nccl as connect
from tests.helpers.operations import raised, sum_of_ranks, use_gpu
from tests.helpers.ranks import AddressBox, run_ranks


def _alone_in_a_world_of_two(rank, world_size, way):
    device = use_gpu(0)
    listener = Listener.bind("127.0.0.1:0")
    port = listener.port
    options = {"device": device, "timeout_s": 3.0}
    if way == "connect":
        failure = raised(lambda: NcclCommunicator.connect(listener, 0, 2, **options))
    elif way == "unique id":
        listener.close()
        uid = NcclCommunicator.unique_id()
        failure = raised(lambda: NcclCommunicator.from_unique_id(uid, 0, 2, **options))
    else:
        failure = raised(
            lambda: NcclCommunicator.from_vllm(
                "127.0.0.1", port, 0, 2, listener=listener, **options
            )
        )
    # The port is free again, and the process can connect.
    with NcclCommunicator.connect(
        Listener.bind(f"127.0.0.1:{port}"), 0, 1, device=device, timeout_s=30
    ) as communicator:
        return *failure, sum_of_ranks(communicator)


@pytest.mark.fault(1)
@pytest.mark.gpu(1)
@pytest.mark.parametrize(
    ("way", "text"),
    [("connect", "ranks [1] are missing"), ("unique id", "rank 0 of 2"), ("vllm", "only 1 of 2")],
)
def test_a_peer_that_never_arrives_is_a_rendezvous_timeout(way, text):
    ((kind, message, seconds, total),) = run_ranks(_alone_in_a_world_of_two, 1, way)
    assert kind is RendezvousTimeout
    assert text in message
    assert seconds < 6.0
    assert total == 1.0


def _abort_hanging(rank, world_size, box, launched):
    """Rank 0 broadcasts alone: before the first connection on the host, later on the GPU."""
    communicator = connect(box, rank, world_size)
    tensor = torch.zeros(1_000_000, device=communicator.device)
    if launched:
        communicator.broadcast(tensor, 0)
        torch.cuda.synchronize()
    failure = None
    if rank == 0:
        threading.Timer(1.0, communicator.abort, ["the peer never joins"]).start()

        def hang():
            # A receiver waits for data; a source could leave some in the peer's buffers and end.
            communicator.broadcast(tensor, 1)
            torch.cuda.synchronize()
            communicator.broadcast(tensor, 1)

        failure = raised(hang)
    else:
        time.sleep(2.0)
        communicator.abort("rank 0 has given up")
    communicator.close()
    contexts = [torch._C._cuda_hasPrimaryContext(i) for i in range(world_size)]
    with connect(box, rank, world_size) as again:
        return failure, contexts, sum_of_ranks(again)


@pytest.mark.gpu(2)
@pytest.mark.parametrize("launched", [False, True], ids=["on the host", "on the GPU"])
def test_an_abort_ends_an_operation_whose_peer_never_joins(launched):
    results = run_ranks(_abort_hanging, 2, AddressBox(2), launched, deadline_s=90)
    kind, message, seconds = results[0][0]
    assert kind is SessionStateError
    assert "the peer never joins" in message
    assert seconds < 8.0
    # Freeing on a helper thread makes no context on a GPU that the process doesn't use.
    assert [result[1] for result in results] == [[True, False], [False, True]]
    assert [result[2] for result in results] == [3.0, 3.0]


def _deadline(rank, world_size, box):
    with connect(box, rank, world_size, operation_timeout_s=1.5) as communicator:
        if rank == 0:
            # The first operation connects the ranks, on the host.
            tensor = torch.zeros(1_000_000, device=communicator.device)
            return raised(lambda: communicator.broadcast(tensor, 1))
        time.sleep(3.0)
        communicator.abort("too late")
        return None


@pytest.mark.gpu(2)
def test_a_launch_that_waits_for_a_peer_ends_at_its_deadline():
    kind, message, seconds = run_ranks(_deadline, 2, AddressBox(2))[0]
    assert kind is DeadlineExceeded
    assert "broadcast from rank 1 on rank 0 of 2 (cuda:0)" in message
    assert 1.4 < seconds < 4.0


def _abort_several(rank, world_size, boxes):
    communicators = [connect(box, rank, world_size) for box in boxes]
    tensors = [torch.zeros(1_000_000, device=c.device) for c in communicators]
    for communicator, tensor in zip(communicators, tensors, strict=True):
        communicator.broadcast(tensor, 0)
    torch.cuda.synchronize()
    if rank == 0:
        # Each hangs on a stream of its own.
        for communicator, tensor in zip(communicators, tensors, strict=True):
            with torch.cuda.stream(torch.cuda.Stream()):
                communicator.broadcast(tensor, 0)
    started = time.monotonic()
    abort_all(communicators, "all at once")
    torch.cuda.synchronize()
    for communicator in communicators:
        communicator.close()
    return time.monotonic() - started


@pytest.mark.fault(5)
@pytest.mark.gpu(2)
def test_several_communicators_are_aborted_at_once():
    boxes = [AddressBox(2) for _ in range(3)]
    assert max(run_ranks(_abort_several, 2, boxes)) < 8.0


def _misuse(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        wrong = [
            torch.zeros(4),
            torch.zeros(4, device=f"cuda:{1 - rank}"),
            torch.zeros(4, 4, device=communicator.device).t(),
            torch.zeros(4, 4, device=communicator.device).to_sparse(),
        ]
        seen = [raised(lambda t=t: communicator.broadcast(t, 0))[:2] for t in wrong]
        return seen, sum_of_ranks(communicator)


@pytest.mark.gpu(2)
def test_misuse_is_typed_and_leaves_the_communicator_usable():
    for rank, (seen, total) in enumerate(run_ranks(_misuse, 2, AddressBox(2))):
        assert {kind for kind, _ in seen} == {TensorError}
        assert "cpu" in seen[0][1]
        assert f"cuda:{1 - rank}" in seen[1][1]
        assert f"cuda:{rank}" in seen[1][1]
        assert "contiguous" in seen[2][1]
        assert total == 3.0


def _no_such_gpu(rank, world_size):
    count = torch.cuda.device_count()
    return count, raised(lambda: NcclCommunicator.connect("127.0.0.1:0", 0, 1, device=count))


@pytest.mark.fault(32)
@pytest.mark.gpu(1)
def test_a_gpu_that_is_not_there_is_an_error_that_says_so():
    ((count, (kind, message, _)),) = run_ranks(_no_such_gpu, 1)
    assert kind is CudaError
    assert f"cuda:{count}" in message
    assert f"sees {count} GPUs" in message
