"""`LoraSource`: one LoRA adapter of a PEFT model, under the names by which PEFT saves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import repeat
from operator import attrgetter, getitem
from typing import Any

import torch.distributed as dist
from torch import nn

from packedcomm.errors import ArgumentError, ManifestError, listed
from packedcomm.sources.dtensor import holds_dtensors
from packedcomm.sources.entries import Attributes, NamedTensor, Transform
from packedcomm.sources.exchange import Exchange
from packedcomm.sources.gathering import GatheringSource
from packedcomm.sources.lora_attributes import PREFIX, LoraDescription, layer_description
from packedcomm.sources.structure import PARTS, ModuleRecord, joined, modules_by_name

__all__ = ["LoraSource"]

# The factors that the scaling belongs to, `W + scaling * B @ A`; B's bias is scaled with it.
_SCALED = ("lora_B", "lora_embedding_B")

# PEFT keeps this vector in a module of its own, but saves it under the name it had before.
_MAGNITUDE = "lora_magnitude_vector"

_scaling = attrgetter("scaling")

# Where containers of adapters keep them.
_OWN = {"ModuleDict": ("_modules",), "ParameterDict": ("_parameters",), "BufferDict": ("_buffers",)}


class LoraSource(GatheringSource):
    """A source of one adapter's tensors, selected by the model's LoRA layers: what is frozen,
    active or merged makes no difference.

    Names are those of `peft.get_peft_model_state_dict`, so `set_peft_model_state_dict` loads them:
    `base_model.model.<module>.lora_A.weight`, `.lora_B.weight`, `.lora_embedding_A`,
    `.lora_embedding_B`, `.lora_magnitude_vector`, also of adapted parameters (experts). Modules to
    save, trainable tokens and trained biases are sent too; whole embedding layers, which PEFT saves
    when the vocabulary was changed, are not.

    The manifest's attribute `lora` is `{"adapter": name, "scaling_folded": bool, "modules":
    {module: {"r": int, "alpha": float, "scaling": float, "rslora": bool, "dora": bool}}}`, where
    adapted parameters also have `"parameter": name` and `"experts": int`, and layers that compute
    something else than `scaling * B @ A` have `"variant": name`, such as `"kasa"` (DoRA's only have
    `"dora"`). Modules are named without `base_model.model.`, as their tensors are after all
    transforms; those of which nothing is sent are left out.

    Args:
        model: a PEFT model, or one with an adapter injected; any wrappers around it. Sharded by
            FSDP2 it is gathered as by `DTensorSource`, to the leader, and every process makes a
            source.
        adapter: its name.
        transforms: applied in order; see `packedcomm.sources.transforms`.
        fold_scaling: whether B is multiplied by the layer's scaling while it is packed.
        group: as for `DTensorSource`; without sharded parameters there is no group.

    Raises:
        ArgumentError: `model` isn't a module.
    """

    def __init__(
        self,
        model: nn.Module,
        adapter: str = "default",
        *,
        transforms: Sequence[Transform] = (),
        fold_scaling: bool = False,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise ArgumentError(f"expected a PEFT model, got {type(model).__name__}")
        sharded = dist.is_initialized() and holds_dtensors(model)
        super().__init__(transforms, Exchange(group) if sharded else None)
        self._model = model
        self._adapter = adapter
        self._fold_scaling = fold_scaling
        self._structure: ModuleRecord | None = None
        self._layers: list[Any] = []
        self._scalings: list[float] = []

    def _structure_holds(self) -> bool:
        return (
            self._structure is not None
            and self._structure.holds()
            # Layers keep their scaling as a plain number, which may be set at any time.
            and list(map(getitem, map(_scaling, self._layers), repeat(self._adapter)))
            == self._scalings
        )

    def _read(self) -> tuple[list[NamedTensor], Attributes]:
        """See `GatheringSource`.

        Raises:
            ManifestError: the model has no LoRA layers, or none of this adapter; those it has are
                listed.
        """
        self._structure = None
        config = self._config()
        trained = getattr(config, "bias", "none")
        structure = ModuleRecord(self._model, self._parts_of(trained))
        modules: dict[str, dict[str, Any]] = {}
        layers = []
        owners: dict[str, str] = {}
        unknown: list[str] = []
        named: list[NamedTensor] = []
        for path, module in self._wire_paths():
            if _is_lora(module) and self._has_adapter(module):
                name = path.removeprefix(PREFIX)
                modules[name] = layer_description(module, self._adapter)
                layers.append(module)
                unknown += self._unknown_tensors(name, module)
                owned = list(self._adapter_tensors(path, module))
                owners.update((item.name, name) for item in owned)
                named.extend(owned)
            else:
                named.extend(self._adapter_tensors(path, module))
        if not layers:
            raise ManifestError(f"LoRA adapter {self._adapter!r}: {self._what_is_missing()}")
        if unknown:
            raise ManifestError(f"LoRA adapter {self._adapter!r}: {listed(unknown)}")
        named.extend(self._biases(trained))
        self._layers = layers
        self._scalings = [layer.scaling[self._adapter] for layer in layers]
        self._structure = structure
        return named, LoraDescription(self._adapter, self._fold_scaling, modules, owners)

    def _parts_of(self, trained: str) -> Callable[[nn.Module], Sequence[str]]:
        """What of each module decides what is read, so that not all of a large model is looked at
        before every sync. New layers and adapters come into modules that have some already.

        Args:
            trained: which biases of the base model are trained.
        """
        own: dict[int, Sequence[str]] = {}
        for module in self._model.modules():
            for _, container in _containers(module):
                own.update((id(part), PARTS) for part in container.modules())
                own[id(container)] = _OWN.get(type(container).__name__, PARTS)
        biases = () if trained == "none" else ("_parameters",)

        def parts_of(module: nn.Module) -> Sequence[str]:
            children = ("_modules",) if module._modules else ()
            return own.get(id(module), (*children, *biases))

        return parts_of

    def _config(self) -> Any:
        """PEFT's configuration of the adapter; None where the model doesn't keep it."""
        configs = (vars(m).get("peft_config") for _, m in modules_by_name(self._model, True))
        config = (next(filter(None, configs), None) or {}).get(self._adapter)
        kind = str(getattr(getattr(config, "peft_type", "LORA"), "value", "LORA"))
        if kind != "LORA":
            raise ManifestError(f"adapter {self._adapter!r} is of type {kind}, expected LORA")
        return config

    def _wire_paths(self) -> Iterator[tuple[str, Any]]:
        """Every module under the name that PEFT would save it by."""
        prefix = PREFIX
        for path, module in modules_by_name(self._model, unwrap=True):
            bases = {base.__name__ for base in type(module).__mro__} if not path else ()
            if "PeftModel" in bases:
                prefix = ""
            elif "BaseTuner" in bases:
                prefix = "base_model."
            yield prefix + path, module

    def _has_adapter(self, layer: Any) -> bool:
        return any(self._adapter in container for _, container in _containers(layer))

    def _unknown_tensors(self, name: str, layer: Any) -> Iterator[str]:
        """What a variant of LoRA keeps where it isn't known how PEFT saves it."""
        known = {kind for kind, _ in _containers(layer)}
        for kind, child in layer._modules.items():
            if kind in known or not kind.startswith("lora_") or self._adapter not in child:
                continue
            if next(iter(child[self._adapter].state_dict()), None) is not None:
                variant = layer_description(layer, self._adapter).get("variant", "unknown")
                yield f"module {name!r}: can't send {kind!r} of the variant {variant!r}"

    def _adapter_tensors(self, path: str, module: Any) -> Iterator[NamedTensor]:
        for kind, container in _containers(module):
            # Trainable tokens of a tied layer are those of the layer that it is tied to.
            if self._adapter not in container or vars(module).get("_tied_adapter"):
                continue
            scale = 1.0
            if self._fold_scaling and kind in _SCALED:
                scale = float(module.scaling[self._adapter])
            adapted = container[self._adapter]
            # A module to save is saved in the place of the module that it replaces.
            name = path if kind == "modules_to_save" else joined(path, kind)
            if not isinstance(adapted, nn.Module):
                yield NamedTensor(name, adapted, scale)
                continue
            for key, tensor in adapted.state_dict(keep_vars=True).items():
                full = name if kind == _MAGNITUDE and key == "weight" else joined(name, key)
                yield NamedTensor(full, tensor, scale)

    def _biases(self, trained: str) -> Iterator[NamedTensor]:
        """Biases of the base model that are trained with the adapter."""
        if trained == "none":
            return
        containers = {
            id(part)
            for _, module in self._wire_paths()
            for _, container in _containers(module)
            if isinstance(container, nn.Module)
            for part in container.modules()
        }
        adapted = {id(module.base_layer) for _, module in self._wire_paths() if _is_lora(module)}
        for path, module in self._wire_paths():
            bias = module._parameters.get("bias")
            wanted = trained == "all" or id(module) in adapted
            if bias is not None and wanted and id(module) not in containers:
                yield NamedTensor(joined(path, "bias"), bias)

    def _what_is_missing(self) -> str:
        adapters: dict[str, None] = {}
        for _, module in modules_by_name(self._model, unwrap=True):
            if _is_lora(module):
                for _, container in _containers(module):
                    adapters.update(dict.fromkeys(container))
        if not adapters:
            return f"{type(self._model).__name__} has no LoRA layers"
        return f"the model's adapters are {', '.join(map(repr, adapters))}"


def _is_lora(module: Any) -> bool:
    return "lora_A" in _container_names(module)


def _container_names(module: Any) -> tuple[str, ...]:
    """What a PEFT layer calls the attributes that hold adapters; of other modules nothing."""
    # Not getattr: PEFT's wrappers answer for the modules that they wrap. Variants of LoRA add names
    # to the layer itself.
    names = vars(module).get(
        "adapter_layer_names", getattr(type(module), "adapter_layer_names", ())
    )
    if not isinstance(names, tuple):
        return ()
    others = vars(module).get("other_param_names", ())
    return (*names, *(name for name in others if name.startswith("lora_") and name not in names))


def _containers(module: Any) -> Iterator[tuple[str, Any]]:
    """A PEFT layer's containers of what each adapter has, by kind."""
    for kind in _container_names(module):
        container = module._modules.get(kind)
        buffers = kind.startswith("lora_") and type(container).__name__ == "BufferDict"
        if buffers or isinstance(container, (nn.ModuleDict, nn.ParameterDict)):
            yield kind, container
