"""Small models of transformers, and what an engine rank makes of their weights, written out."""

from __future__ import annotations

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)


def models():
    common = {
        "vocab_size": 70,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "intermediate_size": 24,
    }
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    torch.manual_seed(1)
    return {
        "llama": LlamaForCausalLM(LlamaConfig(**common, attention_bias=True)),
        "qwen3": Qwen3ForCausalLM(
            Qwen3Config(**common, attention_bias=True, tie_word_embeddings=True)
        ),
        "qwen3 moe": Qwen3MoeForCausalLM(Qwen3MoeConfig(**common, **experts)),
        "mixtral": MixtralForCausalLM(
            MixtralConfig(**common, num_local_experts=4, num_experts_per_tok=2)
        ),
    }


def engine_parameters(state, rank, size):
    """What an engine rank makes of a model with 4 query and 2 KV heads, written out."""
    kv_rank, kv_size = (rank // (size // 2), 2) if size > 2 else (rank, size)
    expected = {}
    for name, tensor in state.items():
        *parent, leaf, kind = ["", *name.split(".")]
        parent = ".".join(parent[1:])
        if leaf == "q_proj":
            k, v = (state[f"{parent}.{n}_proj.{kind}"] for n in "kv")
            expected[f"{parent}.qkv_proj.{kind}"] = torch.cat(
                [tensor.chunk(size)[rank], k.chunk(kv_size)[kv_rank], v.chunk(kv_size)[kv_rank]]
            )
        elif leaf == "gate_proj":
            up = state[f"{parent}.up_proj.{kind}"]
            expected[f"{parent}.gate_up_proj.{kind}"] = torch.cat(
                [tensor.chunk(size)[rank], up.chunk(size)[rank]]
            )
        elif kind == "gate_up_proj":
            gate, up = tensor.chunk(2, dim=1)
            expected[f"{parent}.{leaf}.w13_weight".lstrip(".")] = torch.cat(
                [gate.chunk(size, 1)[rank], up.chunk(size, 1)[rank]], dim=1
            )
        elif kind == "down_proj":
            expected[f"{parent}.{leaf}.w2_weight".lstrip(".")] = tensor.chunk(size, 2)[rank]
        elif leaf in ("o_proj", "down_proj") and kind == "weight":
            expected[name] = tensor.chunk(size, 1)[rank]
        elif leaf in ("embed_tokens", "lm_head"):
            padded = torch.nn.functional.pad(tensor, (0, 0, 0, 128 - 70))
            expected[name] = padded.chunk(size)[rank]
        elif leaf not in ("k_proj", "v_proj", "up_proj"):
            expected[name] = tensor
    return expected
