"""Casting and scaling on the CPU, against torch."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm.copying import CopyPlan
from packedcomm.errors import TensorError
from tests.helpers.copy_checks import (
    FLOATS,
    SCALES,
    assert_same_values,
    check_cast,
    floats,
    torch_cast,
)
from tests.helpers.tensors import content, random_bits, strided_layouts


@settings(max_examples=200, deadline=None)
@given(
    strided_layouts(),
    st.tuples(st.sampled_from(FLOATS), st.sampled_from(FLOATS)),
    st.sampled_from(SCALES),
    st.integers(0, 9),
)
def test_a_cast_of_any_view_is_torchs(layout, types, scale, lead):
    check_cast(layout, types, scale, "cpu", lead)


@pytest.mark.parametrize("destination", FLOATS, ids=str)
@pytest.mark.parametrize("source", [torch.float16, torch.bfloat16], ids=str)
def test_every_16_bit_value_is_cast_as_torch_does(source, destination):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16).view(source)
    for scale in SCALES:
        found = torch.empty(every.shape, dtype=destination)
        CopyPlan([(every, found, scale)], cast=True).run()
        assert_same_values(found, torch_cast(every, scale, destination))


@pytest.mark.parametrize("destination", [torch.float16, torch.bfloat16], ids=str)
def test_float32_is_rounded_to_nearest_even_everywhere(destination):
    # All exponents and signs, with the mantissas next to and at the ties of both 16-bit types.
    ties = torch.tensor([0x0FFF, 0x1000, 0x1001, 0x2FFF, 0x3000, 0x3001, 0x7FFF, 0x8000, 0x8001])
    ties = torch.cat([ties, ties + 0x10000, torch.tensor([0, 1, 0x7FFFFF, 0x7FE000, 0x7FF000])])
    high = torch.arange(512, dtype=torch.int64) << 23
    bits = (high[:, None] + ties[None, :]).reshape(-1)
    values = torch.where(bits >= 1 << 31, bits - (1 << 32), bits).to(torch.int32)
    values = values.view(torch.float32)
    found = torch.empty(values.shape, dtype=destination)
    CopyPlan([(values, found)], cast=True).run()
    assert_same_values(found, values.to(destination))


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("count", [1, 7, 131_072, 1_000_003])
def test_long_casts_are_cut_between_values(count, threads):
    source = floats((count,), torch.float32, count)
    found = torch.empty(count, dtype=torch.bfloat16)
    CopyPlan([(source, found)], cast=True, threads=threads).run()
    assert_same_values(found, source.to(torch.bfloat16))
    back = torch.empty(count, dtype=torch.float64)
    CopyPlan([(found, back)], cast=True, threads=threads).run()
    assert_same_values(back, found.to(torch.float64))


def test_rows_of_every_width_are_cast():
    for columns in (1, 2, 3, 31, 32, 33, 100, 1000):
        matrix = floats((37, columns + 5), torch.float32, columns)
        view = matrix[:, 2 : 2 + columns]
        found = torch.empty(view.shape, dtype=torch.bfloat16)
        CopyPlan([(view, found)], cast=True).run()
        assert_same_values(found, view.to(torch.bfloat16))


def test_one_dtype_and_no_scale_keeps_nan_payloads_even_where_casts_are_allowed():
    source = random_bits((1001,), torch.float32)
    found = torch.empty_like(source)
    CopyPlan([(source, found, 1.0)], cast=True).run()
    assert content(found) == content(source)


def test_a_plan_may_mix_copies_casts_and_scales():
    values = floats((300,), torch.float32, 1)
    whole = random_bits((77,), torch.int64, 2)
    cast, scaled, copied = torch.empty(300).half(), torch.empty(300), torch.empty_like(whole)
    plan = CopyPlan([(values, cast), (values, scaled, 0.1), (whole, copied)], cast=True)
    plan.run()
    assert_same_values(cast, values.half())
    assert_same_values(scaled, values * 0.1)
    assert torch.equal(copied, whole)
    assert plan.nbytes == cast.nbytes + scaled.nbytes + copied.nbytes


def test_a_scale_alone_needs_no_permission_to_cast():
    values = floats((50,), torch.bfloat16, 4)
    found = torch.empty_like(values)
    CopyPlan([(values, found, 2.5)]).run()
    assert_same_values(found, torch_cast(values, 2.5, torch.bfloat16))


def test_values_are_not_cast_unless_asked():
    with pytest.raises(TensorError, match=r"'#0'.*torch.float32.*torch.bfloat16.*asked for"):
        CopyPlan([(torch.ones(3), torch.ones(3, dtype=torch.bfloat16))])


@pytest.mark.parametrize("cast", [False, True])
def test_dtypes_of_one_size_are_not_taken_for_each_other(cast):
    with pytest.raises(TensorError, match=r"torch.int32.*torch.float32"):
        CopyPlan([(torch.ones(3, dtype=torch.int32), torch.ones(3))], cast=cast)


@pytest.mark.parametrize(
    "dtype", [torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64], ids=str
)
def test_only_the_four_float_types_can_be_cast_or_scaled(dtype):
    odd = torch.zeros(3, dtype=dtype)
    with pytest.raises(TensorError, match="can be cast"):
        CopyPlan([(odd, torch.ones(3))], cast=True)
    with pytest.raises(TensorError, match="can be scaled"):
        CopyPlan([(odd, torch.zeros(3, dtype=dtype), 2.0)])


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), 1e39])
def test_a_scale_that_is_no_finite_float32_is_refused(scale):
    with pytest.raises(TensorError, match="not a finite number of float32"):
        CopyPlan([(torch.ones(3), torch.ones(3), scale)])


def test_a_scale_beyond_float32_is_fine_for_float64():
    values = torch.ones(3, dtype=torch.float64)
    found = torch.empty_like(values)
    CopyPlan([(values, found, 1e300)]).run()
    assert torch.equal(found, values * 1e300)


def test_a_cast_into_a_destination_that_overlaps_itself_is_refused():
    with pytest.raises(TensorError, match="share memory"):
        CopyPlan([(torch.ones(3, 4), torch.empty(3, 1).half().expand(3, 4))], cast=True)
