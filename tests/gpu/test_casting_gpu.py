"""Casts, scales and buffer plans on a GPU, against torch's results on the CPU."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packedcomm.copying import BufferPlan, CopyPlan, Part
from packedcomm.errors import TensorError
from tests.helpers.copy_checks import (
    FLOATS,
    SCALES,
    assert_same_values,
    check_cast,
    check_parts,
    cut_tensors,
    floats,
    torch_cast,
)
from tests.helpers.tensors import random_bits, strided_layouts

pytestmark = pytest.mark.gpu(1)

EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
TENSORS = st.lists(cut_tensors(), min_size=0, max_size=3)
CUDA = torch.device("cuda")


@EXAMPLES
@given(
    strided_layouts(),
    st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    st.sampled_from(SCALES),
    st.integers(0, 9),
)
def test_a_cast_of_any_view_is_torchs(layout, types, scale, lead):
    check_cast(layout, types, scale, "cuda", lead)


@EXAMPLES
@given(TENSORS, st.integers(0, 17), st.booleans())
def test_parts_are_cast_and_scaled_through_two_buffers(tensors, lead, into_buffer):
    check_parts(tensors, "cuda", into_buffer, lead)


@pytest.mark.parametrize("source", FLOATS, ids=str)
@pytest.mark.parametrize("destination", FLOATS, ids=str)
def test_long_casts_of_every_pair_at_every_alignment_of_the_buffer(source, destination):
    for count in (1, 5, 64, 1000, 40_009, 300_001):
        values = floats((count,), source, count)
        memory = values.cuda()
        for lead in (0, 1, 2, 4, 6, 8, 12, 16):
            room = torch.zeros(lead + count * destination.itemsize, dtype=torch.uint8).cuda()
            into = BufferPlan(CUDA, into_buffer=True)
            into.add_parts([Part(memory, None, 0.5)], destination, (count,), 0, "w")
            into.run(room[lead:])
            found = room[lead:].cpu().clone().view(destination)
            expected = torch_cast(values, 0.5, destination)
            assert_same_values(found, expected)
            back = torch.zeros_like(memory)
            out = BufferPlan(CUDA, into_buffer=False)
            out.add_parts([Part(back, None, 2.0)], destination, (count,), 0, "w")
            out.run(room[lead:])
            assert_same_values(back, torch_cast(expected, 2.0, source))


@pytest.mark.parametrize("destination", FLOATS, ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_cast_as_torch_does(source, destination):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    for scale in SCALES:
        found = torch.empty(every.shape, dtype=destination, device="cuda")
        CopyPlan([(every.cuda(), found, scale)], cast=True).run()
        assert_same_values(found, torch_cast(every, scale, destination))


def test_rows_of_every_width_are_cast():
    for columns in (1, 2, 3, 31, 32, 33, 100, 1000, 40_000):
        matrix = floats((37, columns + 5), torch.float32, columns)
        view = matrix.cuda()[:, 2 : 2 + columns]
        found = torch.empty(view.shape, dtype=torch.bfloat16, device="cuda")
        CopyPlan([(view, found)], cast=True).run()
        assert_same_values(found, matrix[:, 2 : 2 + columns].to(torch.bfloat16))


def test_a_cast_of_more_than_four_gigabytes():
    free, _ = torch.cuda.mem_get_info()
    if free < 20 << 30:
        pytest.skip("needs 20 GiB of free GPU memory")
    source = torch.empty((1 << 30) + 4321, device="cuda").normal_()
    found = torch.empty(source.shape, dtype=torch.bfloat16, device="cuda")
    CopyPlan([(source, found)], cast=True).run()
    assert torch.equal(found, source.bfloat16())


def test_a_buffer_plan_replays_on_other_streams_than_the_one_that_uploaded_it():
    source = random_bits((1 << 20,), torch.uint8).cuda()
    plan = BufferPlan(CUDA, into_buffer=True)
    plan.add_tensors([source], [0], [source.nbytes])
    buffers = [torch.zeros_like(source) for _ in range(3)]
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in buffers]
    with torch.cuda.stream(streams[0]):
        torch.cuda._sleep(100_000_000)  # the upload is late, and the other streams must wait
    for stream, buffer in zip(streams, buffers, strict=True):
        with torch.cuda.stream(stream):
            plan.run(buffer)
    torch.cuda.synchronize()
    assert all(torch.equal(source, buffer) for buffer in buffers)


def test_a_plan_dropped_right_after_its_run_still_copies():
    source = random_bits((1 << 20,), torch.uint8).cuda()
    buffer = torch.zeros_like(source)
    first, second = torch.cuda.Stream(), torch.cuda.Stream()
    torch.cuda.synchronize()
    plan = BufferPlan(CUDA, into_buffer=True)
    plan.add_tensors([source], [0], [source.nbytes])
    with torch.cuda.stream(first):
        plan.run(torch.zeros_like(source))
    with torch.cuda.stream(second):
        torch.cuda._sleep(100_000_000)
        plan.run(buffer)
    del plan
    with torch.cuda.stream(first):
        torch.full((4096,), 255, dtype=torch.uint8, device="cuda")  # would take the table's block
    torch.cuda.synchronize()
    assert torch.equal(source, buffer)


@pytest.mark.fault(26)
def test_a_copy_plan_can_be_captured_in_a_graph():
    source = torch.ones(10_000, device="cuda")
    found = torch.zeros(10_000, dtype=torch.bfloat16, device="cuda")
    plan = CopyPlan([(source, found)], cast=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        plan.run()
    source.fill_(3)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(found, torch.full_like(found, 3))


def test_a_buffer_of_another_device_is_refused():
    with pytest.raises(TensorError, match="on cpu, expected cuda:0"):
        BufferPlan(CUDA, into_buffer=True).run(torch.zeros(4, dtype=torch.uint8))


def test_a_swapped_tensor_is_noticed():
    parameter = torch.nn.Parameter(torch.ones(3, 4, device="cuda"))
    plan = BufferPlan(CUDA, into_buffer=True)
    plan.add_parts([Part(parameter)], torch.bfloat16, (3, 4), 0, "w")
    assert plan.moved() is None
    parameter.data = parameter.data.clone()
    assert plan.moved() == "w"
