"""The layout of one LoRA adapter in one slot of an engine rank's stacked LoRA tensors.

The rules are those by which vLLM sets a slot (`lora/layers` there): A whole and B cut for
column-parallel layers, A cut on its input and B whole for row-parallel ones, A's rows or B's rows
cut as well where LoRA is fully sharded, everything else in the slot zero.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase

from packedcomm.errors import ArgumentError, LayoutError, ManifestError, listed
from packedcomm.layout import Box, Layout, Piece
from packedcomm.planning.geometry import experts_of
from packedcomm.planning.lora_attributes import LoraAttributes
from packedcomm.planning.lora_names import (
    LoraName,
    SlotPlace,
    SlotShapes,
    division_of,
    slot_places,
)

__all__ = ["LoraGeometry", "SlotShapes", "lora_layout", "slot_parameter"]


@dataclass(frozen=True, slots=True)
class LoraGeometry:
    """One rank's place among those that share an adapter.

    Args:
        tp_rank, tp_size: of tensor parallelism.
        ep_rank, ep_size: of expert parallelism, each rank holding consecutive experts.
        num_experts: experts of a whole layer; needed where `ep_size` is above 1, since the first
            ranks hold one more where they don't divide.
        replicated: as in `ModelGeometry`, of modules.
        max_lora_rank: largest rank that a slot takes; None for what the tensors have room for.

    Raises:
        ArgumentError: a number is out of range.
    """

    tp_rank: int = 0
    tp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1
    max_lora_rank: int | None = None
    num_experts: int | None = None
    replicated: Sequence[str] = ()

    def __post_init__(self) -> None:
        if isinstance(self.replicated, str) or any(type(n) is not str for n in self.replicated):
            raise ArgumentError(f"replicated must be names of modules, got {self.replicated!r}")
        object.__setattr__(self, "replicated", tuple(self.replicated))
        for kind in ("tp", "ep"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            if type(rank) is not int or type(size) is not int or not 0 <= rank < size:
                raise ArgumentError(f"{kind}_rank {rank!r} and {kind}_size {size!r} don't fit")
        for name in ("max_lora_rank", "num_experts"):
            limit = getattr(self, name)
            if limit is not None and (type(limit) is not int or limit < 1):
                raise ArgumentError(f"{name} must be an integer >= 1, got {limit!r}")
        if self.ep_size > 1 and self.num_experts is None:
            raise ArgumentError(f"ep_size {self.ep_size} needs num_experts")

    def of(self, module: str) -> tuple[int, int]:
        """Rank and size of tensor parallelism for one of the engine's modules: 0 and 1 for those
        that are replicated."""
        if any(fnmatchcase(module, name) for name in self.replicated):
            return 0, 1
        return self.tp_rank, self.tp_size

    def experts(self, held: int) -> tuple[int, range]:
        """Number of experts of a layer of which this rank holds some, and which ones it holds."""
        if self.num_experts is None:
            return held, range(held)
        return self.num_experts, experts_of(self.num_experts, self.ep_rank, self.ep_size)


def slot_parameter(module: str, matrix: str, index: int) -> str:
    """The name in layouts of a slice's stacked A or B: `"...qkv_proj.lora_a_stacked.0"`."""
    return f"{module}.lora_{matrix.lower()}_stacked.{index}"


def lora_layout(
    modules: Mapping[str, SlotShapes],
    tensors: Mapping[str, Sequence[int]],
    geometry: LoraGeometry,
    attributes: LoraAttributes,
    *,
    rename: Callable[[str], str] | None = None,
    tied: Mapping[str, str] | None = None,
) -> Layout:
    """Where each matrix of an adapter belongs in a slot, and what of the slot is zero.

    Args:
        modules: the engine's modules with LoRA, named as the engine names them (`qkv_proj` with
            three slices, `gate_up_proj` with two, `experts` with gate, up and down, or gate and up
            together and down).
        tensors: whole shapes by PEFT's names.
        geometry: the rank's.
        attributes: scalings and ranks that the manifest declares.
        rename: from an adapted module's name to the one to look up here.
        tied: names that share the values of a matrix that is sent under another name.

    Raises:
        ManifestError: a tensor has no place, comes twice, lacks its other half, is of a rank or
            shape that doesn't fit, or has no scaling, or names say several adapters; all are
            listed, up to ten.
        LayoutError: the slots contradict themselves.
    """
    builder = _Builder(modules, geometry, attributes, rename)
    builder.read(tensors, tied or {})
    if builder.problems:
        raise ManifestError(listed(builder.problems))
    layout = Layout(tensors, builder.parameters, builder.pieces, builder.padding())
    holes = layout.holes()
    if holes:
        raise LayoutError(f"slots are left with old values: {holes}")
    return layout


class _MisfitError(Exception):
    """A pair that doesn't fit its slice; collected into one public error."""


class _Builder:
    def __init__(
        self,
        modules: Mapping[str, SlotShapes],
        geometry: LoraGeometry,
        attributes: LoraAttributes,
        rename: Callable[[str], str] | None,
    ) -> None:
        self.pieces: list[Piece] = []
        self.problems: list[str] = []
        self.parameters: dict[str, tuple[int, ...]] = {}
        self._modules = modules
        self._geometry = geometry
        self._attributes = attributes
        self._rename = rename
        # For each stacked tensor and expert: how many rows of A or columns of B are filled, and by
        # whom.
        self._filled: dict[tuple[str, int], tuple[int, str]] = {}
        for name, shapes in modules.items():
            for matrix, slices in (("A", shapes.a), ("B", shapes.b)):
                for index, shape in enumerate(slices):
                    self.parameters[slot_parameter(name, matrix, index)] = shape

    def read(self, tensors: Mapping[str, Sequence[int]], tied: Mapping[str, str]) -> None:
        """Place every tensor, those that are tied to one in several places."""
        pairs: dict[str, dict[str, str]] = {}
        adapters: dict[str, str] = {}
        names = {tensor: tensor for tensor in tensors}
        names |= {n: tensor for n, tensor in tied.items() if tensor in tensors and n not in tensors}
        for text, tensor in names.items():
            name = LoraName.parse(text)
            problem = self._unplaceable(text, name, tensors[tensor])
            if problem or name is None:
                self.problems.append(f"tensor {text!r}: {problem}")
                continue
            if name.adapter is not None:
                adapters.setdefault(name.adapter, text)
            other = pairs.setdefault(name.module, {}).setdefault(name.matrix, tensor)
            if other != tensor:
                self.problems.append(f"tensors {other!r} and {tensor!r} are the same matrix")
        if len(adapters) > 1:
            found = [f"{text!r} of {adapter!r}" for adapter, text in adapters.items()]
            self.problems.append(f"matrices of several adapters: {listed(found)}")
            return
        for module, pair in pairs.items():
            if len(pair) == 1:
                present, tensor = next(iter(pair.items()))
                self.problems.append(
                    f"tensor {tensor!r}: lora_{present} comes without its other half"
                )
                continue
            try:
                self._place(module, pair, tuple(tensors[pair["A"]]), tuple(tensors[pair["B"]]))
            except _MisfitError as misfit:
                self.problems.append(f"module {module!r}: {misfit}")
        declared = self._attributes.modules
        self.problems += [
            f"module {m!r} is declared but not sent" for m in declared if m not in pairs
        ]

    def padding(self) -> list[tuple[str, Box]]:
        """What of the slot no tensor fills, in as few boxes as there are runs of experts alike."""
        boxes = []
        for parameter, shape in self.parameters.items():
            dim = 1 if ".lora_a_stacked." in parameter else 2
            first = 0
            while first < shape[0]:
                count = self._count(parameter, first)
                last = first + 1
                while last < shape[0] and self._count(parameter, last) == count:
                    last += 1
                offset, size = [first, 0, 0], [last - first, shape[1], shape[2]]
                offset[dim], size[dim] = count, shape[dim] - count
                if size[dim]:
                    boxes.append((parameter, Box(tuple(offset), tuple(size))))
                first = last
        return boxes

    def _count(self, parameter: str, expert: int) -> int:
        return self._filled.get((parameter, expert), (0, ""))[0]

    def _unplaceable(self, tensor: str, name: LoraName | None, shape: Sequence[int]) -> str | None:
        if "lora_magnitude_vector" in tensor:
            return "slots can't hold a DoRA magnitude: merge it, or send merged weights"
        if name is None:
            return "not a LoRA matrix that slots hold"
        adapter = self._attributes.adapter
        if name.adapter is not None and adapter is not None and name.adapter != adapter:
            return f"it is of adapter {name.adapter!r}, the manifest is of {adapter!r}"
        if len(shape) != 2:
            return f"expected two dimensions, got shape {tuple(shape)}"
        return None

    def _place(
        self, module: str, pair: Mapping[str, str], a: tuple[int, ...], b: tuple[int, ...]
    ) -> None:
        name = self._rename(module) if self._rename else module
        if type(name) is not str:
            raise ManifestError(f"rename made {name!r} of {module!r}, expected a name")
        declared = self._attributes.parameters.get(module)
        places = slot_places(name, (a[1], b[0]), self._modules, declared)
        if places is None:
            raise _MisfitError(f"no LoRA slots ({pair['A']!r})")
        if not places:
            raise _MisfitError("the engine keeps it in slices that one pair doesn't fit")
        if a[0] != b[1]:
            raise _MisfitError(f"lora_A {a} and lora_B {b} have different ranks")
        scale = self._attributes.scale(module)
        if isinstance(scale, str):
            raise _MisfitError(scale)
        for place in places:
            self._place_slice(module, pair, a, b, place, scale)

    def _place_slice(
        self,
        module: str,
        pair: Mapping[str, str],
        a: tuple[int, ...],
        b: tuple[int, ...],
        place: SlotPlace,
        scale: float,
    ) -> None:
        shapes = self._modules[place.module]
        held, rows_held, inputs_held = shapes.a[place.slice]
        _, outputs_held, limit = shapes.b[place.slice]
        geometry = self._geometry
        experts, own = (
            geometry.experts(held)
            if place.expert is not None or place.experts
            else (
                1,
                range(1),
            )
        )
        if len(own) != held:
            raise _MisfitError(
                f"the slots have {held} experts, this rank holds {len(own)} of {experts}"
                if place.expert is not None or place.experts
                else f"it adapts one layer, the slots have {held} experts"
            )
        rank, rest = divmod(a[0], experts if place.experts else 1)
        if rest:
            raise _MisfitError(f"{a[0]} rows of lora_A are not those of {experts} experts")
        if rank > min(limit, geometry.max_lora_rank or limit):
            raise _MisfitError(
                f"rank {rank} is above max_lora_rank {min(limit, geometry.max_lora_rank or limit)}"
            )
        if self._attributes.rank(module) not in (None, rank):
            raise _MisfitError(f"rank {rank}, declared as {self._attributes.rank(module)}")
        first_row = self._first_row(rows_held, limit, place)
        rows = max(0, min(rank - first_row, rows_held))
        if division_of(place.module, shapes) == "unknown" and geometry.of(place.module)[1] > 1:
            raise _MisfitError(
                f"the module holds several projections, and how {geometry.tp_size} ranks divide "
                f"them can't be told"
            )
        column = self._start(a[1], inputs_held, place, "inputs")
        number, count = place.rows
        if b[0] % count:
            raise _MisfitError(f"{b[0]} rows of lora_B don't divide into {count} parts")
        part = b[0] // count
        outputs = outputs_held // count if place.shared else outputs_held
        start = number * part + self._start(part, outputs, place, "outputs")
        at = number * outputs if place.shared else 0
        mine = _local_experts(place, experts, own)
        for expert in mine:
            self._fill(place, "A", expert, rows, pair["A"])
            self._fill(place, "B", expert, rank, pair["B"])
        a_parameter = slot_parameter(place.module, "A", place.slice)
        b_parameter = slot_parameter(place.module, "B", place.slice)
        base = own.start
        # What both halves of one slice share is written once.
        if rows and not (place.shared and number):
            for expert in mine:
                row = first_row + ((base + expert) * rank if place.experts else 0)
                box = Box((row, column), (rows, inputs_held))
                self.pieces.append(_piece(pair["A"], box, a_parameter, (expert, 0, 0), (1, 2)))
        if place.experts:
            # PEFT's B is [outputs, rank * experts] with the experts running fastest.
            for index in range(rank):
                box = Box((start, index * experts + base), (outputs, held))
                piece = _piece(pair["B"], box, b_parameter, (0, at, index), (1, 0), scale)
                self.pieces.append(piece)
        else:
            for expert in mine:
                box = Box((start, 0), (outputs, rank))
                piece = _piece(pair["B"], box, b_parameter, (expert, at, 0), (1, 2), scale)
                self.pieces.append(piece)

    def _first_row(self, rows_held: int, limit: int, place: SlotPlace) -> int:
        """The first of A's rows that this rank holds: 0, or its share's where LoRA is fully
        sharded."""
        rank, size = self._geometry.of(place.module)
        if rows_held == limit:
            return 0
        if rows_held * size == limit:
            return rank * rows_held
        raise _MisfitError(f"slots have {rows_held} rows of A and {limit} columns of B")

    def _start(self, whole: int, held: int, place: SlotPlace, what: str) -> int:
        """The first of the inputs or outputs that this rank holds."""
        rank, size = self._geometry.of(place.module)
        divided = _divided(place)
        if place.expert is not None or place.experts:
            # Experts that have a rank of their own are mostly not divided as well.
            divided = divided if self._geometry.ep_size == 1 else None
        # Fully sharded LoRA also divides the outputs of layers whose inputs are divided.
        if whole == held and (size == 1 or divided != what):
            return 0
        if divided == "outputs" and what == "inputs":
            raise _MisfitError(f"{whole} inputs, expected {held}")
        # Only keys and values may have fewer shards than ranks: neighbours then share one.
        count = whole // held if held and place.part in ("k", "v") else size
        if size % max(1, count) or whole != held * count:
            raise _MisfitError(f"{whole} {what}; this rank's slots have {held}, of {size} ranks")
        return rank // (size // count) * held

    def _fill(self, place: SlotPlace, matrix: str, expert: int, count: int, tensor: str) -> None:
        parameter = slot_parameter(place.module, matrix, place.slice)
        earlier = self._filled.setdefault((parameter, expert), (count, tensor))
        if earlier[1] != tensor:
            raise _MisfitError(f"{earlier[1]!r} and {tensor!r} both go to {parameter!r}")


def _piece(
    tensor: str,
    box: Box,
    parameter: str,
    at: tuple[int, int, int],
    axes: tuple[int, int],
    scale: float = 1.0,
) -> Piece:
    return Piece(tensor, box, parameter, at, axes, (1, 1), scale)


def _divided(place: SlotPlace) -> str | None:
    """Which of its dimensions ranks of tensor parallelism divide a projection on; None where that
    isn't known."""
    if place.part == "down" or place.module.rpartition(".")[2] in ("o_proj", "down_proj"):
        return "inputs"
    if place.part or place.module.rpartition(".")[2] in ("qkv_proj", "q_proj", "k_proj", "v_proj"):
        return "outputs"
    return None


def _local_experts(place: SlotPlace, experts: int, own: range) -> Sequence[int]:
    """Which of the slots' experts a pair is for."""
    if place.expert is None:
        return range(len(own))
    if place.expert >= experts:
        raise _MisfitError(f"there are {experts} experts")
    return (place.expert - own.start,) if place.expert in own else ()
