"""Digests on the CPU, against the written-out definition."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm.digests import DigestPlan, digest_tensors
from packedcomm.errors import TensorError
from tests.helpers.copy_checks import written_out_digest
from tests.helpers.tensors import content, odd_tensors, random_bits, strided_layouts, view_of

LAYOUTS = st.lists(strided_layouts(), min_size=0, max_size=5)


def digest_of(raw: bytes) -> int:
    return digest_tensors([torch.frombuffer(bytearray(raw), dtype=torch.uint8)])[0]


@settings(max_examples=200, deadline=None)
@given(LAYOUTS, st.integers(0, 17))
def test_any_view_has_the_digest_of_its_row_major_bytes(layouts, lead):
    tensors = [view_of(layout, "cpu", seed, lead) for seed, layout in enumerate(layouts)]
    assert digest_tensors(tensors) == [written_out_digest(content(t)) for t in tensors]


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 300), st.integers(0, 17))
def test_a_region_of_a_buffer_at_any_alignment(nbytes, lead):
    region = random_bits((nbytes + lead,), torch.uint8)[lead:]
    assert digest_tensors([region]) == [written_out_digest(content(region))]


def test_odd_tensors_have_the_digest_of_their_bytes():
    tensors = list(odd_tensors().values())
    assert digest_tensors(tensors) == [written_out_digest(content(t)) for t in tensors]


def test_an_empty_tensor_has_the_digest_of_nothing():
    assert digest_tensors([torch.empty(0, 3)]) == [written_out_digest(b"")]
    assert digest_tensors([]) == []


# Around the sizes of pieces and tiles, and with runs that don't divide them.
@pytest.mark.parametrize("columns", [1, 3, 7, 4099, 30_011])
@pytest.mark.parametrize("threads", [1, 3])
def test_large_strided_tensors_are_cut_at_whole_words(columns, threads):
    matrix = random_bits((200_001 // columns + 3, columns + 2), torch.int16)
    views = [matrix[:, 1 : 1 + columns], matrix.t(), matrix[::2, ::2]]
    plan = DigestPlan(views, threads=threads)
    contiguous = DigestPlan([view.contiguous() for view in views], threads=1)
    assert plan.run().tolist() == contiguous.run().tolist()
    raw = content(views[0].contiguous().view(torch.uint8))
    assert plan.run().tolist()[0] % (1 << 64) == written_out_digest(raw)


def test_more_dimensions_than_most_tensors_have():
    tensor = random_bits((2,) * 12, torch.uint8).permute(11, 3, 9, 1, 7, 5, 0, 2, 4, 6, 8, 10)
    assert digest_tensors([tensor]) == [written_out_digest(content(tensor))]


def test_every_flipped_bit_changes_the_digest():
    raw = bytearray(random_bits((41,), torch.uint8).tolist())
    seen = {digest_of(raw)}
    for bit in range(8 * len(raw)):
        raw[bit // 8] ^= 1 << bit % 8
        seen.add(digest_of(raw))
        raw[bit // 8] ^= 1 << bit % 8
    assert len(seen) == 8 * len(raw) + 1


def test_two_flipped_bits_never_cancel():
    raw = bytearray(24)
    seen = set()
    for first in range(8 * len(raw)):
        for second in range(first):
            flipped = bytearray(raw)
            flipped[first // 8] ^= 1 << first % 8
            flipped[second // 8] ^= 1 << second % 8
            seen.add(digest_of(flipped))
    assert len(seen) == 192 * 191 // 2


def test_words_that_change_places_change_the_digest():
    words = [bytes([number] * 8) for number in range(6)]
    seen = {digest_of(b"".join(words))}
    for i in range(6):
        for j in range(i):
            swapped = list(words)
            swapped[i], swapped[j] = swapped[j], swapped[i]
            seen.add(digest_of(b"".join(swapped)))
    assert len(seen) == 16


def test_zeros_of_different_lengths_differ():
    assert len({digest_of(bytes(n)) for n in range(1, 200)}) == 199


def test_tensors_that_change_places_change_their_digests():
    first, second = random_bits((64,), torch.uint8, 1), random_bits((64,), torch.uint8, 2)
    assert digest_tensors([first, second]) == digest_tensors([second, first])[::-1]
    assert digest_tensors([first]) != digest_tensors([second])


def test_equal_bytes_have_equal_digests_whatever_the_dtype_and_shape():
    tensor = random_bits((6, 4), torch.float32)
    views = [tensor, tensor.view(torch.uint8), tensor.view(-1), tensor.t().contiguous().t()]
    assert len(set(digest_tensors(views))) == 1


def test_a_plan_follows_new_values_and_notices_new_memory():
    parameter = torch.nn.Parameter(torch.zeros(100))
    plan = DigestPlan([torch.ones(3), parameter], ["a", "b"])
    before = plan.run().tolist()
    assert plan.run().tolist() == before
    with torch.no_grad():
        parameter[50] = 1
    after = plan.run().tolist()
    assert after[0] == before[0]
    assert after[1] != before[1]
    assert plan.moved() is None
    parameter.data = parameter.data.clone()
    assert plan.moved() == "b"


def test_without_names_a_moved_tensor_is_told_by_position():
    tensors = [torch.ones(3), torch.ones(3)]
    plan = DigestPlan(tensors)
    tensors[1].data = torch.ones(3)
    assert plan.moved() == "#1"


def test_a_tensor_without_dense_memory_is_refused_by_name():
    with pytest.raises(TensorError, match="'b'.*dense memory"):
        digest_tensors([torch.ones(1), torch.eye(3).to_sparse()], ["a", "b"])
