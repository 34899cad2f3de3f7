"""Sessions between GPUs when something fails in the middle of a sync."""

from __future__ import annotations

import pytest

from packedcomm.errors import DeadlineExceeded, PeerLost
from tests.helpers import faults
from tests.helpers.ranks import run_ranks

pytestmark = pytest.mark.gpu(2)


@pytest.mark.fault(2)
def test_a_killed_receiver_is_named_within_two_seconds_and_another_takes_its_place():
    (kind, text, seconds), *_ = run_ranks(
        faults.fault_of_a_receiver, 3, "nccl", faults.Addresses(), "killed", lost=[1]
    )
    assert kind is PeerLost
    assert "receiver rank 1" in text
    assert "in chunk" in text
    assert seconds < 2


@pytest.mark.fault(3)
def test_a_stopped_receiver_is_late_and_not_dead_and_another_takes_its_place():
    (kind, text, seconds), *_ = run_ranks(
        faults.fault_of_a_receiver, 3, "nccl", faults.Addresses(), "stopped", lost=[1]
    )
    assert kind is DeadlineExceeded
    assert "receiver rank 1" in text
    assert seconds < 8


@pytest.mark.fault(19)
@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
@pytest.mark.parametrize("how", ["killed", "stopped"])
def test_a_receiver_that_loses_its_sender_is_torn_or_keeps_the_old_weights(staged, how):
    _, (kind, seconds) = run_ranks(
        faults.lost_sender, 2, "nccl", faults.Addresses(), staged, how, lost=[0]
    )
    assert kind is (PeerLost if how == "killed" else DeadlineExceeded)
    assert seconds < (3 if how == "killed" else 9)


@pytest.mark.fault(17)
def test_no_memory_for_buffers_is_an_error_on_both_sides_and_smaller_ones_work():
    run_ranks(faults.no_memory_for_buffers, 2, "nccl", faults.Addresses())


@pytest.mark.fault(18)
def test_failures_leave_no_memory_and_no_threads_behind():
    for early, late in run_ranks(faults.many_failures, 2, "nccl", faults.Addresses()):
        assert late[0] <= early[0] + (64 << 20), "memory of the GPU"
        assert late[1] <= early[1] + 4, "threads"
