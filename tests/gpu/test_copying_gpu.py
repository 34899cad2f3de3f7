"""The copy kernel, against the same reference as the CPU engine."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from packedcomm.copying import CopyPlan, contiguous_copy, pack, pack_into
from packedcomm.errors import TensorError
from tests.helpers.copy_checks import check_pack, check_plan_between_views, check_unpack
from tests.helpers.tensors import DTYPES, content, random_bits, strided_layouts

pytestmark = pytest.mark.gpu(1)

LAYOUTS = st.lists(strided_layouts(), min_size=0, max_size=5)
EXAMPLES = settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])


@EXAMPLES
@given(LAYOUTS, st.integers(0, 17))
def test_pack_gives_row_major_bytes_of_any_views(layouts, lead):
    check_pack(layouts, "cuda", lead)


@EXAMPLES
@given(LAYOUTS, st.integers(0, 17))
def test_unpack_writes_exactly_the_elements_of_any_views(layouts, lead):
    check_unpack(layouts, "cuda", lead)


@EXAMPLES
@given(strided_layouts(), st.integers(0, 1000))
def test_a_plan_copies_between_different_memory_orders(layout, seed):
    check_plan_between_views(layout, "cuda", seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype):
    source = random_bits((67, 129), dtype).cuda()
    assert content(contiguous_copy(source)) == content(source)
    assert content(contiguous_copy(source.t())) == content(source.t())


@pytest.mark.parametrize("blocks", [0, 1, 64])
def test_every_alignment_of_both_sides(blocks):
    base = random_bits((300_000,), torch.uint8).cuda()
    for lead in range(17):
        for trail in range(17):
            for nbytes in (1, 15, 16, 17, 35, 1000, 33_000, 131_071):
                source = base[lead : lead + nbytes]
                room = torch.zeros(nbytes + 64, dtype=torch.uint8, device="cuda")
                destination = room[trail : trail + nbytes]
                CopyPlan([(source, destination)], blocks=blocks).run()
                assert torch.equal(source, destination)
                assert room.sum() == destination.sum()


def test_rows_of_every_width_inside_a_wider_matrix():
    for columns in (1, 3, 8, 63, 64, 100, 127, 128, 129, 1000, 40_000):
        matrix = random_bits((37, columns + 5), torch.bfloat16).cuda()
        view = matrix[:, 2 : 2 + columns]
        copy = contiguous_copy(view)
        assert torch.equal(copy.view(torch.int16), view.contiguous().view(torch.int16))


def test_a_copy_of_more_than_four_gigabytes_of_runs():
    free, _ = torch.cuda.mem_get_info()
    if free < 12 << 30:
        pytest.skip("needs 12 GiB of free GPU memory")
    source = torch.empty((1 << 31) + 12345, dtype=torch.int16, device="cuda").random_()
    destination = torch.empty_like(source)
    CopyPlan([(source, destination)]).run()
    assert torch.equal(source, destination)


def test_packing_waits_for_the_current_stream_and_tables_are_not_reused_too_early():
    # Many tables in flight behind a long kernel: none may be overwritten before it is read.
    stream = torch.cuda.Stream()
    sources = [random_bits((1000,), torch.uint8, seed).cuda() for seed in range(64)]
    outs = [torch.zeros(1000, dtype=torch.uint8, device="cuda") for _ in sources]
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        for source, out in zip(sources, outs, strict=True):
            pack([source[:500], source[500:]], out)
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(sources, outs, strict=True))


def test_a_plan_replays_on_any_stream():
    source = random_bits((1 << 20,), torch.uint8).cuda()
    destination = torch.zeros_like(source)
    plan = CopyPlan([(source, destination)])
    for _ in range(3):
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            source.bitwise_xor_(0xFF)
            plan.run()
        stream.synchronize()
        assert torch.equal(source, destination)


def test_a_tensor_on_another_device_is_refused_by_name():
    out = torch.empty(64, dtype=torch.uint8, device="cuda")
    with pytest.raises(TensorError, match="'w'.*is on cpu, expected cuda:0"):
        pack_into(out, [torch.ones(2)], [0], [8], ["w"])


def test_cupy_arrays_count_as_tensors():
    cupy = pytest.importorskip("cupy")
    source = cupy.arange(1000, dtype=cupy.float32)
    destination = torch.zeros(1000, device="cuda")
    CopyPlan([(source, destination)]).run()
    torch.cuda.synchronize()
    assert torch.equal(destination.cpu(), torch.arange(1000, dtype=torch.float32))
