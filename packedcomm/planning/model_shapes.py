"""Manifests of well-known models, made from their published configurations, without weights.

Names and shapes follow the Hugging Face checkpoints; a test compares them with transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from packedcomm.errors import ArgumentError
from packedcomm.manifest import Manifest, TensorSpec

__all__ = ["MODEL_SHAPES", "model_shape"]


@dataclass(frozen=True, slots=True)
class _Decoder:
    """The numbers of a Llama- or Qwen3-like decoder that fix its tensors."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    intermediate: int
    vocabulary: int
    tied: bool = False
    qk_norm: bool = False
    experts: int = 0

    def linears(self, layer: int) -> Iterator[tuple[str, int, int]]:
        """(name, out features, in features) of a layer's attention and dense MLP projections."""
        prefix = f"model.layers.{layer}"
        query, key = self.heads * self.head_size, self.kv_heads * self.head_size
        yield f"{prefix}.self_attn.q_proj", query, self.hidden
        yield f"{prefix}.self_attn.k_proj", key, self.hidden
        yield f"{prefix}.self_attn.v_proj", key, self.hidden
        yield f"{prefix}.self_attn.o_proj", self.hidden, query
        if not self.experts:
            yield from self._mlp(f"{prefix}.mlp")

    def _mlp(self, prefix: str) -> Iterator[tuple[str, int, int]]:
        yield f"{prefix}.gate_proj", self.intermediate, self.hidden
        yield f"{prefix}.up_proj", self.intermediate, self.hidden
        yield f"{prefix}.down_proj", self.hidden, self.intermediate

    def expert_linears(self, layer: int) -> Iterator[tuple[str, int, int]]:
        for expert in range(self.experts):
            yield from self._mlp(f"model.layers.{layer}.mlp.experts.{expert}")

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            for name, rows, columns in self.linears(layer):
                yield f"{name}.weight", (rows, columns)
            if self.experts:
                yield f"model.layers.{layer}.mlp.gate.weight", (self.experts, self.hidden)
                for name, rows, columns in self.expert_linears(layer):
                    yield f"{name}.weight", (rows, columns)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                yield f"model.layers.{layer}.{norm}.weight", (self.hidden,)
            if self.qk_norm:
                for norm in ("q_norm", "k_norm"):
                    yield f"model.layers.{layer}.self_attn.{norm}.weight", (self.head_size,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def lora(self, rank: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        """LoRA matrices on every linear projection, named as PEFT saves them."""
        for layer in range(self.layers):
            for name, rows, columns in self.linears(layer):
                yield f"base_model.model.{name}.lora_A.weight", (rank, columns)
                yield f"base_model.model.{name}.lora_B.weight", (rows, rank)

    def experts_only(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        for layer in range(self.layers):
            for name, rows, columns in self.expert_linears(layer):
                yield f"{name}.weight", (rows, columns)


_LLAMA_3_8B = _Decoder(32, 4096, 32, 8, 128, 14336, 128256)
_QWEN3_06B = _Decoder(28, 1024, 16, 8, 128, 3072, 151936, tied=True, qk_norm=True)
_QWEN3_4B = _Decoder(36, 2560, 32, 8, 128, 9728, 151936, tied=True, qk_norm=True)
_QWEN3_30B_A3B = _Decoder(48, 2048, 32, 4, 128, 768, 151936, qk_norm=True, experts=128)


def _minilm() -> Iterator[tuple[str, tuple[int, ...]]]:
    """The parameters; the checkpoint also holds a buffer, `embeddings.position_ids`."""
    hidden, intermediate = 384, 1536
    yield "embeddings.word_embeddings.weight", (30522, hidden)
    yield "embeddings.position_embeddings.weight", (512, hidden)
    yield "embeddings.token_type_embeddings.weight", (2, hidden)
    yield "embeddings.LayerNorm.weight", (hidden,)
    yield "embeddings.LayerNorm.bias", (hidden,)
    for layer in range(6):
        prefix = f"encoder.layer.{layer}"
        for name, rows, columns in (
            ("attention.self.query", hidden, hidden),
            ("attention.self.key", hidden, hidden),
            ("attention.self.value", hidden, hidden),
            ("attention.output.dense", hidden, hidden),
            ("intermediate.dense", intermediate, hidden),
            ("output.dense", hidden, intermediate),
        ):
            yield f"{prefix}.{name}.weight", (rows, columns)
            yield f"{prefix}.{name}.bias", (rows,)
        for name in ("attention.output.LayerNorm", "output.LayerNorm"):
            yield f"{prefix}.{name}.weight", (hidden,)
            yield f"{prefix}.{name}.bias", (hidden,)
    yield "pooler.dense.weight", (hidden, hidden)
    yield "pooler.dense.bias", (hidden,)


def _manifest(tensors: Iterator[tuple[str, tuple[int, ...]]], dtype: str = "bfloat16") -> Manifest:
    return Manifest(TensorSpec(name, dtype, shape) for name, shape in tensors)


MODEL_SHAPES: dict[str, Callable[[], Manifest]] = {
    "minilm": lambda: Manifest(
        (
            TensorSpec("embeddings.position_ids", "int64", (1, 512)),
            *_manifest(_minilm(), "float32").specs,
        )
    ),
    "llama-3-8b": lambda: _manifest(_LLAMA_3_8B.tensors()),
    "llama-3-8b-lora-r16": lambda: _manifest(_LLAMA_3_8B.lora(16)),
    "qwen3-0.6b": lambda: _manifest(_QWEN3_06B.tensors()),
    "qwen3-4b": lambda: _manifest(_QWEN3_4B.tensors()),
    "qwen3-30b-a3b": lambda: _manifest(_QWEN3_30B_A3B.tensors()),
    "qwen3-30b-a3b-experts": lambda: _manifest(_QWEN3_30B_A3B.experts_only()),
}
"""Named model shapes; calling an entry builds its manifest."""


def model_shape(name: str) -> Manifest:
    """The manifest of a named model.

    Raises:
        ArgumentError: the name is unknown; the message lists the known ones.
    """
    try:
        return MODEL_SHAPES[name]()
    except KeyError:
        raise ArgumentError(
            f"unknown model shape {name!r}; known: {', '.join(MODEL_SHAPES)}"
        ) from None
