"""Layouts of engine ranks: what goes where, against slices written out in torch."""

from __future__ import annotations

import time

import pytest
import torch

from packedcomm.errors import ManifestError
from packedcomm.pieces import box_view, part_of
from packedcomm.planning.engine_layouts import ModelGeometry, engine_layout
from tests.helpers.delivery import box_of_part, counting

HEAD, HIDDEN = 4, 6
ATTENTION = "model.layers.0.self_attn"
MLP = "model.layers.0.mlp"


def fill(layout, wire):
    """Parameters of a rank's layout, NaN wherever nothing is written."""
    parameters = {
        name: torch.full(shape, float("nan")) for name, shape in layout.parameters.items()
    }
    for piece in layout.pieces:
        part = part_of(piece, parameters[piece.parameter], layout.tensors[piece.tensor])
        part.tensor.copy_(wire[piece.tensor][box_of_part(part)])
    for name, box in layout.padding:
        box_view(box, parameters[name]).zero_()
    return parameters


def placed(expected, wire, geometry, **options):
    """What the layout for parameters of the expected ones' shapes puts into them."""
    shapes = {name: tuple(tensor.shape) for name, tensor in expected.items()}
    layout = engine_layout(
        shapes, {n: tuple(t.shape) for n, t in wire.items()}, geometry, **options
    )
    assert layout.holes() == {}
    return fill(layout, wire)


def check(expected, wire, geometry, **options):
    found = placed(expected, wire, geometry, **options)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def heads_of(tensor, first, count):
    """Rows of some heads."""
    return tensor.reshape(-1, HEAD, *tensor.shape[1:])[first : first + count].flatten(0, 1)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 8])
@pytest.mark.parametrize("size", [1, 2, 4, 8])
def test_qkv_proj_is_q_k_and_v_of_the_ranks_heads(size, kv_heads, bias):
    rest = () if bias else (HIDDEN,)
    kind = "bias" if bias else "weight"
    q = counting(8 * HEAD, *rest)
    k = counting(kv_heads * HEAD, *rest, start=1000)
    v = counting(kv_heads * HEAD, *rest, start=2000)
    wire = {f"{ATTENTION}.{n}_proj.{kind}": t for n, t in (("q", q), ("k", k), ("v", v))}
    fused = {f"{ATTENTION}.qkv_proj.{kind}": torch.cat([q, k, v])}
    kv_count, replicas = max(1, kv_heads // size), max(1, size // kv_heads)
    for rank in range(size):
        geometry = ModelGeometry(8, kv_heads, HEAD, tp_rank=rank, tp_size=size)
        kv_first = rank // replicas * kv_count
        expected = torch.cat(
            [
                heads_of(q, rank * 8 // size, 8 // size),
                heads_of(k, kv_first, kv_count),
                heads_of(v, kv_first, kv_count),
            ]
        )
        check({f"{ATTENTION}.qkv_proj.{kind}": expected}, wire, geometry)
        check({f"{ATTENTION}.qkv_proj.{kind}": expected}, fused, geometry)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_gate_up_proj_is_gate_then_up_of_the_rank(size):
    gate, up = counting(8, HIDDEN), counting(8, HIDDEN, start=500)
    names = ("gate_proj", "up_proj"), ("w1", "w3")
    for rank in range(size):
        geometry = ModelGeometry(8, 8, HEAD, tp_rank=rank, tp_size=size)
        expected = torch.cat([gate.chunk(size)[rank], up.chunk(size)[rank]])
        wanted = {f"{MLP}.gate_up_proj.weight": expected}
        for first, second in names:
            check(wanted, {f"{MLP}.{first}.weight": gate, f"{MLP}.{second}.weight": up}, geometry)
        check(wanted, {f"{MLP}.gate_up_proj.weight": torch.cat([gate, up])}, geometry)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_other_layers_are_cut_where_their_shapes_say_so(size):
    wire = {
        f"{ATTENTION}.o_proj.weight": counting(HIDDEN, 32),
        f"{ATTENTION}.o_proj.bias": counting(HIDDEN),
        f"{MLP}.down_proj.weight": counting(HIDDEN, 8),
        f"{MLP}.fc1.weight": counting(8, HIDDEN),
        f"{MLP}.fc1.bias": counting(8),
        f"{MLP}.gate.weight": counting(5, HIDDEN),
        f"{ATTENTION}.q_norm.weight": counting(HEAD),
        f"{ATTENTION}.k_norm.weight": counting(HEAD),
        "model.norm.weight": counting(HIDDEN),
        "scale": torch.tensor(2.5),
    }
    cut = {"o_proj.weight": 1, "down_proj.weight": 1, "fc1.weight": 0, "fc1.bias": 0}
    for rank in range(size):
        expected = {
            name: tensor.chunk(size, cut[end])[rank]
            if (end := ".".join(name.split(".")[-2:])) in cut
            else tensor
            for name, tensor in wire.items()
        }
        check(expected, wire, ModelGeometry(8, 8, HEAD, tp_rank=rank, tp_size=size))


def test_metas_names_of_projections_that_stay_alone_are_known():
    wire = {
        f"{ATTENTION}.wo.weight": counting(HIDDEN, 32),
        f"{MLP}.w2.weight": counting(HIDDEN, 8),
    }
    expected = {
        f"{ATTENTION}.o_proj.weight": counting(HIDDEN, 32),
        f"{MLP}.down_proj.weight": counting(HIDDEN, 8),
    }
    check(expected, wire, ModelGeometry(8, 8, HEAD))


def test_keys_and_values_kept_apart_are_replicated_like_fused_ones():
    k = counting(2 * HEAD, HIDDEN)
    for rank in range(4):
        geometry = ModelGeometry(8, 2, HEAD, tp_rank=rank, tp_size=4)
        check(
            {f"{ATTENTION}.k_proj.weight": heads_of(k, rank // 2, 1)},
            {f"{ATTENTION}.k_proj.weight": k},
            geometry,
        )


@pytest.mark.parametrize("size", [1, 2, 4, 8])
@pytest.mark.parametrize("vocabulary", [50257, 50258, 151936, 64, 1])
def test_vocabularies_are_padded_to_64_rows_and_divided(vocabulary, size):
    table = counting(vocabulary, 1)
    padded = torch.zeros(-(-vocabulary // 64) * 64, 1)
    padded[:vocabulary] = table
    for rank in range(size):
        expected = padded.chunk(size)[rank]
        geometry = ModelGeometry(8, 8, HEAD, vocabulary, tp_rank=rank, tp_size=size)
        wire = {"model.embed_tokens.weight": table, "lm_head.weight": table + 0.5}
        head = torch.where(torch.arange(len(padded))[:, None] < vocabulary, padded + 0.5, 0.0)
        check(
            {"model.embed_tokens.weight": expected, "lm_head.weight": head.chunk(size)[rank]},
            wire,
            geometry,
        )


def test_an_embedding_that_isnt_padded_is_taken_whole():
    table = counting(10, 3)
    for rank in range(2):
        geometry = ModelGeometry(8, 8, HEAD, tp_rank=rank, tp_size=2)
        check({"embed_tokens.weight": table}, {"embed_tokens.weight": table}, geometry)


# Experts.


def experts_of(count=4, width=8):
    gate = counting(count, width, HIDDEN)
    up = counting(count, width, HIDDEN, start=1000)
    down = counting(count, HIDDEN, width, start=2000)
    return gate, up, down


def one_by_one(block, names, gate, up, down):
    wire = {}
    for expert in range(len(gate)):
        for name, tensor in zip(names, (gate, up, down), strict=True):
            wire[f"{block}.experts.{expert}.{name}.weight"] = tensor[expert]
    return wire


@pytest.mark.parametrize(("tp", "ep"), [(1, 1), (2, 1), (4, 1), (1, 2), (2, 4)])
@pytest.mark.parametrize("form", ["one by one", "mixtral", "transformers", "engine"])
def test_experts_are_w13_and_w2_of_the_ranks_experts_and_slice(form, tp, ep):
    gate, up, down = experts_of()
    wire = {
        "one by one": one_by_one(MLP, ("gate_proj", "up_proj", "down_proj"), gate, up, down),
        "mixtral": one_by_one(
            "model.layers.0.block_sparse_moe", ("w1", "w3", "w2"), gate, up, down
        ),
        "transformers": {
            f"{MLP}.experts.gate_up_proj": torch.cat([gate, up], dim=1),
            f"{MLP}.experts.down_proj": down,
        },
        "engine": {
            f"{MLP}.experts.w13_weight": torch.cat([gate, up], dim=1),
            f"{MLP}.experts.w2_weight": down,
        },
    }[form]
    for tp_rank in range(tp):
        for ep_rank in range(ep):
            geometry = ModelGeometry(
                8, 8, HEAD, num_experts=4, tp_rank=tp_rank, tp_size=tp, ep_rank=ep_rank, ep_size=ep
            )
            local_gate, local_up, local_down = (t.chunk(ep)[ep_rank] for t in (gate, up, down))
            w13 = torch.cat([local_gate.chunk(tp, 1)[tp_rank], local_up.chunk(tp, 1)[tp_rank]], 1)
            check(
                {
                    f"{MLP}.experts.w13_weight": w13,
                    f"{MLP}.experts.w2_weight": local_down.chunk(tp, 2)[tp_rank],
                },
                wire,
                geometry,
            )


def test_experts_arent_cut_where_the_engine_keeps_them_whole_beside_tensor_parallelism():
    gate, up, down = experts_of()
    geometry = ModelGeometry(8, 8, HEAD, num_experts=4, tp_rank=1, tp_size=2, ep_rank=1, ep_size=2)
    check(
        {
            f"{MLP}.experts.w13_weight": torch.cat([gate[2:], up[2:]], dim=1),
            f"{MLP}.experts.w2_weight": down[2:],
        },
        one_by_one(MLP, ("gate_proj", "up_proj", "down_proj"), gate, up, down),
        geometry,
    )


def test_experts_that_dont_divide_go_to_the_first_ranks():
    geometries = [ModelGeometry(8, 8, HEAD, num_experts=7, ep_rank=r, ep_size=3) for r in range(3)]
    assert [geometry.experts for geometry in geometries] == [range(3), range(3, 5), range(5, 7)]


def test_eighteen_thousand_experts_are_laid_out_quickly():
    parameters, tensors = {}, {}
    for layer in range(48):
        block = f"model.layers.{layer}.mlp.experts"
        parameters |= {
            f"{block}.w13_weight": (128, 768, 2048),
            f"{block}.w2_weight": (128, 2048, 384),
        }
        for expert in range(128):
            tensors |= {
                f"{block}.{expert}.gate_proj.weight": (768, 2048),
                f"{block}.{expert}.up_proj.weight": (768, 2048),
                f"{block}.{expert}.down_proj.weight": (2048, 768),
            }
    began = time.monotonic()
    layout = engine_layout(
        parameters, tensors, ModelGeometry(32, 4, 128, num_experts=128, tp_rank=1, tp_size=2)
    )
    assert len(layout.pieces) == len(tensors)
    assert time.monotonic() - began < 4


# Tied embeddings.


def test_a_tied_lm_head_is_filled_from_the_embedding_that_the_manifest_names():
    table = counting(64, 3)
    both = {"model.embed_tokens.weight": table, "lm_head.weight": table}
    wire = {"model.embed_tokens.weight": table}
    check(
        both, wire, ModelGeometry(8, 8, HEAD), tied={"lm_head.weight": "model.embed_tokens.weight"}
    )
    check(both, wire, ModelGeometry(8, 8, HEAD, tied_embeddings=True))
    with pytest.raises(ManifestError, match=r"'lm_head.weight' is not sent"):
        placed(both, wire, ModelGeometry(8, 8, HEAD))


def test_an_lm_head_that_is_sent_is_taken_rather_than_the_embedding():
    wire = {
        "model.embed_tokens.weight": counting(64, 3),
        "lm_head.weight": counting(64, 3, start=9),
    }
    check(wire, wire, ModelGeometry(8, 8, HEAD, tied_embeddings=True))
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    check(wire, wire, ModelGeometry(8, 8, HEAD), tied=tied)


def test_an_engine_without_lm_head_takes_it_as_the_embedding_only_if_they_are_tied():
    table = counting(64, 3)
    expected = {"model.embed_tokens.weight": table}
    wire = {"lm_head.weight": table, "model.embed_tokens.weight": table}
    geometry = ModelGeometry(8, 8, HEAD, tied_embeddings=True)
    check(expected, wire, geometry)
    check(expected, {"lm_head.weight": table}, geometry)
    with pytest.raises(ManifestError, match=r"'lm_head.weight' \(if it is the embedding"):
        placed(expected, wire, ModelGeometry(8, 8, HEAD))


def test_an_lm_head_of_another_shape_is_not_the_embedding():
    wire = {"lm_head.weight": counting(128, 3), "model.embed_tokens.weight": counting(64, 3)}
    with pytest.raises(ManifestError, match="doesn't fit"):
        placed(
            {"model.embed_tokens.weight": counting(64, 3)},
            wire,
            ModelGeometry(8, 8, HEAD, tied_embeddings=True),
        )
