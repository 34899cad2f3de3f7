"""What ranks must divide, what they may hold whole, and names that other engines use."""

from __future__ import annotations

import pytest
import torch

from packedcomm.errors import LayoutError, ManifestError
from packedcomm.planning.engine_layouts import ModelGeometry
from packedcomm.targets.fused import FusedTarget
from packedcomm.targets.lora_slots import LoraSlotTarget
from tests.helpers.delivery import counting, deliver


def ranks(parameters, wire, size, attributes=None, **options):
    """Each rank's parameters after a transfer; `parameters` are shapes."""
    filled = []
    for rank in range(size):
        mine = {name: torch.full(shape, float("nan")) for name, shape in parameters.items()}
        options = {"num_heads": 4, "num_kv_heads": 2, "head_size": 2, **options}
        geometry = ModelGeometry(**options, tp_rank=rank, tp_size=size)
        deliver(FusedTarget(mine, geometry), wire, attributes)
        filled.append(mine)
    return filled


@pytest.mark.parametrize(
    ("parameter", "tensors", "expected"),
    [
        ("o_proj.weight", {"o_proj.weight": (6, 4)}, r"expected shape \(6, 8\)"),
        ("mlp.down_proj.weight", {"mlp.down_proj.weight": (6, 4)}, r"expected shape \(6, 8\)"),
        ("q_proj.weight", {"q_proj.weight": (6, 4)}, r"expected shape \(12, 4\)"),
        ("k_proj.bias", {"k_proj.bias": (6,)}, r"expected shape \(12,\)"),
        ("gate_proj.weight", {"gate_proj.weight": (6, 8)}, r"expected shape \(12, 4\)"),
    ],
)
def test_a_projection_that_is_not_divided_is_of_another_model(parameter, tensors, expected):
    local = (6,) if parameter.endswith("bias") else (6, 4)
    wire = {name: counting(*shape) for name, shape in tensors.items()}
    with pytest.raises(ManifestError, match=expected):
        ranks({parameter: local}, wire, 2)


def test_halves_of_unlike_sizes_are_an_error():
    wire = {"gate_proj.weight": counting(8, 3), "up_proj.weight": counting(4, 3)}
    with pytest.raises(ManifestError, match="'up_proj.weight' of shape"):
        ranks({"gate_up_proj.weight": (8, 3)}, wire, 2)
    # Experts with ranks of their own may be whole or divided, but both halves alike.
    wire = {}
    for expert in range(2):
        wire[f"experts.{expert}.gate_proj.weight"] = counting(4, 3)
        wire[f"experts.{expert}.up_proj.weight"] = counting(2, 3)
    with pytest.raises(ManifestError, match="are halves of 4 and 2 rows"):
        ranks({"experts.w13_weight": (1, 4, 3)}, wire, 2, num_experts=2, ep_size=2, ep_rank=0)


def test_replicated_parameters_are_whole_on_every_rank():
    wire = {
        "shared.gate_proj.weight": counting(4, 3),
        "shared.up_proj.weight": counting(4, 3, start=50),
        "shared.down_proj.weight": counting(3, 4),
        "q_proj.weight": counting(8, 3),
    }
    parameters = {
        "shared.gate_up_proj.weight": (8, 3),
        "shared.down_proj.weight": (3, 4),
        "q_proj.weight": (4, 3),
    }
    both = torch.cat([wire["shared.gate_proj.weight"], wire["shared.up_proj.weight"]])
    for rank, mine in enumerate(ranks(parameters, wire, 2, replicated=("shared.*",))):
        assert torch.equal(mine["shared.gate_up_proj.weight"], both)
        assert torch.equal(mine["shared.down_proj.weight"], wire["shared.down_proj.weight"])
        assert torch.equal(mine["q_proj.weight"], wire["q_proj.weight"].chunk(2)[rank])


@pytest.mark.parametrize("names", ["shared.*", ("a", 3)], ids=str)
def test_replicated_must_be_names(names):
    with pytest.raises(LayoutError, match="replicated must be names"):
        ModelGeometry(2, 2, 2, replicated=names)


def test_one_kv_head_is_whole_on_every_rank():
    wire = {"k_proj.weight": counting(2, 3)}
    for mine in ranks({"k_proj.weight": (2, 3)}, wire, 2, num_kv_heads=1):
        assert torch.equal(mine["k_proj.weight"], wire["k_proj.weight"])


@pytest.mark.parametrize("each", [False, True], ids=["together", "one by one"])
def test_an_engines_fused_experts_may_have_hugging_faces_names(each):
    both, down = counting(2, 8, 3), counting(2, 3, 4, start=500)
    wire = {"mlp.experts.gate_up_proj": both, "mlp.experts.down_proj": down}
    if each:
        wire = {}
        for expert in range(2):
            gate, up = both[expert].chunk(2)
            wire[f"mlp.experts.{expert}.gate_proj.weight"] = gate
            wire[f"mlp.experts.{expert}.up_proj.weight"] = up
            wire[f"mlp.experts.{expert}.down_proj.weight"] = down[expert]
    parameters = {"mlp.experts.gate_up_proj": (2, 4, 3), "mlp.experts.down_proj": (2, 3, 2)}
    gate, up = both.chunk(2, 1)
    for rank, mine in enumerate(ranks(parameters, wire, 2, num_experts=2)):
        expected = torch.cat([gate.chunk(2, 1)[rank], up.chunk(2, 1)[rank]], 1)
        assert torch.equal(mine["mlp.experts.gate_up_proj"], expected)
        assert torch.equal(mine["mlp.experts.down_proj"], down.chunk(2, 2)[rank])


def test_on_one_rank_fused_experts_are_copied_as_they_are():
    """Also where a model has another order of rows and columns."""
    wire = {"experts.gate_up_proj": counting(2, 3, 8)}
    (mine,) = ranks({"experts.gate_up_proj": (2, 3, 8)}, wire, 1)
    assert torch.equal(mine["experts.gate_up_proj"], wire["experts.gate_up_proj"])


@pytest.mark.parametrize(
    "leaf",
    ["query_key_value", "W_pack", "c_attn", "in_proj_qkv", "wqkv", "linear_fc1", "linear_qkv"],
)
def test_projections_fused_in_an_unknown_order_are_copied_but_never_divided(leaf):
    name = f"layers.0.{leaf}.weight"
    wire = {name: counting(24, 4)}
    (mine,) = ranks({name: (24, 4)}, wire, 1)
    assert torch.equal(mine[name], wire[name])
    for rows in (12, 24):
        with pytest.raises(ManifestError, match=f"{leaf} holds several projections"):
            ranks({name: (rows, 4)}, wire, 2)


@pytest.mark.parametrize(
    "name",
    [
        "transformer.wte.weight",
        "gpt_neox.embed_in.weight",
        "embed_out.weight",
        "transformer.word_embeddings.weight",
        "shared.weight",
        "lm_head.weight",
        "model.embed_tokens.weight",
    ],
)
def test_vocabularies_are_padded_under_all_their_names(name):
    wire = {name: counting(70, 2)}
    padded = torch.nn.functional.pad(wire[name], (0, 0, 0, 58))
    for rank, mine in enumerate(ranks({name: (64, 2)}, wire, 2)):
        assert torch.equal(mine[name], padded.chunk(2)[rank])


@pytest.mark.parametrize(
    ("sent", "held"), [("mlp", "block_sparse_moe"), ("block_sparse_moe", "mlp")]
)
def test_a_router_is_found_under_both_names_of_its_block(sent, held):
    wire = {f"layers.0.{sent}.gate.weight": counting(4, 3)}
    (mine,) = ranks({f"layers.0.{held}.gate.weight": (4, 3)}, wire, 1)
    assert torch.equal(mine[f"layers.0.{held}.gate.weight"], next(iter(wire.values())))


def test_a_rank_without_experts_needs_none():
    wire = {f"experts.{expert}.down_proj.weight": counting(4, 2) for expert in range(2)}
    ranks({"experts.w2_weight": (0, 4, 2)}, wire, 1, num_experts=2, ep_rank=3, ep_size=4)


@pytest.mark.parametrize("kind", ["tp", "ep"])
def test_one_of_several_ranks_must_be_named(kind):
    sizes = {f"{kind}_size": 2, "num_experts": 4}
    with pytest.raises(LayoutError, match=f"{kind}_size 2 needs {kind}_rank"):
        ModelGeometry(4, 4, 8, **sizes)
    assert ModelGeometry(4, 4, 8, **sizes, **{f"{kind}_rank": 0}).tp_rank == 0
    with pytest.raises(LayoutError, match="needs tp_rank"):
        LoraSlotTarget({}, 0, tp_size=2)
