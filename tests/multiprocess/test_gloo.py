"""The Gloo communicator between processes: every operation, and what it leaves untouched."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest
import torch

from packedcomm import GlooCommunicator
from packedcomm.communicators.gloo_transfers import broadcast_tree
from packedcomm.communicators.listener import Listener
from packedcomm.errors import ArgumentError, SessionStateError, TensorError
from tests.helpers.operations import (
    DTYPES,
    SHAPES,
    broadcast_everything,
    expected_broadcasts,
    raised,
    send_around,
)
from tests.helpers.operations import (
    connect_gloo as connect,
)
from tests.helpers.ranks import AddressBox, run_ranks
from tests.helpers.usage import files_and_threads


@pytest.mark.parametrize("world_size", range(1, 18))
def test_a_broadcast_tree_reaches_every_rank_once_and_soon(world_size):
    for src in range(world_size):
        parents = {}
        for rank in range(world_size):
            parent, children = broadcast_tree(rank, src, world_size)
            parents[rank] = parent
            assert all(broadcast_tree(c, src, world_size)[0] == rank for c in children)
        assert [rank for rank, parent in parents.items() if parent is None] == [src]
        for start in parents:
            rank, hops = start, 0
            while rank != src:
                rank, hops = parents[rank], hops + 1
            assert hops <= (world_size - 1).bit_length()


def _broadcast_everything(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        return broadcast_everything(communicator)


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_broadcast_is_bit_exact_for_every_dtype_shape_and_source(world_size):
    for received in run_ranks(_broadcast_everything, world_size, AddressBox(world_size)):
        assert received == expected_broadcasts(world_size)


def _send_around(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        agreed = send_around(communicator)
        numbers = torch.arange(5)
        if rank == 0:
            communicator.send(numbers + 1, 1)
        elif rank == 1:
            communicator.recv(numbers, 0)
    return agreed, numbers.tolist()


@pytest.mark.parametrize("world_size", [2, 3])
def test_sends_and_receives_of_one_group_cross(world_size):
    results = run_ranks(_send_around, world_size, AddressBox(world_size))
    assert [agreed for agreed, _ in results] == [len(DTYPES) * len(SHAPES)] * world_size
    assert results[1][1] == [1, 2, 3, 4, 5]


def _group_of_many(rank, world_size, box):
    tensors = [torch.full((i,), float(rank)) for i in range(200)]
    with connect(box, rank, world_size) as communicator, communicator.group():
        for i, tensor in enumerate(tensors):
            communicator.broadcast(tensor, i % world_size)
    return [sum(tensor.tolist()) for tensor in tensors]


def test_a_group_of_broadcasts_from_different_sources():
    for sums in run_ranks(_group_of_many, 3, AddressBox(3)):
        assert sums == [float(i * (i % 3)) for i in range(200)]


def _reduce_everything(rank, world_size, box):
    sums = {}
    with connect(box, rank, world_size) as communicator:
        for dtype in DTYPES:
            tensor = torch.tensor([[1, 2], [3, rank]]).to(dtype)
            if dtype.is_complex:
                tensor += 1j * rank
            kind, message, _ = raised(lambda t=tensor: communicator.all_reduce(t))
            assert kind is None or (kind is TensorError and str(dtype) in message)
            sums[str(dtype)] = None if kind else tensor.tolist()
        for empty in (torch.zeros(0), torch.zeros(3, 0)):
            communicator.all_reduce(empty)
        scalar = torch.tensor(2.5)
        communicator.all_reduce(scalar)
        sums["scalar"] = scalar.item()
    return sums


def test_all_reduce_sums_by_dtype_and_refuses_the_others():
    for sums in run_ranks(_reduce_everything, 3, AddressBox(3)):
        assert sums.pop("scalar") == 7.5
        for name in ("float8_e4m3fn", "float8_e5m2", "bool", "int16"):
            assert sums.pop(f"torch.{name}") is None
        for name in ("complex64", "complex128"):
            assert sums.pop(f"torch.{name}") == [[3 + 3j, 6 + 3j], [9 + 3j, 3 + 3j]]
        assert list(sums.values()) == [[[3, 6], [9, 3]]] * 8


def _use_gradients(rank, world_size, box):
    parameter = torch.nn.Parameter(torch.full((4,), float(rank)))
    with connect(box, rank, world_size) as communicator:
        communicator.broadcast(parameter, 1)
        communicator.all_reduce(parameter)
    return parameter.tolist(), parameter.requires_grad


def test_parameters_can_be_sent_as_they_are():
    assert run_ranks(_use_gradients, 2, AddressBox(2)) == [([2.0] * 4, True)] * 2


def _two_groups(rank, world_size, boxes):
    results = [None, None]

    def work(index):
        with connect(boxes[index], rank, world_size) as communicator:
            tensor = torch.zeros(1000)
            for step in range(200):
                tensor.fill_(step * 10 + index if rank == index else -1)
                communicator.broadcast(tensor, index)
                assert tensor.eq(step * 10 + index).all()
            results[index] = tensor[0].item()

    threads = [threading.Thread(target=work, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return results


def test_two_groups_work_at_once():
    boxes = (AddressBox(2), AddressBox(2))
    assert run_ranks(_two_groups, 2, boxes) == [[1990.0, 1991.0]] * 2


def _connect_at_once(rank, world_size, boxes, rounds):
    """What is left of three groups, connected by three threads, when one is closed, one aborted."""
    seen = []
    for _ in range(rounds):
        endpoints = [box.endpoint(rank) for box in boxes]
        groups = [None] * len(boxes)

        def work(index, endpoints=endpoints, groups=groups):
            groups[index] = GlooCommunicator.connect(
                endpoints[index], rank, world_size, timeout_s=20
            )

        threads = [threading.Thread(target=work, args=(index,)) for index in range(len(boxes))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        tensor = torch.ones(3)
        seen.append([len(group._sockets._sockets) for group in groups])
        groups[0].close()
        seen.append(raised(lambda g=groups[1], t=tensor: g.all_reduce(t))[0])
        # Every rank has its sum before any rank cuts.
        groups[2].all_reduce(tensor)
        groups[1].abort("enough")
        seen.append(raised(lambda g=groups[2], t=tensor: g.all_reduce(t))[0])
        seen.append(tensor.tolist())
        for group in groups:
            group.close()
    return seen


def test_groups_that_are_connected_at_once_do_not_share_connections():
    boxes = [AddressBox(2) for _ in range(3)]
    for seen in run_ranks(_connect_at_once, 2, boxes, 25):
        assert seen == [[1, 1, 1], None, None, [8.0] * 3] * 25


def _ranks_of_one_process(rank, world_size):
    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(2) as pool:
        ends = [listener, listener.address]
        groups = list(pool.map(lambda r: GlooCommunicator.connect(ends[r], r, 2), range(2)))
        owners = [[peer.rank for peer in group._sockets._sockets] for group in groups]
        for group in groups:
            group.close()
    return owners


def test_two_ranks_in_one_process_have_one_end_each():
    assert run_ranks(_ranks_of_one_process, 1) == [[[1], [0]]]


def _beside_other_listeners(rank, world_size, box):
    """Another thread keeps opening listening sockets while Gloo begins to listen."""
    stop = threading.Event()

    def listen():
        while not stop.is_set():
            with Listener.bind("127.0.0.1:0"):
                time.sleep(0.0005)

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        owners = []
        for _ in range(20):
            with connect(box, rank, world_size) as communicator:
                owners.append([peer.rank for peer in communicator._sockets._sockets])
                communicator.all_reduce(torch.zeros(1))
    finally:
        stop.set()
        thread.join()
    return owners


def test_other_listening_sockets_are_not_taken_for_gloos():
    results = run_ranks(_beside_other_listeners, 2, AddressBox(2))
    assert results == [[[1]] * 20, [[0]] * 20]


def _beside_a_default_group(rank, world_size, box, store):
    import torch.distributed as dist

    with connect(box, rank, world_size) as first:
        assert not dist.is_initialized()
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        with connect(box, rank, world_size) as second:
            values = []
            for reduce in (first.all_reduce, dist.all_reduce, second.all_reduce):
                tensor = torch.ones(3)
                reduce(tensor)
                values.append(tensor.tolist())
        dist.destroy_process_group()
        first.all_reduce(tensor)
    return values


def test_torch_distributeds_default_group_is_untouched(tmp_path):
    results = run_ranks(_beside_a_default_group, 2, AddressBox(2), str(tmp_path / "store"))
    assert results == [[[2.0] * 3] * 3] * 2


def _come_and_go(rank, world_size, box, rounds):
    process = psutil.Process()
    for i in range(rounds):
        with connect(box, rank, world_size) as communicator:
            tensor = torch.full((10_000,), float(i))
            communicator.broadcast(tensor, i % world_size)
            communicator.all_reduce(tensor)
            communicator.close()
        if i == 9:
            early = *files_and_threads(), process.memory_info().rss
    return early, (*files_and_threads(early[:2]), process.memory_info().rss)


def test_fifty_rounds_of_connect_and_close_do_not_grow():
    for early, late in run_ranks(_come_and_go, 2, AddressBox(2), 50):
        assert late[0] <= early[0], "file descriptors"
        assert late[1] <= early[1], "threads"
        assert late[2] - early[2] < 8 << 20, "memory"


def _listen_where(rank, world_size, box):
    def listening():
        connections = psutil.Process().net_connections("tcp")
        return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}

    with connect(box, rank, world_size):
        while_open = listening()
    return while_open, listening()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_nothing_listens_on_another_address(host):
    for while_open, after in run_ranks(_listen_where, 2, AddressBox(2, host)):
        assert while_open <= {host.strip("[]")}
        assert after == set()


def _close_early(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        tensor = torch.full((20_000_000,), float(rank))
        if rank == world_size - 1:
            time.sleep(0.5)
        communicator.broadcast(tensor, 0)
    return tensor.sum().item()


def test_a_sender_may_close_right_after_its_last_operation():
    assert run_ranks(_close_early, 3, AddressBox(3)) == [0.0, 0.0, 0.0]


def _misuse(rank, world_size, box):
    seen = []
    with connect(box, rank, world_size) as communicator:
        for tensor in (
            torch.zeros(4, 4).t(),
            torch.zeros(4, 4).to_sparse(),
            torch.zeros(4, device="meta"),
        ):
            for operation in ("broadcast", "send", "recv"):
                call = getattr(communicator, operation)
                seen.append(raised(lambda c=call, t=tensor: c(t, 1 - rank))[:2])
        good = torch.zeros(4)
        refused = [
            raised(lambda: communicator.broadcast(good, world_size))[0],
            raised(lambda: communicator.broadcast(good, True))[0],
            raised(lambda: communicator.send(good, rank))[0],
            raised(lambda: communicator.recv(good, -1))[0],
        ]
        with communicator.group():
            refused.append(raised(lambda: communicator.group().__enter__())[0])
        # None of it was an operation: the communicator still works.
        communicator.all_reduce(good)
    closed = raised(lambda: communicator.broadcast(good, 0))[:2]
    communicator.close()
    return seen, refused, closed


def test_misuse_is_typed_and_leaves_the_communicator_usable():
    for seen, refused, closed in run_ranks(_misuse, 2, AddressBox(2)):
        assert {kind for kind, _ in seen} == {TensorError}
        assert [message.count(" on rank ") for _, message in seen] == [1] * 9
        assert "contiguous" in seen[0][1]
        assert "dense" in seen[3][1]
        assert "meta" in seen[6][1]
        assert refused == [ArgumentError] * 4 + [SessionStateError]
        assert closed[0] is SessionStateError
        assert "closed" in closed[1]


def _alone(rank, world_size, box):
    with connect(box, rank, world_size) as communicator:
        tensor = torch.ones(3)
        communicator.broadcast(tensor, 0)
        communicator.all_reduce(tensor)
        with communicator.group():
            communicator.broadcast(tensor, 0)
    return tensor.tolist()


def test_a_world_of_one_needs_nobody():
    assert run_ranks(_alone, 1, AddressBox(1)) == [[1.0] * 3]
