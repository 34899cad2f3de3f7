"""Senders and receivers in processes of their own, over Gloo."""

from __future__ import annotations

import pytest

from packedcomm import TensorTarget
from tests.helpers import sync_failures, sync_values, syncs
from tests.helpers.ranks import run_ranks

TARGETS = {"in place": TensorTarget, "staged": syncs.staged}


@pytest.mark.fault(13, 31)
@pytest.mark.parametrize("verify", [False, True], ids=["plain", "verified"])
@pytest.mark.parametrize("make_target", TARGETS.values(), ids=TARGETS.keys())
def test_every_version_arrives_bit_exact_on_every_receiver(make_target, verify):
    meeting = syncs.Meeting(3)
    results = run_ranks(syncs.sync_odd_tensors, 3, "gloo", meeting, make_target, {"verify": verify})
    for sent, *received in zip(*results, strict=True):
        for digests, record in received:
            assert digests == sent[0]
            assert record["version"] == sent[1]["version"]
            assert record["epoch"] == sent[1]["epoch"]
            assert record["bytes"] == sent[1]["bytes"]
            assert record["verified"] is verify
    assert [record["version"] for _, record in results[0]] == [0, 1, 2]


@pytest.mark.fault(15)
def test_a_callback_gets_every_version_and_may_keep_its_tensors():
    for verify in (False, True):
        results = run_ranks(syncs.sync_to_callback, 2, "gloo", syncs.Meeting(2), verify)
        assert results[0] == results[1]
        assert [version for version, _ in results[0]] == [5, 9]


@pytest.mark.fault(24)
def test_a_sync_that_changes_nothing_says_so_on_both_sides():
    results = run_ranks(syncs.unchanged_syncs, 2, "gloo", syncs.Meeting(2))
    assert results == [[None, 0, 1], [None, 0, 1]]


def test_the_first_sync_sends_the_manifest_and_later_ones_only_its_digest():
    counts = run_ranks(syncs.manifests_sent, 2, "gloo", syncs.Meeting(2))[0]
    assert counts == [1, 0, 0, 1, 0]


def test_statistics_of_the_change_are_those_of_torch():
    run_ranks(syncs.change_statistics, 3, "gloo", syncs.Meeting(3))


def test_a_background_receiver_updates_a_state_dict_and_tells_its_status():
    run_ranks(syncs.background_receiver, 2, "gloo", syncs.Meeting(2))


def test_a_policy_decides_when_weights_are_sent():
    results = run_ranks(syncs.policy, 2, "gloo", syncs.Meeting(2))
    assert results == [[0, 3, 6, 7], [0, 3, 6, 7]]


def test_fp32_weights_travel_and_arrive_as_bfloat16():
    run_ranks(sync_values.cast_on_the_way, 2, "gloo", syncs.Meeting(2))


def test_a_filtered_sync_says_what_was_left_out():
    run_ranks(sync_values.filtered, 2, "gloo", syncs.Meeting(2))


def test_tied_weights_travel_once_and_arrive_under_both_names():
    run_ranks(sync_values.tied_weights, 2, "gloo", syncs.Meeting(2))


@pytest.mark.fault(19)
def test_staged_weights_stay_whole_until_the_commit():
    run_ranks(sync_values.staged_until_commit, 2, "gloo", syncs.Meeting(2))


@pytest.mark.fault(16)
def test_tensors_of_the_host_and_sources_changed_after_the_sync_arrive_right():
    run_ranks(sync_values.offloaded_source, 2, "gloo", syncs.Meeting(2))
    run_ranks(sync_values.rewritten_right_after_the_sync, 2, "gloo", syncs.Meeting(2))


def test_hostile_launcher_variables_change_nothing():
    results = run_ranks(syncs.hostile_environment, 2, "gloo", syncs.Meeting(2))
    assert results[0] == results[1]


@pytest.mark.fault(10, 11)
@pytest.mark.parametrize("case", sync_failures.REFUSALS)
def test_what_does_not_fit_is_refused_before_data_and_the_session_goes_on(case):
    run_ranks(sync_failures.refusal, 3, "gloo", syncs.Meeting(3), case)


@pytest.mark.fault(7)
def test_a_callback_that_raises_reaches_the_sender_with_its_traceback():
    run_ranks(sync_failures.raising_callback, 3, "gloo", syncs.Meeting(3))


@pytest.mark.fault(9)
def test_an_iterator_that_raises_half_way_reaches_every_receiver():
    run_ranks(sync_failures.raising_source, 3, "gloo", syncs.Meeting(3))


@pytest.mark.fault(8)
def test_a_failure_of_a_background_receiver_shows_on_status_and_at_the_sender():
    run_ranks(sync_failures.raising_on_update, 2, "gloo", syncs.Meeting(2))


def test_wrong_bytes_are_found_before_the_commit():
    run_ranks(sync_failures.corrupted_destination, 2, "gloo", syncs.Meeting(2))


@pytest.mark.fault(2)
def test_a_receiver_that_dies_in_the_middle_is_noticed_by_all_others():
    seconds = run_ranks(sync_failures.dying_receiver, 3, "gloo", syncs.Meeting(3), lost=[2])
    assert max(seconds[:2]) < 10
