"""LoRA adapters of a running vLLM engine, on the side of its workers: syncs write them, no disk.

An adapter is created once through vLLM's own API, by a request whose path needs no file behind it:
`LoRARequest("policy", 1, lora_path="packedcomm:policy")`, or `--lora-modules
policy=packedcomm:policy`. It changes nothing of the base model until its first sync; rank, scaling
and modules are told by each sync. An adapter that was loaded from disk can be updated as well.

vLLM moves adapters in and out of a few slots, and forgets them at will, also at each
`finish_weight_update` from 0.28 on. So each adapter that is synced has memory of its own, a slot's
worth on the device: a sync writes that, already cut for this rank and scaled, and from there it is
copied into the slot that vLLM has given to the adapter, now or whenever it gives it one. vLLM's own
copy on the host, from which it would fill a slot, is left empty.

An adapter is known by its name; vLLM has numbers for it, under which it comes back. A server
unloads one without a word to the workers, and the next one of that name has another number. All
numbers without files are the name's one adapter, whatever else comes. A number of files takes part
from the next sync on, until files under another number take its place.

What vLLM has cached of earlier prompts (its prefix cache) is keyed by the adapter's name, not by
its weights, and belongs to the scheduler, which no worker reaches: the trainer's client resets it
after a sync, or makes a new name or path for each version.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from packedcomm.endpoints import Target
from packedcomm.engines.vllm.adapter_numbers import Files, Numbers
from packedcomm.engines.vllm.hooks import wrap
from packedcomm.engines.vllm.live_adapter import LiveAdapter
from packedcomm.errors import ArgumentError, SessionStateError
from packedcomm.receivers import WeightReceiver
from packedcomm.targets import StagedTarget

__all__ = [
    "SCHEME",
    "adapter_receivers",
    "adapter_target",
    "fill_adapters_again",
    "install_adapter_hook",
]

SCHEME = "packedcomm:"
"""How the path of an adapter begins that has no files."""

logger = logging.getLogger("packedcomm")

# Where a LoRA manager of vLLM's carries what is known of its adapters.
_ATTRIBUTE = "packedcomm_adapters"


def adapter_target(model: Any, vllm_config: Any, device: torch.device, name: str) -> Target:
    """The target that brings a LoRA adapter into a worker's model; the same one at every call.

    It stages: a sync that fails leaves the adapter as it was. A sync that is committed counts for
    every request from then on, wherever vLLM keeps the adapter at that time. Belongs to the
    worker's own thread, as everything in vLLM's worker does.

    Args:
        model: the worker's model.
        vllm_config: its configuration.
        device: of the session and of the model's LoRA tensors.
        name: the adapter's, as requests name it.

    Raises:
        SessionStateError: the engine was started without `enable_lora=True`, or cuts its layers
            in a way that isn't known here.
        ArgumentError: no adapter of this name was created, or it was removed by `remove_lora`;
            those that were created are listed.
        CapacityError: no memory.
    """
    manager = getattr(model, "lora_manager", None)
    if manager is None or getattr(vllm_config, "lora_config", None) is None:
        raise SessionStateError(
            f"adapter {name!r}: the engine has no LoRA adapters, start it with enable_lora=True"
        )
    return _EngineAdapters.of(manager).target(name, device)


def adapter_receivers(model: Any) -> dict[str, WeightReceiver]:
    """The receivers of a model's adapters, by name, for the worker to fill. What one has planned
    holds the adapter's memory, so it is dropped when the adapter is.

    Args:
        model: the worker's; one without adapters has a new dict at every call.
    """
    manager = getattr(model, "lora_manager", None)
    return {} if manager is None else _EngineAdapters.of(manager).receivers


def fill_adapters_again(model: Any) -> None:
    """Fill the slots of all adapters that were received, where their contents were lost; on a GPU
    enqueued on the current stream.

    Args:
        model: the worker's.
    """
    found = getattr(getattr(model, "lora_manager", None), _ATTRIBUTE, None)
    if isinstance(found, _EngineAdapters):
        found.fill_again()


def install_adapter_hook() -> None:
    """Teach vLLM's LoRA managers, in this process, adapters without files; see this module.

    To be called in every process of the engine before it loads its model, as plugins are. Any
    number of calls is as good as one.
    """
    workers = importlib.import_module("vllm.lora.worker_manager")
    managers = importlib.import_module("vllm.lora.model_manager")
    # The managers of workers are all of this class; only its removals are a user's.
    wrap(workers.WorkerLoRAManager, "_load_adapter", _load)
    wrap(workers.LRUCacheWorkerLoRAManager, "remove_adapter", _remove)
    wrap(managers.LoRAModelManager, "activate_adapter", _activate)


def _load(original: Callable[[Any], Any], worker_manager: Any, lora_request: Any) -> Any:
    """In the place of `WorkerLoRAManager._load_adapter`: what was received isn't read again."""
    adapters = _EngineAdapters.of(worker_manager._adapter_manager)
    name, adapter_id = lora_request.lora_name, lora_request.lora_int_id
    # Also where it was loaded from disk at first, and whatever `load_inplace` says, which up to
    # 0.32 goes with every later request: only removing the adapter, or files under another number,
    # end that.
    named = lora_request.lora_path.startswith(SCHEME)
    if named or adapters.is_received(name, adapter_id):
        loaded = _empty_model(adapter_id)
    else:
        loaded = original(lora_request)
    files = None if named else Files(lora_request.lora_path, partial(original, lora_request))
    adapters.created(name, adapter_id, files)
    return loaded


def _remove(original: Callable[[int], Any], worker_manager: Any, adapter_id: int) -> Any:
    """In the place of `WorkerLoRAManager.remove_adapter`, which users call: evictions don't."""
    _EngineAdapters.of(worker_manager._adapter_manager).removed(adapter_id)
    return original(adapter_id)


def _activate(original: Callable[[int], bool], manager: Any, lora_id: int) -> bool:
    """In the place of `LoRAModelManager.activate_adapter`: fills the slot that was given."""
    placed = original(lora_id)
    if placed:
        _EngineAdapters.of(manager).activated(lora_id)
    return placed


def _empty_model(adapter_id: int) -> Any:
    """A `LoRAModel` that adapts nothing. vLLM looks at the first entry of what it registers, so
    there is one, of a module that no model has."""
    weights = importlib.import_module("vllm.lora.lora_weights")
    models = importlib.import_module("vllm.lora.lora_model")
    zeros = torch.zeros(1, 1), torch.zeros(1, 1)
    nothing = weights.LoRALayerWeights(SCHEME, 1, 1, *zeros)
    return models.LoRAModel(adapter_id, 1, {SCHEME: nothing})


class _EngineAdapters:
    """The adapters of one of vLLM's LoRA managers: numbers by name, and those that are synced."""

    def __init__(self, manager: Any) -> None:
        self._manager = manager
        self._numbers: dict[str, Numbers] = {}
        self._live: dict[str, LiveAdapter] = {}
        self._targets: dict[str, StagedTarget] = {}
        # Numbers of which nothing but what they received is left: their files are gone.
        self._orphans: dict[int, LiveAdapter] = {}
        self.receivers: dict[str, WeightReceiver] = {}

    @classmethod
    def of(cls, manager: Any) -> _EngineAdapters:
        found = vars(manager).get(_ATTRIBUTE)
        if not isinstance(found, cls):
            found = cls(manager)
            setattr(manager, _ATTRIBUTE, found)
        return found

    def is_received(self, name: str, adapter_id: int) -> bool:
        numbers = self._numbers.get(name)
        return numbers is not None and adapter_id in numbers.synced and self._received(name)

    def created(self, name: str, adapter_id: int, files: Files | None) -> None:
        """vLLM has loaded an adapter, from files or not. Its id may be new, and may have been
        another one's."""
        for other in self._named(adapter_id):
            if other != name:
                self._drop(other, adapter_id)
        self._orphans.pop(adapter_id, None)
        numbers = self._numbers.setdefault(name, Numbers())
        if numbers.known(adapter_id, files):
            return
        live = self._live.get(name)
        if files is not None and not numbers.without_files:
            # Another adapter than what was received.
            self._forget(name)
        registered = self._manager.list_adapters()
        # vLLM has dropped the others, and would look for their files.
        self._orphans = {n: live for n, live in self._orphans.items() if n in registered}
        for old, theirs in numbers.add(adapter_id, files, registered).items():
            if old in registered and live is not None:
                self._read_again(registered[old], theirs, live)

    def _read_again(self, registered: Any, files: Files, live: LiveAdapter) -> None:
        """Show what is in an adapter's files in the place of what it has received: vLLM has the
        adapter, so it wouldn't read them by itself. It is in the middle of giving slots to a batch:
        which adapter has which one, and which one goes next, stays as it is."""
        manager, number = self._manager, registered.id
        slot = self._slot(number)
        try:
            loaded = files.read()
            manager._create_merged_loras_inplace(loaded)
            registered.loras = loaded.loras
            for name, module in manager.modules.items() if slot is not None else ():
                weights = manager._get_lora_layer_weights(registered, name)
                if weights:
                    module.set_lora(slot, weights.lora_a, weights.lora_b)
                else:
                    module.reset_lora(slot)
        except Exception:
            logger.exception(
                "%s can't be read again: as long as vLLM keeps adapter %s, it shows what it has "
                "received",
                files.path,
                number,
            )
            registered.loras = {}
            self._orphans[number] = live
            live.fill(slot)

    def removed(self, adapter_id: int) -> None:
        self._orphans.pop(adapter_id, None)
        for name in self._named(adapter_id):
            self._drop(name, adapter_id)

    def activated(self, adapter_id: int) -> None:
        for name in self._named(adapter_id):
            if self.is_received(name, adapter_id):
                self._live[name].fill(self._slot(adapter_id))
        if adapter_id in self._orphans:
            self._orphans[adapter_id].fill(self._slot(adapter_id))

    def committed(self, live: LiveAdapter) -> None:
        """Bring what was received to where vLLM has the adapter now."""
        if self._live.get(live.name) is not live:
            return
        for adapter_id in self._numbers[live.name].all_synced():
            slot = self._slot(adapter_id)
            registered = self._manager.list_adapters().get(adapter_id)
            if registered is not None and registered.loras:
                # From disk: neither the slot nor a later one may keep anything of it.
                registered.loras = {}
                if slot is not None:
                    for module in self._manager.modules.values():
                        module.reset_lora(slot)
            live.fill(slot)
        for adapter_id, theirs in self._orphans.items():
            if theirs is live:
                live.fill(self._slot(adapter_id))

    def fill_again(self) -> None:
        """Bring every adapter that was received to where vLLM has it, whatever is there."""
        for name, live in self._live.items():
            for adapter_id in self._numbers[name].synced if live.received else ():
                live.fill(self._slot(adapter_id))
        for adapter_id, live in self._orphans.items():
            live.fill(self._slot(adapter_id))

    def target(self, name: str, device: torch.device) -> StagedTarget:
        if name not in self._numbers:
            known = ", ".join(map(repr, self._numbers)) or "none"
            raise ArgumentError(
                f"the engine has no adapter {name!r}; it has {known}: create it once, as by "
                f"LoRARequest({name!r}, 1, lora_path={SCHEME + name!r})"
            )
        if name not in self._targets:
            live = LiveAdapter(self._manager, name, device, self.committed)
            self._live[name] = live
            self._targets[name] = StagedTarget(live)
        return self._targets[name]

    def _named(self, adapter_id: int) -> list[str]:
        return [name for name, numbers in self._numbers.items() if adapter_id in numbers]

    def _received(self, name: str) -> bool:
        return name in self._live and self._live[name].received

    def _drop(self, name: str, adapter_id: int) -> None:
        """The id isn't this name's any more; without any there is no adapter of the name."""
        numbers = self._numbers[name]
        numbers.drop(adapter_id)
        if not numbers.current:
            del self._numbers[name]
        if not numbers.synced:
            self._forget(name)

    def _forget(self, name: str) -> None:
        """Give up what was received, and all memory for it."""
        self._live.pop(name, None)
        self._targets.pop(name, None)
        self.receivers.pop(name, None)

    def _slot(self, adapter_id: int) -> int | None:
        slots = self._manager.lora_index_to_id
        return slots.index(adapter_id) if adapter_id in slots else None
