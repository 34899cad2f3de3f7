"""Digests on a GPU are those of the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packedcomm.digests import DigestPlan, digest_tensors
from packedcomm.errors import TensorError
from tests.helpers.copy_checks import written_out_digest
from tests.helpers.tensors import content, odd_tensors, random_bits, strided_layouts, view_of

pytestmark = pytest.mark.gpu(1)

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
LAYOUTS = st.lists(strided_layouts(), min_size=0, max_size=5)


@EXAMPLES
@given(LAYOUTS, st.integers(0, 17))
def test_any_view_has_the_digest_of_its_row_major_bytes(layouts, lead):
    tensors = [view_of(layout, "cuda", seed, lead) for seed, layout in enumerate(layouts)]
    assert digest_tensors(tensors) == [written_out_digest(content(t)) for t in tensors]


def test_a_region_of_a_buffer_at_every_alignment():
    buffer = random_bits((300_000,), torch.uint8)
    on_gpu = buffer.cuda()
    for lead in range(17):
        for nbytes in (0, 1, 7, 8, 15, 16, 17, 31, 1000, 65_535, 65_536, 65_537, 131_081, 270_001):
            region = slice(lead, lead + nbytes)
            assert digest_tensors([on_gpu[region]]) == digest_tensors([buffer[region]])


def test_odd_tensors_of_two_devices_have_the_digests_of_the_cpu():
    on_cpu, on_gpu = list(odd_tensors().values()), list(odd_tensors("cuda").values())
    expected = digest_tensors(on_cpu)
    mixed = [tensor for pair in zip(on_cpu, on_gpu, strict=True) for tensor in pair]
    assert digest_tensors(mixed) == [digest for digest in expected for _ in range(2)]


@pytest.mark.parametrize("columns", [1, 3, 7, 4099, 30_011])
def test_large_strided_tensors_are_cut_at_whole_words(columns):
    matrix = random_bits((200_001 // columns + 3, columns + 2), torch.int16)
    on_gpu = matrix.cuda()

    def views(m):
        return [m[:, 1 : 1 + columns], m.t(), m[::2, ::2]]

    assert digest_tensors(views(on_gpu)) == digest_tensors(views(matrix))


def test_a_plan_is_computed_on_the_current_stream():
    tensor = torch.zeros(1 << 20, dtype=torch.uint8, device="cuda")
    plan = DigestPlan([tensor, tensor[:100]])
    torch.cuda.synchronize()
    found = []
    for value in range(3):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(50_000_000)
            tensor.fill_(value)
            found.append(plan.run())
        stream.synchronize()
    for value, digests in enumerate(found):
        raw = torch.full((1 << 20,), value, dtype=torch.uint8)
        assert [d % (1 << 64) for d in digests.tolist()] == digest_tensors([raw, raw[:100]])


def test_only_empty_tensors():
    assert digest_tensors([torch.empty(0, device="cuda")]) == [written_out_digest(b"")]


def test_a_plan_of_two_devices_is_refused():
    with pytest.raises(TensorError, match="'#1'.*on cpu, expected cuda:0"):
        DigestPlan([torch.ones(2, device="cuda"), torch.ones(2)])
