"""`LoraSlotTarget`: a LoRA adapter is written in place into one slot of an engine rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import torch

from packedcomm.copying import Part
from packedcomm.errors import ArgumentError, LayoutError
from packedcomm.layout import Layout
from packedcomm.manifest import Manifest
from packedcomm.planning.geometry import given_rank
from packedcomm.planning.lora_attributes import LoraAttributes
from packedcomm.planning.lora_layouts import LoraGeometry, lora_layout, slot_parameter
from packedcomm.planning.lora_names import Division, SlotShapes
from packedcomm.targets.placement import (
    Placement,
    Placements,
    check_apart,
    check_one_device,
    renaming,
    tied_names,
)
from packedcomm.targets.tensors import checked_destinations

__all__ = ["LoraSlotTarget", "LoraSlots"]


@dataclass(frozen=True, slots=True)
class LoraSlots:
    """The stacked LoRA tensors of one engine module, in vLLM's layout.

    Args:
        a: for each slice `[max_loras, 1, R, inputs]`, the number of experts in place of 1 where
            there are any.
        b: for each slice `[max_loras, 1, outputs, R]`, likewise. `qkv_proj` has three slices,
            `gate_up_proj` two, plain layers one; experts have gate, up and down (w13's two,
            then w2's), or gate and up in one and down.
        division: of a module of one slice: "whole" if it holds one projection; else "halves" where
            each rank holds its piece of the first half of the outputs, then its piece of the
            second, or "unknown" where ranks divide them in another way, which can't be written
            here. None to tell it from the module's name.

    Raises:
        LayoutError: a tensor hasn't four dimensions, slices or slots of A and B differ, or a
            module of several slices has a division.
        ArgumentError: an unknown division.
    """

    a: tuple[torch.Tensor, ...]
    b: tuple[torch.Tensor, ...]
    division: Division | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "a", tuple(self.a))
        object.__setattr__(self, "b", tuple(self.b))
        if not self.a or len(self.a) != len(self.b):
            raise LayoutError(f"LoRA slots have {len(self.a)} slices of A and {len(self.b)} of B")
        shapes = [tuple(tensor.shape) for tensor in (*self.a, *self.b)]
        if any(len(shape) != 4 for shape in shapes) or len({s[:2] for s in shapes}) != 1:
            raise LayoutError(
                f"LoRA slots need [max_loras, experts or 1, ., .] throughout, got shapes {shapes}"
            )
        if self.division not in (None, *get_args(Division)):
            raise ArgumentError(
                f"division must be None or one of {get_args(Division)}, got {self.division!r}"
            )
        if self.division is not None and len(self.a) > 1:
            raise LayoutError(f"division {self.division!r} needs one slice, got {len(self.a)}")

    @property
    def max_loras(self) -> int:
        """Number of slots."""
        return int(self.a[0].shape[0])


class LoraSlotTarget:
    """In-place destinations in one slot of the stacked LoRA tensors of a tensor-parallel rank.

    Cuts are told from shapes, so fully sharded LoRA works too. At the commit everything in the slot
    that the adapter doesn't fill is zeroed: ranks beyond its own, projections and modules that it
    leaves alone. A failed transfer leaves the slot torn; `StagedTarget` around this one prevents
    that. Adapters of parameters that hold all experts (PEFT's `target_parameters`) are taken with
    gate rows before up rows, as all models but those that interleave them have it. Not thread-safe.

    Args:
        modules: stacked tensors by the engine's module names, all on one device.
        slot: which slot to write, from 0.
        max_lora_rank: largest rank taken; None for what the tensors have room for.
        tp_rank, tp_size: this rank and the number of ranks of tensor parallelism.
        ep_rank, ep_size: the same of expert parallelism.
        num_experts: experts of a whole layer; needed where `ep_size` is above 1.
        replicated: names of the engine's modules that every rank of tensor parallelism holds whole,
            with `*` for any characters; all other projections must be divided.
        fold_scaling: whether B is multiplied by the scaling that the manifest declares, unless the
            sender has done it. Engines that run at scale 1, such as vLLM, need it.
        cast: whether adapters of another floating-point dtype than the slots' are cast.
        rename: from adapted modules' names (without `base_model.model.`) to those under which the
            engine knows them, a function or a mapping (names that it lacks stay).

    Raises:
        ArgumentError: the slot, a rank or a number is out of range.
        TensorError: a tensor requires grad, overlaps itself or another one, or is on another
            device.
    """

    fixed_destinations = True

    def __init__(
        self,
        modules: Mapping[str, LoraSlots],
        slot: int,
        *,
        max_lora_rank: int | None = None,
        tp_rank: int | None = None,
        tp_size: int = 1,
        ep_rank: int | None = None,
        ep_size: int = 1,
        num_experts: int | None = None,
        replicated: Sequence[str] = (),
        fold_scaling: bool = True,
        cast: bool = False,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
    ) -> None:
        self._geometry = LoraGeometry(
            given_rank("tp", tp_rank, tp_size),
            tp_size,
            given_rank("ep", ep_rank, ep_size),
            ep_size,
            max_lora_rank,
            num_experts,
            replicated,
        )
        for name, given in modules.items():
            if not isinstance(given, LoraSlots):
                raise ArgumentError(
                    f"module {name!r}: expected LoraSlots, got {type(given).__name__}"
                )
        memory: dict[str, torch.Tensor] = {}
        shapes: dict[str, SlotShapes] = {}
        for name, slots in modules.items():
            if type(slot) is not int or not 0 <= slot < slots.max_loras:
                raise ArgumentError(f"slot {slot!r}: module {name!r} has {slots.max_loras} slots")
            room = min(int(tensor.shape[-1]) for tensor in slots.b)
            if max_lora_rank is not None and max_lora_rank > room:
                raise ArgumentError(
                    f"max_lora_rank {max_lora_rank}: module {name!r} has room for {room}"
                )
            for matrix, slices in (("A", slots.a), ("B", slots.b)):
                for index, tensor in enumerate(slices):
                    memory[slot_parameter(name, matrix, index)] = tensor
            shapes[name] = SlotShapes(
                tuple(tuple(tensor.shape[1:]) for tensor in slots.a),
                tuple(tuple(tensor.shape[1:]) for tensor in slots.b),
                slots.division,
            )
        checked = checked_destinations(memory)
        check_one_device(checked)
        check_apart(checked)
        self._memory = {name: tensor[slot] for name, tensor in checked.items()}
        self._modules = shapes
        self._slot = slot
        self._fold_scaling = fold_scaling
        self._cast = cast
        self._rename = renaming(rename)
        # The stacked tensors, not their views: these would never notice a replacement.
        self._placements = Placements(checked)

    def layout(self, manifest: Manifest) -> Layout:
        """Which box of each tensor lies where in the slot; parameters are named by
        `slot_parameter`.

        Raises:
            ManifestError: as `place`.
        """
        return self._placements.get(manifest, self._place).layout

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """All stacked tensors."""
        return self._placements.tensors

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """This rank's boxes of each matrix; those of B carry the scaling.

        Raises:
            ManifestError: a tensor has no place, comes twice, lacks its other half, has a rank,
                shape or dtype that doesn't fit, or no scaling, or a module is of a variant of LoRA
                that slots can't hold, such as DoRA; all are listed, up to ten.
        """
        return self._placements.get(manifest, self._place).parts

    def commit(self, manifest: Manifest) -> None:
        """Zero what the adapter doesn't fill; on a GPU enqueued on the current stream."""
        self._placements.get(manifest, self._place).zero()

    def zeroed(self, manifest: Manifest) -> Sequence[torch.Tensor]:
        """What `commit` overwrites beside the parts."""
        return self._placements.get(manifest, self._place).zeroed

    def _place(self, manifest: Manifest) -> Placement:
        layout = lora_layout(
            self._modules,
            {spec.name: spec.shape for spec in manifest.specs},
            self._geometry,
            LoraAttributes.read(manifest.attributes, fold_scaling=self._fold_scaling),
            rename=self._rename,
            tied=tied_names(manifest),
        )
        return Placement.of(manifest, layout, self._memory, cast=self._cast)

    def __repr__(self) -> str:
        rank, size = self._geometry.tp_rank, self._geometry.tp_size
        return (
            f"LoraSlotTarget({len(self._modules)} modules, slot {self._slot}, "
            f"rank {rank} of {size})"
        )
