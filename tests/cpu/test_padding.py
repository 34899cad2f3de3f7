"""Padding is zero after every commit, whatever its shape, strides and dtype."""

from __future__ import annotations

import pytest
import torch

from packedcomm.layout import Box, Layout
from packedcomm.manifest import Manifest
from packedcomm.targets.placement import Placement

# Of a parameter [6, 5, 4], boxes with short rows and long ones, in several orders.
BOXES = [
    Box((0, 0, 0), (1, 1, 1)),
    Box((0, 2, 1), (6, 1, 3)),
    Box((1, 3, 0), (2, 2, 4)),
    Box((5, 0, 0), (1, 2, 4)),
    Box((3, 0, 3), (2, 2, 1)),
]


def placement(memory, padding):
    shapes = {name: tuple(tensor.shape) for name, tensor in memory.items()}
    return Placement.of(Manifest([]), Layout({}, shapes, [], padding), memory, cast=False)


def check(memory, padding):
    """Zeros in the boxes and nowhere else, twice, since a placement serves many commits."""
    made = placement(memory, padding)
    for _ in range(2):
        expected = {}
        for name, tensor in memory.items():
            tensor.view(tensor.shape).copy_(torch.ones(tensor.shape).to(tensor.dtype))
            expected[name] = torch.ones(tensor.shape)
        for name, box in padding:
            ranges = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
            expected[name][ranges] = 0
        made.zero()
        for name, tensor in memory.items():
            assert torch.equal(tensor.float(), expected[name]), name


@pytest.mark.parametrize("order", [1, -1], ids=["short rows first", "long rows first"])
@pytest.mark.parametrize(
    "strides", [lambda t: t, lambda t: t.transpose(0, 2)], ids=["dense", "transposed"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int8])
def test_padding_is_zero_and_all_else_is_left(dtype, strides, order):
    shape = (6, 5, 4) if strides(torch.zeros(2, 3, 4)).shape == (2, 3, 4) else (4, 5, 6)
    memory = {"p": strides(torch.zeros(shape, dtype=dtype))}
    check(memory, [("p", box) for box in BOXES][::order])


def test_parameters_of_several_dtypes_and_dimensions_are_padded_at_once():
    memory = {
        "vector": torch.zeros(9, dtype=torch.float16),
        "matrix": torch.zeros(4, 7, dtype=torch.bfloat16),
        "same": torch.zeros(2, 33, dtype=torch.bfloat16),
        "scalar": torch.zeros(()),
    }
    padding = [
        ("vector", Box((4,), (5,))),
        ("matrix", Box((1, 0), (3, 7))),
        ("same", Box((0, 2), (2, 31))),
        ("scalar", Box((), ())),
    ]
    check(memory, padding)


def test_without_padding_nothing_is_written():
    assert placement({"p": torch.ones(3)}, []).zeroing is None
