"""Layouts of LoRA adapters in slots: names, cuts, zeros and scalings, without any tensor."""

from __future__ import annotations

import pytest

from packedcomm.errors import ManifestError
from packedcomm.layout import Box
from packedcomm.planning.lora_attributes import LoraAttributes
from packedcomm.planning.lora_layouts import LoraGeometry, lora_layout
from packedcomm.planning.lora_names import LoraName, SlotShapes

UNSCALED = LoraAttributes(fold=False)


def shapes_of(module, rank, inputs, outputs):
    return {f"{module}.lora_A.weight": (rank, inputs), f"{module}.lora_B.weight": (outputs, rank)}


def where(layout):
    """Each piece as (matrix, region of it, parameter, place)."""
    return {(p.tensor.split("_")[-1][0], str(p.box), p.parameter, p.at) for p in layout.pieces}


@pytest.mark.parametrize(
    ("name", "parsed"),
    [
        ("base_model.model.a.b.lora_A.weight", LoraName("a.b", "A", None)),
        ("base_model.model.a.b.lora_B.default.weight", LoraName("a.b", "B", "default")),
        ("a.lora_A.weight", LoraName("a", "A", None)),
        ("base_model.model.a.lora_A", None),
        ("base_model.model.a.lora_A.weight.extra", None),
        ("base_model.model.a.lora_C.weight", None),
        ("base_model.model.a.lora_embedding_A", None),
        ("base_model.model.a.weight", None),
    ],
)
def test_names_are_taken_apart_as_peft_writes_them(name, parsed):
    assert LoraName.parse(name) == parsed


def test_padding_is_one_box_for_each_run_of_experts_alike():
    experts = {
        "m.experts": SlotShapes(
            ((5, 8, 6), (5, 8, 6), (5, 8, 4)), ((5, 4, 8), (5, 4, 8), (5, 6, 8))
        )
    }
    tensors = shapes_of("m.experts.1.gate_proj", 3, 6, 4) | shapes_of(
        "m.experts.2.gate_proj", 3, 6, 4
    )
    layout = lora_layout(experts, tensors, LoraGeometry(), UNSCALED)
    padding = {}
    for parameter, box in layout.padding:
        padding.setdefault(parameter.removeprefix("m.experts.lora_"), []).append(box)
    assert padding["a_stacked.0"] == [
        Box((0, 0, 0), (1, 8, 6)),
        Box((1, 3, 0), (2, 5, 6)),
        Box((3, 0, 0), (2, 8, 6)),
    ]
    assert padding["b_stacked.0"] == [
        Box((0, 0, 0), (1, 4, 8)),
        Box((1, 0, 3), (2, 4, 5)),
        Box((3, 0, 0), (2, 4, 8)),
    ]
    assert padding["a_stacked.1"] == [Box((0, 0, 0), (5, 8, 6))]
    assert layout.holes() == {}


def test_an_adapter_of_full_rank_leaves_no_padding():
    modules = {"o_proj": SlotShapes(((1, 8, 6),), ((1, 4, 8),))}
    layout = lora_layout(modules, shapes_of("o_proj", 8, 6, 4), LoraGeometry(), UNSCALED)
    assert layout.padding == ()


def test_only_b_is_scaled():
    modules = {"o_proj": SlotShapes(((1, 8, 6),), ((1, 4, 8),))}
    attributes = LoraAttributes("default", {"o_proj": (2, 0.25)})
    layout = lora_layout(modules, shapes_of("o_proj", 2, 6, 4), LoraGeometry(), attributes)
    assert {piece.tensor: piece.scale for piece in layout.pieces} == {
        "o_proj.lora_A.weight": 1.0,
        "o_proj.lora_B.weight": 0.25,
    }


@pytest.mark.parametrize("tp_rank", [0, 1, 2, 3])
def test_fully_sharded_experts_hold_their_rows_of_every_experts_a(tp_rank):
    # Two rows of eight per rank; an adapter of rank 3 gives two to rank 0, one to rank 1.
    modules = {"experts": SlotShapes(((2, 2, 6), (2, 2, 4)), ((2, 8, 8), (2, 6, 8)))}
    tensors = {"experts.lora_A.weight": (6, 6), "experts.lora_B.weight": (32, 6)}
    layout = lora_layout(modules, tensors, LoraGeometry(tp_rank, 4), UNSCALED)
    expected = {
        0: {("A", "[0:2, 0:6]", (0, 0, 0)), ("A", "[3:5, 0:6]", (1, 0, 0))},
        1: {("A", "[2:3, 0:6]", (0, 0, 0)), ("A", "[5:6, 0:6]", (1, 0, 0))},
    }.get(tp_rank, set())
    found = {(m, box, at) for m, box, parameter, at in where(layout) if m == "A"}
    assert found == expected
    # Columns of B are rank by rank, experts fastest; rows are gate's, then up's.
    columns = {(box, at) for m, box, _, at in where(layout) if m == "B"}
    first = 4 * tp_rank
    assert columns == {
        (f"[{start}:{start + 4}, {2 * r}:{2 * r + 2}]", (0, at, r))
        for r in range(3)
        for start, at in ((first, 0), (16 + first, 4))
    }


@pytest.mark.parametrize(("parameter", "index"), [("gate_up_proj", 0), ("down_proj", 2)])
def test_experts_whose_sizes_dont_tell_are_told_by_what_is_declared(parameter, index):
    # The hidden size is 8 and so is twice the intermediate size, or the intermediate size itself.
    width = 4 if parameter == "gate_up_proj" else 8
    modules = {
        "experts": SlotShapes(
            ((2, 8, 8), (2, 8, 8), (2, 8, width)), ((2, width, 8), (2, width, 8), (2, 8, 8))
        )
    }
    tensors = shapes_of("experts", 4, 8, 8)
    declared = LoraAttributes(parameters={"experts": parameter}, fold=False)
    layout = lora_layout(modules, tensors, LoraGeometry(), declared)
    assert f"experts.lora_a_stacked.{index}" in {piece.parameter for piece in layout.pieces}
    if parameter == "gate_up_proj":
        with pytest.raises(ManifestError, match="this rank's slots have"):
            lora_layout(modules, tensors, LoraGeometry(), UNSCALED)


def test_an_expert_of_another_rank_fills_nothing_here():
    modules = {
        "experts": SlotShapes(((2, 8, 6), (2, 8, 6), (2, 8, 4)), ((2, 4, 8), (2, 4, 8), (2, 6, 8)))
    }
    tensors = shapes_of("experts.3.up_proj", 2, 6, 4)
    here = lora_layout(
        modules, tensors, LoraGeometry(ep_rank=1, ep_size=2, num_experts=4), UNSCALED
    )
    elsewhere = lora_layout(
        modules, tensors, LoraGeometry(ep_rank=0, ep_size=2, num_experts=4), UNSCALED
    )
    assert {piece.at for piece in here.pieces} == {(1, 0, 0)}
    assert elsewhere.pieces == ()


def test_slots_for_experts_dont_take_a_plain_layer():
    modules = {"m.o_proj": SlotShapes(((2, 8, 6),), ((2, 4, 8),))}
    with pytest.raises(ManifestError, match="the slots have 2 experts"):
        lora_layout(modules, shapes_of("m.o_proj", 2, 6, 4), LoraGeometry(), UNSCALED)


def test_slots_that_contradict_themselves_take_nothing():
    modules = {"o_proj": SlotShapes(((1, 5, 6),), ((1, 4, 8),))}
    with pytest.raises(ManifestError, match="5 rows of A and 8 columns of B"):
        lora_layout(modules, shapes_of("o_proj", 2, 6, 4), LoraGeometry(), UNSCALED)


@pytest.mark.parametrize(
    ("module", "division", "pieces"),
    [
        # Of twelve outputs a rank of three holds four.
        ("gate_up_proj", None, [("[4:6, 0:8]", 0), ("[10:12, 0:8]", 2)]),
        ("input_linear", "halves", [("[4:6, 0:8]", 0), ("[10:12, 0:8]", 2)]),
        ("in_proj", "halves", [("[4:6, 0:8]", 0), ("[10:12, 0:8]", 2)]),
        ("dense_h_to_4h", "halves", [("[4:6, 0:8]", 0), ("[10:12, 0:8]", 2)]),
        ("dense_h_to_4h", None, [("[8:12, 0:8]", 0)]),
        # Whatever others call by the name.
        ("linear_fc1", "whole", [("[8:12, 0:8]", 0)]),
        ("gate_up_proj", "whole", [("[8:12, 0:8]", 0)]),
    ],
)
def test_the_outputs_of_a_pair_are_divided_as_the_module_says(module, division, pieces):
    modules = {module: SlotShapes(((1, 8, 6),), ((1, 4, 8),), division)}
    layout = lora_layout(modules, shapes_of(module, 8, 6, 12), LoraGeometry(2, 3), UNSCALED)
    found = [(str(p.box), p.at[1]) for p in layout.pieces if "lora_B" in p.tensor]
    assert sorted(found, key=lambda piece: piece[1]) == pieces
    assert [str(p.box) for p in layout.pieces if "lora_A" in p.tensor] == ["[0:8, 0:6]"]


@pytest.mark.parametrize(
    ("module", "division"), [("attention", "unknown"), ("gate_up_proj", "unknown"), ("Wqkv", None)]
)
def test_a_pair_whose_division_is_unknown_is_taken_by_one_rank_only(module, division):
    modules = {module: SlotShapes(((1, 8, 6),), ((1, 4, 8),), division)}
    layout = lora_layout(modules, shapes_of(module, 8, 6, 4), LoraGeometry(), UNSCALED)
    assert {(m, box) for m, box, _, _ in where(layout)} == {
        ("A", "[0:8, 0:6]"),
        ("B", "[0:4, 0:8]"),
    }
    with pytest.raises(ManifestError, match="how 3 ranks divide them can't be told"):
        lora_layout(modules, shapes_of(module, 8, 6, 12), LoraGeometry(2, 3), UNSCALED)


def test_only_keys_and_values_may_have_fewer_shards_than_ranks():
    # Slots of three rows: of six on the wire that would be two shards among four ranks.
    slot = SlotShapes(((1, 8, 6),) * 3, ((1, 3, 8),) * 3)
    geometry = LoraGeometry(3, 4)
    layout = lora_layout({"qkv_proj": slot}, shapes_of("k_proj", 8, 6, 6), geometry, UNSCALED)
    assert ("B", "[3:6, 0:8]", "qkv_proj.lora_b_stacked.1", (0, 0, 0)) in where(layout)
    with pytest.raises(ManifestError, match="6 outputs"):
        lora_layout({"qkv_proj": slot}, shapes_of("q_proj", 8, 6, 6), geometry, UNSCALED)
