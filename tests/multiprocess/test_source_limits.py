"""How long the processes of a source wait for each other, and which time counts."""

from __future__ import annotations

import time
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from packedcomm.errors import DeadlineExceeded, RemoteError
from packedcomm.sources import DTensorSource, Rename, gathering
from tests.helpers.operations import raised
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_models import join
from tests.helpers.slow_rounds import slow_rounds

TENSORS = 6
GATHER_S = 1.5
# More than a wait that begins after its deadline has.
ROUND_S = 0.15


def _source(**options):
    mesh = init_device_mesh("cpu", (2,))
    # Every tensor is a round of its own.
    gathering._ROUND_BYTES = 64
    tensors = {
        f"w{index}": distribute_tensor(torch.ones(8, 4), mesh, [Shard(0)])
        for index in range(TENSORS)
    }
    return DTensorSource(tensors, **options)


def _slow_taker(rank, world_size, store, task):
    """The leader's taker needs longer for one item than a gather may take."""
    join(rank, 2, store)
    if rank == 1:
        slow_rounds(ROUND_S)
    source = _source()
    source.set_timeout(GATHER_S, 20.0)
    snapshot = source.snapshot()
    source.share(None)
    gathered = source.gather(snapshot)

    def take():
        for number, _ in enumerate(gathered):
            if rank == 0 and number == 1:
                if task == "slow source":
                    # What the source itself has left isn't enough for the rest.
                    source._exchange._bounded._deadline = time.monotonic() + 0.1
                else:
                    time.sleep(GATHER_S + 0.2)
                if task == "close":
                    gathered.close()
                elif task != "take":
                    source.set_timeout(GATHER_S, 20.0)

    return raised(take)[:2], raised(lambda: source.share("x"))[:2], raised(source.snapshot)[:2]


def test_time_in_the_hands_of_the_taker_is_not_the_gathers(tmp_path):
    assert run_ranks(_slow_taker, 2, str(tmp_path / "store"), "take") == [((None, ""),) * 3] * 2


def test_what_is_closed_late_has_time_for_its_rest(tmp_path):
    assert run_ranks(_slow_taker, 2, str(tmp_path / "store"), "close") == [((None, ""),) * 3] * 2


def test_a_gather_that_is_under_way_can_be_given_time_anew(tmp_path):
    results = run_ranks(_slow_taker, 2, str(tmp_path / "store"), "slow source")
    assert results == [((None, ""),) * 3] * 2


def _no_word(rank, world_size, store):
    join(rank, 2, store)
    group = dist.new_group(timeout=timedelta(seconds=1.0))
    source = DTensorSource({"w": torch.ones(2)}, group=group)
    if rank == 0:
        time.sleep(2.5)
        return None
    return raised(source.snapshot)


def test_before_the_leaders_first_word_torchs_own_limit_holds(tmp_path):
    _, (kind, text, seconds) = run_ranks(_no_word, 2, str(tmp_path / "store"))
    assert kind is DeadlineExceeded
    assert text.startswith("snapshot: given up (")
    assert "waiting for rank 0 of the source" in text
    assert "not done within" not in text
    assert seconds < 2.5


def _late_leader(rank, world_size, store, failing):
    """The leader begins the next sync later than the others may wait for it within one."""
    join(rank, 2, store)
    names = {f"w{index}": f"v{index}" for index in range(TENSORS)}
    known = dict(names)
    if failing and rank == 1:
        del known["w3"]
    source = _source(transforms=[Rename(lambda name: known[name])])
    source.set_timeout(10.0, 0.5)
    first = raised(source.snapshot)[0]
    known.update(names)
    if not failing:
        list(source.gather(source.snapshot()))
        source.set_timeout(10.0, None)
        source.share(None)
    if rank == 0:
        time.sleep(1.2)
    source.set_timeout(10.0, 0.5)
    begun = raised(source.snapshot)[:2]
    if rank == 0:
        time.sleep(1.2)
    return first, begun, raised(lambda: source.share(None))[:2]


def test_the_leader_may_take_its_time_between_syncs_but_not_within_one(tmp_path):
    results = run_ranks(_late_leader, 2, str(tmp_path / "store"), False)
    assert [begun for _, begun, _ in results] == [(None, "")] * 2
    kind, text = results[1][2]
    assert kind is DeadlineExceeded
    assert "share: not done within 0.5 s, waiting for rank 0 of the source" in text


def test_a_snapshot_that_fails_is_the_end_of_its_sync(tmp_path):
    results = run_ranks(_late_leader, 2, str(tmp_path / "store"), True)
    assert [first for first, *_ in results] == [RemoteError] * 2
    assert [begun for _, begun, _ in results] == [(None, "")] * 2
