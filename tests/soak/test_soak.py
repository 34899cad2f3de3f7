"""The short form of `make soak`: the same code, a few times."""

from __future__ import annotations

import pytest

from tests.soak.kills import soak_kills
from tests.soak.repeats import PART, soak_connections, soak_syncs
from tests.soak.run import MOST_SECONDS


@pytest.mark.fault(2, 19, 20)
def test_receivers_killed_at_random_moments_leave_the_others_whole():
    seen = soak_kills(6)
    assert seen.wrong == []
    assert seen.count == 6
    assert max(seen.sender_s + seen.survivors_s, default=0.0) < MOST_SECONDS


@pytest.mark.fault(18)
def test_many_syncs_need_no_more_memory_files_and_threads():
    seen = soak_syncs(50, PART)
    assert seen["grown"] == []
    assert seen["wrong"] == 0


@pytest.mark.fault(18)
def test_many_sessions_need_no_more_memory_files_and_threads():
    seen = soak_connections(10)
    assert seen["grown"] == []
    assert seen["wrong"] == 0
