"""Plans between a buffer and tensors on the CPU; and noticing that a plan is out of date."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm.copying import BufferPlan, CopyPlan, Part, TensorRecord
from packedcomm.errors import ArgumentError, TensorError
from tests.helpers.copy_checks import check_parts, cut_tensors
from tests.helpers.tensors import content, odd_tensors, random_bits

CPU = torch.device("cpu")
TENSORS = st.lists(cut_tensors(), min_size=0, max_size=3)


def new_plan(into_buffer: bool = True) -> BufferPlan:
    return BufferPlan(CPU, into_buffer=into_buffer)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.integers(0, 17))
def test_parts_are_cast_and_scaled_into_two_buffers(tensors, lead):
    check_parts(tensors, "cpu", True, lead)


@settings(max_examples=150, deadline=None)
@given(TENSORS, st.integers(0, 17))
def test_parts_are_cast_and_scaled_out_of_two_buffers(tensors, lead):
    check_parts(tensors, "cpu", False, lead)


def test_whole_tensors_go_through_any_buffer_that_is_named():
    tensors = list(odd_tensors().values())
    sizes = [tensor.nbytes for tensor in tensors]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    back = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
    pack, unpack = new_plan(True), new_plan(False)
    pack.add_tensors(tensors, offsets, sizes)
    unpack.add_tensors(back, offsets, sizes)
    assert (pack.nbytes, pack.extent) == (sum(sizes), sum(sizes))
    assert (unpack.nbytes, unpack.extent) == (sum(sizes), sum(sizes))
    for lead in (0, 3, 16):
        buffer = torch.zeros(sum(sizes) + lead, dtype=torch.uint8)[lead:]
        pack.run(buffer)
        assert content(buffer) == b"".join(content(t) for t in tensors)
        for tensor in back:
            tensor.zero_()
        unpack.run(buffer)
        assert [content(t) for t in back] == [content(t) for t in tensors]


def test_a_plan_can_grow_after_it_has_run():
    plan = new_plan()
    plan.add_tensors([torch.full((4,), 1, dtype=torch.uint8)], [0], [4])
    plan.run(torch.zeros(4, dtype=torch.uint8))
    plan.add_tensors([torch.full((4,), 2, dtype=torch.uint8)], [4], [4])
    buffer = torch.zeros(8, dtype=torch.uint8)
    plan.run(buffer)
    assert buffer.tolist() == [1] * 4 + [2] * 4


def test_a_part_without_offset_is_the_whole_tensor_and_bytes_of_any_dtype():
    values = random_bits((6, 5), torch.float8_e4m3fn).t()
    plan = new_plan()
    plan.add_parts([Part(values)], torch.float8_e4m3fn, (5, 6), 1, "w")
    buffer = torch.zeros(31, dtype=torch.uint8)
    plan.run(buffer)
    assert content(buffer[1:]) == content(values)


def test_payload_is_counted_in_the_buffer():
    for into_buffer in (True, False):
        plan = new_plan(into_buffer)
        plan.add_parts([Part(torch.ones(3, 4), (1, 0))], torch.bfloat16, (4, 4), 8, "w")
        assert (plan.nbytes, plan.extent) == (24, 40)


def test_a_scalar_is_a_tensor_of_no_dimensions():
    plan = new_plan()
    plan.add_parts([Part(torch.tensor(1.5), ())], torch.float16, (), 0, "scalar")
    buffer = torch.zeros(2, dtype=torch.uint8)
    plan.run(buffer)
    assert buffer.view(torch.float16).item() == 1.5


BAD_PARTS = {
    "leaves the shape": (Part(torch.ones(3, 4), (2, 0)), (4, 4), r"\(3, 4\) at \(2, 0\) leaves"),
    "negative offset": (Part(torch.ones(3, 4), (-1, 0)), (4, 4), "leaves the tensor's shape"),
    "dimensions": (Part(torch.ones(4), (0, 0)), (4, 4), "expected 2 dimensions"),
    "offset's dimensions": (Part(torch.ones(4, 4), (0,)), (4, 4), "expected 2 dimensions"),
    "not all of it": (Part(torch.ones(3, 4)), (4, 4), r"expected all of \(4, 4\)"),
    "not castable": (Part(torch.ones(4, 4).int()), (4, 4), "torch.(int32|bfloat16), .*can be cast"),
    "bad scale": (Part(torch.ones(4, 4), None, float("inf")), (4, 4), "finite"),
    "negative shape": (Part(torch.ones(4, 4)), (4, -4), r"impossible shape \(4, -4\)"),
    "overflow": (Part(torch.ones(1, 1), (0, 0)), (1 << 40, 1 << 40), "impossible shape"),
}


@pytest.mark.parametrize("kind", BAD_PARTS)
@pytest.mark.parametrize("into_buffer", [True, False])
def test_a_part_that_does_not_fit_is_refused_by_name(kind, into_buffer):
    part, shape, reason = BAD_PARTS[kind]
    plan = new_plan(into_buffer)
    with pytest.raises(TensorError, match=rf"'culprit'.*{reason}"):
        plan.add_parts([part], torch.bfloat16, shape, 0, "culprit")


def test_a_part_whose_elements_share_memory_cannot_be_written():
    part = Part(torch.ones(1, 4).expand(3, 4))
    new_plan(True).add_parts([part], torch.float32, (3, 4), 0, "w")
    with pytest.raises(TensorError, match="'w'.*share memory"):
        new_plan(False).add_parts([part], torch.float32, (3, 4), 0, "w")


@pytest.mark.parametrize("offset", [-1, (1 << 63) - 1])
def test_an_offset_that_is_no_place_in_a_buffer_is_refused(offset):
    with pytest.raises(ArgumentError, match="'w'.*leaves its buffer"):
        new_plan().add_parts([Part(torch.ones(2))], torch.float32, (2,), offset, "w")


def test_a_size_that_is_not_the_tensors_is_refused_by_name():
    with pytest.raises(TensorError, match="'w': has 8 bytes, expected 12"):
        new_plan().add_tensors([torch.ones(2)], [0], [12], ["w"])


def test_a_buffer_that_is_too_small_is_refused():
    plan = new_plan()
    plan.add_tensors([torch.ones(4)], [8], [16])
    with pytest.raises(ArgumentError, match="23 bytes: it needs 24"):
        plan.run(torch.zeros(23, dtype=torch.uint8))


@pytest.mark.parametrize(
    "buffer",
    [torch.zeros(64), torch.zeros(64, dtype=torch.uint8)[::2]],
    ids=["float32", "strided"],
)
def test_a_buffer_that_is_not_contiguous_bytes_is_refused(buffer):
    with pytest.raises(TensorError, match="contiguous uint8"):
        new_plan().run(buffer)


def test_a_buffer_of_another_device_is_refused():
    with pytest.raises(TensorError, match="on meta, expected cpu"):
        new_plan().run(torch.zeros(4, dtype=torch.uint8, device="meta"))


def swap_data(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.clone()


def shrink_storage(parameter: torch.nn.Parameter) -> None:
    parameter.untyped_storage().resize_(0)


def change_dtype(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.view(torch.int32).view(torch.float32).to(torch.float64)


def change_shape(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.view(4, 3)


def change_strides(parameter: torch.nn.Parameter) -> None:
    parameter.data = parameter.data.as_strided((3, 4), (1, 3))


CHANGES = [swap_data, shrink_storage, change_dtype, change_shape, change_strides]


@pytest.mark.parametrize("change", CHANGES, ids=lambda f: f.__name__)
def test_a_changed_tensor_is_noticed_by_name(change):
    parameters = [torch.nn.Parameter(torch.rand(3, 4)) for _ in range(6)]
    plan = new_plan()
    plan.add_tensors(parameters[:2], [0, 48], [48, 48], ["a", "b"])
    plan.add_parts([Part(parameters[2]), Part(parameters[3])], torch.float32, (3, 4), 96, "c")
    plan.add_tensors(parameters[4:], [0, 48], [48, 48])
    record = TensorRecord(parameters)
    assert plan.moved() is None
    assert record.first_change(parameters) == -1
    for index, name in reversed(list(enumerate(["a", "b", "c", "c", "#4", "#5"]))):
        change(parameters[index])
        assert plan.moved() == name
        assert record.first_change(parameters) == index


def test_new_values_do_not_make_a_plan_out_of_date():
    parameter = torch.nn.Parameter(torch.rand(3, 4))
    plan = new_plan()
    plan.add_tensors([parameter], [0], [48], ["w"])
    with torch.no_grad():
        parameter.mul_(2)
    assert plan.moved() is None


def test_a_copy_plan_tells_which_side_of_which_pair_has_moved():
    pairs = [(torch.ones(3), torch.zeros(3)) for _ in range(3)]
    plan = CopyPlan(pairs)
    assert plan.moved() is None
    pairs[2][0].data = torch.ones(3)
    assert plan.moved() == "source #2"
    pairs[1][1].data = torch.ones(3)
    assert plan.moved() == "destination #1"


def test_a_record_wants_as_many_tensors_as_it_has():
    with pytest.raises(ArgumentError, match="expected 1 tensors, got 2"):
        TensorRecord([torch.ones(1)]).first_change([torch.ones(1), torch.ones(1)])


def test_a_record_refuses_what_has_no_memory_of_its_own():
    with pytest.raises(TensorError, match="'#1'"):
        TensorRecord([torch.ones(1), torch.eye(2).to_sparse()])


def test_a_record_notices_another_tensor_in_the_same_place():
    first, second = torch.ones(3), torch.ones(3)
    record = TensorRecord((first, second))
    assert record.first_change((first, second)) == -1
    assert record.first_change([first, first]) == 1
    assert TensorRecord([]).first_change([]) == -1
