"""Which of an engine's parameters a tensor on the wire belongs to, and which part of it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

__all__ = [
    "ALONE",
    "EXPERT_PARTS",
    "FUSED",
    "UNDIVIDED",
    "Destination",
    "EngineNames",
    "expert_modules",
    "is_embedding",
    "is_output",
    "is_vocabulary",
    "layer_of",
]

# Projections that engines keep in one parameter: Hugging Face's names, then Meta's.
FUSED = {
    "q_proj": ("qkv_proj", "q"),
    "k_proj": ("qkv_proj", "k"),
    "v_proj": ("qkv_proj", "v"),
    "gate_proj": ("gate_up_proj", "gate"),
    "up_proj": ("gate_up_proj", "up"),
    "wq": ("qkv_proj", "q"),
    "wk": ("qkv_proj", "k"),
    "wv": ("qkv_proj", "v"),
    "w1": ("gate_up_proj", "gate"),
    "w3": ("gate_up_proj", "up"),
}

# Meta's names of projections that stay alone.
ALONE = {"wo": "o_proj", "w2": "down_proj", "tok_embeddings": "embed_tokens", "output": "lm_head"}

# The parts of an expert under Mixtral's and everyone else's names.
EXPERT_PARTS = {
    "w1": "gate",
    "w2": "down",
    "w3": "up",
    "gate_proj": "gate",
    "down_proj": "down",
    "up_proj": "up",
    "gate_up_proj": "gate_up",
}

_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)\.weight")
_ALL_EXPERTS = re.compile(r"(.*\bexperts)\.(gate_up_proj|down_proj)(?:\.weight)?")
_ENGINE_EXPERTS = re.compile(
    r"(.*\bexperts)\.(?:(?:.*\.)?(w13_weight|w2_weight)|(gate_up_proj|down_proj))"
)

# Several projections in one parameter, in an order that differs from model to model.
UNDIVIDED = frozenset(
    {
        "W_pack",
        "Wqkv",
        "c_attn",
        "in_proj",
        "in_proj_qkv",
        "linear_fc1",
        "linear_qkv",
        "query_key_value",
        "wqkv",
    }
)

_EMBEDDINGS = frozenset({"embed_tokens", "wte", "embed_in", "word_embeddings", "shared"})
_OUTPUTS = frozenset({"lm_head", "embed_out"})


@dataclass(frozen=True, slots=True)
class Destination:
    """Where a tensor goes."""

    parameter: str

    part: str
    """"q", "k", "v", "qkv", "gate", "up", "gate_up", "down", or "" for a parameter that isn't made
    of several tensors."""

    experts: bool = False
    """Whether the parameter holds experts."""

    expert: int | None = None
    """The one expert that the tensor is of; None for all of them."""


class EngineNames:
    """The names of an engine's parameters, looked up by names on the wire.

    Args:
        parameters: names such as vLLM's: `qkv_proj.weight`, `gate_up_proj.weight`,
            `experts.w13_weight` or `experts.gate_up_proj`, `experts.w2_weight` or
            `experts.down_proj`; all others are as on the wire.
    """

    def __init__(self, parameters: Iterable[str]) -> None:
        self._parameters = frozenset(parameters)
        self._experts: dict[tuple[str, str], str] = {}
        for name in self._parameters:
            if match := _ENGINE_EXPERTS.fullmatch(name):
                kind = "w2_weight" if _is_down(match) else "w13_weight"
                self._experts[match[1], kind] = name

    def find(self, name: str) -> Destination | None:
        """Where a tensor of this name goes; None if nowhere."""
        if name in self._parameters:
            return self.destination(name)
        if match := _EXPERT.fullmatch(name):
            module, expert, leaf = match.groups()
            return self._expert(module, EXPERT_PARTS.get(leaf), int(expert))
        if match := _ALL_EXPERTS.fullmatch(name):
            module, leaf = match.groups()
            return self._expert(module, EXPERT_PARTS[leaf], None)
        *parent, leaf, kind = ["", *name.split(".")]
        fused, part = FUSED.get(leaf, (ALONE.get(leaf), ""))
        if fused is not None:
            parameter = ".".join([*parent[1:], fused, kind])
            return Destination(parameter, part) if parameter in self._parameters else None
        # What is left of a block of experts, its router.
        same = (other for other in expert_modules(name) if other in self._parameters)
        return next(map(self.destination, same), None)

    @staticmethod
    def destination(parameter: str) -> Destination:
        """All of a parameter, named as the engine names it."""
        if match := _ENGINE_EXPERTS.fullmatch(parameter):
            return Destination(parameter, "down" if _is_down(match) else "gate_up", True)
        part = {"qkv_proj": "qkv", "gate_up_proj": "gate_up"}.get(layer_of(parameter), "")
        return Destination(parameter, part)

    def _expert(self, module: str, part: str | None, expert: int | None) -> Destination | None:
        if part is None:
            return None
        kind = "w2_weight" if part == "down" else "w13_weight"
        for candidate in expert_modules(module):
            if parameter := self._experts.get((candidate, kind)):
                return Destination(parameter, part, True, expert)
        return None


def expert_modules(module: str) -> tuple[str, str, str]:
    """Names that a module of experts may have at the other end: Mixtral's block is called by either
    one, depending on the library and its version."""
    return (
        module,
        module.replace(".block_sparse_moe.", ".mlp."),
        module.replace(".mlp.", ".block_sparse_moe."),
    )


def layer_of(parameter: str) -> str:
    """The last name of the module that has a parameter: "o_proj" of "layers.0.o_proj.weight"."""
    return parameter.rpartition(".")[0].rpartition(".")[2]


def is_embedding(name: str) -> bool:
    """Whether it is the weight of an embedding of tokens."""
    return layer_of(name) in _EMBEDDINGS and name.endswith(".weight")


def is_output(name: str) -> bool:
    """Whether it is the weight of the projection to the vocabulary."""
    return layer_of(name) in _OUTPUTS and name.endswith(".weight")


def is_vocabulary(parameter: str) -> bool:
    """Whether a parameter's rows are the vocabulary's, which engines pad."""
    return layer_of(parameter) in _EMBEDDINGS | _OUTPUTS


def _is_down(match: re.Match[str]) -> bool:
    return match[2] == "w2_weight" or match[3] == "down_proj"
