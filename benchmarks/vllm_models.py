"""Models of the vLLM benchmark: a trainer's tensors, and what an engine makes of them.

The engine's fused parameters are put together here by plain concatenation, not by packedcomm's own
layouts, so that the comparison doesn't repeat a mistake of theirs.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import torch

__all__ = ["MODELS", "adapter_digests", "digest", "engine_digests", "shapes", "write_config"]

_LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
}

_QWEN: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "vocab_size": 151936,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1000000.0,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
    "router_aux_loss_coef": 0.001,
    "max_window_layers": 48,
}

_COMMON: dict[str, Any] = {
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "hidden_act": "silu",
    "attention_bias": False,
}

MODELS: dict[str, dict[str, Any]] = {
    "llama-3-8b": _LLAMA | _COMMON,
    "qwen3-30b-a3b-12-layers": _QWEN | _COMMON | {"num_hidden_layers": 12},
    "qwen3-30b-a3b": _QWEN | _COMMON,
}


def write_config(name: str, folder: Path) -> Path:
    """Write a model's `config.json` into a folder of its own; returns that."""
    path = folder / name
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(MODELS[name]))
    return path


def shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """The model's tensors in the order of a checkpoint."""
    hidden, head = config["hidden_size"], config["head_dim"]
    queries = config["num_attention_heads"] * head
    keys = config["num_key_value_heads"] * head
    found: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden)
    }
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        found |= {
            f"{at}.self_attn.q_proj.weight": (queries, hidden),
            f"{at}.self_attn.k_proj.weight": (keys, hidden),
            f"{at}.self_attn.v_proj.weight": (keys, hidden),
            f"{at}.self_attn.o_proj.weight": (hidden, queries),
        }
        if "num_experts" in config:
            inner = config["moe_intermediate_size"]
            found |= {
                f"{at}.self_attn.q_norm.weight": (head,),
                f"{at}.self_attn.k_norm.weight": (head,),
                f"{at}.mlp.gate.weight": (config["num_experts"], hidden),
            }
            prefixes = [f"{at}.mlp.experts.{e}" for e in range(config["num_experts"])]
        else:
            inner = config["intermediate_size"]
            prefixes = [f"{at}.mlp"]
        for prefix in prefixes:
            found |= {
                f"{prefix}.gate_proj.weight": (inner, hidden),
                f"{prefix}.up_proj.weight": (inner, hidden),
                f"{prefix}.down_proj.weight": (hidden, inner),
            }
        found |= {
            f"{at}.input_layernorm.weight": (hidden,),
            f"{at}.post_attention_layernorm.weight": (hidden,),
        }
    return found | {
        "model.norm.weight": (hidden,),
        "lm_head.weight": (config["vocab_size"], hidden),
    }


_SLICES = {
    "q_proj": ("qkv_proj", 0), "k_proj": ("qkv_proj", 1), "v_proj": ("qkv_proj", 2),
    "gate_proj": ("gate_up_proj", 0), "up_proj": ("gate_up_proj", 1),
}  # fmt: skip


@torch.no_grad()
def adapter_digests(held: dict[str, torch.Tensor], scaling: float) -> dict[str, list[int]]:
    """The digest of each matrix of an adapter as an engine must hold it: B is scaled.

    Args:
        held: by PEFT's names.
        scaling: of B; a power of two, so that it is exact.
    """
    found = {}
    for name, tensor in held.items():
        module, _, matrix = name.removeprefix("base_model.model.").partition(".lora_")
        prefix, _, last = module.rpartition(".")
        whole, index = _SLICES.get(last, (last, 0))
        which = matrix[0]
        value = tensor * scaling if which == "B" else tensor
        found[f"{prefix}.{whole} {index} {which}"] = digest(value)
    return found


@torch.no_grad()
def digest(*tensors: torch.Tensor) -> list[int]:
    """Two 64-bit sums over the bits of 2-byte elements, one of them by position, and their number;
    of several tensors as if one stood behind the other."""
    plain, placed, at = 0, 0, 0
    for tensor in tensors:
        bits = tensor.detach().contiguous().view(torch.int16).view(-1)
        for piece in bits.split(1 << 26):
            values = piece.to(torch.int64)
            index = torch.arange(at, at + len(values), device=values.device)
            plain += int(values.sum())
            placed += int((values * (index % 1_000_003 + 1)).sum())
            at += len(values)
    return [plain, placed % (1 << 63), at]


def engine_digests(held: dict[str, torch.Tensor]) -> dict[str, list[int]]:
    """The digest of each parameter that an engine without parallelism must hold, by its name."""
    found: dict[str, list[int]] = {}
    groups: dict[str, list[str]] = {}
    for name in held:
        if ".experts." in name:
            prefix, _, rest = name.partition(".experts.")
            which = "w2_weight" if "down_proj" in rest else "w13_weight"
            fused = f"{prefix}.experts.{which}"
        else:
            fused = re.sub(r"\.[qkv]_proj\.", ".qkv_proj.", name)
            fused = re.sub(r"\.(gate|up)_proj\.", ".gate_up_proj.", fused)
        groups.setdefault(fused, []).append(name)
    for fused, names in groups.items():
        found[fused] = digest(*(held[name] for name in names))
    return found
