"""Digests that the copy engine makes while it copies, and the vector loops behind them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm import _native
from packedcomm.copying import BufferPlan
from packedcomm.digests import DigestPlan, digest_tensors
from packedcomm.errors import ArgumentError
from tests.helpers import digest_checks
from tests.helpers.copy_checks import cut_tensors, written_out_digest
from tests.helpers.tensors import content, random_bits

CPU = torch.device("cpu")
TENSORS = st.lists(cut_tensors(), min_size=0, max_size=3)
_MASK = (1 << 64) - 1


@pytest.mark.parametrize("path", _native.digest_paths())
@settings(max_examples=150, deadline=None)
@given(nbytes=st.integers(0, 1500), lead=st.integers(0, 70), first=st.integers(0, (1 << 61) - 1))
def test_every_loop_gives_the_written_out_digest(path, nbytes, lead, first):
    raw = random_bits((nbytes + lead,), torch.uint8, nbytes)[lead:]
    found = _native.digest_bytes_by(path, raw.data_ptr(), nbytes, 0)
    assert (found + _length_term(nbytes)) & _MASK == written_out_digest(content(raw))
    portable = _native.digest_bytes_by("portable", raw.data_ptr(), nbytes, first)
    assert _native.digest_bytes_by(path, raw.data_ptr(), nbytes, first) == portable


def _length_term(nbytes: int) -> int:
    """What is left of the digest of zeros when their words are taken away."""
    zeros = torch.zeros(max(nbytes, 1), dtype=torch.uint8)
    words = _native.digest_bytes_by("portable", zeros.data_ptr(), nbytes, 0)
    return (written_out_digest(bytes(nbytes)) - words) & _MASK


def test_a_loop_that_the_processor_lacks_is_refused():
    with pytest.raises(ArgumentError, match="abacus"):
        _native.digest_bytes_by("abacus", 0, 0, 0)


@pytest.mark.parametrize("into_buffer", [True, False])
@pytest.mark.parametrize("threads", [1, 2, 3, 8])
def test_packed_and_unpacked_tensors_have_their_digests(threads, into_buffer):
    for lead, offset in ((0, 0), (0, 5), (3, 0), (7, 16)):
        digest_checks.check_packed("cpu", lead, offset, into_buffer, threads)


def test_copies_that_write_around_the_caches_have_their_digests():
    tensors = [random_bits((n,), torch.uint8, n) for n in (1 << 20, 70_000_001)]
    plan = BufferPlan(CPU, into_buffer=True)
    plan.add_tensors(tensors, [3, 3 + (1 << 20)], [t.nbytes for t in tensors], None, [0, 1])
    sums = torch.zeros(2, dtype=torch.int64)
    plan.run(torch.empty(plan.extent, dtype=torch.uint8), sums)
    assert digest_checks.unsigned(sums) == digest_tensors(tensors)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.integers(0, 17), st.booleans())
def test_parts_of_any_kind_have_right_digests_or_none(tensors, lead, into_buffer):
    digest_checks.check_cut(tensors, "cpu", into_buffer, lead)


def test_shards_make_up_one_digest():
    digest_checks.check_shards("cpu")


@pytest.mark.parametrize("lead", [0, 1, 4, 8, 16])
def test_cast_values_are_digested_as_they_are_written(lead):
    digest_checks.check_cast("cpu", lead)


def test_many_small_tensors_each_have_a_digest():
    tensors = [random_bits((n % 37 + 1,), torch.int16, n) for n in range(3000)]
    sizes = [t.nbytes for t in tensors]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    plan = BufferPlan(CPU, into_buffer=True)
    plan.add_tensors(tensors, offsets, sizes, None, range(len(tensors)))
    sums = torch.zeros(len(tensors), dtype=torch.int64)
    plan.run(torch.empty(plan.extent, dtype=torch.uint8), sums)
    assert digest_checks.unsigned(sums) == digest_tensors(tensors)


def test_strided_tensors_are_left_to_a_pass():
    matrix = random_bits((64, 64), torch.float32)
    plan = BufferPlan(CPU, into_buffer=True)
    plan.add_tensors([matrix.t(), matrix], [0, 16384], [16384] * 2, None, [0, 1])
    assert plan.digested == [1]


def test_a_run_that_asks_for_no_digests_makes_none():
    tensor = random_bits((1000,), torch.uint8)
    plan = BufferPlan(CPU, into_buffer=True)
    plan.add_tensors([tensor], [0], [1000], None, [0])
    buffer = torch.empty(1000, dtype=torch.uint8)
    plan.run(buffer)
    assert torch.equal(buffer, tensor)


@pytest.mark.parametrize(
    "digests",
    [torch.zeros(1, dtype=torch.int64), torch.zeros(2), torch.zeros(4, dtype=torch.int64)[::2]],
    ids=["too few", "of another dtype", "strided"],
)
def test_memory_that_is_no_place_for_digests_is_refused(digests):
    tensors = [random_bits((8,), torch.uint8, seed) for seed in range(2)]
    plan = BufferPlan(CPU, into_buffer=True)
    plan.add_tensors(tensors, [0, 8], [8, 8], None, [0, 1])
    with pytest.raises(ArgumentError, match="digests must be 2 or more contiguous int64 on cpu"):
        plan.run(torch.empty(16, dtype=torch.uint8), digests)
    with pytest.raises(ArgumentError, match="digests must be 2"):
        DigestPlan(tensors).run(digests)


def test_a_plan_adds_its_digests_to_numbers_of_choice():
    tensors = [random_bits((n,), torch.uint8, n) for n in (0, 9, 100_000)]
    sums = torch.ones(7, dtype=torch.int64)
    assert DigestPlan(tensors, numbers=[5, 0, 3]).run(sums) is sums
    expected = [1] * 7
    for number, digest in zip([5, 0, 3], digest_tensors(tensors), strict=True):
        expected[number] = (digest + 1) & _MASK
    assert digest_checks.unsigned(sums) == expected
