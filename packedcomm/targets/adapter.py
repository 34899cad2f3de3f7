"""`AdapterTarget`: a received LoRA adapter is written into a live PEFT model, in place."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from packedcomm.copying import Part
from packedcomm.errors import ManifestError, listed
from packedcomm.manifest import Manifest
from packedcomm.targets.tensors import TensorTarget

__all__ = ["AdapterTarget"]

# What PEFT puts before the names of the model that it wraps.
_PREFIX = "base_model.model."


class AdapterTarget(TensorTarget):
    """The tensors of one adapter of a PEFT model, under the names that PEFT saves.

    The model applies its own scaling (`alpha / r`), which isn't a tensor: a trainer whose adapter
    is scaled otherwise is refused before data, and so is any while the adapter is merged into the
    weights here: unmerging would then take off what was never added.

    Args:
        model: a PEFT model.
        adapter: the adapter's name here; the trainer's may be another.

    Raises:
        ManifestError: the model has no such adapter.
        TensorError: as `TensorTarget`.
    """

    # Asked at every sync, because merging changes no memory of the adapter.
    fixed_destinations = False

    def __init__(self, model: Any, adapter: str = "default") -> None:
        if adapter not in getattr(model, "peft_config", {}):
            known = ", ".join(map(repr, getattr(model, "peft_config", {}))) or "none"
            raise ManifestError(f"the model has no adapter {adapter!r}; it has: {known}")
        peft = importlib.import_module("peft")
        tensors: dict[str, torch.Tensor] = peft.get_peft_model_state_dict(
            model, adapter_name=adapter, save_embedding_layers=False
        )
        super().__init__({name: tensor.detach() for name, tensor in tensors.items()})
        self._adapter = adapter
        self._layers: dict[str, Any] = {}
        for name, layer in model.named_modules():
            # Attention layers have a `scaling` of their own, a number; PEFT's is by adapter.
            scaling = getattr(layer, "scaling", None)
            if isinstance(scaling, Mapping) and adapter in scaling:
                self._layers[name.removeprefix(_PREFIX)] = layer

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """As `TensorTarget.place`.

        Raises:
            ManifestError: also where the scaling of a module isn't the trainer's, the trainer has
                folded it into B, or a layer has the adapter merged.
        """
        lora = manifest.attributes.get("lora", {})
        problems = []
        if lora.get("scaling_folded"):
            problems.append("the trainer folds the scaling into B, this model would apply it again")
        for name, module in lora.get("modules", {}).items():
            layer = self._layers.get(name)
            if layer is None:
                continue
            here = float(layer.scaling[self._adapter])
            if here != module.get("scaling"):
                problems.append(f"{name!r} is scaled by {module.get('scaling')}, here by {here}")
            if self._adapter in getattr(layer, "merged_adapters", ()):
                problems.append(f"{name!r} has the adapter merged here: unmerge it first")
        if problems:
            raise ManifestError(listed(problems))
        return super().place(manifest)
