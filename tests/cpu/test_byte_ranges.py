"""Which bytes tensors occupy, against sets of single bytes."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from packedcomm.byte_ranges import byte_ranges, ranges_without


def single_bytes(tensors):
    """Every byte, found element by element."""
    found = set()
    for tensor in tensors:
        size = tensor.element_size()
        for index in torch.cartesian_prod(*map(torch.arange, tensor.shape)).view(-1, tensor.dim()):
            steps = zip(index.tolist(), tensor.stride(), strict=True)
            start = tensor.data_ptr() + size * sum(i * s for i, s in steps)
            found.update(range(start, start + size))
    return found


def of_ranges(ranges):
    pairs = ranges.tolist()
    assert all(start < end for start, end in pairs)
    assert all(one[1] <= other[0] for one, other in pairwise(pairs))
    return {byte for start, end in pairs for byte in range(start, end)}


BASE = torch.zeros(6, 8, 10, dtype=torch.float16)
VIEWS = {
    "whole": [BASE],
    "transposed": [BASE.permute(2, 0, 1)],
    "rows": [BASE[1:3], BASE[3:4]],
    "columns": [BASE[:, :, 2:5]],
    "every second": [BASE[:, ::2], BASE[::3, 1::2, ::4]],
    "overlapping": [BASE[:3], BASE[2:5], BASE[:, 3]],
    "none": [],
    "empty": [BASE[:0], BASE[:, :, 3:3]],
}


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
def test_ranges_are_the_bytes_of_tensors_of_any_strides(views):
    assert of_ranges(byte_ranges(views)) == single_bytes(views)


@pytest.mark.parametrize("views", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("others", VIEWS.values(), ids=VIEWS)
def test_what_is_left_is_what_others_do_not_cover(views, others):
    left = ranges_without(byte_ranges(views), byte_ranges(others))
    assert of_ranges(left) == single_bytes(views) - single_bytes(others)


def test_a_scalar_and_one_that_is_repeated_are_single_elements():
    scalar = torch.zeros(())
    assert of_ranges(byte_ranges([scalar])) == {scalar.data_ptr() + i for i in range(4)}
    assert of_ranges(byte_ranges([scalar.expand(3, 5)])) == of_ranges(byte_ranges([scalar]))


def test_a_default_device_changes_nothing():
    memory = torch.zeros(4, 6)
    expected = single_bytes([memory[:, :3]])
    with torch.device("meta"):
        left = ranges_without(byte_ranges([memory]), byte_ranges([memory[:, 3:]]))
    assert of_ranges(left) == expected


def test_what_is_in_millions_of_pieces_is_refused():
    with pytest.raises(ValueError, match="pieces"):
        byte_ranges([torch.zeros(1 << 22)[::2]])
