"""The cut rules, against their definitions and against vLLM's own packing."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from packedcomm.errors import ArgumentError
from packedcomm.planning.chunks import (
    NATIVE_ALIGNMENT,
    Chunk,
    chunk_rule,
    little_follows,
    native_chunks,
    slot_bytes,
    vllm_chunks,
)

SIZES = st.lists(st.integers(0, 300), max_size=60)


def test_exactly_the_buffer_size_does_not_cut():
    chunks = list(vllm_chunks([40, 24, 1, 7], 64))
    assert [list(c.sizes) for c in chunks] == [[40, 24, 1], [7]]


def test_a_tensor_larger_than_the_buffer_joins_the_smaller_ones_before_it():
    chunks = list(vllm_chunks([10, 1000, 5], 64))
    assert [list(c.sizes) for c in chunks] == [[10, 1000], [5]]
    assert [c.nbytes for c in chunks] == [1010, 5]


def test_only_empty_tensors_make_one_chunk_of_no_bytes():
    (chunk,) = vllm_chunks([0, 0], 64)
    assert (chunk.nbytes, len(chunk.indices)) == (0, 2)


def test_nothing_makes_no_chunks():
    assert list(vllm_chunks([], 64)) == []
    assert list(native_chunks([], 64)) == []


@given(SIZES, st.integers(1, 400))
def test_vllm_chunks_cover_the_stream_in_order(sizes, buffer_size):
    chunks = list(vllm_chunks(sizes, buffer_size))
    assert [i for c in chunks for i in c.indices] == list(range(len(sizes)))
    assert [s for c in chunks for s in c.sizes] == sizes
    for chunk in chunks:
        assert list(chunk.offsets) == [sum(chunk.sizes[:i]) for i in range(len(chunk.sizes))]
        assert chunk.nbytes == sum(chunk.sizes)
        assert chunk.nbytes - chunk.sizes[-1] <= buffer_size
    for chunk in chunks[:-1]:
        assert chunk.nbytes > buffer_size


@given(SIZES, st.integers(1, 400), st.integers(0, 200), st.integers(1, 500), st.integers(1, 5))
def test_native_chunks_cover_the_stream(sizes, buffer_size, direct, group_bytes, group_tensors):
    chunks = list(native_chunks(sizes, buffer_size, direct, group_bytes, group_tensors))
    assert sorted(i for c in chunks for i in c.indices) == list(range(len(sizes)))
    for chunk in chunks:
        assert [sizes[i] for i in chunk.indices] == list(chunk.sizes)
        assert list(chunk.indices) == sorted(chunk.indices)
        if chunk.direct:
            assert all(size >= min(direct, buffer_size + 1) for size in chunk.sizes)
            assert len(chunk.indices) <= group_tensors
            assert sum(chunk.sizes[:-1]) < group_bytes
            assert chunk.nbytes == sum(chunk.sizes)
        else:
            assert chunk.nbytes <= buffer_size
            assert all(offset % NATIVE_ALIGNMENT == 0 for offset in chunk.offsets)
            ends = [o + s for o, s in zip(chunk.offsets, chunk.sizes, strict=True)]
            assert all(a <= b for a, b in zip(ends, list(chunk.offsets)[1:], strict=False))
            assert chunk.nbytes == ends[-1]


def test_rules_are_lazy():
    pulled = []

    def sizes():
        for size in (10, 60, 10):
            pulled.append(size)
            yield size

    next(vllm_chunks(sizes(), 64))
    assert pulled == [10, 60]


def test_slots_grow_to_the_largest_chunk_that_rotates_through_them():
    chunks = list(vllm_chunks([70, 65, 200, 66], 64))
    assert slot_bytes(chunks, 2) == [200, 66]
    assert slot_bytes(chunks, 3) == [70, 65, 200]


@pytest.mark.parametrize(
    ("nbytes", "flags"),
    [
        ([], []),
        ([0], [True]),
        ([500, 500], [False, True]),
        ([100, 1000, 10], [False, True, True]),
        ([100, 1000, 11], [False, False, True]),
        ([1000, 5, 5], [True, False, True]),
        ([1000, 6, 5], [False, False, True]),
        # Nothing is on the wire after the data.
        ([1000, 0, 1000, 0], [False, False, True, True]),
    ],
)
def test_little_follows_a_chunk_that_all_others_after_it_are_a_hundredth_of(nbytes, flags):
    chunks = [Chunk(range(1), [size], [0], size) for size in nbytes]
    assert little_follows(chunks) == flags


def test_the_end_of_a_model_follows_its_last_large_tensor():
    # As of Llama: a head, then the last norm and all other small tensors in one chunk.
    sizes = [100 << 20, 8192, 100 << 20, 8192, 1 << 30, 8192]
    chunks = list(native_chunks(sizes, 1 << 30))
    assert [chunk.direct for chunk in chunks] == [True, False]
    assert little_follows(chunks) == [True, True]


@pytest.mark.parametrize("size", [0, -1, 1.5, "64", True])
def test_a_buffer_size_that_is_not_positive_is_refused(size):
    with pytest.raises(ArgumentError, match="buffer_size_bytes"):
        chunk_rule("vllm", size)


def test_an_unknown_format_is_refused():
    with pytest.raises(ArgumentError, match="wire_format"):
        chunk_rule("protobuf", 64)
