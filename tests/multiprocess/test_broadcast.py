"""Producer and consumer between processes, over Gloo."""

from __future__ import annotations

import pytest

from tests.helpers import scenarios
from tests.helpers.ranks import AddressBox, run_ranks

SMALL = {"buffer_size_bytes": 300}
MEDIUM = {"buffer_size_bytes": 1 << 20, "num_buffers": 3}
NATIVE = {"buffer_size_bytes": 1 << 20, "wire_format": "native"}
SINGLE = {"buffer_size_bytes": 1 << 20, "num_buffers": 1}


@pytest.mark.fault(13, 31)
@pytest.mark.parametrize("in_place", [False, True], ids=["callback", "in place"])
@pytest.mark.parametrize(
    ("world_size", "src", "options"),
    [(2, 0, SMALL), (2, 1, SINGLE), (3, 1, MEDIUM), (2, 0, NATIVE), (4, 2, NATIVE)],
)
def test_odd_tensors_arrive_bit_exact_on_every_rank(world_size, src, options, in_place):
    box = AddressBox(world_size)
    results = run_ranks(scenarios.send_and_receive, world_size, "gloo", box, src, in_place, options)
    assert all(result == results[src] for result in results)
    assert len(results[0]) > 30


def test_the_one_by_one_path_agrees():
    results = run_ranks(scenarios.one_by_one, 3, "gloo", AddressBox(3))
    assert results[0] == results[1] == results[2]


@pytest.mark.fault(15)
@pytest.mark.parametrize("options", [MEDIUM, NATIVE], ids=["vllm", "native"])
def test_kept_callback_tensors_survive_later_chunks_and_syncs(options):
    results = run_ranks(scenarios.keep_callback_tensors, 3, "gloo", AddressBox(3), options)
    assert results[0] == results[1] == results[2]


@pytest.mark.fault(14, 15, 16)
def test_slow_producers_and_consumers_and_sources_changed_after_the_return():
    results = run_ranks(scenarios.slow_sides, 3, "gloo", AddressBox(3))
    assert results[0] == results[1] == results[2]


def test_a_late_last_tensor_is_there_on_return_and_reused_memory_is_sent_before():
    results = run_ranks(
        scenarios.late_and_reused, 2, "gloo", AddressBox(2), {"buffer_size_bytes": 1 << 20}
    )
    assert results[0] == results[1]


def test_two_groups_at_once_in_opposite_directions():
    boxes = (AddressBox(2), AddressBox(2))
    results = run_ranks(scenarios.two_groups_at_once, 2, "gloo", boxes)
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


@pytest.mark.fault(18)
def test_fifty_rounds_of_connect_sync_close_do_not_grow():
    for growth in run_ranks(
        scenarios.create_and_destroy, 2, "gloo", AddressBox(2), 50, deadline_s=120
    ):
        assert growth["descriptors"] <= 0
        assert growth["threads"] <= 0
        assert growth["resident_bytes"] < 16 << 20


@pytest.mark.fault(9)
def test_an_iterator_that_raises_reaches_every_receiver():
    results = run_ranks(scenarios.failing_iterator, 3, "gloo", AddressBox(3))
    assert results == ["RuntimeError", "PeerLost", "PeerLost"]


def test_a_tensor_on_the_wrong_device_reaches_every_rank_by_a_typed_error():
    results = run_ranks(scenarios.tensor_on_the_wrong_device, 2, "gloo", AddressBox(2))
    assert results[0][0] == "TensorError"
    assert "culprit" in results[0][1]
    assert results[1][0] == "PeerLost"
