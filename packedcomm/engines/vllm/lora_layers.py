"""What vLLM's LoRA layers hold and how ranks divide them, read from the layers themselves."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from packedcomm.errors import LayoutError, SessionStateError
from packedcomm.planning.lora_names import Division
from packedcomm.targets import LoraSlots

__all__ = ["Cuts", "engine_names", "stack_of", "weight_names"]


def stack_of(layer: Any) -> LoraSlots | None:
    """The stacked tensors of one of vLLM's LoRA layers; None for those that can't be written here:
    embeddings, classifiers, and experts that share matrices or have no gate."""
    kinds = _kinds(layer)
    if "FusedMoEWithLoRA" in kinds:
        a = (*layer.w13_lora_a_stacked, *layer.w2_lora_a_stacked)
        b = (*layer.w13_lora_b_stacked, *layer.w2_lora_b_stacked)
        together = "FusedMoE3DWithLoRA" in kinds
        # GPT-OSS has gate and up rows in turns, which only an undivided layer can take as they are.
        interleaved = getattr(layer, "_base_model", "") == "GptOssForCausalLM"
        if len(a) != (2 if together else 3) or (interleaved and layer.tp_size > 1):
            return None
    else:
        a, b = (_as_tuple(getattr(layer, f"lora_{matrix}_stacked", ())) for matrix in "ab")
    try:
        return LoraSlots(a, b, _division(layer) if len(a) == 1 else None)
    except LayoutError:
        return None


@dataclass(frozen=True, slots=True)
class Cuts:
    """How the ranks divide an engine's LoRA layers among them: ranks and sizes."""

    tp: tuple[int, int]
    ep: tuple[int, int]
    num_experts: int | None
    replicated: tuple[str, ...]

    @classmethod
    def of(cls, layers: Mapping[str, Any]) -> Cuts:
        """Read from the layers themselves, which know it best.

        Raises:
            SessionStateError: layers are divided in several ways.
        """
        tp: set[tuple[int, int]] = set()
        ep: set[tuple[int, int, int | None]] = set()
        replicated = []
        for name, layer in layers.items():
            whole = _kinds(layer) & {"ReplicatedLinearWithLoRA", "LogitsProcessorWithLoRA"}
            if whole or layer.tp_size == 1:
                replicated.append(name)
            else:
                tp.add((int(layer.tp_rank), int(layer.tp_size)))
            if getattr(layer, "use_ep", False):
                parallel = layer.moe_config.moe_parallel_config
                ep.add((int(parallel.ep_rank), int(parallel.ep_size), layer.global_num_experts))
        if len(tp) > 1 or len(ep) > 1:
            raise SessionStateError(
                f"the engine's LoRA layers are divided in several ways, which isn't supported: "
                f"tensor parallelism {sorted(tp)}, expert parallelism {sorted(ep)} (rank, size)"
            )
        ep_rank, ep_size, experts = next(iter(ep), (0, 1, None))
        return cls(next(iter(tp), (0, 1)), (ep_rank, ep_size), experts, tuple(replicated))


def engine_names(model: Any) -> Callable[[str], str] | None:
    """From the names of modules on the wire to vLLM's, as vLLM's own loader of adapters has it."""
    mapper = _plain_mapper(model)
    if mapper is None:
        return None
    suffix = ".lora_A.weight"

    def rename(module: str) -> str:
        mapped = mapper._map_name(module + suffix)
        return module if mapped is None else str(mapped).removesuffix(suffix)

    return rename


def weight_names(model: Any) -> Callable[[str], str]:
    """The same for the names of weights; those that vLLM's loader drops stay as they are."""
    mapper = _plain_mapper(model)

    def rename(name: str) -> str:
        mapped = None if mapper is None else mapper._map_name(name)
        return name if mapped is None else str(mapped)

    return rename


def _plain_mapper(model: Any) -> Any:
    """What maps a checkpoint's names, without what it does to fuse projections."""
    mapper = getattr(model, "hf_to_vllm_mapper", None)
    if mapper is None:
        return None
    # The method's name is another one from 0.29 on.
    plain = getattr(mapper, "get_rename_mapper", None) or mapper.get_unstacked_mapper
    return plain()


def _division(layer: Any) -> Division:
    """How ranks divide the outputs of a layer of one slice. vLLM goes by the kind of the layer, as
    modules of one name are made of one projection in some models and of two in others."""
    if "QKVParallelLinearWithLoRA" in _kinds(layer):
        return "unknown"
    if not getattr(layer, "is_merged_col_linear", False):
        return "whole"
    sizes = layer.base_layer.output_sizes
    # vLLM's loader cuts whatever is merged into halves, which suits two equal parts only.
    return "halves" if len(sizes) == 2 and sizes[0] == sizes[1] else "unknown"


def _kinds(layer: Any) -> set[str]:
    return {kind.__name__ for kind in type(layer).__mro__}


def _as_tuple(stacked: Any) -> tuple[torch.Tensor, ...]:
    """The output layer has one tensor where others have one for each slice."""
    return (stacked,) if isinstance(stacked, torch.Tensor) else tuple(stacked)
