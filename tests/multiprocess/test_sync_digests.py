"""Verification of everything that a sync can move, over Gloo."""

from __future__ import annotations

import pytest

from tests.helpers import sync_digests, syncs
from tests.helpers.ranks import run_ranks


@pytest.mark.parametrize("options", sync_digests.FORMATS.values(), ids=sync_digests.FORMATS.keys())
def test_sources_of_every_kind_are_verified_in_targets_of_every_kind(options):
    run_ranks(sync_digests.verified_syncs, 2, "gloo", syncs.Meeting(2), options)


@pytest.mark.parametrize("wire_format", ["native", "vllm"])
def test_a_byte_that_changes_on_its_way_is_noticed_whatever_the_target(wire_format):
    options = {"wire_format": wire_format}
    run_ranks(sync_digests.flipped_byte, 2, "gloo", syncs.Meeting(2), options)
