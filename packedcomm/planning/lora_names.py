"""Which slots of an engine's LoRA layers an adapter's tensors belong to, by their PEFT names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from packedcomm.planning.engine_names import ALONE, EXPERT_PARTS, FUSED, UNDIVIDED, expert_modules

__all__ = ["Division", "LoraName", "SlotPlace", "SlotShapes", "division_of", "slot_places"]

_NAME = re.compile(r"(?:base_model\.model\.)?(.+)\.lora_([AB])(?:\.([^.]+))?\.weight")
_EXPERT = re.compile(r"(.*\bexperts)\.(\d+)\.(\w+)")
_ALL_EXPERTS = re.compile(r"(.*\bexperts)(?:\.base_layer)*")

# Order of the slices of a module of experts.
_EXPERT_SLICES = ("gate", "up", "down")

_PARTS = {"qkv_proj": ("q", "k", "v"), "gate_up_proj": ("gate", "up")}

Division = Literal["whole", "halves", "unknown"]
"""How ranks divide the outputs of one pair: "whole" if they are of one projection, "halves" if each
rank holds its piece of the first half and its piece of the second, "unknown" if they are of several
projections and that can't be told."""

_DIVISIONS: dict[str, Division] = {"gate_up_proj": "halves"}
_DIVISIONS |= dict.fromkeys(UNDIVIDED, "unknown")


@dataclass(frozen=True, slots=True)
class SlotShapes:
    """The shapes of one module's stacked tensors, the dimension of slots left out.

    Args:
        a: for each slice `(experts, rank, inputs)`; `experts` is 1 for layers without.
        b: for each slice `(experts, outputs, rank)`.
        division: of a module of one slice; None to tell it from the module's name.
    """

    a: tuple[tuple[int, ...], ...]
    b: tuple[tuple[int, ...], ...]
    division: Division | None = None


@dataclass(frozen=True, slots=True)
class LoraName:
    """A LoRA matrix's name, taken apart."""

    module: str
    """The adapted module, without PEFT's prefix."""

    matrix: str
    """"A" or "B"."""

    adapter: str | None
    """Name of the adapter, if the tensor's name has it."""

    @classmethod
    def parse(cls, name: str) -> LoraName | None:
        """Take apart `base_model.model.{module}.lora_A.weight`, or `.lora_A.{adapter}.weight`; None
        if it is neither."""
        match = _NAME.fullmatch(name)
        return cls(match[1], match[2], match[3]) if match else None


@dataclass(frozen=True, slots=True)
class SlotPlace:
    """One slice of an engine module that an adapted module fills, or fills a part of."""

    module: str

    slice: int
    """Which of the module's stacked tensors."""

    part: str = ""
    """The projection that the slice holds, "q" or "down" say; "" for a plain layer."""

    rows: tuple[int, int] = (0, 1)
    """Which of how many equal parts of the rows of B this is, of the adapter's as of the slice's if
    that holds several."""

    shared: bool = False
    """Whether the slice holds all those rows, not only this part."""

    expert: int | None = None
    """The one expert that is adapted."""

    experts: bool = False
    """Whether all experts are adapted by one pair of matrices, PEFT's form for parameters that hold
    all experts."""


def division_of(module: str, shapes: SlotShapes) -> Division | None:
    """How ranks divide the outputs of an engine's module; None for several slices."""
    if len(shapes.a) > 1:
        return None
    return shapes.division or _DIVISIONS.get(module.rpartition(".")[2], "whole")


def slot_places(
    module: str,
    sizes: tuple[int, int],
    modules: Mapping[str, SlotShapes],
    declared: str | None = None,
) -> list[SlotPlace] | None:
    """Where the LoRA pair of an adapted module goes.

    Args:
        module: its name, as `LoraName.module`.
        sizes: columns of A and rows of B.
        modules: the engine's modules with LoRA.
        declared: the name of the adapted parameter, where the module's holds several; None to tell
            it from the sizes.

    Returns:
        None if the engine has no such module; an empty list if it has, but keeps it in slices that
        the pair doesn't fit.
    """
    if match := _EXPERT.fullmatch(module):
        return _one_expert(match[1], int(match[2]), EXPERT_PARTS.get(match[3]), modules)
    if match := _ALL_EXPERTS.fullmatch(module):
        return _all_experts(match[1], sizes, modules, declared)
    *parent, leaf = ["", *module.split(".")]
    if module in modules:
        return _unfused(module, leaf, sizes[1], modules[module])
    fused, part = FUSED.get(leaf, (ALONE.get(leaf), ""))
    engine_module = ".".join([*parent[1:], fused or leaf])
    if fused is None or engine_module not in modules:
        return None
    parts = _PARTS.get(fused, ("",))
    if len(modules[engine_module].a) != len(parts):
        return []
    return [SlotPlace(engine_module, parts.index(part), part)]


def _unfused(module: str, leaf: str, rows: int, shapes: SlotShapes) -> list[SlotPlace]:
    """A module that is named as the engine names it, so has one pair for all it computes."""
    if len(shapes.a) > 1:
        return []
    if division_of(module, shapes) == "halves":
        return [SlotPlace(module, 0, part, (n, 2), True) for n, part in enumerate(("gate", "up"))]
    if leaf == "qkv_proj" and shapes.b[0][1] != rows:
        # Where a rank's queries, keys and values begin can't be told from one size.
        return []
    return [SlotPlace(module, 0)]


def _one_expert(
    module: str, expert: int, part: str | None, modules: Mapping[str, SlotShapes]
) -> list[SlotPlace] | None:
    found = _find(module, modules)
    if found is None or part not in _EXPERT_SLICES:
        return None
    if len(modules[found].a) != len(_EXPERT_SLICES):
        return []
    return [SlotPlace(found, _EXPERT_SLICES.index(part), part, expert=expert)]


def _all_experts(
    module: str, sizes: tuple[int, int], modules: Mapping[str, SlotShapes], declared: str | None
) -> list[SlotPlace] | None:
    found = _find(module, modules)
    if found is None:
        return None
    slices = modules[found].a
    if len(slices) not in (2, 3):
        return []
    # gate_up_proj reads vectors of the hidden size, down_proj writes them; A's columns for the
    # former are never divided. A pair that does both must be declared, or is taken for down_proj,
    # where any other's size doesn't fit.
    hidden = slices[0][-1]
    down = sizes[0] != hidden or sizes[1] == hidden
    if declared is not None:
        down = declared == "down_proj"
    if down:
        return [SlotPlace(found, len(slices) - 1, "down", experts=True)]
    together = len(slices) == 2
    return [
        SlotPlace(found, 0 if together else number, part, (number, 2), together, experts=True)
        for number, part in enumerate(("gate", "up"))
    ]


def _find(module: str, modules: Mapping[str, SlotShapes]) -> str | None:
    return next((name for name in expert_modules(module) if name in modules), None)
