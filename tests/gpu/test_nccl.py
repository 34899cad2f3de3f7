"""The NCCL communicator between GPUs: every operation, and every way in."""

from __future__ import annotations

import base64
import importlib.util

import pytest
import torch

from packedcomm import Listener, NcclCommunicator
from packedcomm.errors import ArgumentError, TensorError
from tests.helpers.operations import (
    DTYPES,
    SHAPES,
    broadcast_everything,
    expected_broadcasts,
    raised,
    send_around,
    sum_of_ranks,
    use_gpu,
)
from tests.helpers.operations import (
    connect_nccl as connect,
)
from tests.helpers.processes import context
from tests.helpers.ranks import AddressBox, run_ranks
from tests.helpers.vllm_peer import load_vllm_peer, needs_vllm_files

needs_cupy = pytest.mark.skipif(importlib.util.find_spec("cupy") is None, reason="needs cupy")

WORLDS = [pytest.param(2, marks=pytest.mark.gpu(2)), pytest.param(4, marks=pytest.mark.gpu(4))]

NO_SUM = ["torch.float8_e4m3fn", "torch.float8_e5m2", "torch.bool", "torch.int16"]


def _broadcast_everything(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        return broadcast_everything(communicator)


@pytest.mark.parametrize("world_size", WORLDS)
def test_broadcast_is_bit_exact_for_every_dtype_shape_and_source(world_size):
    for received in run_ranks(_broadcast_everything, world_size, AddressBox(world_size)):
        assert received == expected_broadcasts(world_size)


def _send_around(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        agreed = send_around(communicator)
        numbers = torch.arange(5, device=communicator.device)
        if rank == 0:
            communicator.send(numbers + 1, 1)
        elif rank == 1:
            communicator.recv(numbers, 0)
        return agreed, numbers.tolist()


@pytest.mark.parametrize("world_size", WORLDS)
def test_sends_and_receives_of_one_group_cross(world_size):
    results = run_ranks(_send_around, world_size, AddressBox(world_size))
    assert [agreed for agreed, _ in results] == [len(DTYPES) * len(SHAPES)] * world_size
    assert results[1][1] == [1, 2, 3, 4, 5]


def _group_of_many(rank, world_size, box):
    device = use_gpu(rank)
    tensors = [torch.full((i * 37,), float(rank), device=device) for i in range(200)]
    with connect(box, rank, world_size) as communicator:
        with communicator.group():
            for i, tensor in enumerate(tensors):
                # A temporary of the caller's is kept until the group is issued.
                communicator.broadcast(tensor.view(-1), i % world_size)
        return [tensor.unique().tolist() for tensor in tensors]


@pytest.mark.parametrize("world_size", WORLDS)
def test_a_group_of_broadcasts_from_different_sources(world_size):
    for values in run_ranks(_group_of_many, world_size, AddressBox(world_size)):
        assert values == [[]] + [[float(i % world_size)] for i in range(1, 200)]


def _reduce_everything(rank, world_size, box):
    sums = {}
    with connect(box, rank, world_size) as communicator:
        for dtype in DTYPES:
            tensor = torch.tensor([[1, 2], [3, rank]]).to(dtype)
            tensor = (tensor + 1j * rank if dtype.is_complex else tensor).to(communicator.device)
            kind, _, _ = raised(lambda t=tensor: communicator.all_reduce(t))
            assert kind in (None, TensorError)
            sums[str(dtype)] = None if kind else tensor.tolist()
    return sums


@pytest.mark.gpu(2)
def test_all_reduce_sums_by_dtype_and_refuses_the_others():
    for sums in run_ranks(_reduce_everything, 2, AddressBox(2)):
        assert [sums.pop(name) for name in NO_SUM] == [None] * 4
        for name in ("torch.complex64", "torch.complex128"):
            assert sums.pop(name) == [[2 + 1j, 4 + 1j], [6 + 1j, 1 + 1j]]
        assert list(sums.values()) == [[[2, 4], [6, 1]]] * 8


def _slow_producer(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        stream = torch.cuda.Stream()
        tensor = torch.zeros(10_000_000, device=communicator.device)
        communicator.broadcast(tensor, 0)
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            if rank == 0:
                # 0.1 s or so in which the broadcast is enqueued behind the write.
                torch.cuda._sleep(200_000_000)
                tensor.fill_(7.0)
            communicator.broadcast(tensor, 0)
            done = torch.cuda.Event()
            done.record()
        # An event that is recorded after the call covers what the call enqueued.
        done.synchronize()
        return tensor.double().sum().item(), tensor[-1].item()


@pytest.mark.gpu(2)
def test_an_operation_is_ordered_on_the_current_stream():
    for total, last in run_ranks(_slow_producer, 2, AddressBox(2)):
        assert total == 70_000_000.0
        assert last == 7.0


def _by_unique_id(rank, world_size, uids, text):
    device = use_gpu(rank)
    if rank == 0:
        uid = NcclCommunicator.unique_id()
        for _, writer in uids:
            writer.send(uid)
    uid = uids[rank][0].recv()
    given = base64.b64encode(uid).decode() if text else uid
    with NcclCommunicator.from_unique_id(
        given, rank, world_size, device=device, timeout_s=30
    ) as communicator:
        return sum_of_ranks(communicator), repr(communicator)


def _pipes(world_size):
    return [context.Pipe(duplex=False) for _ in range(world_size)]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("text", [False, True], ids=["bytes", "base64"])
def test_a_shared_unique_id_connects(text):
    results = run_ranks(_by_unique_id, 2, _pipes(2), text)
    assert [result[0] for result in results] == [3.0, 3.0]
    assert "rank=1, world_size=2, device='cuda:1'" in results[1][1]


def _adopt_from_cupy(rank, world_size, uids):
    from cupy.cuda import nccl

    device = use_gpu(rank)
    if rank == 0:
        uid = nccl.get_unique_id()
        for _, writer in uids:
            writer.send(uid)
    owner = nccl.NcclCommunicator(world_size, uids[rank][0].recv(), rank)
    wrong = [
        raised(lambda: NcclCommunicator.from_handle(owner.comm, rank, 3, device=device))[0],
        raised(lambda: NcclCommunicator.from_handle(owner.comm, rank, 2, device=1 - rank))[0],
        raised(lambda: NcclCommunicator.from_handle(0, rank, 2, device=device))[0],
    ]
    sums = []
    for _ in range(2):
        # Closing or aborting ours leaves theirs as it is.
        adopted = NcclCommunicator.from_handle(owner.comm, rank, world_size, device=device)
        sums.append(sum_of_ranks(adopted))
        with adopted.group():
            tensor = torch.full((10,), float(rank), device=device)
            adopted.broadcast(tensor, 1)
        sums.append(tensor[0].item())
        adopted.abort("ours only")
        adopted.close()
    owner.destroy()
    return wrong, sums


@needs_cupy
@pytest.mark.gpu(2)
def test_cupys_communicator_can_be_adopted_and_outlives_us():
    for wrong, sums in run_ranks(_adopt_from_cupy, 2, _pipes(2)):
        assert wrong == [ArgumentError] * 3
        assert sums == [3.0, 1.0] * 2


def _with_vllms_communicator(rank, world_size, box, vllm_rank):
    device = use_gpu(rank)
    endpoint = box.endpoint(rank)
    address = endpoint if isinstance(endpoint, str) else endpoint.address
    host, _, port = address.rpartition(":")
    tensor = torch.full((1000,), float(rank), device=device)
    seen = []
    if rank == vllm_rank:
        if isinstance(endpoint, Listener):
            # vLLM binds by itself.
            endpoint.close()
        group = load_vllm_peer().connect(host, int(port), rank, world_size, rank)
        group.broadcast(tensor, src=0)
        seen.append(tensor[-1].item())
        tensor.fill_(float(rank + 10))
        group.broadcast(tensor, src=1)
        seen.append(tensor[-1].item())
        torch.cuda.synchronize()
        return seen
    listener = endpoint if isinstance(endpoint, Listener) else None
    with NcclCommunicator.from_vllm(
        host, int(port), rank, world_size, device=device, timeout_s=30, listener=listener
    ) as communicator:
        communicator.broadcast(tensor, 0)
        seen.append(tensor[-1].item())
        tensor.fill_(float(rank + 10))
        communicator.broadcast(tensor, 1)
        seen.append(tensor[-1].item())
    return seen


@needs_vllm_files
@pytest.mark.gpu(2)
@pytest.mark.parametrize("vllm_rank", [0, 1])
def test_vllms_own_communicator_connects_with_ours(vllm_rank):
    results = run_ranks(_with_vllms_communicator, 2, AddressBox(2), vllm_rank)
    assert results == [[0.0, 11.0]] * 2
