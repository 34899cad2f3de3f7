"""Declared transforms: cast, rename, filter and the rotary permutation."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from packedcomm.errors import ArgumentError, LayoutError, ManifestError
from packedcomm.sources import Cast, Filter, ModuleSource, Rename, RotaryPermutation
from tests.helpers.source_parts import everything


def snapshot(tensors, *transforms):
    return ModuleSource(tensors, transforms=transforms).snapshot()


def sent(tensors, *transforms):
    return everything(ModuleSource(tensors, transforms=transforms))


def names(tensors, *transforms):
    return [spec.name for spec in snapshot(tensors, *transforms).manifest.specs]


def some(*keys):
    return {key: torch.full((2,), float(i)) for i, key in enumerate(keys)}


# --- all of them ---


def test_transforms_are_in_the_digest():
    tensors = some("a", "b")
    kinds = [
        (),
        (Cast("float32"),),
        (Cast("float32", only="a"),),
        (Cast("float32", only=lambda name: True),),
        (Filter("*"),),
        (Filter(["a", "b"]),),
        (Rename(lambda name: name),),
        (Cast("float32"), Filter("*")),
        (Filter("*"), Cast("float32")),
    ]
    digests = {snapshot(tensors, *kind).manifest.digest for kind in kinds}
    assert len(digests) == len(kinds)


def test_the_manifest_declares_the_transforms_in_order():
    tensors = {"wq.weight": torch.rand(4, 2), "b": torch.rand(2)}
    manifest = snapshot(
        tensors, RotaryPermutation(2, 1, q="wq"), Rename({"b": "c"}), Filter("*"), Cast("float16")
    ).manifest
    rotary, *others = manifest.attributes["transforms"]
    assert rotary == {
        "kind": "rotary_permutation",
        "num_heads": 2,
        "num_kv_heads": 1,
        "direction": "meta_to_hf",
        "q": ["wq"],
        "k": ["k_proj", "wk"],
    }
    assert others == [
        {"kind": "rename"},
        {"kind": "filter", "keep": ["*"]},
        {"kind": "cast", "dtype": "float16", "only": None},
    ]


def test_transforms_are_applied_in_order():
    tensors = some("a", "b")
    assert names(tensors, Rename({"a": "x"}), Filter("x")) == ["x"]
    with pytest.raises(ManifestError, match="pattern 'x' matches no name"):
        snapshot(tensors, Filter("x"), Rename({"a": "x"}))


# --- Cast ---


def test_master_weights_are_sent_in_the_wires_dtype_from_their_own_memory():
    model = nn.Linear(3, 2)
    taken = snapshot(model, Cast(torch.bfloat16))
    assert [spec.dtype for spec in taken.manifest.specs] == ["bfloat16"] * 2
    [[part], _] = taken.parts
    assert part.tensor.dtype is torch.float32
    assert part.tensor.data_ptr() == model.weight.data_ptr()


@pytest.mark.parametrize("source", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("wire", ["float64", "float32", "float16", "bfloat16"])
def test_floats_become_what_torch_makes_of_them(source, wire):
    values = torch.randn(50, dtype=torch.float64).to(getattr(torch, source))
    found = sent({"a": values}, Cast(wire))["a"]
    assert torch.equal(found, values.to(getattr(torch, wire)))


def test_what_is_no_plain_float_is_left_as_it_is():
    kept = [torch.int8, torch.int64, torch.bool, torch.uint8, torch.complex64, torch.float8_e4m3fn]
    tensors = {str(dtype): torch.ones(2).to(dtype) for dtype in kept}
    found = sent(tensors, Cast("bfloat16"))
    assert [tensor.dtype for tensor in found.values()] == kept


@pytest.mark.parametrize("only", ["*.w", ["x.w", "y.w"], lambda name: name.endswith("w")])
def test_only_selected_names_are_cast(only):
    found = sent(some("x.w", "x.b", "y.w"), Cast("float16", only=only))
    assert [t.dtype for t in found.values()] == [torch.float16, torch.float32, torch.float16]


def test_a_later_cast_wins():
    found = sent(some("a", "b"), Cast("bfloat16"), Cast("float32", only="b"))
    assert [tensor.dtype for tensor in found.values()] == [torch.bfloat16, torch.float32]


def test_a_pattern_may_select_a_tied_name():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    assert sent(model, Cast("float16", only="1.weight"))["0.weight"].dtype is torch.float16


def test_cast_patterns_that_match_nothing_are_all_listed():
    with pytest.raises(ManifestError) as caught:
        snapshot(some("a"), Cast("float16", only=["a", "b", "*.c"]))
    assert str(caught.value) == (
        "Cast: pattern 'b' matches no name; Cast: pattern '*.c' matches no name"
    )


@pytest.mark.parametrize("dtype", ["int8", "float8_e4m3fn", torch.complex64, "fp32"])
def test_a_cast_to_what_is_no_plain_float_is_an_error(dtype):
    with pytest.raises(ArgumentError, match="can't cast to"):
        Cast(dtype)


@pytest.mark.parametrize("selection", [(), [], ["a", 3], [None]])
def test_a_selection_must_be_patterns_or_a_function(selection):
    with pytest.raises(ArgumentError, match="expected a pattern"):
        Cast("float16", only=selection)
    with pytest.raises(ArgumentError, match="expected a pattern"):
        Filter(selection)


# --- Rename ---


def test_a_mapping_renames_and_keeps_the_rest_in_place():
    assert names(some("a", "b", "c"), Rename({"b": "x"})) == ["a", "x", "c"]


def test_a_function_renames():
    found = sent(some("a", "b"), Rename(lambda name: f"model.{name}"))
    assert {name: tensor[0].item() for name, tensor in found.items()} == {
        "model.a": 0,
        "model.b": 1,
    }


def test_names_may_be_swapped():
    found = sent(some("a", "b"), Rename({"a": "b", "b": "a"}))
    assert {name: tensor[0].item() for name, tensor in found.items()} == {"b": 0, "a": 1}


def test_tied_names_are_renamed_too():
    model = nn.ModuleDict({"embed": nn.Embedding(3, 2), "head": nn.Linear(2, 3, bias=False)})
    model["head"].weight = model["embed"].weight
    manifest = snapshot(model, Rename({"head.weight": "lm_head", "embed.weight": "wte"})).manifest
    assert manifest.attributes["tied"] == {"lm_head": "wte"}


def test_tied_names_may_become_one():
    tensor = torch.ones(2)
    manifest = snapshot({"a": tensor, "b": tensor}, Rename(lambda name: "one")).manifest
    assert [spec.name for spec in manifest.specs] == ["one"]
    assert manifest.attributes["tied"] == {}


def test_all_collisions_are_listed():
    with pytest.raises(ManifestError) as caught:
        snapshot(some("a1", "a2", "b1", "b2", "c"), Rename(lambda name: name[0]))
    assert str(caught.value) == (
        "Rename: 'a1', 'a2' all became 'a'; Rename: 'b1', 'b2' all became 'b'"
    )


def test_a_collision_with_a_kept_name_is_an_error():
    with pytest.raises(ManifestError, match="'a', 'b' all became 'b'"):
        snapshot(some("a", "b"), Rename({"a": "b"}))


def test_ten_problems_are_listed_and_the_others_counted():
    with pytest.raises(ManifestError, match="; and 3 more") as caught:
        snapshot(some("a"), Rename({f"x{i}": f"y{i}" for i in range(13)}))
    assert str(caught.value).count("no tensor is named") == 10


def test_a_strict_mapping_must_have_every_name():
    assert names(some("a"), Rename({"a": "b"}, strict=True)) == ["b"]
    with pytest.raises(ManifestError, match="no new name for 'c'"):
        snapshot(some("a", "c"), Rename({"a": "b"}, strict=True))


@pytest.mark.parametrize("new", ["", None, 3])
def test_a_new_name_must_be_text(new):
    with pytest.raises(ManifestError, match="expected a non-empty name"):
        snapshot(some("a"), Rename({"a": new}))


def test_names_must_be_a_mapping_or_a_function():
    with pytest.raises(ArgumentError, match="mapping or a function"):
        Rename("a")


# --- Filter ---


@pytest.mark.parametrize(
    "keep", ["layers.0.*", ["layers.0.a", "layers.0.b"], lambda name: ".0." in name]
)
def test_a_filter_leaves_names_out_and_says_so(keep):
    tensors = some("layers.0.a", "layers.0.b", "layers.1.a", "norm")
    taken = snapshot(tensors, Filter(keep))
    assert [spec.name for spec in taken.manifest.specs] == ["layers.0.a", "layers.0.b"]
    assert taken.left_out == ("layers.1.a", "norm")
    assert len(taken.parts) == 2


def test_a_tied_tensor_is_sent_under_the_name_that_is_kept():
    tensor = torch.ones(2)
    tensors = {"embed": tensor, "head": tensor, "norm": torch.ones(1)}
    taken = snapshot(tensors, Filter("head"))
    assert [spec.name for spec in taken.manifest.specs] == ["head"]
    assert taken.left_out == ("embed", "norm")
    assert taken.manifest.attributes["tied"] == {}


def test_patterns_are_sensitive_to_case():
    with pytest.raises(ManifestError, match="pattern 'A' matches no name"):
        snapshot(some("a"), Filter("A"))


def test_a_function_may_keep_nothing():
    assert names(some("a"), Filter(lambda name: False)) == []


# --- RotaryPermutation ---


def to_hf(tensor, heads):
    """The permutation written out, Meta's order to Hugging Face's."""
    rest = tensor.shape[1:]
    half = tensor.shape[0] // heads // 2
    return tensor.view(heads, half, 2, *rest).transpose(1, 2).reshape(tensor.shape)


def to_meta(tensor, heads):
    rest = tensor.shape[1:]
    half = tensor.shape[0] // heads // 2
    return tensor.view(heads, 2, half, *rest).transpose(1, 2).reshape(tensor.shape)


def attention(prefix="layers.0.self_attn."):
    return {
        f"{prefix}q_proj.weight": torch.rand(4 * 6, 5),
        f"{prefix}q_proj.bias": torch.rand(4 * 6),
        f"{prefix}k_proj.weight": torch.rand(2 * 6, 5),
        f"{prefix}v_proj.weight": torch.rand(2 * 6, 5),
        f"{prefix}q_norm.weight": torch.rand(6),
    }


@pytest.mark.parametrize(
    ("direction", "reference"), [("meta_to_hf", to_hf), ("hf_to_meta", to_meta)]
)
def test_queries_and_keys_are_permuted_by_their_own_heads(direction, reference):
    tensors = attention()
    found = sent(tensors, RotaryPermutation(4, 2, direction))
    for name, tensor in tensors.items():
        heads = 4 if "q_proj" in name else 2 if "k_proj" in name else None
        expected = reference(tensor, heads) if heads else tensor
        assert torch.equal(found[name], expected), name


def test_one_direction_undoes_the_other():
    tensors = attention()
    found = sent(sent(tensors, RotaryPermutation(4, 2)), RotaryPermutation(4, 2, "hf_to_meta"))
    both = sent(tensors, RotaryPermutation(4, 2), RotaryPermutation(4, 2, "hf_to_meta"))
    for name, tensor in tensors.items():
        assert torch.equal(found[name], tensor)
        assert torch.equal(both[name], tensor)


def test_metas_order_takes_two_strided_parts_per_head():
    tensors = attention()
    parts = dict(zip(tensors, snapshot(tensors, RotaryPermutation(4, 2)).parts, strict=True))
    counts = [len(pieces) for pieces in parts.values()]
    assert counts == [8, 8, 4, 1, 1]
    memory = tensors["layers.0.self_attn.k_proj.weight"].untyped_storage().data_ptr()
    for part in parts["layers.0.self_attn.k_proj.weight"]:
        assert part.tensor.untyped_storage().data_ptr() == memory


def test_transposed_memory_is_permuted_by_rows():
    weight = torch.rand(5, 24).t()
    found = sent({"wq.weight": weight}, RotaryPermutation(4, 2))["wq.weight"]
    assert torch.equal(found, to_hf(weight.contiguous(), 4))


def test_it_computes_the_same_attention_scores_as_metas_rotation():
    """Rotating neighbours with Meta's weights and halves with the permuted ones."""
    heads, size, hidden, length = 3, 8, 5, 7
    query, key = torch.rand(2, heads * size, hidden, dtype=torch.float64)
    hidden_states = torch.rand(length, hidden, dtype=torch.float64)
    angles = torch.outer(
        torch.arange(length).double(), 10_000 ** (-torch.arange(0, size, 2) / size)
    )

    def meta_rotated(weight):
        x = (hidden_states @ weight.t()).view(length, heads, size // 2, 2)
        turned = torch.view_as_complex(x) * torch.polar(torch.ones_like(angles), angles)[:, None]
        return torch.view_as_real(turned).flatten(2)

    def hf_rotated(weight):
        x = (hidden_states @ weight.t()).view(length, heads, size)
        cos, sin = (torch.cat([f(angles)] * 2, dim=-1)[:, None] for f in (torch.cos, torch.sin))
        halves = torch.cat((-x[..., size // 2 :], x[..., : size // 2]), dim=-1)
        return x * cos + halves * sin

    found = sent({"wq.weight": query, "wk.weight": key}, RotaryPermutation(heads, heads))
    expected = torch.einsum("ahd,bhd->hab", meta_rotated(query), meta_rotated(key))
    scores = torch.einsum(
        "ahd,bhd->hab", hf_rotated(found["wq.weight"]), hf_rotated(found["wk.weight"])
    )
    assert torch.allclose(scores, expected)


def test_of_lora_the_rows_of_b_are_permuted_and_a_is_not():
    prefix = "base_model.model.layers.0.q_proj."
    tensors = {
        f"{prefix}base_layer.weight": torch.rand(24, 5),
        f"{prefix}lora_A.weight": torch.rand(24, 5),
        f"{prefix}lora_B.weight": torch.rand(24, 3),
        f"{prefix}lora_B.default.weight": torch.rand(24, 3),
        f"{prefix}lora_B.bias": torch.rand(24),
        f"{prefix}lora_magnitude_vector": torch.rand(24),
    }
    found = sent(tensors, RotaryPermutation(4, 2))
    for name, tensor in tensors.items():
        expected = tensor if "lora_A" in name else to_hf(tensor, 4)
        assert torch.equal(found[name], expected), name


def test_the_permuted_adapter_adds_up_to_the_permuted_weight():
    a, b = torch.rand(3, 5, dtype=torch.float64), torch.rand(24, 3, dtype=torch.float64)
    found = sent({"q_proj.lora_A.weight": a, "q_proj.lora_B.weight": b}, RotaryPermutation(4, 2))
    delta = found["q_proj.lora_B.weight"] @ found["q_proj.lora_A.weight"]
    assert torch.allclose(delta, to_hf(b @ a, 4))


@pytest.mark.parametrize(("heads", "rows"), [(5, 24), (8, 24), (1, 3)])
def test_heads_that_do_not_divide_the_rows_are_an_error(heads, rows):
    with pytest.raises(LayoutError, match=r"'wq\.weight'.*rows"):
        snapshot({"wq.weight": torch.rand(rows, 2)}, RotaryPermutation(heads, 1))


def test_what_belongs_to_a_projection_but_is_not_understood_is_an_error():
    tensors = {**attention(""), "q_proj.weight_scale_inv": torch.rand(1, 1)}
    with pytest.raises(LayoutError, match=r"'q_proj\.weight_scale_inv': can't be permuted"):
        snapshot(tensors, RotaryPermutation(4, 2))


def test_other_names_of_projections_can_be_given():
    tensors = {"attn.query.weight": torch.rand(8, 2), "q_proj.weight": torch.rand(8, 2)}
    found = sent(tensors, RotaryPermutation(2, 1, q=["attn.query"], k=[]))
    assert torch.equal(found["attn.query.weight"], to_hf(tensors["attn.query.weight"], 2))
    assert torch.equal(found["q_proj.weight"], tensors["q_proj.weight"])


def test_a_permutation_of_nothing_is_an_error():
    with pytest.raises(ManifestError, match="no tensor belongs to any of q_proj, wq, k_proj, wk"):
        snapshot(some("xq_proj.weight"), RotaryPermutation(2, 2))


@pytest.mark.parametrize("count", [0, -1, True, 2.0])
def test_head_counts_must_be_positive_integers(count):
    with pytest.raises(ArgumentError, match="num_heads"):
        RotaryPermutation(count, 1)
    with pytest.raises(ArgumentError, match="num_kv_heads"):
        RotaryPermutation(1, count)


def test_an_unknown_direction_is_an_error():
    with pytest.raises(ArgumentError, match="direction"):
        RotaryPermutation(1, 1, "sideways")
