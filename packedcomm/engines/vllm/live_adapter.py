"""One adapter of a worker of vLLM's, in memory of its own beside vLLM's slots."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from packedcomm.copying import CopyPlan, Part
from packedcomm.engines.vllm.lora_layers import Cuts, engine_names, stack_of
from packedcomm.errors import CapacityError
from packedcomm.manifest import Manifest
from packedcomm.planning.lora_names import LoraName
from packedcomm.targets import LoraSlots, LoraSlotTarget

__all__ = ["LiveAdapter"]


# Manifests whose part for this rank is kept, as many as a receiver keeps plans.
_KEPT = 8


class LiveAdapter:
    """One adapter of a worker, in memory that is laid out as a slot of its LoRA layers.

    Args:
        manager: vLLM's `LoRAModelManager`.
        name: of the adapter.
        device: of the manager's tensors.
        on_commit: told of each commit, with this adapter.

    Raises:
        SessionStateError: the manager's layers are cut in a way that isn't known here.
        CapacityError: no memory.
    """

    fixed_destinations = True

    def __init__(
        self,
        manager: Any,
        name: str,
        device: torch.device,
        on_commit: Callable[[LiveAdapter], None],
    ) -> None:
        self.name = name
        self.received = False
        """Whether a sync has been committed."""
        self._on_commit = on_commit
        self._stacks = {
            module: stack
            for module, layer in manager.modules.items()
            if (stack := stack_of(layer)) is not None
        }
        self._enabled = [
            layer.adapter_enabled
            for module, layer in manager.modules.items()
            if module in self._stacks and hasattr(layer, "adapter_enabled")
        ]
        self._slots = {module: _one_slot(s, device) for module, s in self._stacks.items()}
        self._one = torch.ones(1, dtype=torch.int32, device=device)
        cuts = Cuts.of({module: manager.modules[module] for module in self._stacks})
        self._target = LoraSlotTarget(
            self._slots,
            0,
            max_lora_rank=manager.lora_config.max_lora_rank,
            tp_rank=cuts.tp[0],
            tp_size=cuts.tp[1],
            ep_rank=cuts.ep[0],
            ep_size=cuts.ep[1],
            num_experts=cuts.num_experts,
            replicated=cuts.replicated,
            # vLLM casts what it loads, too.
            cast=True,
            rename=engine_names(manager.model),
        )
        self._rename = engine_names(manager.model) or str
        # Stages of pipeline parallelism hold some layers only.
        self._elsewhere = tuple(
            f"{path}."
            for path, layer in manager.model.named_modules()
            if type(layer).__name__ == "PPMissingLayer"
        )
        self._own: dict[str, Manifest] = {}
        self._fills: dict[int, CopyPlan] = {}

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """What the parts are views of; vLLM's slots are not."""
        return self._target.memory

    def zeroed(self, manifest: Manifest) -> Sequence[torch.Tensor]:
        """See `Target`."""
        return self._target.zeroed(self._own_part(manifest))

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """This rank's boxes of each tensor.

        Raises:
            ManifestError: a rank is above `max_lora_rank`, a module isn't adapted by the engine or
                is of a variant such as DoRA, or a shape or dtype doesn't fit; all are listed, up to
                ten.
        """
        own = self._own_part(manifest)
        parts = self._target.place(own)
        if own is manifest:
            return parts
        placed = dict(zip(own.by_name, parts, strict=True))
        return [placed.get(spec.name, ()) for spec in manifest.specs]

    def commit(self, manifest: Manifest) -> None:
        """Zero what the adapter doesn't fill, and copy all of it into vLLM's slot, if it has one;
        on a GPU enqueued on the current stream."""
        self._target.commit(self._own_part(manifest))
        self.received = True
        self._on_commit(self)

    def fill(self, slot: int | None) -> None:
        """Copy the adapter into a slot of vLLM's; on a GPU enqueued on the current stream."""
        if slot is None:
            return
        plan = self._fills.get(slot)
        if plan is None or plan.moved() is not None:
            plan = self._fills[slot] = CopyPlan(list(self._pairs(slot)))
        plan.run()

    def _pairs(self, slot: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        for module, stack in self._stacks.items():
            own = self._slots[module]
            for source, stacked in zip((*own.a, *own.b), (*stack.a, *stack.b), strict=True):
                yield source[0], stacked[slot]
        for enabled in self._enabled:
            # Layers of experts skip adapters that aren't marked here.
            yield self._one, enabled[slot : slot + 1]

    def _own_part(self, manifest: Manifest) -> Manifest:
        """What of a manifest is for the layers of this rank's stage."""
        if not self._elsewhere:
            return manifest
        own = self._own.get(manifest.digest)
        if own is None:
            specs = [spec for spec in manifest.specs if not self._is_elsewhere(spec.name)]
            attributes = manifest.attributes
            lora = attributes.get("lora")
            if isinstance(lora, dict) and isinstance(lora.get("modules"), dict):
                modules = lora["modules"].items()
                lora["modules"] = {
                    module: described
                    for module, described in modules
                    if not self._is_elsewhere(f"{module}.lora_A.weight")
                }
            own = Manifest(specs, attributes)
            while len(self._own) >= _KEPT:
                del self._own[next(iter(self._own))]
            self._own[manifest.digest] = own
        return own

    def _is_elsewhere(self, name: str) -> bool:
        parsed = LoraName.parse(name)
        module = parsed.module if parsed is not None else name
        return f"{self._rename(module)}.".startswith(self._elsewhere)

    def __repr__(self) -> str:
        return f"LiveAdapter({self.name!r}, {len(self._stacks)} modules)"


def _one_slot(stack: LoraSlots, device: torch.device) -> LoraSlots:
    """Memory of one slot's size, zeroed."""
    try:
        # What vLLM makes while it infers may not be written elsewhere.
        with torch.inference_mode(False):
            a, b = (
                tuple(torch.zeros((1, *t.shape[1:]), dtype=t.dtype, device=device) for t in tensors)
                for tensors in (stack.a, stack.b)
            )
            return LoraSlots(a, b, stack.division)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
        raise CapacityError(
            f"no memory for one adapter on {device}: {str(error).splitlines()[0]}"
        ) from error
