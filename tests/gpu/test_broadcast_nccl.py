"""Producer and consumer between GPUs over NCCL, and with vLLM's real code on the other end."""

from __future__ import annotations

import pytest

from tests.helpers import scenarios, vllm_scenarios
from tests.helpers.ranks import AddressBox, run_ranks

SMALL = {"buffer_size_bytes": 300}
MEDIUM = {"buffer_size_bytes": 1 << 20, "num_buffers": 3}
NATIVE = {"buffer_size_bytes": 1 << 20, "wire_format": "native"}
SINGLE = {"buffer_size_bytes": 1 << 20, "num_buffers": 1}

PAIRS = [
    pytest.param(2, 0, SMALL, marks=pytest.mark.gpu(2)),
    pytest.param(2, 1, SINGLE, marks=pytest.mark.gpu(2)),
    pytest.param(2, 0, NATIVE, marks=pytest.mark.gpu(2)),
    pytest.param(3, 1, MEDIUM, marks=pytest.mark.gpu(3)),
    pytest.param(4, 2, NATIVE, marks=pytest.mark.gpu(4)),
]


@pytest.mark.fault(13, 31)
@pytest.mark.parametrize("in_place", [False, True], ids=["callback", "in place"])
@pytest.mark.parametrize(("world_size", "src", "options"), PAIRS)
def test_odd_tensors_arrive_bit_exact_on_every_rank(world_size, src, options, in_place):
    box = AddressBox(world_size)
    results = run_ranks(scenarios.send_and_receive, world_size, "nccl", box, src, in_place, options)
    assert all(result == results[src] for result in results)
    assert len(results[0]) > 30


@pytest.mark.gpu(2)
def test_the_one_by_one_path_agrees():
    results = run_ranks(scenarios.one_by_one, 2, "nccl", AddressBox(2))
    assert results[0] == results[1]


@pytest.mark.fault(15)
@pytest.mark.gpu(2)
@pytest.mark.parametrize("options", [MEDIUM, NATIVE], ids=["vllm", "native"])
def test_kept_callback_tensors_survive_later_chunks_and_syncs(options):
    results = run_ranks(scenarios.keep_callback_tensors, 2, "nccl", AddressBox(2), options)
    assert results[0] == results[1]


@pytest.mark.fault(14, 15, 16)
@pytest.mark.gpu(2)
def test_slow_producers_and_consumers_and_sources_changed_after_the_return():
    results = run_ranks(scenarios.slow_sides, 2, "nccl", AddressBox(2))
    assert results[0] == results[1]


@pytest.mark.gpu(2)
def test_a_late_last_tensor_is_there_on_return_and_reused_memory_is_sent_before():
    results = run_ranks(
        scenarios.late_and_reused, 2, "nccl", AddressBox(2), {"buffer_size_bytes": 1 << 20}
    )
    assert results[0] == results[1]


@pytest.mark.gpu(2)
def test_two_groups_at_once_in_opposite_directions():
    boxes = (AddressBox(2), AddressBox(2))
    results = run_ranks(scenarios.two_groups_at_once, 2, "nccl", boxes)
    assert results[0] == results[1]
    assert results[0][0] != results[0][1]


@pytest.mark.gpu(2)
def test_fifty_rounds_of_connect_sync_close_do_not_grow():
    for growth in run_ranks(
        scenarios.create_and_destroy, 2, "nccl", AddressBox(2), 50, deadline_s=150
    ):
        assert growth["descriptors"] <= 0
        assert growth["threads"] <= 0
        assert growth["resident_bytes"] < 64 << 20
        assert growth["device_bytes"] < 32 << 20
        assert growth["allocated_bytes"] <= 0


@pytest.mark.gpu(2)
def test_a_tensor_on_the_wrong_device_is_a_typed_error_before_its_chunk():
    results = run_ranks(scenarios.tensor_on_the_wrong_device, 2, "nccl", AddressBox(2), lost=(1,))
    assert results[0][0] == "TensorError"
    assert "culprit" in results[0][1]


@pytest.mark.gpu(2)
@pytest.mark.parametrize("sender", ["ours", "theirs"])
@pytest.mark.parametrize("bootstrap", ["ours", "theirs"])
@pytest.mark.parametrize("buffer_size", [300, 1 << 20])
def test_either_end_may_be_vllms_own_code(sender, bootstrap, buffer_size):
    results = run_ranks(vllm_scenarios.with_vllm, 2, AddressBox(2), sender, bootstrap, buffer_size)
    assert results[0] == results[1]
    assert len(results[0]) > 20
