"""The Gloo communicator between processes: every operation, and every way it can fail."""

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

from packedcomm import GlooCommunicator, Settings
from packedcomm.communicators.gloo_transfers import broadcast_tree
from packedcomm.errors import (
    ArgumentError,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    RendezvousTimeout,
    SessionStateError,
    TensorError,
)
from tests.helpers.ranks import AddressBox, run_ranks

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (1,), (7,), (0, 4), (3, 5, 2), (300_000,)]


def _random(dtype, shape, seed):
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape)


def _bytes(tensor):
    return bytes(tensor.reshape(-1).view(torch.uint8).numpy())


def _connect(box, rank, world_size, **settings):
    options = {"operation_timeout_s": 20.0} | settings
    return GlooCommunicator.connect(
        box.endpoint(rank), rank, world_size, timeout_s=20, settings=Settings(**options)
    )


def _raised(operation):
    """Class and message of what `operation` raised, and after how many seconds."""
    started = time.monotonic()
    try:
        operation()
    except PackedCommError as error:
        return type(error), str(error), time.monotonic() - started
    return None, "", time.monotonic() - started


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
    received = []
    with _connect(box, rank, world_size) as communicator:
        for src in range(world_size):
            for seed, dtype in enumerate(DTYPES):
                for shape in SHAPES:
                    tensor = _random(dtype, shape, seed if rank == src else 1000 + rank)
                    communicator.broadcast(tensor, src)
                    received.append(_bytes(tensor))
    return received


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_broadcast_is_bit_exact_for_every_dtype_shape_and_source(world_size):
    expected = [
        _bytes(_random(dtype, shape, seed))
        for _ in range(world_size)
        for seed, dtype in enumerate(DTYPES)
        for shape in SHAPES
    ]
    for received in run_ranks(_broadcast_everything, world_size, AddressBox(world_size)):
        assert received == expected


def _send_around(rank, world_size, box):
    received = []
    with _connect(box, rank, world_size) as communicator:
        after, before = (rank + 1) % world_size, (rank - 1) % world_size
        for seed, dtype in enumerate(DTYPES):
            for shape in SHAPES:
                mine, theirs = _random(dtype, shape, seed + rank), torch.zeros(shape, dtype=dtype)
                # Everyone sends at once: only a group can do that without waiting in a circle.
                with communicator.group():
                    communicator.send(mine, after)
                    communicator.recv(theirs, before)
                assert _bytes(theirs) == _bytes(_random(dtype, shape, seed + before))
                received.append(theirs.nbytes)
        if rank == 0:
            communicator.send(torch.arange(5), 1)
        if rank == 1:
            numbers = torch.zeros(5, dtype=torch.int64)
            communicator.recv(numbers, 0)
            assert numbers.tolist() == [0, 1, 2, 3, 4]
    return received


@pytest.mark.parametrize("world_size", [2, 3])
def test_sends_and_receives_of_one_group_cross(world_size):
    results = run_ranks(_send_around, world_size, AddressBox(world_size))
    assert all(len(result) == len(DTYPES) * len(SHAPES) for result in results)


def _group_of_many(rank, world_size, box):
    tensors = [torch.full((i,), float(rank)) for i in range(200)]
    with _connect(box, rank, world_size) as communicator, communicator.group():
        for i, tensor in enumerate(tensors):
            communicator.broadcast(tensor, i % world_size)
    return [sum(tensor.tolist()) for tensor in tensors]


def test_a_group_of_broadcasts_from_different_sources():
    for sums in run_ranks(_group_of_many, 3, AddressBox(3)):
        assert sums == [float(i * (i % 3)) for i in range(200)]


def _reduce_everything(rank, world_size, box):
    sums = {}
    with _connect(box, rank, world_size) as communicator:
        for dtype in DTYPES:
            tensor = torch.tensor([[1, 2], [3, rank]]).to(dtype)
            if dtype.is_complex:
                tensor += 1j * rank
            kind, message, _ = _raised(lambda t=tensor: communicator.all_reduce(t))
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
    with _connect(box, rank, world_size) as communicator:
        communicator.broadcast(parameter, 1)
        communicator.all_reduce(parameter)
    return parameter.tolist(), parameter.requires_grad


def test_parameters_can_be_sent_as_they_are():
    assert run_ranks(_use_gradients, 2, AddressBox(2)) == [([2.0] * 4, True)] * 2


def _two_groups(rank, world_size, boxes):
    results = [None, None]

    def work(index):
        with _connect(boxes[index], rank, world_size) as communicator:
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


def _beside_a_default_group(rank, world_size, box, store):
    import torch.distributed as dist

    with _connect(box, rank, world_size) as first:
        assert not dist.is_initialized()
        dist.init_process_group(
            "gloo", init_method=f"file://{store}", rank=rank, world_size=world_size
        )
        with _connect(box, rank, world_size) as second:
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
    seen = []
    for i in range(rounds):
        with _connect(box, rank, world_size) as communicator:
            tensor = torch.full((10_000,), float(i))
            communicator.broadcast(tensor, i % world_size)
            communicator.all_reduce(tensor)
            communicator.close()
        gc.collect()
        seen.append((process.num_fds(), process.num_threads(), process.memory_info().rss))
    return seen[9], seen[-1]


def test_fifty_rounds_of_connect_and_close_do_not_grow():
    for early, late in run_ranks(_come_and_go, 2, AddressBox(2), 50):
        assert late[0] <= early[0], "file descriptors"
        assert late[1] <= early[1], "threads"
        assert late[2] - early[2] < 8 << 20, "memory"


def _listen_where(rank, world_size, box):
    def listening():
        connections = psutil.Process().net_connections("tcp")
        return {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN}

    with _connect(box, rank, world_size):
        while_open = listening()
    return while_open, listening()


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_nothing_listens_on_another_address(host):
    for while_open, after in run_ranks(_listen_where, 2, AddressBox(2, host)):
        assert while_open <= {host.strip("[]")}
        assert after == set()


def _connect_without_the_last(rank, world_size, box):
    endpoint = box.endpoint(rank)
    if rank == world_size - 1:
        return None
    return _raised(lambda: GlooCommunicator.connect(endpoint, rank, world_size, timeout_s=1.0))


def test_a_peer_that_never_comes_is_named():
    for kind, message, seconds in run_ranks(_connect_without_the_last, 3, AddressBox(3))[:2]:
        assert kind is RendezvousTimeout
        assert "ranks [2] are missing" in message
        assert seconds < 2.5


def _killed(rank, world_size, box, operation):
    with _connect(box, rank, world_size) as communicator:
        communicator.all_reduce(torch.zeros(1))
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        # Larger than what fits into the sockets on the way.
        tensor = torch.zeros(30_000_000)
        if operation == "recv" and rank == 0:
            first = _raised(lambda: communicator.recv(tensor, world_size - 1))
        elif operation == "recv":
            first = _raised(lambda: communicator.recv(tensor, 0))
        elif operation == "broadcast":
            # A rank that owes the dead one nothing is done with the first one.
            first = _raised(lambda: [communicator.broadcast(tensor, 0) for _ in range(3)])
        else:
            first = _raised(lambda: communicator.all_reduce(tensor))
        second = _raised(lambda: communicator.broadcast(tensor, 0))
    return first, second, repr(communicator)


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
    with _connect(box, rank, world_size, operation_timeout_s=1.0) as communicator:
        communicator.all_reduce(torch.zeros(1))
        if rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        tensor = torch.zeros(30_000_000)
        return _raised(lambda: communicator.broadcast(tensor, world_size - 1))


def test_a_stopped_peer_is_a_deadline_that_names_it():
    (kind, message, seconds), _ = run_ranks(_stopped, 2, AddressBox(2), lost=(1,))
    assert kind is DeadlineExceeded
    assert "broadcast from rank 1 on rank 0 of 2" in message
    assert "waiting for rank 1" in message
    assert 0.9 < seconds < 2.5


def _aborted(rank, world_size, box):
    with _connect(box, rank, world_size) as communicator:
        tensor = torch.zeros(1000)
        if rank == 0:
            threading.Timer(0.3, communicator.abort, ["enough"]).start()
            first = _raised(lambda: communicator.recv(tensor, 1))
            communicator.abort("a second reason")
            return first, _raised(lambda: communicator.send(tensor, 1))
        return _raised(lambda: communicator.recv(tensor, 0)), None


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
    communicator = _connect(box, rank, world_size, operation_timeout_s=0.3)
    kind = None
    if rank == 0:
        kind, _, _ = _raised(lambda: communicator.all_reduce(torch.zeros(1000)))
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


def _close_early(rank, world_size, box):
    with _connect(box, rank, world_size) as communicator:
        tensor = torch.full((20_000_000,), float(rank))
        if rank == world_size - 1:
            time.sleep(0.5)
        communicator.broadcast(tensor, 0)
    return tensor.sum().item()


def test_a_sender_may_close_right_after_its_last_operation():
    assert run_ranks(_close_early, 3, AddressBox(3)) == [0.0, 0.0, 0.0]


def _misuse(rank, world_size, box):
    seen = []
    with _connect(box, rank, world_size) as communicator:
        for tensor in (
            torch.zeros(4, 4).t(),
            torch.zeros(4, 4).to_sparse(),
            torch.zeros(4, device="meta"),
        ):
            for operation in ("broadcast", "send", "recv"):
                call = getattr(communicator, operation)
                seen.append(_raised(lambda c=call, t=tensor: c(t, 1 - rank))[:2])
        good = torch.zeros(4)
        refused = [
            _raised(lambda: communicator.broadcast(good, world_size))[0],
            _raised(lambda: communicator.broadcast(good, True))[0],
            _raised(lambda: communicator.send(good, rank))[0],
            _raised(lambda: communicator.recv(good, -1))[0],
        ]
        with communicator.group():
            refused.append(_raised(lambda: communicator.group().__enter__())[0])
        # None of it was an operation: the communicator still works.
        communicator.all_reduce(good)
    closed = _raised(lambda: communicator.broadcast(good, 0))[:2]
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
    with _connect(box, rank, world_size) as communicator:
        tensor = torch.ones(3)
        communicator.broadcast(tensor, 0)
        communicator.all_reduce(tensor)
        with communicator.group():
            communicator.broadcast(tensor, 0)
    return tensor.tolist()


def test_a_world_of_one_needs_nobody():
    assert run_ranks(_alone, 1, AddressBox(1)) == [[1.0] * 3]
