"""Slots that ranks divide or hold whole, experts over ranks, and adapters of other kinds."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from packedcomm.errors import ArgumentError, ManifestError
from packedcomm.targets import StagedTarget
from packedcomm.targets.lora_slots import LoraSlotTarget
from tests.helpers.delivery import counting, deliver
from tests.helpers.lora import LIMIT, PREFIX, attributes, pair, stacked


def target(module, *shapes, experts=1, **options):
    slots = stacked(*shapes, experts=experts)
    return slots, LoraSlotTarget({module: slots}, 0, fold_scaling=False, **options)


@pytest.mark.parametrize(
    ("module", "shapes", "adapted", "text"),
    [
        ("o_proj", [(LIMIT, 4, 6, LIMIT)], ("o_proj", 4, 6), "4 inputs"),
        ("down_proj", [(LIMIT, 4, 6, LIMIT)], ("down_proj", 4, 6), "4 inputs"),
        ("qkv_proj", [(LIMIT, 6, 4, LIMIT)] * 3, ("q_proj", 6, 4), "4 outputs"),
        ("qkv_proj", [(LIMIT, 6, 4, LIMIT)] * 3, ("q_proj", 12, 8), "12 inputs, expected 6"),
        ("qkv_proj", [(LIMIT, 6, 4, LIMIT)], ("qkv_proj", 6, 4), "4 outputs"),
        ("gate_up_proj", [(LIMIT, 6, 4, LIMIT)] * 2, ("up_proj", 6, 4), "4 outputs"),
        ("c_attn", [(LIMIT, 6, 4, LIMIT)], ("c_attn", 6, 8), "several projections"),
    ],
)
def test_slots_that_are_not_divided_are_of_another_model(module, shapes, adapted, text):
    name, inputs, outputs = adapted
    _, there = target(f"m.{module}", *shapes, tp_rank=1, tp_size=2)
    with pytest.raises(ManifestError, match=text):
        deliver(there, pair(f"m.{name}", 2, inputs, outputs))


def test_replicated_modules_are_whole_on_every_rank():
    slots, there = target(
        "m.shared.down_proj", (LIMIT, 4, 6, LIMIT), tp_rank=1, tp_size=2, replicated=["*.shared.*"]
    )
    wire = pair("m.shared.down_proj", 2, 4, 6)
    deliver(there, wire)
    assert torch.equal(slots.a[0][0, 0, :2], wire[f"{PREFIX}m.shared.down_proj.lora_A.weight"])


@pytest.mark.parametrize("staged", [False, True], ids=["in place", "staged"])
@pytest.mark.parametrize("rank", [0, 1])
def test_each_rank_takes_its_piece_of_both_halves(rank, staged):
    slots = replace(stacked((LIMIT, 6, 4, LIMIT)), division="halves")
    there = LoraSlotTarget(
        {"m.input_linear": slots}, 0, fold_scaling=False, tp_rank=rank, tp_size=2
    )
    wire = pair("m.input_linear", 2, 6, 8)
    deliver(StagedTarget(there) if staged else there, wire)
    left, right = wire[f"{PREFIX}m.input_linear.lora_B.weight"].chunk(2)
    expected = torch.cat([left.chunk(2)[rank], right.chunk(2)[rank]])
    assert torch.equal(slots.b[0][0, 0, :, :2], expected)


def test_one_kv_head_is_whole_on_every_rank():
    slots, there = target("m.qkv_proj", *[(LIMIT, 6, 4, LIMIT)] * 3, tp_rank=1, tp_size=2)
    wire = pair("m.k_proj", 2, 6, 4)
    deliver(there, wire)
    assert torch.equal(slots.b[1][0, 0, :, :2], wire[f"{PREFIX}m.k_proj.lora_B.weight"])


def test_experts_that_do_not_divide_go_one_more_to_the_first_ranks():
    wire = {}
    for expert in range(5):
        stem = f"mlp.experts.{expert}.down_proj"
        wire[f"{stem}.lora_A.weight"] = torch.full((2, 4), float(expert))
        wire[f"{stem}.lora_B.weight"] = torch.ones(6, 2)
    found = []
    for rank, held in enumerate((3, 2)):
        shapes = [(LIMIT, 6, 4, LIMIT)] * 2 + [(LIMIT, 4, 6, LIMIT)]
        options = {"ep_rank": rank, "ep_size": 2, "num_experts": 5}
        slots, there = target("mlp.experts", *shapes, experts=held, **options)
        deliver(there, wire)
        found += slots.a[2][0, :, 0, 0].tolist()
        with pytest.raises(ManifestError, match=f"this rank holds {held} of 5"):
            deliver(target("mlp.experts", *shapes, experts=4, **options)[1], wire)
    assert found == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_expert_parallelism_needs_the_number_of_experts():
    with pytest.raises(ArgumentError, match="ep_size 2 needs num_experts"):
        target("mlp.experts", *[(LIMIT, 6, 4, LIMIT)] * 3, experts=2, ep_rank=0, ep_size=2)


@pytest.mark.parametrize("replicated", ["*.shared.*", (1,)], ids=str)
def test_replicated_must_be_names(replicated):
    with pytest.raises(ArgumentError, match="replicated must be names"):
        target("m.o_proj", (LIMIT, 4, 6, LIMIT), replicated=replicated)


def test_matrices_of_two_adapters_are_no_pair():
    _, there = target("l.o_proj", (LIMIT, 6, 3, LIMIT))
    wire = {
        f"{PREFIX}l.o_proj.lora_A.one.weight": counting(2, 6),
        f"{PREFIX}l.o_proj.lora_B.two.weight": counting(3, 2),
    }
    with pytest.raises(ManifestError, match=r"several adapters: .* of 'one'; .* of 'two'"):
        deliver(there, wire)


@pytest.mark.parametrize("variant", ["kasa", "monteclora", "alora", "bdlora", "qalora", "arrow"])
def test_adapters_that_are_more_than_two_matrices_are_refused(variant):
    _, there = target("l.o_proj", (LIMIT, 6, 3, LIMIT))
    declared = attributes(modules={"l.o_proj": 2})
    declared["lora"]["modules"]["l.o_proj"]["variant"] = variant
    with pytest.raises(ManifestError, match=rf"variant '{variant}', which is more than scaling"):
        deliver(there, pair("l.o_proj", 2, 6, 3), declared)


def test_adapters_that_differ_in_training_only_are_taken():
    slots, there = target("l.o_proj", (LIMIT, 6, 3, LIMIT))
    declared = attributes(modules={"l.o_proj": 2})
    declared["lora"]["modules"]["l.o_proj"]["variant"] = "mica"
    wire = pair("l.o_proj", 2, 6, 3)
    deliver(there, wire, declared)
    assert torch.equal(slots.a[0][0, 0, :2], wire[f"{PREFIX}l.o_proj.lora_A.weight"])
