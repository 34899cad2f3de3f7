"""vLLM's layerwise reload, driven from outside: begun, watched layer by layer, ended or taken back.

Its modules' parameters are on the meta device in between, so an update that fails must be taken
back before anybody generates; vLLM has no call for that.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Protocol

import torch

from packedcomm.engines.vllm.lora_layers import engine_names, weight_names
from packedcomm.engines.vllm.trial import Trial
from packedcomm.errors import ManifestError, listed

__all__ = ["PASSED_OVER", "Reload", "Watch"]

PASSED_OVER = "the engine's loader passes over"
"""How the error begins of tensors that a loader does nothing with."""

Named = tuple[str, torch.Tensor]

# An attribute of the experts' own modules, used by nothing but their loader.
_PREFIX = "lora_base_layer_prefix"

_EXPERTS = ".experts."


class Watch(Protocol):
    """Is told of every layer that a reload completes."""

    def enter_layer(self, layer: str, loaded: Iterable[object]) -> None:
        """A layer has everything, and will be loaded from these values now."""

    def leave_layer(self) -> None:
        """It is loaded, and in the engine's own memory."""


class Reload:
    """One reload of a model or of some of its layers, through the engine's own loader.

    Belongs to one thread.

    Args:
        model: the engine's model.
        model_config, vllm_config: the engine's configurations.
        layers: the qualified names of the modules that are reloaded; None is all.
        rename: from names as they are sent to names that the loader knows.
        lender: another model, whose modules this one uses too; nothing need be sent for them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,
        vllm_config: Any,
        *,
        layers: Sequence[str] | None = None,
        rename: Callable[[str], str] | None = None,
        lender: torch.nn.Module | None = None,
    ) -> None:
        self._model: Any = model
        self._model_config = model_config
        self._vllm_config = vllm_config
        named = dict(model.named_modules())
        self._names = {id(module): name for name, module in named.items()}
        self._roots: list[Any] = [model] if layers is None else [named[n] for n in _tops(layers)]
        self._rename = rename
        self._lent = set() if lender is None else {id(module) for module in lender.modules()}
        # Experts that LoRA wraps: of those vLLM's loader looks for names that no checkpoint has.
        self._prefixed = [m for m in named.values() if getattr(m, _PREFIX, "")]
        self._kernels: list[tuple[Any, Any]] = []
        # What is written before its layer is complete, by module: biases, from vLLM 0.27 on.
        self._before: dict[Any, list[tuple[torch.Tensor, torch.Tensor]]] = {}
        self.begun = False

    def begin(self) -> None:
        """Put the layers on the meta device; until `end` or `take_back` nobody may generate."""
        from vllm.model_executor.model_loader.reload import initialize_layerwise_reload
        from vllm.model_executor.model_loader.reload.utils import get_layer_tensors

        self.begun = True
        for root in self._roots:
            initialize_layerwise_reload(root)
            for module in root.modules():
                self._before[module] = [
                    (tensor, tensor.detach().clone())
                    for tensor in get_layer_tensors(module).values()
                    if not tensor.is_meta
                ]
                method: Any = getattr(module, "quant_method", None)
                if getattr(method, "moe_kernel", None) is not None and _on_cpu(module):
                    # Only a layer without one has its experts packed anew.
                    self._kernels.append((method, method.moe_kernel))
                    method.moe_kernel = None

    def load(self, items: Iterable[Named], watch: Watch | None = None) -> None:
        """Give tensors to the loader, which keeps them until their layers are complete.

        Args:
            items: names and tensors.
            watch: is told of layers that are completed by them.
        """
        with self._watched(watch), self._configured():
            given = ((self._name(name), tensor) for name, tensor in items)
            prefixes = [(module, getattr(module, _PREFIX)) for module in self._prefixed]
            try:
                for module, _ in prefixes:
                    setattr(module, _PREFIX, "")
                self._model.load_weights(given)
            finally:
                for module, prefix in prefixes:
                    setattr(module, _PREFIX, prefix)

    def end(self, watch: Watch | None = None) -> None:
        """Complete what is left, such as layers with padding, and attention."""
        from vllm.model_executor.model_loader.reload import finalize_layerwise_reload

        with self._watched(watch), self._configured():
            for root in self._roots:
                finalize_layerwise_reload(root, self._model_config)
            self._pack_tied_again()
        self._give_kernels_back()
        self._before.clear()
        self.begun = False

    def take_back(self) -> None:
        """Give the layers that aren't complete their own memory back, with what it held before.
        Complete ones keep what they were given. Idempotent."""
        if not self.begun:
            return
        self.begun = False
        from vllm.model_executor.model_loader.reload import layerwise

        for root in self._roots:
            for module in root.modules():
                info = layerwise.get_layerwise_info(module)
                if info.can_load():
                    if info.kernel_tensors is not None:
                        layerwise._place_kernel_tensors(module, info)
                    info.reset()
                    for tensor, before in self._before.get(module, ()):
                        tensor.detach().copy_(before)
            if hasattr(root, "_original_do_torchao_reload"):
                root._do_torchao_reload = root._original_do_torchao_reload
        layerwise.LOADING_LAYERS.clear()
        self._before.clear()
        self._give_kernels_back()

    def _pack_tied_again(self) -> None:
        """On CPUs: what vLLM has packed of a layer it renews where that layer is loaded, and not
        where it only has another one's parameter."""
        owners: dict[int, str] = {}
        for name, module in self._model.named_modules():
            weight = module._parameters.get("weight")
            if weight is None or not weight.numel():
                continue
            first = owners.setdefault(id(weight), name)
            if first != name and "cpu_linear" in vars(module):
                module.quant_method.process_weights_after_loading(module)

    def _give_kernels_back(self) -> None:
        """To the layers that weren't loaded."""
        for method, kernel in self._kernels:
            if method.moe_kernel is None:
                method.moe_kernel = kernel
        self._kernels.clear()

    def check(self, items: Iterable[Named], *, partial: bool) -> str:
        """Have the loader try descriptions only, on the meta device; nothing is changed.

        Args:
            items: names and tensors without memory.
            partial: whether layers may be left out.

        Returns:
            Why it can't be tried; empty if it could.

        Raises:
            ManifestError: the loader doesn't know a name or a shape, a parameter or a part of it
                gets nothing, or numbers that aren't of its kind; or with `partial` the loader
                passes over a tensor that the model has a parameter for.
        """
        from vllm.model_executor.model_loader.reload import layerwise

        names = [name for name, _ in self._model.named_parameters()]
        watched: list[tuple[Any, Any]] = []
        self.begin()
        try:
            trial = Trial(self._parameters(names), _whole_numel)
            for root in self._roots:
                for module in root.modules():
                    prefix = self._names[id(module)]
                    for name, tensor in layerwise.get_layer_tensors(module).items():
                        loader = layerwise._get_original_loader(tensor)
                        whole = f"{prefix}.{name}" if prefix else name
                        # vLLM hands these tensors out again at the next reload.
                        watched.append((tensor, loader))
                        # Of layers that are merged: of queries, keys and values, for example.
                        parts = sum(1 for n in getattr(module, "output_sizes", None) or () if n)
                        tensor.weight_loader = trial.noting(loader, whole, parts)
            try:
                self.load(trial.following(items))
            except Exception as error:
                if isinstance(error, NotImplementedError) or "meta tensors" in str(error):
                    # A loader that looks at values.
                    return f"{trial.given}: {_first_line(error)}"
                said = str(error) or type(error).__name__
                raise ManifestError(
                    f"the engine's loader refuses this manifest: {trial.given}: {said}"
                ) from error
        finally:
            for tensor, loader in watched:
                tensor.weight_loader = loader
            self.take_back()
        passed_over = self._passed_over(trial) if partial else []
        if passed_over:
            raise ManifestError(f"{PASSED_OVER} {len(passed_over)} tensors: {listed(passed_over)}")
        if trial.misfits:
            raise ManifestError(f"other numbers than the engine's: {listed(trial.misfits)}")
        missing = trial.missing(partial=partial)
        if missing:
            which = "the layers that are sent" if partial else "the engine"
            raise ManifestError(
                f"{len(missing)} parameters of {which} are not sent: {listed(missing)}"
            )
        return ""

    def _passed_over(self, trial: Trial) -> list[str]:
        """Tensors that the loader did nothing with although the model has parameters for them: it
        goes on at names that it doesn't know, or writes where a reload doesn't see it. Others it
        may leave out, as a tied output layer or what another stage of a pipeline has."""
        one_stage = self._vllm_config.parallel_config.pipeline_parallel_size == 1
        if not trial.called and one_stage:
            return [repr(name) for name in trial.idle]
        of_module, of_weight = engine_names(self._model) or str, weight_names(self._model)
        packed = getattr(self._model, "packed_modules_mapping", None) or {}
        fused = {part: whole for whole, parts in packed.items() for part in parts}
        untouched = trial.untouched
        layers = {name.partition(_EXPERTS)[0] for name in untouched if _EXPERTS in name}

        def meant(name: str) -> bool:
            module, _, leaf = name.rpartition(".")
            for mapped in (f"{of_module(module)}.{leaf}", of_weight(name)):
                module, _, leaf = mapped.rpartition(".")
                parent, dot, last = module.rpartition(".")
                for each in (last, fused.get(last, last)):
                    whole = f"{parent}{dot}{each}"
                    if not untouched.isdisjoint((f"{whole}.{leaf}", f"{whole}.base_layer.{leaf}")):
                        return True
                # All experts of a layer are in few parameters, under other names.
                before, experts, _ = mapped.partition(_EXPERTS)
                if experts and before in layers:
                    return True
            return False

        return [repr(name) for name in trial.idle if meant(name)]

    def _parameters(self, names: Iterable[str]) -> dict[str, torch.Tensor]:
        """Those that a checkpoint must fill, as they are while the reload has begun."""
        found = {}
        for name in names:
            module, _, leaf = name.rpartition(".")
            owner = self._model.get_submodule(module)
            tensor = owner._parameters.get(leaf)
            if tensor is not None and id(owner) not in self._lent:
                found[name] = tensor
        return found

    def _name(self, name: str) -> str:
        return self._rename(name) if self._rename is not None else name

    @contextlib.contextmanager
    def _configured(self) -> Iterator[None]:
        from vllm.config import set_current_vllm_config

        with set_current_vllm_config(self._vllm_config), torch.no_grad():
            yield

    @contextlib.contextmanager
    def _watched(self, watch: Watch | None) -> Iterator[None]:
        """Whoever completes a layer calls this by its name in its module, so it can be followed."""
        if watch is None:
            yield
            return
        from vllm.model_executor.model_loader.reload import layerwise

        original = layerwise._layerwise_process

        def process(layer: torch.nn.Module, info: Any) -> None:
            loaded = [
                value for _, bound in info.loaded_weights for value in bound.arguments.values()
            ]
            watch.enter_layer(self._names.get(id(layer), ""), loaded)
            try:
                original(layer, info)
            finally:
                watch.leave_layer()

        layerwise._layerwise_process = process
        try:
            yield
        finally:
            layerwise._layerwise_process = original


def _whole_numel(tensor: torch.Tensor) -> int:
    """How many elements a checkpoint has of a parameter; vLLM says where some are padding."""
    return getattr(tensor, "weight_loader_numel", tensor.numel())


def _first_line(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"


def _tops(layers: Sequence[str]) -> list[str]:
    """Names that aren't below another one of them."""
    names = set(layers)
    return [
        name
        for name in sorted(names)
        if not any(name.startswith(f"{other}.") or not other for other in names - {name})
    ]


def _on_cpu(module: torch.nn.Module) -> bool:
    backend = getattr(getattr(module, "quant_method", None), "unquantized_backend", None)
    return "CPU" in str(backend).upper()
