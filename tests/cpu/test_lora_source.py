"""`LoraSource`: adapters of real PEFT models."""

from __future__ import annotations

import copy

import pytest
import torch

from packedcomm.errors import ArgumentError, ManifestError
from packedcomm.sources import Cast, Filter, LoraSource, Rename, RotaryPermutation
from tests.helpers.source_parts import everything

pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
from peft import LoraConfig, get_peft_model, inject_adapter_in_model  # noqa: E402
from peft.tuners.lora.config import BdLoraConfig, MontecloraConfig  # noqa: E402
from transformers import (  # noqa: E402
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

# PEFT warns of its own use of transformers and of tied weights, neither of which matters here.
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]

SIZES = {
    "vocab_size": 32,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def llama(**options):
    return LlamaForCausalLM(LlamaConfig(**SIZES, **options))


def qwen_moe(**options):
    config = Qwen3MoeConfig(
        **SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, **options
    )
    return Qwen3MoeForCausalLM(config)


def mixtral(**options):
    return MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4, **options))


def adapted(base=None, adapter="default", **options):
    """A PEFT model with random values in A and B."""
    options = {"target_modules": ["q_proj", "v_proj"], "r": 3, "lora_alpha": 12, **options}
    model = get_peft_model(base or llama(), LoraConfig(**options), adapter_name=adapter)
    randomise(model)
    return model


def randomise(model):
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "modules_to_save" in name or "delta" in name:
                parameter.copy_(torch.rand_like(parameter))


def saved(model, adapter="default"):
    return peft.get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False)


def check_same(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


BLOCK_DIAGONAL = BdLoraConfig(target_modules_bd_b=["q_proj", "v_proj"], nblocks=1)

MODELS = {
    "plain": lambda: adapted(),
    "all linear": lambda: adapted(target_modules="all-linear"),
    "dora": lambda: adapted(use_dora=True),
    "rank stabilised": lambda: adapted(use_rslora=True),
    "ranks and alphas by module": lambda: adapted(
        rank_pattern={"v_proj": 5}, alpha_pattern={"q_proj": 7}
    ),
    "embedding": lambda: adapted(target_modules=["embed_tokens", "q_proj"]),
    "module to save": lambda: adapted(modules_to_save=["lm_head"]),
    "bias of the adapter": lambda: adapted(llama(attention_bias=True), lora_bias=True),
    "all biases": lambda: adapted(llama(attention_bias=True), bias="all"),
    "biases of adapted layers": lambda: adapted(llama(attention_bias=True), bias="lora_only"),
    "trainable tokens": lambda: adapted(trainable_token_indices=[1, 5]),
    "tied trainable tokens": lambda: adapted(
        llama(tie_word_embeddings=True), trainable_token_indices=[1, 5]
    ),
    "experts of Qwen3-MoE": lambda: adapted(
        qwen_moe(), target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    ),
    "experts of Mixtral": lambda: adapted(
        mixtral(), target_parameters=["mlp.experts.down_proj"], target_modules=[]
    ),
    "kasa": lambda: adapted(kasa_config=peft.KasaConfig()),
    "block diagonal": lambda: adapted(use_bdlora=BLOCK_DIAGONAL),
    "monteclora": lambda: adapted(monteclora_config=MontecloraConfig()),
    "alora": lambda: adapted(alora_invocation_tokens=[1, 2]),
    "mica": lambda: adapted(init_lora_weights="mica"),
}


@pytest.mark.parametrize("kind", MODELS)
def test_what_is_sent_is_what_peft_saves(kind):
    model = MODELS[kind]()
    source = LoraSource(model)
    expected = saved(model)
    found = everything(source)
    check_same(found, expected)
    assert all(name.startswith("base_model.model.") for name in found)
    assert source.leader
    assert source.snapshot() is source.snapshot()


@pytest.mark.parametrize("kind", MODELS)
def test_peft_loads_what_was_sent(kind):
    model, other = MODELS[kind](), MODELS[kind]()
    result = peft.set_peft_model_state_dict(other, everything(LoraSource(model)))
    assert not result.unexpected_keys
    check_same(saved(other), saved(model))


def test_the_manifest_has_the_true_scaling_of_every_module():
    model = adapted(
        use_rslora=True, rank_pattern={"v_proj": 4}, alpha_pattern={"v_proj": 6}, use_dora=True
    )
    lora = LoraSource(model).snapshot().manifest.attributes["lora"]
    assert lora["adapter"] == "default"
    assert lora["scaling_folded"] is False
    assert list(lora["modules"]) == [
        f"model.layers.{layer}.self_attn.{name}"
        for layer in range(2)
        for name in ("q_proj", "v_proj")
    ]
    expected = {"alpha": 12.0, "dora": True, "r": 3, "rslora": True, "scaling": 12 / 3**0.5}
    assert lora["modules"]["model.layers.1.self_attn.q_proj"] == expected
    expected = {"alpha": 6.0, "dora": True, "r": 4, "rslora": True, "scaling": 6 / 4**0.5}
    assert lora["modules"]["model.layers.0.self_attn.v_proj"] == expected


def test_adapted_experts_say_which_parameter_they_belong_to():
    model = MODELS["experts of Qwen3-MoE"]()
    modules = LoraSource(model).snapshot().manifest.attributes["lora"]["modules"]
    described = {
        (name, module["parameter"], module["experts"])
        for name, module in modules.items()
        if "parameter" in module
    }
    for layer in range(2):
        path = f"model.layers.{layer}.mlp.experts"
        assert (path, "down_proj", 4) in described
        assert (f"{path}.base_layer", "gate_up_proj", 4) in described


@pytest.mark.parametrize("rank_stabilised", [False, True])
def test_folded_scaling_gives_the_merged_weights(rank_stabilised):
    model = adapted(use_rslora=rank_stabilised, rank_pattern={"v_proj": 5}, r=4)
    source = LoraSource(model, fold_scaling=True)
    assert source.snapshot().manifest.attributes["lora"]["scaling_folded"] is True
    found = everything(source)
    before = {
        name.replace(".base_layer", ""): tensor.clone()
        for name, tensor in model.get_base_model().state_dict().items()
    }
    merged = model.merge_and_unload().state_dict()
    changed = 0
    for name, tensor in merged.items():
        prefix = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{prefix}.lora_A.weight" in found:
            delta = found[f"{prefix}.lora_B.weight"] @ found[f"{prefix}.lora_A.weight"]
            assert torch.allclose(before[name] + delta, tensor)
            changed += 1
    assert changed == 4


def test_scaling_is_folded_into_b_only():
    model = adapted(llama(attention_bias=True), lora_bias=True)
    plain, folded = everything(LoraSource(model)), everything(LoraSource(model, fold_scaling=True))
    for name, tensor in plain.items():
        expected = tensor * 4.0 if "lora_B" in name else tensor
        assert torch.equal(folded[name], expected), name


def test_freezing_disabling_and_merging_change_nothing():
    model = adapted()
    expected = {name: tensor.clone() for name, tensor in saved(model).items()}
    digest = LoraSource(model).snapshot().manifest.digest
    model.requires_grad_(False)
    check_same(everything(LoraSource(model)), expected)
    with model.disable_adapter():
        check_same(everything(LoraSource(model)), expected)
    model.merge_adapter()
    check_same(everything(LoraSource(model)), expected)
    assert LoraSource(model).snapshot().manifest.digest == digest


def test_each_adapter_is_a_source_of_its_own():
    model = adapted()
    model.add_adapter("other", LoraConfig(target_modules=["k_proj", "v_proj"], r=2))
    randomise(model)
    check_same(everything(LoraSource(model)), saved(model))
    check_same(everything(LoraSource(model, "other")), saved(model, "other"))
    modules = LoraSource(model, "other").snapshot().manifest.attributes["lora"]["modules"]
    assert modules.keys() == {
        f"model.layers.{i}.self_attn.{name}" for i in range(2) for name in ("k_proj", "v_proj")
    }


def test_changes_are_noticed():
    model = adapted()
    source = LoraSource(model, fold_scaling=True)
    first = source.snapshot()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    randomise(model)
    assert source.snapshot() is first
    layer.scaling["default"] = 0.5
    second = source.snapshot()
    assert second is not first
    path = "model.layers.0.self_attn.q_proj"
    assert second.manifest.attributes["lora"]["modules"][path]["scaling"] == 0.5
    name = f"base_model.model.{path}.lora_B.weight"
    weight = layer.lora_B["default"].weight
    assert torch.equal(everything(source)[name], weight.detach() * 0.5)
    weight.data = torch.ones_like(weight)
    third = source.snapshot()
    assert third is not second
    assert third.manifest is second.manifest
    assert everything(source)[name].eq(0.5).all()
    model.delete_adapter("default")
    with pytest.raises(ManifestError):
        source.snapshot()


def memory_of(tensors):
    return {tensor.untyped_storage().data_ptr() for tensor in tensors}


def sent_memory(source):
    parts = (part for parts in source.snapshot().parts for part in parts)
    return memory_of(part.tensor for part in parts)


@pytest.mark.parametrize("kind", MODELS)
def test_whatever_leads_to_a_tensor_that_is_sent_may_be_replaced(kind):
    model = MODELS[kind]()
    source = LoraSource(model)
    sent = sent_memory(source)
    replaced = 0
    for module in list(model.modules()):
        for kept in (module._modules, module._parameters, module._buffers):
            for name, held in list(kept.items()):
                if held is None:
                    continue
                inside = isinstance(held, torch.nn.Module)
                tensors = [*held.parameters(), *held.buffers()] if inside else [held]
                if not sent & memory_of(tensors):
                    continue
                kept[name] = copy.deepcopy(held)
                present = memory_of([*model.parameters(), *model.buffers()])
                found = sent_memory(source)
                assert found <= present, (type(module), name)
                kept[name] = held
                assert sent_memory(source) == sent
                replaced += 1
    assert replaced >= 4


def test_transforms_apply_to_adapters():
    model = adapted(target_modules=["q_proj", "k_proj", "v_proj"])
    found = everything(
        LoraSource(model, transforms=[RotaryPermutation(4, 2), Cast("bfloat16", only="*lora_A*")])
    )
    for name, tensor in saved(model).items():
        if "lora_A" in name:
            tensor = tensor.bfloat16()
        elif "v_proj" not in name:
            heads = 4 if "q_proj" in name else 2
            tensor = tensor.view(heads, 2, 2, 3).transpose(1, 2).reshape(tensor.shape)
        assert torch.equal(found[name], tensor), name


def test_an_injected_adapter_is_sent_under_the_same_names():
    base = llama()
    inject_adapter_in_model(LoraConfig(target_modules=["q_proj"], r=2), base)
    expected = {f"base_model.model.{name}": t for name, t in saved(base).items()}
    check_same(everything(LoraSource(base)), expected)


def test_wrappers_are_left_out_of_names():
    model = adapted()
    manifest = LoraSource(model).snapshot().manifest
    for wrapped in (torch.compile(model), torch.nn.DataParallel(model), model.base_model):
        assert LoraSource(wrapped).snapshot().manifest == manifest


def test_an_unknown_adapter_is_an_error_that_lists_the_others():
    model = adapted(adapter="first")
    model.add_adapter("second", LoraConfig(target_modules=["k_proj"]))
    with pytest.raises(
        ManifestError, match="'default': the model's adapters are 'first', 'second'"
    ):
        LoraSource(model).snapshot()


def test_a_model_without_lora_is_an_error():
    with pytest.raises(ManifestError, match="LlamaForCausalLM has no LoRA layers"):
        LoraSource(llama()).snapshot()


def test_an_adapter_of_another_method_is_an_error():
    config = peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])
    with pytest.raises(ManifestError, match="is of type IA3, expected LORA"):
        LoraSource(get_peft_model(llama(), config)).snapshot()


def test_a_state_dict_is_refused():
    with pytest.raises(ArgumentError, match="expected a PEFT model, got dict"):
        LoraSource(saved(adapted()))


@pytest.mark.parametrize(
    ("kind", "variant"),
    [
        ("kasa", "kasa"),
        ("block diagonal", "bdlora"),
        ("monteclora", "monteclora"),
        ("alora", "alora"),
        ("mica", "mica"),
        ("dora", None),
        ("plain", None),
    ],
)
def test_variants_of_lora_are_named(kind, variant):
    modules = LoraSource(MODELS[kind]()).snapshot().manifest.attributes["lora"]["modules"]
    assert {module.get("variant") for module in modules.values()} == {variant}


def test_tensors_of_an_unknown_variant_are_an_error():
    model = adapted()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.lora_router = torch.nn.ModuleDict({"default": torch.nn.Linear(2, 2)})
    with pytest.raises(ManifestError, match="can't send 'lora_router' of the variant 'unknown'"):
        LoraSource(model).snapshot()


def described(model, *transforms):
    source = LoraSource(model, transforms=transforms)
    return source.snapshot().manifest.attributes["lora"]["modules"]


def test_modules_are_described_under_the_names_that_their_tensors_are_sent_by():
    model = adapted(rank_pattern={"v_proj": 5})
    plain = described(model)
    renamed = described(model, Rename(lambda name: name.replace("self_attn", "attention")))
    assert renamed == {n.replace("self_attn", "attention"): found for n, found in plain.items()}
    assert described(model, Rename(lambda name: name.removeprefix("base_model.model."))) == plain


def test_modules_of_which_nothing_is_sent_are_not_described():
    model = adapted()
    found = described(model, Filter("*q_proj*"))
    assert found == {n: value for n, value in described(model).items() if "q_proj" in n}
    assert len(found) == 2


def test_tied_matrices_leave_both_modules_described():
    model = adapted()
    first, second = (layer.self_attn for layer in model.base_model.model.model.layers)
    second.q_proj.lora_A["default"].weight = first.q_proj.lora_A["default"].weight
    assert described(model) == described(adapted())


def test_unlike_modules_under_one_name_are_an_error():
    model = adapted(rank_pattern={"v_proj": 5})

    def clash(name):
        return name.replace("q_proj", "v_proj") if name.endswith("lora_A.weight") else name

    source = LoraSource(
        model, transforms=[Filter(lambda n: "v_proj.lora_A" not in n), Rename(clash)]
    )
    with pytest.raises(ManifestError, match=r"alike: module '.*v_proj'"):
        source.snapshot()
