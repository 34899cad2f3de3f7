"""`LoraSlotTarget`: adapters, slots and arguments that don't fit are refused, all of them named."""

from __future__ import annotations

import pytest
import torch

from packedcomm.errors import ArgumentError, LayoutError, ManifestError, TensorError
from packedcomm.manifest import Manifest
from packedcomm.targets.lora_slots import LoraSlots, LoraSlotTarget
from tests.helpers.delivery import counting, deliver
from tests.helpers.lora import LIMIT, attributes, pair, stacked


def problems_of(wire, modules=None, declared=None, **options):
    modules = modules or {"m.o_proj": stacked((LIMIT, 6, 4, LIMIT))}
    target = LoraSlotTarget(modules, 0, **options)
    declared = attributes(modules={"m.o_proj": 2}) if declared is None else declared
    with pytest.raises(ManifestError) as caught:
        target.place(Manifest.from_tensors(wire, declared))
    return str(caught.value)


@pytest.mark.parametrize(
    ("extra", "text"),
    [
        (pair("m.strange", 2, 6, 4), "no LoRA slots"),
        ({"base_model.model.m.o_proj.lora_magnitude_vector": counting(4)}, "DoRA magnitude"),
        ({"base_model.model.m.lm_head.weight": counting(4, 6)}, "not a LoRA matrix"),
        ({"base_model.model.m.o_proj.lora_B.bias": counting(4)}, "not a LoRA matrix"),
        ({"base_model.model.m.e.lora_embedding_A": counting(2, 4)}, "not a LoRA matrix"),
        ({"base_model.model.m.q.lora_A.weight": counting(2, 6)}, "without its other half"),
        ({"base_model.model.m.q.lora_B.weight": counting(4, 2)}, "without its other half"),
        ({"m.o_proj.lora_A.weight": counting(2, 6)}, "are the same matrix"),
        ({"m.o_proj.lora_A.other.weight": counting(2, 6)}, "it is of adapter 'other'"),
        ({"m.conv.lora_A.weight": counting(2, 6, 1, 1)}, "expected two dimensions"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_tensor_without_a_place_is_an_error(extra, text):
    assert text in problems_of(pair("m.o_proj", 2, 6, 4) | extra)


@pytest.mark.parametrize(
    ("wire", "text"),
    [
        (pair("m.o_proj", 9, 6, 4), "rank 9 is above max_lora_rank 8"),
        (pair("m.o_proj", 3, 6, 4), "rank 3, declared as 2"),
        (pair("m.o_proj", 2, 7, 4), "7 inputs; this rank's slots have 6"),
        (pair("m.o_proj", 2, 6, 5), "5 outputs; this rank's slots have 4"),
        (
            {"m.o_proj.lora_A.weight": counting(2, 6), "m.o_proj.lora_B.weight": counting(4, 3)},
            "different ranks",
        ),
        ({}, "module 'm.o_proj' is declared but not sent"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_pair_that_doesnt_fit_its_slots_is_an_error(wire, text):
    assert text in problems_of(wire)


def test_all_problems_are_listed():
    wire = {f"m.{name}.lora_A.weight": counting(2, 6) for name in "abcdefghijkl"}
    text = problems_of(wire, declared={})
    assert text.count("other half") == 10
    assert text.endswith("; and 2 more")


def test_a_smaller_limit_than_the_slots_room_holds():
    text = problems_of(pair("m.o_proj", 2, 6, 4), max_lora_rank=1)
    assert "rank 2 is above max_lora_rank 1" in text


def test_one_pair_for_slices_kept_apart_is_an_error():
    modules = {"m.qkv_proj": stacked(*[(LIMIT, 6, 4, LIMIT)] * 3)}
    text = problems_of(pair("m.qkv_proj", 2, 6, 12), modules, attributes(modules={"m.qkv_proj": 2}))
    assert "slices that one pair doesn't fit" in text


def test_qkv_in_one_slice_cant_be_cut():
    modules = {"m.qkv_proj": stacked((LIMIT, 6, 6, LIMIT))}
    declared = attributes(modules={"m.qkv_proj": 2})
    text = problems_of(pair("m.qkv_proj", 2, 6, 12), modules, declared, tp_rank=0, tp_size=2)
    assert "slices that one pair doesn't fit" in text
    deliver(LoraSlotTarget(modules, 0), pair("m.qkv_proj", 2, 6, 6), declared)


def test_two_modules_for_one_slice_are_an_error():
    modules = {"m.qkv_proj": stacked(*[(LIMIT, 6, 4, LIMIT)] * 3)}
    declared = attributes(modules={"m.q_proj": 2, "m.wq": 2})
    wire = pair("m.q_proj", 2, 6, 4) | pair("m.wq", 2, 6, 4)
    assert "both go to 'm.qkv_proj.lora_a_stacked.0'" in problems_of(wire, modules, declared)


@pytest.mark.parametrize(
    ("module", "rank", "sizes", "text"),
    [
        ("m.experts.5.gate_proj", 2, (6, 4), "there are 4 experts"),
        ("m.experts.0.router", 2, (6, 4), "no LoRA slots"),
        ("m.experts", 6, (6, 8), "not those of 4 experts"),
        ("m.experts", 8, (6, 7), "don't divide into 2 parts"),
        ("m.gate_proj", 2, (6, 4), "no LoRA slots"),
    ],
)
def test_an_expert_that_isnt_there_is_an_error(module, rank, sizes, text):
    shapes = [(LIMIT, 6, 4, LIMIT)] * 2 + [(LIMIT, 4, 6, LIMIT)]
    modules = {"m.experts": stacked(*shapes, experts=4)}
    assert text in problems_of(pair(module, rank, *sizes), modules, {}, fold_scaling=False)


@pytest.mark.parametrize(
    "lora",
    [
        [],
        {"modules": []},
        {"modules": {"m.o_proj": 3}},
        {"modules": {"m.o_proj": {"r": 2}}},
        {"modules": {"m.o_proj": {"r": "2", "scaling": 1.0}}},
        {"modules": {"m.o_proj": {"r": 2, "scaling": True}}},
        {"modules": {"m.o_proj": {"r": 2, "scaling": 1.0, "dora": True}}},
        {"adapter": 3},
        {"scaling_folded": "yes"},
    ],
    ids=str,
)
def test_a_malformed_lora_attribute_is_an_error(lora):
    assert "lora" in problems_of(pair("m.o_proj", 2, 6, 4), declared={"lora": lora})


@pytest.mark.parametrize(
    "options",
    [
        {"slot": 3},
        {"slot": -1},
        {"slot": True},
        {"slot": 0, "max_lora_rank": 9},
        {"slot": 0, "max_lora_rank": 0},
        {"slot": 0, "tp_rank": 1},
        {"slot": 0, "ep_rank": 2, "ep_size": 2},
    ],
    ids=str,
)
def test_an_argument_out_of_range_is_an_error(options):
    with pytest.raises(ArgumentError):
        LoraSlotTarget({"m.o_proj": stacked((LIMIT, 6, 4, LIMIT))}, **options)


@pytest.mark.parametrize(
    ("a", "b"),
    [
        ((), ()),
        ((torch.zeros(1, 1, 8, 6),), ()),
        ((torch.zeros(1, 8, 6),), (torch.zeros(1, 4, 8),)),
        ((torch.zeros(1, 1, 8, 6),), (torch.zeros(2, 1, 4, 8),)),
        ((torch.zeros(1, 1, 8, 6),), (torch.zeros(1, 3, 4, 8),)),
    ],
    ids=["none", "no B", "three dimensions", "slots differ", "experts differ"],
)
def test_stacked_tensors_that_dont_go_together_are_an_error(a, b):
    with pytest.raises(LayoutError):
        LoraSlots(a, b)


def test_an_unknown_division_is_an_error():
    with pytest.raises(ArgumentError, match="division must be None or one of .* got 'thirds'"):
        LoraSlots((torch.zeros(1, 1, 8, 6),), (torch.zeros(1, 1, 4, 8),), "thirds")


def test_a_division_of_several_slices_is_an_error():
    a, b = (torch.zeros(1, 1, 8, 6),) * 2, (torch.zeros(1, 1, 4, 8),) * 2
    with pytest.raises(LayoutError, match="'halves' needs one slice, got 2"):
        LoraSlots(a, b, "halves")


def test_stacked_tensors_that_require_grad_are_an_error():
    slots = LoraSlots((torch.zeros(1, 1, 8, 6, requires_grad=True),), (torch.zeros(1, 1, 4, 8),))
    with pytest.raises(TensorError, match="requires grad"):
        LoraSlotTarget({"m.o_proj": slots}, 0)


def test_stacked_tensors_on_two_devices_are_an_error():
    slots = LoraSlots((torch.zeros(1, 1, 8, 6),), (torch.zeros(1, 1, 4, 8, device="meta"),))
    with pytest.raises(TensorError, match="meta"):
        LoraSlotTarget({"m.o_proj": slots}, 0)


def test_memory_that_was_replaced_is_noticed():
    slots = stacked((LIMIT, 6, 4, LIMIT))
    target = LoraSlotTarget({"m.o_proj": slots}, 0)
    manifest = deliver(target, pair("m.o_proj", 2, 6, 4), attributes(modules={"m.o_proj": 2}))
    slots.a[0].data = torch.zeros_like(slots.a[0])
    with pytest.raises(TensorError, match="other memory"):
        target.commit(manifest)
