"""`LoraSlotTarget`: what a transfer leaves in an engine rank's stacked LoRA tensors."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM

from packedcomm.errors import ManifestError
from packedcomm.sources.lora import LoraSource
from packedcomm.targets.lora_slots import LoraSlots, LoraSlotTarget
from tests.helpers.delivery import deliver
from tests.helpers.lora import LIMIT, PREFIX, attributes, pair, slot_of, stacked

# PEFT reads this of transformers' models.
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def check_others_untouched(modules, slot):
    for slots in modules.values():
        for tensor in (*slots.a, *slots.b):
            assert torch.cat([tensor[:slot], tensor[slot + 1 :]]).isnan().all()


# Layers, against a written-out setting of a slot.


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_qkv_slots_hold_the_ranks_heads_of_b_and_all_of_a(size, kv_heads, fully_sharded):
    head, hidden, rank, scaling = 2, 6, 5, 1.5
    wire, sizes = {}, {"q": 8, "k": kv_heads, "v": kv_heads}
    for start, (name, heads) in enumerate(sizes.items()):
        wire |= pair(f"{ATTENTION}.{name}_proj", rank, hidden, heads * head, 1000 * start)
    declared = attributes(scaling, modules={f"{ATTENTION}.{name}_proj": rank for name in sizes})
    rows = LIMIT // size if fully_sharded else LIMIT
    for tp_rank in range(size):
        kv_rows = head * max(1, kv_heads // size)
        shapes = [(rows, hidden, outs, LIMIT) for outs in (8 * head // size, kv_rows, kv_rows)]
        modules = {f"{ATTENTION}.qkv_proj": stacked(*shapes)}
        deliver(LoraSlotTarget(modules, 1, tp_rank=tp_rank, tp_size=size), wire, declared)
        slots = modules[f"{ATTENTION}.qkv_proj"]
        for index, name in enumerate("qkv"):
            a = slot_of(wire[f"{PREFIX}{ATTENTION}.{name}_proj.lora_A.weight"], LIMIT, hidden)
            if fully_sharded:
                a = a.chunk(size)[tp_rank]
            replicas = 1 if name == "q" else max(1, size // kv_heads)
            count = shapes[index][2]
            b = wire[f"{PREFIX}{ATTENTION}.{name}_proj.lora_B.weight"] * scaling
            b = b[tp_rank // replicas * count :][:count]
            assert torch.equal(slots.a[index][1, 0], a)
            assert torch.equal(slots.b[index][1, 0], slot_of(b, count, LIMIT))
        check_others_untouched(modules, 1)


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_row_parallel_slots_hold_the_ranks_inputs_of_a(size, fully_sharded):
    module, rank = f"{MLP}.down_proj", 3
    wire = pair(module, rank, 16, 8)
    a, b = wire.values()
    outputs = 8 // size if fully_sharded else 8
    for tp_rank in range(size):
        modules = {module: stacked((LIMIT, 16 // size, outputs, LIMIT))}
        target = LoraSlotTarget(modules, 0, tp_rank=tp_rank, tp_size=size)
        deliver(target, wire, attributes(0.5, modules={module: rank}))
        mine = b.chunk(size)[tp_rank] if fully_sharded else b
        slots = modules[module]
        assert torch.equal(slots.a[0][0, 0], slot_of(a.chunk(size, 1)[tp_rank], LIMIT, 16 // size))
        assert torch.equal(slots.b[0][0, 0], slot_of(mine * 0.5, outputs, LIMIT))


@pytest.mark.parametrize("size", [1, 2])
def test_gate_up_in_one_slice_is_gate_then_up_of_the_rank(size):
    module = f"{MLP}.gate_up_proj"
    wire = pair(module, 4, 6, 16)
    a, b = wire.values()
    for tp_rank in range(size):
        modules = {module: stacked((LIMIT, 6, 16 // size, LIMIT))}
        target = LoraSlotTarget(modules, 2, tp_rank=tp_rank, tp_size=size)
        deliver(target, wire, attributes(1.0, modules={module: 4}))
        gate, up = b.chunk(2)
        mine = torch.cat([gate.chunk(size)[tp_rank], up.chunk(size)[tp_rank]])
        assert torch.equal(modules[module].a[0][2, 0], slot_of(a, LIMIT, 6))
        assert torch.equal(modules[module].b[0][2, 0], slot_of(mine, 16 // size, LIMIT))


def test_what_the_adapter_leaves_alone_is_zero():
    modules = {
        f"{ATTENTION}.qkv_proj": stacked(*[(LIMIT, 6, 4, LIMIT)] * 3),
        f"{MLP}.gate_up_proj": stacked(*[(LIMIT, 6, 4, LIMIT)] * 2),
    }
    wire = pair(f"{ATTENTION}.v_proj", 2, 6, 4)
    deliver(LoraSlotTarget(modules, 1), wire, attributes(modules={f"{ATTENTION}.v_proj": 2}))
    qkv, gate_up = modules.values()
    for tensor in (*qkv.a[:2], *qkv.b[:2], *gate_up.a, *gate_up.b):
        assert (tensor[1] == 0).all()
    assert (qkv.a[2][1, 0, :2] != 0).all()
    check_others_untouched(modules, 1)


def test_a_smaller_adapter_leaves_nothing_of_a_larger_one_in_the_slot():
    module = f"{ATTENTION}.o_proj"
    modules = {module: stacked((LIMIT, 6, 4, LIMIT))}
    target = LoraSlotTarget(modules, 1)
    deliver(target, pair(module, 8, 6, 4), attributes(modules={module: 8}))
    small = pair(module, 2, 6, 4, start=50)
    deliver(target, small, attributes(modules={module: 2}))
    a, b = small.values()
    assert torch.equal(modules[module].a[0][1, 0], slot_of(a, LIMIT, 6))
    assert torch.equal(modules[module].b[0][1, 0], slot_of(2 * b, 4, LIMIT))


# Scaling.


@pytest.mark.parametrize(
    ("folded", "fold", "factor"), [(False, True, 3.0), (True, True, 1.0), (False, False, 1.0)]
)
def test_the_scaling_is_folded_into_b_exactly_once(folded, fold, factor):
    module = f"{ATTENTION}.o_proj"
    modules = {module: stacked((LIMIT, 6, 4, LIMIT))}
    wire = pair(module, 2, 6, 4)
    target = LoraSlotTarget(modules, 0, fold_scaling=fold)
    deliver(target, wire, attributes(3.0, folded, {module: 2}))
    a, b = wire.values()
    assert torch.equal(modules[module].a[0][0, 0, :2], a)
    assert torch.equal(modules[module].b[0][0, 0, :, :2], factor * b)


def test_a_scaling_that_isnt_known_is_an_error_unless_it_isnt_needed():
    module = f"{ATTENTION}.o_proj"
    modules = {module: stacked((LIMIT, 6, 4, LIMIT))}
    wire = pair(module, 2, 6, 4)
    for unknown in ({}, attributes(modules={})):
        with pytest.raises(ManifestError, match="its scaling is not among"):
            deliver(LoraSlotTarget(modules, 0), wire, unknown)
    deliver(LoraSlotTarget(modules, 0, fold_scaling=False), wire)


# Adapters made by PEFT.


def peft_model(model, **config):
    torch.manual_seed(3)
    adapted = get_peft_model(
        model, LoraConfig(r=4, lora_alpha=6, init_lora_weights=False, **config)
    )
    weights = get_peft_model_state_dict(adapted)
    described = {
        name.removeprefix(PREFIX): {
            "r": layer.r["default"],
            "alpha": float(layer.lora_alpha["default"]),
            "scaling": layer.scaling["default"],
        }
        | ({"parameter": layer.parameter_name} if hasattr(layer, "parameter_name") else {})
        for name, layer in adapted.named_modules()
        if hasattr(layer, "lora_A")
    }
    return (
        adapted,
        weights,
        {"lora": {"adapter": "default", "scaling_folded": False, "modules": described}},
    )


@pytest.mark.parametrize("named", [False, True], ids=["without adapter's name", "with it"])
@pytest.mark.parametrize("rslora", [False, True])
def test_the_product_of_the_slots_is_pefts_delta_of_the_weights(rslora, named):
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        intermediate_size=24,
    )
    everything = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    adapted, wire, declared = peft_model(
        LlamaForCausalLM(config), target_modules=everything, use_rslora=rslora
    )
    if named:
        wire = {name.replace(".weight", ".default.weight"): t for name, t in wire.items()}
    outputs = {"q": 16, "k": 8, "v": 8}
    size = 2
    products: dict[str, list[torch.Tensor]] = {}
    for rank in range(size):
        modules = {}
        for layer in range(2):
            base = f"model.layers.{layer}"
            modules[f"{base}.self_attn.qkv_proj"] = stacked(
                *[(LIMIT, 16, rows // size, LIMIT) for rows in outputs.values()]
            )
            modules[f"{base}.self_attn.o_proj"] = stacked((LIMIT, 16 // size, 16, LIMIT))
            modules[f"{base}.mlp.gate_up_proj"] = stacked(*[(LIMIT, 16, 24 // size, LIMIT)] * 2)
            modules[f"{base}.mlp.down_proj"] = stacked((LIMIT, 24 // size, 16, LIMIT))
        deliver(LoraSlotTarget(modules, 1, tp_rank=rank, tp_size=size), wire, declared)
        for name, slots in modules.items():
            for index, (a, b) in enumerate(zip(slots.a, slots.b, strict=True)):
                products.setdefault(f"{name}.{index}", []).append(b[1, 0] @ a[1, 0])
    parts = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
    for key, shards in products.items():
        parent, leaf, index = key.rsplit(".", 2)
        projection = parts.get(leaf, [leaf])[int(index)]
        dim = 1 if projection in ("o_proj", "down_proj") else 0
        layer = adapted.get_submodule(f"{PREFIX}{parent}.{projection}")
        torch.testing.assert_close(torch.cat(shards, dim), layer.get_delta_weight("default"))


def moe_model(width=12):
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=32,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=4,
            intermediate_size=24,
            num_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=width,
        )
    )


@pytest.mark.parametrize("fully_sharded", [False, True])
@pytest.mark.parametrize("together", [False, True], ids=["gate and up apart", "in one slice"])
@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (1, 2), (2, 2)])
def test_adapters_of_all_experts_are_pefts_delta_of_their_weights(tp, ep, together, fully_sharded):
    adapted, wire, declared = peft_model(
        moe_model(),
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    deltas = {
        layer.parameter_name: layer.get_delta_weight("default").detach()
        for layer in adapted.modules()
        if hasattr(layer, "parameter_name")
    }
    gate, up = deltas["gate_up_proj"].chunk(2, dim=1)
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            width, rows = 12 // tp, LIMIT
            first = [(rows, 16, 2 * width, LIMIT)] if together else [(rows, 16, width, LIMIT)] * 2
            hidden = 16 // tp if fully_sharded else 16
            modules = {
                f"{MLP}.experts": stacked(*first, (LIMIT, width, hidden, LIMIT), experts=4 // ep)
            }
            target = LoraSlotTarget(
                modules, 1, tp_rank=tp_rank, tp_size=tp, ep_rank=ep_rank, ep_size=ep, num_experts=4
            )
            deliver(target, wire, declared)
            slots = modules[f"{MLP}.experts"]
            *gate_up, down = (b[1] @ a[1] for a, b in zip(slots.a, slots.b, strict=True))
            mine = [d.chunk(ep)[ep_rank].chunk(tp, 1)[tp_rank] for d in (gate, up)]
            torch.testing.assert_close(torch.cat(gate_up, dim=1), torch.cat(mine, dim=1))
            wanted = deltas["down_proj"].chunk(ep)[ep_rank].chunk(tp, 2)[tp_rank]
            if fully_sharded:
                wanted = wanted.chunk(tp, 1)[tp_rank]
            torch.testing.assert_close(down, wanted)
            assert (slots.a[0][1, :, 4:] == 0).all()
            check_others_untouched(modules, 1)


def test_adapters_of_all_experts_are_told_apart_by_their_sizes_if_nothing_is_declared():
    adapted, wire, _ = peft_model(
        moe_model(),
        target_modules=[],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    shapes = [(LIMIT, 16, 12, LIMIT)] * 2 + [(LIMIT, 12, 16, LIMIT)]
    modules = {f"{MLP}.experts": stacked(*shapes, experts=4)}
    deliver(LoraSlotTarget(modules, 0, fold_scaling=False), wire)
    deltas = {
        layer.parameter_name: layer.get_delta_weight("default") / layer.scaling["default"]
        for layer in adapted.modules()
        if hasattr(layer, "parameter_name")
    }
    slots = modules[f"{MLP}.experts"]
    gate, up, down = (b[0] @ a[0] for a, b in zip(slots.a, slots.b, strict=True))
    torch.testing.assert_close(torch.cat([gate, up], dim=1), deltas["gate_up_proj"])
    torch.testing.assert_close(down, deltas["down_proj"])


@pytest.mark.parametrize(
    ("block", "names"),
    [
        (MLP, ("gate_proj", "up_proj", "down_proj")),
        ("model.layers.0.block_sparse_moe", ("w1", "w3", "w2")),
    ],
)
def test_adapters_of_single_experts_go_to_their_experts(block, names):
    wire, declared = {}, {}
    for expert in (1, 2):
        for start, (name, inputs, outputs) in enumerate(
            zip(names, (6, 6, 4), (4, 4, 6), strict=True)
        ):
            module = f"{block}.experts.{expert}.{name}"
            wire |= pair(module, 2 + expert, inputs, outputs, 1000 * start + 100 * expert)
            declared[module] = 2 + expert
    for ep_rank in range(2):
        for tp_rank in range(2):
            shapes = [(LIMIT, 6, 2, LIMIT)] * 2 + [(LIMIT, 2, 6, LIMIT)]
            modules = {f"{MLP}.experts": stacked(*shapes, experts=2)}
            target = LoraSlotTarget(
                modules, 0, tp_rank=tp_rank, tp_size=2, ep_rank=ep_rank, ep_size=2, num_experts=4
            )
            deliver(target, wire, attributes(2.0, modules=declared))
            slots = modules[f"{MLP}.experts"]
            adapted = 1 - ep_rank  # expert 1 is the first rank's second, expert 2 the other's first
            for index, name in enumerate(names):
                stem = f"{PREFIX}{block}.experts.{1 + ep_rank}.{name}"
                a, b = (wire[f"{stem}.lora_{matrix}.weight"] for matrix in "AB")
                a, b = (a, b.chunk(2)[tp_rank]) if index < 2 else (a.chunk(2, 1)[tp_rank], b)
                assert torch.equal(slots.a[index][0, adapted], slot_of(a, LIMIT, a.shape[1]))
                assert torch.equal(slots.b[index][0, adapted], slot_of(2 * b, len(b), LIMIT))
                assert (slots.a[index][0, 1 - adapted] == 0).all()
                assert (slots.b[index][0, 1 - adapted] == 0).all()


def test_what_a_lora_source_declares_is_what_the_slots_need():
    adapted, wire, _ = peft_model(
        moe_model(),
        target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
    )
    manifest = LoraSource(adapted).snapshot().manifest
    modules = {
        f"{ATTENTION}.qkv_proj": stacked(*[(LIMIT, 16, rows, LIMIT) for rows in (16, 8, 8)]),
        f"{MLP}.experts": stacked(*[(LIMIT, 16, 12, LIMIT)] * 2, (LIMIT, 12, 16, LIMIT), experts=4),
    }
    deliver(LoraSlotTarget(modules, 1), {n: wire[n] for n in manifest.by_name}, manifest.attributes)
    projection = adapted.get_submodule(f"{PREFIX}{ATTENTION}.q_proj")
    (q_a, _, _), (q_b, _, _) = (
        modules[f"{ATTENTION}.qkv_proj"].a,
        modules[f"{ATTENTION}.qkv_proj"].b,
    )
    torch.testing.assert_close(q_b[1, 0] @ q_a[1, 0], projection.get_delta_weight("default"))
    (delta,) = (
        layer.get_delta_weight("default").detach()
        for layer in adapted.modules()
        if getattr(layer, "parameter_name", None) == "down_proj"
    )
    experts = modules[f"{MLP}.experts"]
    torch.testing.assert_close(experts.b[2][1] @ experts.a[2][1], delta)


# Other ways in.


def test_names_can_be_changed_on_arrival():
    modules = {"language_model.o_proj": stacked((LIMIT, 6, 4, LIMIT))}
    wire = pair("o_proj", 2, 6, 4)
    target = LoraSlotTarget(modules, 0, rename=lambda name: f"language_model.{name}")
    deliver(target, wire, attributes(modules={"o_proj": 2}))
    assert torch.equal(modules["language_model.o_proj"].a[0][0, 0, :2], next(iter(wire.values())))


def test_adapters_are_cast_only_if_that_is_asked_for():
    slots = LoraSlots(
        (torch.ones(1, 1, 8, 6, dtype=torch.bfloat16),),
        (torch.ones(1, 1, 4, 8, dtype=torch.bfloat16),),
    )
    wire = {name: t / 3 for name, t in pair("o_proj", 2, 6, 4).items()}
    declared = attributes(1.0, modules={"o_proj": 2})
    with pytest.raises(ManifestError, match="received as float32, held as bfloat16"):
        deliver(LoraSlotTarget({"o_proj": slots}, 0), wire, declared)
    deliver(LoraSlotTarget({"o_proj": slots}, 0, cast=True), wire, declared)
    assert torch.equal(slots.a[0][0, 0, :2], next(iter(wire.values())).to(torch.bfloat16))
