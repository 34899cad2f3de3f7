"""Movements between strided memory: what two of them amount to, against doing both."""

from __future__ import annotations

import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from packedcomm.engines.vllm.moves import Move, box_in, compose, dense_steps


def move_between(source: torch.Tensor, destination: torch.Tensor) -> Move:
    """`destination.copy_(source)` as a movement."""
    return Move.of(
        source.data_ptr(),
        [s * source.element_size() for s in source.stride()],
        destination.data_ptr(),
        [s * destination.element_size() for s in destination.stride()],
        source.shape,
        (str(source.dtype), str(destination.dtype)),
    )


def carry_out(move: Move, source: torch.Tensor, destination: torch.Tensor) -> torch.Tensor:
    """What a movement between two contiguous tensors makes of zeros, element by element."""
    written = torch.zeros_like(destination)
    size = source.element_size()
    shape = [axis.size for axis in move.axes]
    reads = source.flatten().as_strided(
        shape, [a.src // size for a in move.axes], (move.src - source.data_ptr()) // size
    )
    writes = written.view(-1).as_strided(
        shape, [a.dst // size for a in move.axes], (move.dst - destination.data_ptr()) // size
    )
    writes.copy_(reads)
    return written


@st.composite
def views(draw, shape):
    """A function that cuts the same box out of any tensor of this shape, and turns it."""
    cut = []
    for size in shape:
        start = draw(st.integers(0, size - 1))
        cut.append(slice(start, start + draw(st.integers(1, size - start))))
    order = draw(st.permutations(range(len(shape))))
    return tuple(cut), tuple(order)


def viewed(tensor, view):
    cut, order = view
    return tensor[cut].permute(order)


shapes = st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_two_movements_amount_to_one(data):
    shape = data.draw(shapes)
    between_view = data.draw(views(shape))
    source = torch.arange(1, 1 + viewed(torch.empty(shape), between_view).numel())
    source = source.float().reshape(viewed(torch.empty(shape), between_view).shape).contiguous()
    between = torch.zeros(shape)
    first = move_between(source, viewed(between, between_view))
    viewed(between, between_view).copy_(source)
    # The second reads another box of it, perhaps as fewer dimensions, into turned memory.
    last_view = data.draw(views(shape))
    read = viewed(between, last_view)
    room = data.draw(st.integers(0, 2))
    destination = torch.zeros(*(n + room for n in read.shape))
    into = destination[tuple(slice(room, None) for _ in read.shape)]
    turned = data.draw(st.booleans())
    if turned:
        destination = torch.zeros(*(n + room for n in reversed(read.shape)))
        into = destination.permute(*reversed(range(read.dim())))[
            tuple(slice(room, None) for _ in read.shape)
        ]
    second = move_between(read, into)
    expected = carry_out(second, between, destination)
    try:
        composed = compose(first, second)
    except ValueError:
        event("not followed")
        return
    event("followed")
    if composed is None:
        assert not expected.any()
    else:
        assert torch.equal(carry_out(composed, source, destination), expected)


def test_usual_movements_are_followed():
    source = torch.arange(24.0).reshape(4, 6)
    between = torch.zeros(8, 6)
    live = torch.zeros(8, 6)
    first = move_between(source, between[4:])
    composed = compose(first, move_between(between, live))
    assert composed is not None
    assert composed.dst == live[4:].data_ptr()
    # Turned on the way, and cut to a slice by columns.
    turned = torch.zeros(6, 4)
    composed = compose(move_between(source, turned.t()), move_between(turned[2:4], live[:2, :4]))
    assert composed is not None
    offset, box, steps = box_in(composed, source.data_ptr(), source.shape, 4)
    assert (offset, box) == ((0, 2), (4, 2))
    assert steps == (4, 24)


def test_a_whole_tensor_is_one_box():
    source = torch.zeros(3, 1, 5)
    live = torch.zeros(15)
    move = move_between(source.flatten(), live)
    assert box_in(move, source.data_ptr(), source.shape, 4) == ((0, 0, 0), (3, 1, 5), (20, 4, 4))


def test_rows_that_a_reshape_has_taken_apart_are_found_again():
    source = torch.arange(48.0).reshape(12, 4)
    between = torch.zeros(12, 4)
    live = torch.zeros(4, 3, 4)
    # [heads, rows, columns] with the first two exchanged.
    second = move_between(between.view(3, 4, 4).permute(1, 0, 2), live)
    composed = compose(move_between(source, between), second)
    assert composed is not None
    assert torch.equal(carry_out(composed, source, live), source.view(3, 4, 4).permute(1, 0, 2))


def test_steps_of_contiguous_tensors():
    assert dense_steps((2, 3, 4), 2) == (24, 8, 2)
    assert dense_steps((), 2) == ()
