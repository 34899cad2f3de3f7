"""Senders and receivers in processes of their own, over NCCL."""

from __future__ import annotations

from functools import partial

import pytest

from packedcomm import TensorTarget
from tests.helpers import sync_failures, sync_values, syncs
from tests.helpers.ranks import run_ranks

TARGETS = {"in place": TensorTarget, "staged": syncs.staged}

pytestmark = pytest.mark.gpu(2)


@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@pytest.mark.parametrize("make_target", TARGETS.values(), ids=TARGETS.keys())
def test_every_version_arrives_bit_exact(make_target, verify):
    results = run_ranks(
        syncs.sync_odd_tensors, 2, "nccl", syncs.Meeting(2), make_target, {"verify": verify}
    )
    for (sent, _), (received, record) in zip(*results, strict=True):
        assert received == sent
        assert record["transport"] == "nccl"


@pytest.mark.parametrize(
    "scenario",
    [
        syncs.change_statistics,
        syncs.background_receiver,
        sync_values.cast_on_the_way,
        sync_values.tied_weights,
        sync_values.staged_until_commit,
        sync_values.offloaded_source,
        sync_values.rewritten_right_after_the_sync,
        sync_failures.raising_callback,
        sync_failures.raising_source,
        sync_failures.corrupted_destination,
    ],
    ids=lambda scenario: scenario.__name__,
)
def test_scenarios_of_the_cpu_hold_on_gpus(scenario):
    run_ranks(scenario, 2, "nccl", syncs.Meeting(2))


@pytest.mark.fault(26)
@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
def test_a_graph_that_was_captured_before_sees_what_is_synced(staged):
    scenario = partial(sync_values.captured_weights, staged=staged)
    run_ranks(scenario, 2, "nccl", syncs.Meeting(2))


def test_callbacks_keep_their_tensors():
    for verify in (False, True):
        results = run_ranks(syncs.sync_to_callback, 2, "nccl", syncs.Meeting(2), verify)
        assert results[0] == results[1]


def test_a_sync_that_changes_nothing_says_so():
    results = run_ranks(syncs.unchanged_syncs, 2, "nccl", syncs.Meeting(2))
    assert results == [[None, 0, 1], [None, 0, 1]]


@pytest.mark.parametrize("case", ["shape", "missing"])
def test_what_does_not_fit_is_refused_before_data(case):
    run_ranks(sync_failures.refusal, 2, "nccl", syncs.Meeting(2), case)


def test_a_receiver_that_dies_in_the_middle_is_noticed():
    seconds = run_ranks(sync_failures.dying_receiver, 2, "nccl", syncs.Meeting(2), lost=[1])
    assert seconds[0] < 15


@pytest.mark.gpu(3)
def test_several_receivers_over_nccl():
    results = run_ranks(
        syncs.sync_odd_tensors, 3, "nccl", syncs.Meeting(3), syncs.staged, {"verify": True}
    )
    for (sent, _), (first, _), (second, _) in zip(*results, strict=True):
        assert first == second == sent
