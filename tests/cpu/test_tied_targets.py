"""Tied weights and shared memory: what a target may take for one tensor, and what it may not."""

from __future__ import annotations

import pytest
import torch

from packedcomm.errors import ManifestError, TensorError
from packedcomm.planning.engine_layouts import ModelGeometry
from packedcomm.targets.fused import FusedTarget
from packedcomm.targets.lora_slots import LoraSlots, LoraSlotTarget
from packedcomm.targets.placement import check_apart
from packedcomm.targets.tensors import TensorTarget
from tests.helpers.delivery import counting, deliver
from tests.helpers.lora import PREFIX, attributes, pair, stacked

GEOMETRY = ModelGeometry(2, 2, 2)
TIED = ModelGeometry(2, 2, 2, tied_embeddings=True)
EMBEDDING, OUTPUT = "model.embed_tokens.weight", "lm_head.weight"


def nan(*shape):
    return torch.full(shape, float("nan"))


@pytest.mark.parametrize("partial", [False, True])
def test_tied_names_are_renamed_too(partial):
    parameters = {EMBEDDING: nan(64, 4), OUTPUT: nan(64, 4)}
    target = FusedTarget(
        parameters, GEOMETRY, partial=partial, rename=lambda name: name.removeprefix("policy.")
    )
    table = counting(64, 4)
    tied = {f"policy.{OUTPUT}": f"policy.{EMBEDDING}"}
    deliver(target, {f"policy.{EMBEDDING}": table}, {"tied": tied})
    assert torch.equal(parameters[OUTPUT], table)
    assert torch.equal(parameters[EMBEDDING], table)


def test_embeddings_may_be_tied_by_the_wire_and_by_the_geometry():
    parameters = {EMBEDDING: nan(64, 4), OUTPUT: nan(64, 4)}
    table = counting(64, 4)
    deliver(FusedTarget(parameters, TIED), {EMBEDDING: table}, {"tied": {OUTPUT: EMBEDDING}})
    assert torch.equal(parameters[OUTPUT], table)


@pytest.mark.parametrize("make", [TensorTarget, lambda p: FusedTarget(p, GEOMETRY)])
def test_an_output_that_is_sent_for_a_tied_embedding_needs_no_output_here(make):
    parameters = {EMBEDDING: nan(64, 4)}
    table = counting(64, 4)
    deliver(make(parameters), {OUTPUT: table}, {"tied": {EMBEDDING: OUTPUT}})
    assert torch.equal(parameters[EMBEDDING], table)


def test_layers_with_tied_projections_are_filled_from_the_first():
    parameters = {f"l{index}.qkv_proj.weight": nan(12, 4) for index in range(2)}
    wire = {f"l0.{p}_proj.weight": counting(4, 4, start=i * 100) for i, p in enumerate("qkv")}
    tied = {f"l1.{p}_proj.weight": f"l0.{p}_proj.weight" for p in "qkv"}
    deliver(FusedTarget(parameters, GEOMETRY), wire, {"tied": tied})
    for parameter in parameters.values():
        assert torch.equal(parameter, torch.cat(list(wire.values())))


def test_only_some_projections_of_a_layer_may_be_tied():
    parameters = {f"l{index}.qkv_proj.weight": nan(12, 4) for index in range(2)}
    wire = {f"l0.{p}_proj.weight": counting(4, 4, start=i * 100) for i, p in enumerate("qkv")}
    wire["l1.q_proj.weight"] = counting(4, 4, start=900)
    tied = {f"l1.{p}_proj.weight": f"l0.{p}_proj.weight" for p in "kv"}
    deliver(FusedTarget(parameters, GEOMETRY), wire, {"tied": tied})
    expected = [wire[name] for name in ("l1.q_proj.weight", "l0.k_proj.weight", "l0.v_proj.weight")]
    assert torch.equal(parameters["l1.qkv_proj.weight"], torch.cat(expected))


@pytest.mark.parametrize("declared", [{}, {"tied": {}}], ids=["unknown", "not tied"])
def test_an_engine_that_ties_what_the_trainer_does_not_is_an_error(declared):
    table = nan(64, 4)
    wire = {EMBEDDING: counting(64, 4), OUTPUT: counting(64, 4, start=1000)}
    target = FusedTarget({EMBEDDING: table, OUTPUT: table}, GEOMETRY)
    with pytest.raises(ManifestError, match="aren't declared to be tied"):
        deliver(target, wire, declared)
    assert table.isnan().all()


@pytest.mark.parametrize(
    ("geometry", "declared"), [(TIED, {}), (GEOMETRY, {"tied": {OUTPUT: EMBEDDING}})]
)
def test_declared_ties_may_be_sent_twice(geometry, declared):
    table = nan(64, 4)
    wire = {EMBEDDING: counting(64, 4), OUTPUT: counting(64, 4)}
    deliver(FusedTarget({EMBEDDING: table, OUTPUT: table}, geometry), wire, declared)
    assert torch.equal(table, wire[EMBEDDING])


def test_tied_embeddings_say_nothing_of_other_shared_parameters():
    shared = nan(4)
    target = FusedTarget({"a.weight": shared, "b.weight": shared}, TIED)
    with pytest.raises(ManifestError, match="'a.weight' and 'b.weight' both go to"):
        deliver(target, {"a.weight": counting(4), "b.weight": counting(4)})


@pytest.mark.parametrize(
    "second",
    [
        lambda m: m[2:6],
        lambda m: m[:, 1:2],
        lambda m: m.view(4, 8),
        lambda m: m.view(torch.int32),
        lambda m: m[7:, 3:],
        lambda m: m.t(),
    ],
    ids=["rows", "column", "another shape", "another dtype", "last element", "transposed"],
)
def test_views_of_one_another_are_no_two_parameters(second):
    memory = torch.zeros(8, 4)
    for parameters in ([memory, second(memory)], [second(memory), memory]):
        named = {"a.weight": parameters[0], "b.weight": parameters[1]}
        with pytest.raises(TensorError, match="share memory"):
            FusedTarget(named, GEOMETRY)


def test_neighbours_in_one_memory_are_apart():
    memory = torch.zeros(8, 4)
    check_apart({"a": memory[:3], "b": memory[3:], "c": torch.zeros(0)})
    check_apart({"left": memory[:, :2], "right": memory[:, 2:]})
    check_apart({"even": memory[::2], "odd": memory[1::2]})


@pytest.mark.parametrize("view", [lambda a: a, lambda a: a[..., :3]], ids=["same", "part"])
def test_slices_of_slots_in_one_memory_are_an_error(view):
    a = torch.zeros(2, 1, 4, 6)
    b = [torch.zeros(2, 1, 3, 4) for _ in range(3)]
    slots = LoraSlots((a, view(a), torch.zeros(2, 1, 4, 6)), tuple(b))
    with pytest.raises(TensorError, match="share memory"):
        LoraSlotTarget({"l.qkv_proj": slots}, 0)


def test_tied_matrices_fill_the_slots_of_both_modules():
    slots = stacked(*[(8, 6, 3, 8)] * 3)
    wire = pair("l.q_proj", 2, 6, 3) | pair("l.k_proj", 2, 6, 3, start=2000)
    first, second = (f"{PREFIX}l.{part}_proj.lora_A.weight" for part in "qk")
    del wire[second]
    declared = attributes(1.0, modules={"l.q_proj": 2, "l.k_proj": 2}) | {"tied": {second: first}}
    deliver(LoraSlotTarget({"l.qkv_proj": slots}, 0), wire, declared)
    for index in range(2):
        assert torch.equal(slots.a[index][0, 0, :2], wire[first])
    assert slots.a[2][0].eq(0).all()


@pytest.mark.parametrize("new", [None, 3, b"a"], ids=str)
def test_a_rename_that_makes_no_name_is_an_error(new):
    with pytest.raises(ManifestError, match="expected a name"):
        deliver(FusedTarget({"a": nan(2)}, GEOMETRY, rename=lambda name: new), {"a": counting(2)})
    target = LoraSlotTarget({"m.o_proj": stacked((8, 6, 4, 8))}, 0, rename=lambda name: new)
    with pytest.raises(ManifestError, match="expected a name"):
        deliver(target, pair("m.o_proj", 2, 6, 4), attributes(modules={"m.o_proj": 2}))
