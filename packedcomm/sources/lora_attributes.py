"""What a manifest says of a LoRA adapter, read from PEFT's layers and named as on the wire."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from packedcomm.errors import ManifestError, listed
from packedcomm.planning.lora_names import LoraName
from packedcomm.sources.entries import Entry

__all__ = ["PREFIX", "LoraDescription", "layer_description"]

PREFIX = "base_model.model."
"""What PEFT puts before the base model's names when it saves an adapter."""

_VARIANT = re.compile(r"_?(\w+?)(?:Linear|Embedding|Conv\w*)?Variant")


def layer_description(layer: Any, adapter: str) -> dict[str, Any]:
    """The rank, scaling and kind of one layer's adapter."""
    described: dict[str, Any] = {
        "r": int(layer.r[adapter]),
        "alpha": float(layer.lora_alpha[adapter]),
        "scaling": float(layer.scaling[adapter]),
        "rslora": bool(getattr(layer, "use_rslora", {}).get(adapter, False)),
        "dora": bool(getattr(layer, "use_dora", {}).get(adapter, False)),
    }
    variant = _variant(layer, adapter)
    if variant is not None and not described["dora"]:
        described["variant"] = variant
    if hasattr(layer, "parameter_name"):
        described["parameter"] = str(layer.parameter_name)
        described["experts"] = int(layer.num_experts)
    return described


def _variant(layer: Any, adapter: str) -> str | None:
    """The name of what PEFT computes with the layer's tensors in the place of plain LoRA."""
    variant = vars(layer).get("lora_variant", {}).get(adapter)
    if variant is None:
        return None
    name = variant.__name__ if isinstance(variant, type) else type(variant).__name__
    match = _VARIANT.fullmatch(name)
    return (match[1] if match else name).lower()


class LoraDescription:
    """Makes the attribute `lora`, whose modules are named as the tensors are after all transforms.

    Args:
        adapter: its name.
        scaling_folded: whether B holds the scaling.
        modules: what is known of each adapted module, by its name in the model.
        owners: of each of their tensors, by its name before all transforms, the module.
    """

    def __init__(
        self,
        adapter: str,
        scaling_folded: bool,
        modules: Mapping[str, dict[str, Any]],
        owners: Mapping[str, str],
    ) -> None:
        self._head = {"adapter": adapter, "scaling_folded": scaling_folded}
        self._modules = modules
        self._owners = owners

    def __call__(self, entries: Sequence[Entry]) -> dict[str, Any]:
        """The attributes; modules of which nothing is sent are left out.

        Raises:
            ManifestError: transforms gave modules that differ one name.
        """
        named: dict[str, dict[str, Any]] = {}
        problems: dict[str, None] = {}
        for entry in entries:
            for name, original in zip(entry.names, entry.originals or entry.names, strict=True):
                owner = self._owners.get(original)
                if owner is None:
                    continue
                module = _module(name, original, owner)
                described = self._modules[owner]
                if named.setdefault(module, described) != described:
                    problems[f"module {module!r}"] = None
        if problems:
            raise ManifestError(
                f"transforms name LoRA modules of different ranks or scalings alike: "
                f"{listed(list(problems))}"
            )
        return {"lora": {**self._head, "modules": named}}


def _module(name: str, original: str, owner: str) -> str:
    """The module that a tensor's name says it is of."""
    parsed = LoraName.parse(name)
    if parsed is not None:
        return parsed.module
    rest = original.removeprefix(PREFIX).removeprefix(owner)
    if name == original or not name.endswith(rest):
        return owner
    return name.removesuffix(rest).removeprefix(PREFIX)
