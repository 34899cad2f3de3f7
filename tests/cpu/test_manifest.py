"""Manifest, TensorSpec and Settings: validation, digests, JSON."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from packedcomm import Manifest, Settings, TensorSpec, TensorTarget
from packedcomm.errors import ArgumentError, ManifestError, TensorError
from packedcomm.manifest import DTYPE_SIZES

SPECS = st.lists(
    st.builds(
        TensorSpec,
        st.text(st.characters(codec="utf-8"), min_size=1, max_size=20),
        st.sampled_from(sorted(DTYPE_SIZES)),
        st.lists(st.integers(0, 100), max_size=4).map(tuple),
    ),
    unique_by=lambda spec: spec.name,
    max_size=10,
)


@given(SPECS)
def test_json_round_trips_and_keeps_the_digest(specs):
    manifest = Manifest(specs)
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.nbytes == sum(spec.nbytes for spec in specs)


def test_the_digest_is_of_names_dtypes_shapes_and_order():
    a, b = TensorSpec("a", "float32", (2, 3)), TensorSpec("b", "float32", (6,))
    variants = [
        [a, b],
        [b, a],
        [a],
        [TensorSpec("a", "float32", (3, 2)), b],
        [TensorSpec("a", "int32", (2, 3)), b],
        [TensorSpec("c", "float32", (2, 3)), b],
    ]
    assert len({Manifest(v).digest for v in variants}) == len(variants)
    # Fixed for ever: digests travel between versions.
    assert (
        Manifest([a]).to_json() == '{"attributes":{},"tensors":[["a","float32",[2,3]]],"version":1}'
    )


def test_every_dtype_has_torchs_size():
    for name, size in DTYPE_SIZES.items():
        assert getattr(torch, name).itemsize == size


def test_from_tensors_describes_a_state_dict():
    layer = torch.nn.Linear(3, 2)
    manifest = Manifest.from_tensors(layer.state_dict())
    assert manifest.specs == (
        TensorSpec("weight", "float32", (2, 3)),
        TensorSpec("bias", "float32", (2,)),
    )
    assert manifest == Manifest.from_tensors(layer.named_parameters())


@pytest.mark.parametrize("wanting", [Manifest.from_tensors, TensorTarget])
@pytest.mark.parametrize("tensors", [None, 3, "abc", [1], [torch.ones(3)]])
def test_what_has_no_names_is_refused_by_its_type(wanting, tensors):
    kinds = "NoneType|int|str|Tensor"
    with pytest.raises(ArgumentError, match=f"expected .*tensors?, got ({kinds})$"):
        wanting(tensors)


def test_a_number_is_no_tensor():
    with pytest.raises(TensorError, match="'a': expected a tensor, got int"):
        Manifest.from_tensors({"a": 3})


def test_from_lists_of_unequal_lengths_is_refused():
    with pytest.raises(ManifestError, match="got 2, 1 and 2"):
        Manifest.from_lists(["a", "b"], ["int8"], [[1], [2]])


def test_from_lists_is_the_form_of_vllms_update_request():
    manifest = Manifest.from_lists(["a"], ["bfloat16"], [[4, 2]])
    assert list(manifest) == [("a", ((4, 2), "bfloat16"))]


def test_duplicates_are_listed():
    spec = TensorSpec("twice", "int8", (1,))
    with pytest.raises(ManifestError, match="twice"):
        Manifest([spec, TensorSpec("once", "int8", (1,)), spec])


@pytest.mark.parametrize("name", ["", 3, None, "x" * 5000, "\ud800"])
def test_bad_names_are_refused(name):
    with pytest.raises(ManifestError, match="tensor name"):
        TensorSpec(name, "int8", (1,))


@pytest.mark.parametrize(
    "shape", [(-1,), (1 << 64,), (1 << 40, 1 << 40), (1.0,), (True,), (1,) * 65, 5]
)
def test_bad_shapes_are_refused(shape):
    with pytest.raises(ManifestError, match="'w'"):
        TensorSpec("w", "int8", shape)


def test_numbers_that_python_does_not_write_are_refused():
    huge = 10**5000
    for name, dtype, shape in (
        ("w", "int8", (huge,)),
        ("w", "int8", (-huge,)),
        ("w", huge, (1,)),
        (huge, "int8", (1,)),
    ):
        with pytest.raises(ManifestError):
            TensorSpec(name, dtype, shape)


def _nested(depth):
    value = 0
    for _ in range(depth):
        value = [value]
    return value


def test_messages_stay_short_whatever_came():
    for name, dtype, shape in (
        ("w", "int8", _nested(990)),
        ("w", "int8", [0] * 100_000 + ["x"]),
        ("w", "x" * 100_000, (1,)),
        ("x" * 100_000 + "\ud800", "int8", (1,)),
        (_nested(990), "int8", (1,)),
    ):
        with pytest.raises(ManifestError) as raised:
            TensorSpec(name, dtype, shape)
        assert len(str(raised.value)) < 1000


@pytest.mark.parametrize("dtype", ["int7", "", "quint8", "float4_e2m1fn_x2"])
def test_unknown_dtypes_are_refused(dtype):
    with pytest.raises(ManifestError, match=r"'w'.*dtype"):
        TensorSpec("w", dtype, (1,))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "[]",
        "{",
        '{"tensors":[]}',
        '{"attributes":{},"tensors":{},"version":1}',
        '{"attributes":{},"tensors":[],"version":2}',
        '{"attributes":{},"tensors":[],"version":1.0}',
        '{"attributes":{},"tensors":[],"version":true}',
        '{"attributes":{"a":NaN},"tensors":[],"version":1}',
        '{"attributes":{"a":' + "[" * 990 + "]" * 990 + '},"tensors":[],"version":1}',
        '{"attributes":{},"tensors":[["a","int8"]],"version":1}',
        '{"attributes":{},"tensors":[["a","int8",[1],2]],"version":1}',
        '{"attributes":{},"tensors":[[1,"int8",[1]]],"version":1}',
        '{"attributes":{},"tensors":[["a","int8",[-1]]],"version":1}',
        '{"attributes":{},"tensors":[["a","int8",[1e3]]],"version":1}',
        '{"attributes":{},"tensors":[["a","int8",[true]]],"version":1}',
        '{"attributes":{},"tensors":[["a","int8",[1]],["a","int8",[1]]],"version":1}',
        "[" * 100_000,
    ],
)
def test_malformed_json_is_refused(text):
    with pytest.raises(ManifestError):
        Manifest.from_json(text)


def test_attributes_nest_so_far_that_every_manifest_has_a_digest():
    deepest = Manifest([], {"a": _nested(31)})
    assert Manifest.from_json(deepest.to_json()).digest == deepest.digest
    for depth in range(32, 1000, 11):
        with pytest.raises(ManifestError, match="nest deeper than 32|not JSON"):
            Manifest([], {"a": _nested(depth)})
    # As deep as JSON can still be read here, where it could no longer be written.
    for depth in range(900, 1000):
        text = '{"attributes":{"a":' + "[" * depth + "]" * depth + '},"tensors":[],"version":1}'
        with pytest.raises(ManifestError):
            Manifest.from_json(text)


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=20))
def test_any_json_is_a_manifest_or_a_typed_error(tensors):
    try:
        Manifest.from_json(json.dumps({"tensors": tensors, "version": 1}))
    except ManifestError:
        return
    assert tensors == []


def test_settings_come_from_the_environment_only_when_asked():
    environ = {"PACKEDCOMM_NUM_BUFFERS": "3", "PACKEDCOMM_CONNECT_TIMEOUT_S": "1.5", "PATH": "x"}
    settings = Settings.from_environment(environ)
    assert (settings.num_buffers, settings.connect_timeout_s) == (3, 1.5)
    assert Settings().num_buffers == 2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("connect_timeout_s", "5"),
        ("connect_timeout_s", True),
        ("num_buffers", 2.0),
        ("buffer_size_bytes", "1"),
        ("flight_record_dir", None),
    ],
)
def test_a_setting_of_another_type_is_refused_by_name(name, value):
    with pytest.raises(ArgumentError, match=f"Settings.{name} must be "):
        Settings(**{name: value})
    assert Settings(connect_timeout_s=5).connect_timeout_s == 5


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("PACKEDCOMM_NUM_BUFERS", "3"),
        ("PACKEDCOMM_NUM_BUFFERS", "three"),
        ("PACKEDCOMM_NUM_BUFFERS", "0"),
        ("PACKEDCOMM_CONNECT_TIMEOUT_S", "nan"),
        ("PACKEDCOMM_BUFFER_SIZE_BYTES", "-1"),
        ("PACKEDCOMM_MAX_FRAME_BYTES", "0"),
        ("PACKEDCOMM_CONTROL_TIMEOUT_S", "0"),
    ],
)
def test_a_bad_variable_is_refused_by_name(variable, value):
    with pytest.raises(ArgumentError, match=r"NUM_BUF|num_buf|timeout|buffer_size|max_frame"):
        Settings.from_environment({variable: value})
