"""Digests that the copy kernel makes while it copies."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packedcomm.copying import BufferPlan
from packedcomm.digests import DigestPlan, digest_tensors
from tests.helpers import digest_checks
from tests.helpers.copy_checks import cut_tensors
from tests.helpers.tensors import random_bits

pytestmark = pytest.mark.gpu(1)

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TENSORS = st.lists(cut_tensors(), min_size=0, max_size=3)
DEVICE = "cuda:0"


@pytest.mark.parametrize("into_buffer", [True, False])
@pytest.mark.parametrize("blocks", [0, 1, 64])
def test_packed_and_unpacked_tensors_have_their_digests(blocks, into_buffer):
    for lead in (0, 1, 3, 4, 8, 13, 16):
        for offset in (0, 5, 8, 16):
            digest_checks.check_packed(DEVICE, lead, offset, into_buffer, 0, blocks)


@EXAMPLES
@given(TENSORS, st.integers(0, 17), st.booleans())
def test_parts_of_any_kind_have_right_digests_or_none(tensors, lead, into_buffer):
    digest_checks.check_cut(tensors, DEVICE, into_buffer, lead)


def test_shards_make_up_one_digest():
    digest_checks.check_shards(DEVICE)


@pytest.mark.parametrize("lead", [0, 1, 2, 4, 8, 12, 16])
def test_cast_values_are_digested_as_they_are_written(lead):
    digest_checks.check_cast(DEVICE, lead)


def test_many_aligned_tensors_of_many_tiles_have_the_digests_of_the_cpu():
    tensors = [random_bits((n * 99_991,), torch.uint8, n) for n in range(1, 40)]
    on_gpu = [t.to(DEVICE) for t in tensors]
    offsets = [0]
    for tensor in tensors[:-1]:
        offsets.append(-(-(offsets[-1] + tensor.nbytes) // 16) * 16)
    plan = BufferPlan(torch.device(DEVICE), into_buffer=True, blocks=64)
    plan.add_tensors(on_gpu, offsets, [t.nbytes for t in tensors], None, range(len(tensors)))
    buffer = torch.zeros(plan.extent, dtype=torch.uint8, device=DEVICE)
    for _ in range(3):
        sums = torch.zeros(len(tensors), dtype=torch.int64, device=DEVICE)
        plan.run(buffer, sums)
        assert digest_checks.unsigned(sums) == digest_tensors(tensors)
    for tensor, begin in zip(on_gpu, offsets, strict=True):
        assert torch.equal(tensor, buffer[begin : begin + tensor.nbytes])
    sums.zero_()
    buffer.zero_()
    plan.run(buffer)
    assert not sums.any()
    assert torch.equal(on_gpu[-1], buffer[offsets[-1] : offsets[-1] + tensors[-1].nbytes])


@pytest.mark.parametrize("blocks", [0, 1, 7, 64])
def test_a_pass_with_a_narrow_grid_adds_to_numbers_of_choice(blocks):
    tensors = [random_bits((n,), torch.uint8, n) for n in (0, 9, 100_000, 3_000_001)]
    on_gpu = [t.to(DEVICE) for t in tensors]
    sums = torch.zeros(7, dtype=torch.int64, device=DEVICE)
    DigestPlan(on_gpu, numbers=[5, 0, 3, 1], blocks=blocks).run(sums)
    found = digest_checks.unsigned(sums)
    assert [found[n] for n in (5, 0, 3, 1)] == digest_tensors(tensors)
    assert [found[n] for n in (2, 4, 6)] == [0, 0, 0]
