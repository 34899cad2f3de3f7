"""One process of a sharded trainer fails: all of them must learn why, and none may wait."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Shard, distribute_tensor

from packedcomm.errors import LayoutError, RemoteError, SessionStateError, TensorError
from packedcomm.sources import Cast, DTensorSource, Rename, gathering, rounds
from tests.helpers.operations import raised
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_models import join
from tests.helpers.source_parts import everything

WORLD = 3
TENSORS = 6

# Far below the time after which torch.distributed gives up.
PROMPT_S = 20.0


def _tensors(world_size):
    mesh = init_device_mesh("cpu", (world_size,))
    torch.manual_seed(0)
    return {
        f"w{index}": distribute_tensor(torch.rand(9, 4), mesh, [Shard(0)])
        for index in range(TENSORS)
    }


def _failing(monkey, call, error, **counted):
    """Make the n-th call of a function fail, of those with certain options."""
    real = getattr(*monkey)
    calls = []

    def fail(*arguments, **options):
        if counted.items() <= options.items():
            calls.append(None)
            if len(calls) == call:
                raise error
        return real(*arguments, **options)

    setattr(*monkey, fail)
    return lambda: setattr(*monkey, real)


def _gather_fails(rank, world_size, store, failing, error):
    join(rank, world_size, store)
    gathering._ROUND_BYTES = 64
    source = DTensorSource(_tensors(world_size))
    snapshot = source.snapshot()
    restore = list
    if rank in failing:
        restore = _failing((rounds.Gathered, "local"), 4, error)
    begin = time.monotonic()
    gathered = source.gather(snapshot)
    taken = []

    def take():
        for parts in gathered:
            taken.append(len(parts))

    found = raised(take)[:2]
    seconds = time.monotonic() - begin
    shared = source.share("told" if rank == 0 else None)
    # What has failed once may be gathered again.
    restore()
    again = len(everything(source))
    dist.destroy_process_group()
    return found, taken, seconds, shared, again


@pytest.mark.parametrize("failing", [(0,), (1,), (2,), (1, 2)], ids=str)
def test_a_shard_that_one_process_cannot_read_is_raised_by_all(failing, tmp_path):
    error = torch.OutOfMemoryError("no memory for the shard")
    results = run_ranks(_gather_fails, WORLD, str(tmp_path / "store"), failing, error)
    for found, _, seconds, shared, _ in results:
        assert found[0] is RemoteError
        for rank in failing:
            assert (
                f"rank {rank} of the source: OutOfMemoryError: no memory for the shard" in found[1]
            )
        assert seconds < PROMPT_S
        assert shared == "told"
    assert [again for *_, again in results] == [TENSORS, 0, 0]
    for rank in range(WORLD):
        # Whoever hasn't failed takes everything.
        assert (len(results[rank][1]) == TENSORS) is (rank not in failing)


def test_an_error_of_packedcomm_keeps_its_class_on_all_processes(tmp_path):
    results = run_ranks(
        _gather_fails, WORLD, str(tmp_path / "store"), (2,), TensorError("shard: is gone")
    )
    assert [found for found, *_ in results] == [
        (TensorError, "rank 2 of the source: shard: is gone")
    ] * WORLD


def _no_memory(rank, world_size, store):
    """The leader has no memory at first for what arrives, another one none for zeros."""
    join(rank, world_size, store)
    gathering._ROUND_BYTES = 64
    source = DTensorSource(_tensors(world_size), transforms=[Cast("bfloat16")])
    snapshot = source.snapshot()
    restore = []
    error = torch.OutOfMemoryError("full")
    if rank == 0:
        restore.append(_failing((torch, "empty"), 3, error, dtype=torch.bfloat16))
    if rank == 1:
        restore.append(_failing((rounds.Gathered, "local"), 2, error))
        restore.append(_failing((torch, "zeros"), 1, error, dtype=torch.bfloat16))
    gathered = source.gather(snapshot)
    found = raised(lambda: list(gathered))[:2]
    for put_back in restore:
        put_back()
    again = len(everything(source))
    dist.destroy_process_group()
    return found, again


def test_without_memory_for_stand_ins_all_still_end(tmp_path):
    results = run_ranks(_no_memory, WORLD, str(tmp_path / "store"))
    for found, _ in results:
        assert found[0] is RemoteError
        assert "rank 0 of the source: OutOfMemoryError: full" in found[1]
        assert "rank 1 of the source: OutOfMemoryError: full" in found[1]
    assert [again for _, again in results] == [TENSORS, 0, 0]


def _lost_shard(rank, world_size, store):
    join(rank, world_size, store)
    tensors = _tensors(world_size)
    source = DTensorSource(tensors)
    snapshot = source.snapshot()
    if rank == 1:
        tensors["w2"]._local_tensor.data = torch.empty(0)
    found = raised(lambda: list(source.gather(snapshot)))[:2]
    dist.destroy_process_group()
    return found


def test_a_shard_lost_since_the_snapshot_is_raised_by_all(tmp_path):
    for kind, text in run_ranks(_lost_shard, WORLD, str(tmp_path / "store")):
        assert kind is LayoutError
        assert "rank 1 of the source: tensor 'w2': its shard of shape (3, 4) has become" in text


def _stale(rank, world_size, store):
    """A snapshot that only one process has replaced, since only its memory has moved."""
    join(rank, world_size, store)
    tensors = _tensors(world_size)
    source = DTensorSource(tensors)
    snapshot = source.snapshot()
    if rank == 2:
        tensors["w0"]._local_tensor.data = tensors["w0"]._local_tensor.clone()
    latest = source.snapshot()
    assert (latest is snapshot) is (rank != 2)
    found = raised(lambda: list(source.gather(snapshot)))[:2]
    dist.destroy_process_group()
    return found


def test_a_stale_snapshot_on_one_process_is_raised_by_all(tmp_path):
    for kind, text in run_ranks(_stale, WORLD, str(tmp_path / "store")):
        assert kind is SessionStateError
        assert "rank 2 of the source: gather: expected the source's latest snapshot" in text


def _closed(rank, world_size, store):
    """A leader that stops early isn't told what failed elsewhere; the others are."""
    join(rank, world_size, store)
    gathering._ROUND_BYTES = 64
    source = DTensorSource(_tensors(world_size))
    snapshot = source.snapshot()
    if rank == 1:
        _failing((rounds.Gathered, "local"), 3, ValueError("odd"))
    gathered = source.gather(snapshot)
    if rank == 0:
        next(gathered)
        gathered.close()
        found = None
    else:
        found = raised(lambda: list(gathered))[0]
    shared = source.share("stopped")
    dist.destroy_process_group()
    return found, shared


def test_closing_early_keeps_the_processes_together(tmp_path):
    results = run_ranks(_closed, WORLD, str(tmp_path / "store"))
    assert results == [(None, "stopped"), (RemoteError, "stopped"), (RemoteError, "stopped")]


def _snapshot_fails(rank, world_size, store):
    join(rank, world_size, store)
    names = {f"w{index}": f"v{index}" for index in range(TENSORS)}
    known = dict(names)
    if rank == 1:
        del known["w3"]
    source = DTensorSource(_tensors(world_size), transforms=[Rename(lambda name: known[name])])
    begin = time.monotonic()
    kind, text, *_ = raised(source.snapshot)
    seconds = time.monotonic() - begin
    known.update(names)
    again = len(source.snapshot().manifest)
    dist.destroy_process_group()
    return kind, text, seconds, again


def test_a_foreign_error_in_one_snapshot_is_raised_by_all(tmp_path):
    for kind, text, seconds, again in run_ranks(_snapshot_fails, WORLD, str(tmp_path / "store")):
        assert kind is RemoteError
        assert text == "rank 1 of the source: KeyError: 'w3'"
        assert seconds < PROMPT_S
        assert again == TENSORS


def _reduced(rank, world_size, store):
    """Of partial sums, which torch gathers, one process can't make the sum."""
    join(rank, world_size, store)
    mesh = init_device_mesh("cpu", (world_size,))
    tensors = _tensors(world_size)
    tensors["sum"] = DTensor.from_local(torch.ones(2), mesh, [Partial()])
    source = DTensorSource(tensors)
    snapshot = source.snapshot()
    if rank == 1:
        _failing((rounds.Gathered, "local"), 1, ValueError("odd"))
    found = raised(lambda: list(source.gather(snapshot)))[0]
    dist.destroy_process_group()
    return found


def test_partial_sums_are_reduced_by_processes_that_have_failed(tmp_path):
    assert run_ranks(_reduced, WORLD, str(tmp_path / "store")) == [RemoteError] * WORLD


def _carriers(rank, world_size, store):
    join(rank, world_size, store)
    exchange = DTensorSource({"a": torch.zeros(1)})._exchange
    carriers = [str(exchange.carrier(torch.device(d))) for d in ("cpu", "cuda")]
    dist.destroy_process_group()
    return carriers


def test_gloo_carries_what_lies_on_gpus_through_host_memory(tmp_path):
    assert run_ranks(_carriers, 2, str(tmp_path / "store")) == [["cpu", "cpu"]] * 2
