"""Boxes, shards, pieces, whole layouts and the rotary permutation, against torch."""

from __future__ import annotations

import time

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packedcomm.errors import LayoutError
from packedcomm.footprints import first_overlap, progressions_meet
from packedcomm.layout import Box, Layout, Piece, Replicate, Shard, box_of
from packedcomm.pieces import part_of
from packedcomm.planning.rotary import rotary_pieces

PROGRESSIONS = st.tuples(st.integers(0, 30), st.integers(1, 9), st.integers(0, 12))


def indices(progression):
    start, step, count = progression
    return set(range(start, start + step * count, step))


def read(layout_pieces, tensor, shape):
    """The logical tensor that pieces of one parameter make up."""
    result = torch.full(shape, float("nan"))
    for piece in layout_pieces:
        part = part_of(piece, tensor, shape)
        box = piece.box if part.offset is None else Box(part.offset, tuple(part.tensor.shape))
        region = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
        result[region] = part.tensor
    return result


# Boxes and shards.


def test_boxes_intersect_as_slices_of_a_tensor_do():
    one, other = Box((0, 2), (3, 4)), Box((1, 0), (5, 3))
    shared = one.intersect(other)
    assert shared == Box((1, 2), (2, 1))
    assert shared.numel == 2
    assert shared.stop == (3, 3)
    assert one.contains(shared)
    assert other.contains(shared)
    assert not one.contains(other)
    assert str(shared) == "[1:3, 2:3]"


def test_boxes_that_only_touch_share_nothing():
    assert Box((0,), (3,)).intersect(Box((3,), (2,))) is None


def test_scalars_are_boxes_too():
    scalar = Box((), ())
    assert scalar.numel == 1
    assert scalar.intersect(scalar) == scalar


@pytest.mark.parametrize(
    ("offset", "shape"),
    [((-1,), (2,)), ((0,), (-2,)), ((0, 0), (1,)), ((True,), (1,)), ((0.0,), (1,))],
    ids=["negative offset", "negative shape", "lengths differ", "a bool", "a float"],
)
def test_a_box_needs_indices(offset, shape):
    with pytest.raises(LayoutError):
        Box(offset, shape)


def test_boxes_of_different_dimensions_dont_compare():
    with pytest.raises(LayoutError, match="different numbers of dimensions"):
        Box((0,), (1,)).intersect(Box((0, 0), (1, 1)))


@pytest.mark.parametrize("count", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("length", [0, 1, 7, 8, 9, 16])
def test_shards_are_the_chunks_of_torch(length, count):
    tensor = torch.arange(length * 3).reshape(length, 3)
    chunks = [*torch.chunk(tensor, count), *[tensor[:0]] * count][:count]
    for index, chunk in enumerate(chunks):
        box = Shard(0, index, count).box((length, 3))
        assert torch.equal(tensor[box.offset[0] : box.stop[0]], chunk)


def test_uneven_shards_have_the_sizes_they_are_given():
    boxes = [Shard(1, index, 3, (5, 0, 2)).box((4, 7)) for index in range(3)]
    assert boxes == [Box((0, 0), (4, 5)), Box((0, 5), (4, 0)), Box((0, 5), (4, 2))]


def test_placements_apply_one_after_the_other():
    tensor = torch.arange(10 * 6).reshape(10, 6)
    box = box_of((10, 6), [Shard(0, 1, 2), Replicate(), Shard(0, 2, 3), Shard(1, 1, 2)])
    expected = tensor.chunk(2)[1].chunk(3)[2].chunk(2, dim=1)[1]
    region = tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))
    assert torch.equal(tensor[region], expected)


@pytest.mark.parametrize(
    "make",
    [
        lambda: Shard(0, 2, 2),
        lambda: Shard(-1, 0, 2),
        lambda: Shard(0, 0, 0),
        lambda: Shard(0, 0, 2, (1, 2, 3)),
        lambda: Shard(2, 0, 2).box((4, 4)),
        lambda: Shard(0, 0, 2, (1, 2)).box((4, 4)),
    ],
    ids=["index", "negative dim", "no shards", "sizes count", "dimension", "sizes sum"],
)
def test_a_shard_that_cannot_be_is_an_error(make):
    with pytest.raises(LayoutError):
        make()


# Progressions and footprints.


@given(PROGRESSIONS, PROGRESSIONS)
def test_progressions_meet_exactly_when_they_share_an_index(one, other):
    assert progressions_meet(one, other) == bool(indices(one) & indices(other))


@given(
    st.lists(
        st.tuples(
            st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 3)),
            st.tuples(st.integers(0, 6), st.integers(1, 3), st.integers(1, 3)),
        ),
        max_size=6,
    )
)
def test_an_overlap_is_found_exactly_when_there_is_one(footprints):
    elements = [{(i, j) for i in indices(a) for j in indices(b)} for a, b in footprints]
    total = sum(map(len, elements))
    pair = first_overlap(footprints)
    assert (pair is None) == (len(set().union(*elements)) == total)
    if pair is not None:
        assert elements[pair[0]] & elements[pair[1]]


# Pieces.


def test_a_part_of_a_piece_is_where_the_piece_says():
    piece = Piece("w", Box((4, 0), (3, 6)), "p", (1, 2, 0), (2, 1), (1, 2), 0.5)
    part = piece.part(Box((5, 2), (9, 2)))
    assert part == Piece("w", Box((5, 2), (2, 2)), "p", (1, 6, 1), (2, 1), (1, 2), 0.5)
    assert piece.part(Box((0, 0), (4, 6))) is None


def test_a_piece_reads_the_same_elements_through_any_strides():
    dense = torch.arange(2 * 14 * 5, dtype=torch.float32).reshape(2, 14, 5)
    strided = dense.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    offset = torch.cat([torch.zeros(1, 14, 5), dense])[1:]
    piece = Piece("w", Box((4, 0), (3, 6)), "p", (1, 2, 1), (2, 1), (1, 2))
    expected = dense[1, 2:14:2, 1:4].T.clone()
    for tensor in (dense, strided, offset):
        part = part_of(piece, tensor)
        assert torch.equal(part.tensor, expected)
        assert part.offset == (4, 0)
        part.tensor.neg_()
        assert torch.equal(tensor[1, 2:14:2, 1:4].T, -expected)


def test_a_piece_of_a_parameter_that_requires_grad_is_written_without_a_graph():
    parameter = torch.nn.Parameter(torch.zeros(4, 2))
    part = part_of(Piece.aligned("w", Box((0, 0), (2, 2)), "p", (2, 0)), parameter, (2, 2))
    part.tensor.fill_(1)
    assert part.offset is None
    assert torch.equal(parameter.detach(), torch.tensor([[0.0, 0], [0, 0], [1, 1], [1, 1]]))


def test_a_scalar_piece_is_the_scalar():
    parameter = torch.tensor(3.0)
    assert part_of(Piece.aligned("s", Box((), ()), "p"), parameter).tensor.item() == 3


def test_an_empty_piece_has_an_empty_view():
    part = part_of(Piece.aligned("w", Box((4, 0), (0, 2)), "p", (3, 0)), torch.zeros(3, 2))
    assert tuple(part.tensor.shape) == (0, 2)


def test_a_piece_that_leaves_the_parameter_is_an_error():
    with pytest.raises(LayoutError, match="shape is"):
        part_of(Piece.aligned("w", Box((0,), (3,)), "p", (2,)), torch.zeros(4))


@pytest.mark.parametrize(
    ("at", "axes", "steps"),
    [
        ((0, 0), (0, 0), (1, 1)),
        ((0, 0), (0, 2), (1, 1)),
        ((0, 0), (0, 1), (1, 0)),
        ((0, 0), (0,), (1,)),
        ((-1, 0), (0, 1), (1, 1)),
    ],
    ids=["axis twice", "no such axis", "step 0", "axes missing", "negative"],
)
def test_a_malformed_piece_is_an_error(at, axes, steps):
    with pytest.raises(LayoutError):
        Piece("w", Box((0, 0), (2, 2)), "p", at, axes, steps)


# Layouts.


def test_a_layout_counts_its_holes():
    pieces = [Piece.aligned("q", Box((2, 0), (2, 3)), "qkv", (1, 0))]
    layout = Layout(
        {"q": (4, 3)}, {"qkv": (5, 3), "norm": (3,)}, pieces, [("qkv", Box((4, 0), (1, 3)))]
    )
    assert layout.holes() == {"qkv": 6, "norm": 3}


def test_a_layout_without_holes_has_none():
    pieces = [
        Piece.aligned("q", Box((0,), (2,)), "qk"),
        Piece("k", Box((0,), (2,)), "kq", (1,), (0,), (2,)),
        Piece("q", Box((0,), (2,)), "kq", (0,), (0,), (2,)),
    ]
    assert Layout({"q": (4,), "k": (2,)}, {"qk": (2,), "kq": (4,)}, pieces).holes() == {}


def test_all_problems_of_a_layout_are_listed():
    whole = Box((0,), (4,))
    with pytest.raises(LayoutError) as caught:
        Layout(
            {"w": (4,)},
            {"p": (4,), "small": (3,), "taken": (4,)},
            [
                Piece.aligned("unknown", whole, "p"),
                Piece.aligned("w", whole, "nowhere"),
                Piece.aligned("w", whole, "small"),
                Piece.aligned("w", Box((1,), (4,)), "p"),
                Piece.aligned("w", whole, "taken"),
            ],
            [("taken", Box((3,), (1,)))],
        )
    text = str(caught.value)
    for expected in (
        "no tensor of that name",
        "no parameter of that name",
        "the parameter's shape is (3,)",
        "the tensor's shape is (4,)",
        "'taken' is written twice",
    ):
        assert expected in text


def test_a_piece_whose_last_step_leaves_the_parameter_is_an_error():
    piece = Piece("w", Box((0,), (3,)), "p", (1,), (0,), (2,))
    assert Layout({"w": (3,)}, {"p": (6,)}, [piece]).holes() == {"p": 3}
    with pytest.raises(LayoutError, match="shape is"):
        Layout({"w": (3,)}, {"p": (5,)}, [piece])
    with pytest.raises(LayoutError, match="shape is"):
        part_of(piece, torch.zeros(5))


def test_interleaved_rows_are_not_an_overlap_but_shared_ones_are():
    even = Piece("a", Box((0, 0), (3, 2)), "p", (0, 0), (0, 1), (2, 1))
    odd = Piece("b", Box((0, 0), (3, 2)), "p", (1, 0), (0, 1), (2, 1))
    third = Piece("b", Box((0, 0), (2, 2)), "p", (1, 0), (0, 1), (3, 1))
    tensors, parameters = {"a": (3, 2), "b": (3, 2)}, {"p": (6, 2)}
    assert Layout(tensors, parameters, [even, odd]).holes() == {}
    with pytest.raises(LayoutError, match="written twice"):
        Layout(tensors, parameters, [even, third])


def test_eighteen_thousand_expert_pieces_are_checked_quickly():
    tensors, parameters, pieces = {}, {}, []
    for layer in range(48):
        parameters[f"{layer}.w13"] = (128, 1536, 2048)
        parameters[f"{layer}.w2"] = (128, 2048, 768)
        for expert in range(128):
            for name, parameter, row, shape in (
                ("gate", "w13", 0, (768, 2048)),
                ("up", "w13", 768, (768, 2048)),
                ("down", "w2", 0, (2048, 768)),
            ):
                tensors[f"{layer}.{expert}.{name}"] = shape
                pieces.append(
                    Piece(
                        f"{layer}.{expert}.{name}",
                        Box.whole(shape),
                        f"{layer}.{parameter}",
                        (expert, row, 0),
                        (1, 2),
                        (1, 1),
                    )
                )
    began = time.monotonic()
    layout = Layout(tensors, parameters, pieces)
    assert layout.holes() == {}
    assert time.monotonic() - began < 2


# Rotary permutation.


@pytest.mark.parametrize(("heads", "size", "hidden"), [(1, 2, 3), (4, 8, 5), (3, 6, None)])
def test_rotary_pieces_are_the_permutation_of_the_conversion(heads, size, hidden):
    shape = (heads * size,) if hidden is None else (heads * size, hidden)
    meta = torch.arange(torch.Size(shape).numel(), dtype=torch.float32).reshape(shape)
    rest = shape[1:]
    hugging_face = meta.view(heads, size // 2, 2, *rest).transpose(1, 2).reshape(shape)
    there = rotary_pieces("q", shape, heads, "meta_to_hf", parameter="wq")
    back = rotary_pieces("q", shape, heads, "hf_to_meta")
    assert len(there) == 2 * heads
    assert torch.equal(read(there, meta, shape), hugging_face)
    assert torch.equal(read(back, hugging_face, shape), meta)
    assert Layout({"q": shape}, {"wq": shape}, there).holes() == {}
    assert Layout({"q": shape}, {"q": shape}, back).holes() == {}


@pytest.mark.parametrize(
    ("shape", "heads", "direction"),
    [
        ((10, 3), 4, "meta_to_hf"),
        ((12, 3), 4, "meta_to_hf"),
        ((8, 3), 0, "meta_to_hf"),
        ((8, 3, 3), 2, "meta_to_hf"),
        ((8, 3), 2, "sideways"),
    ],
    ids=["heads don't divide", "odd head size", "no heads", "three dimensions", "direction"],
)
def test_rows_that_are_no_heads_cannot_be_permuted(shape, heads, direction):
    with pytest.raises(LayoutError):
        rotary_pieces("q", shape, heads, direction)
