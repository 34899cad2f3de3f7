"""Layouts of engine ranks: names, shapes and geometries that don't fit are refused."""

from __future__ import annotations

import pytest

from packedcomm.errors import LayoutError, ManifestError
from packedcomm.planning.engine_layouts import ModelGeometry, engine_layout

HEAD = 4


def shapes(**tensors):
    return {name.replace("__", "."): shape for name, shape in tensors.items()}


def test_all_problems_are_listed():
    with pytest.raises(ManifestError) as caught:
        engine_layout(
            shapes(a__weight=(2, 2), norm__weight=(3,), m__qkv_proj__weight=(96, 6)),
            {
                "a.weight": (5, 2),
                "strange.weight": (1,),
                "m.k_proj.weight": (32, 6),
                "m.wk.weight": (32, 6),
            },
            ModelGeometry(8, 8, HEAD),
        )
    text = str(caught.value)
    for expected in (
        "no destination for tensor 'strange.weight'",
        "tensor 'a.weight' of shape (5, 2) doesn't fit parameter 'a.weight' of shape (2, 2)",
        "parameter 'norm.weight' is not sent",
        "parameter 'm.qkv_proj.weight' is sent without q, v",
        "tensors 'm.k_proj.weight' and 'm.wk.weight' both go to k of parameter",
    ):
        assert expected in text, expected


def test_at_most_ten_problems_are_listed():
    with pytest.raises(ManifestError, match=r"; and 15 more$") as caught:
        engine_layout({}, {f"t{n}": (1,) for n in range(25)}, ModelGeometry(8, 8, HEAD))
    assert str(caught.value).count("no destination") == 10


def test_a_partial_transfer_may_leave_out_parameters_but_not_pieces_of_one():
    parameters = shapes(
        norm__weight=(3,), m__qkv_proj__weight=(96, 6), m__gate_up_proj__weight=(8, 6)
    )
    geometry = ModelGeometry(8, 8, HEAD)
    layout = engine_layout(parameters, {"norm.weight": (3,)}, geometry, partial=True)
    assert set(layout.holes()) == {"m.qkv_proj.weight", "m.gate_up_proj.weight"}
    with pytest.raises(ManifestError, match="qkv_proj.weight' is sent without q, v$"):
        engine_layout(parameters, {"m.k_proj.weight": (32, 6)}, geometry, partial=True)
    with pytest.raises(ManifestError, match="gate_up_proj.weight' is sent without gate$"):
        engine_layout(parameters, {"m.up_proj.weight": (4, 6)}, geometry, partial=True)


def test_an_expert_that_is_missing_is_named():
    tensors = {
        f"m.experts.{e}.{n}.weight": s
        for e in range(3)
        for n, s in (("gate_proj", (4, 6)), ("up_proj", (4, 6)), ("down_proj", (6, 4)))
    }
    del tensors["m.experts.1.up_proj.weight"]
    parameters = {"m.experts.w13_weight": (3, 8, 6), "m.experts.w2_weight": (3, 6, 4)}
    with pytest.raises(ManifestError, match=r"w13_weight' is sent without expert 1 up$"):
        engine_layout(parameters, tensors, ModelGeometry(8, 8, HEAD), partial=True)


@pytest.mark.parametrize(
    ("parameter", "tensor", "text"),
    [
        (("m.qkv_proj.weight", (96, 6)), ("m.q_proj.weight", (33, 6)), "expected shape (32, 6)"),
        (("m.qkv_proj.weight", (96, 6)), ("m.q_proj.weight", (32, 7)), "expected shape (32, 6)"),
        (("m.qkv_proj.weight", (90, 6)), ("m.q_proj.weight", (32, 6)), "gives the parameter 96"),
        (("m.gate_up_proj.weight", (8, 6)), ("m.up_proj.weight", (5, 6)), "expected shape (4, 6)"),
        (("m.gate_up_proj.weight", (7, 6)), ("m.up_proj.weight", (4, 6)), "gate and up"),
        (("lm_head.weight", (65, 6)), ("lm_head.weight", (70, 6)), "not 65 each"),
        (("lm_head.weight", (64, 6)), ("lm_head.weight", (64, 7)), "rows of shape (6,)"),
        (("a.weight", (4, 6)), ("a.weight", (4, 6, 1)), "expected shape (4, 6)"),
        (("a.weight", (4, 6)), ("a.weight", (8, 12)), "expected shape (4, 6)"),
        (("a.weight", (4, 6)), ("a.weight", (12, 6)), "expected 4 on dimension 0"),
        (("m.experts.w2_weight", (2, 6, 4)), ("m.experts.down_proj", (3, 6, 4)), "2 experts"),
        (("m.experts.w2_weight", (2, 6, 4)), ("m.experts.down_proj", (2, 4, 6)), "(6, 4) per"),
        (("m.experts.w2_weight", (2, 6, 4)), ("m.experts.2.w2.weight", (6, 4)), "are 2 experts"),
        (("m.experts.w13_weight", (2, 8)), ("m.experts.0.w1.weight", (6, 4)), "isn't [experts"),
    ],
    ids=lambda value: str(value[0]) if isinstance(value, tuple) else None,
)
def test_a_shape_that_doesnt_fit_is_an_error_that_says_what_would(parameter, tensor, text):
    with pytest.raises(ManifestError) as caught:
        engine_layout(dict([parameter]), dict([tensor]), ModelGeometry(8, 8, HEAD))
    assert text in str(caught.value)


def test_a_parameter_with_a_tensor_that_doesnt_fit_is_reported_once():
    with pytest.raises(ManifestError) as caught:
        engine_layout(
            {"m.qkv_proj.weight": (96, 6)},
            {"m.q_proj.weight": (31, 6), "m.k_proj.weight": (32, 6)},
            ModelGeometry(8, 8, HEAD),
        )
    assert str(caught.value) == (
        "tensor 'm.q_proj.weight' of shape (31, 6) doesn't fit parameter 'm.qkv_proj.weight' of "
        "shape (96, 6) on rank 0 of 1: expected shape (32, 6)"
    )


def test_a_vocabulary_of_another_size_than_the_geometrys_is_an_error():
    with pytest.raises(ManifestError, match="expected 60 rows"):
        engine_layout(
            {"lm_head.weight": (64, 6)}, {"lm_head.weight": (61, 6)}, ModelGeometry(8, 8, 4, 60)
        )


def test_experts_of_unknown_names_are_unknown():
    with pytest.raises(ManifestError, match=r"no destination for tensor 'm.experts.0.w9.weight'"):
        engine_layout(
            {"m.experts.w2_weight": (1, 6, 4)},
            {"m.experts.0.w9.weight": (6, 4), "m.experts.0.w2.weight": (6, 4)},
            ModelGeometry(8, 8, HEAD),
        )


@pytest.mark.parametrize(
    "changes",
    [
        {"num_heads": 7, "num_kv_heads": 7, "tp_size": 2},
        {"num_heads": 8, "num_kv_heads": 3},
        {"num_heads": 24, "num_kv_heads": 6, "tp_size": 4},
        {"num_heads": 0},
        {"head_size": 4.0},
        {"tp_rank": 2, "tp_size": 2},
        {"ep_rank": 1},
        {"ep_size": 2},
        {"num_experts": 0},
        {"tp_rank": -1},
        {"tp_size": True},
    ],
    ids=str,
)
def test_a_geometry_that_cannot_be_is_an_error(changes):
    with pytest.raises(LayoutError):
        ModelGeometry(**({"num_heads": 8, "num_kv_heads": 8, "head_size": 4} | changes))
