"""The layout of one engine rank: every tensor on the wire against every parameter it holds."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence

from packedcomm.errors import ManifestError, listed
from packedcomm.layout import Box, Layout, Piece
from packedcomm.planning.engine_names import (
    Destination,
    EngineNames,
    is_embedding,
    is_output,
    is_vocabulary,
)
from packedcomm.planning.geometry import ModelGeometry
from packedcomm.planning.tensor_layouts import MisfitError, place_tensor

__all__ = ["ModelGeometry", "engine_layout"]

Shapes = Mapping[str, Sequence[int]]


def engine_layout(
    parameters: Shapes,
    tensors: Shapes,
    geometry: ModelGeometry,
    *,
    partial: bool = False,
    tied: Mapping[str, str] | None = None,
    aliases: Mapping[str, str] | None = None,
    rename: Callable[[str], str] | None = None,
) -> Layout:
    """Where each tensor of a manifest belongs in a tensor-parallel rank's parameters.

    Nothing is known of a model but names and shapes. Parameters are named as vLLM names them:
    `qkv_proj` [q; k; v] and `gate_up_proj` [gate; up] with weights and biases, `experts.w13_weight`
    `[experts, 2 I / T, H]`, `experts.w2_weight` `[experts, H, I / T]`, `embed_tokens` and `lm_head`
    with rows padded to a multiple of 64; others as on the wire, divided on the dimension on which
    the shapes differ, or whole. At a tensor-parallel size above 1 projections of attention and MLPs
    must be divided, but for those that the geometry says are replicated; parameters that hold
    projections in an order of their own (`query_key_value`, `c_attn`) are refused.

    On the wire tensors may have Hugging Face's names (`q_proj`, `experts.3.gate_proj`, Mixtral's
    `experts.3.w1`, transformers 5's `experts.gate_up_proj` for all experts), the engine's own (a
    fused tensor is then sent whole, as one rank alone would hold it) or Meta's last names (`wq`,
    `w1`) under the engine's module names; the rows of `wq` and `wk` must be in Hugging Face's order
    (`packedcomm.planning.rotary`).

    Args:
        parameters: this rank's shapes by name.
        tensors: whole shapes by name on the wire.
        geometry: the model's and the rank's.
        partial: whether parameters may get nothing. One that gets only some of its tensors is an
            error always.
        tied: names on the wire that share the values of a tensor that is sent under another name.
        aliases: other names of parameters, for the same memory.
        rename: from a name on the wire to the one to look up here.

    Raises:
        ManifestError: tensors or parameters are unknown, missing, duplicated or of other shapes;
            all of them are listed, up to ten.
    """
    builder = _Builder(parameters, tensors, geometry, tied or {}, aliases or {}, rename)
    problems = [*builder.problems, *builder.missing(partial)]
    if problems:
        raise ManifestError(listed(problems))
    return Layout(tensors, parameters, builder.pieces, builder.padding)


class _Builder:
    def __init__(
        self,
        parameters: Shapes,
        tensors: Shapes,
        geometry: ModelGeometry,
        tied: Mapping[str, str],
        aliases: Mapping[str, str],
        rename: Callable[[str], str] | None,
    ) -> None:
        self.pieces: list[Piece] = []
        self.padding: list[tuple[str, Box]] = []
        self.problems: list[str] = []
        self._parameters = parameters
        self._tensors = tensors
        self._geometry = geometry
        self._names = EngineNames(parameters)
        # What fills which part of a parameter.
        self._filled: dict[str, dict[str, str]] = {}
        self._misfits: set[str] = set()
        # Rows of the gate or up projection that a parameter is made of, and where that was read.
        self._halves: dict[str, tuple[int, str]] = {}
        self._tied = tied
        spare = []
        wanted = {sent for name, sent in tied.items() if self._find(self._renamed(rename, name))}
        for tensor in tensors:
            name = self._renamed(rename, tensor)
            destination = self._find(name)
            if destination is not None:
                self._place(tensor, destination)
            elif name in aliases or (geometry.tied_embeddings and is_output(name)):
                spare.append((tensor, self._shared(name, aliases)))
            elif tensor not in wanted:
                self.problems.append(f"no destination for tensor {tensor!r}{self._hint(name)}")
        # Only now is known which parameters have a tensor of their own.
        for tensor, destination in spare:
            if destination is None:
                self.problems.append(f"no destination for tensor {tensor!r}")
            elif not self._already_filled(tensor, destination):
                self._place(tensor, destination)
        self._tie({self._renamed(rename, name): sent for name, sent in tied.items()})

    def _renamed(self, rename: Callable[[str], str] | None, name: str) -> str:
        renamed = rename(name) if rename else name
        if type(renamed) is not str:
            raise ManifestError(f"rename made {renamed!r} of {name!r}, expected a name")
        return renamed

    def _find(self, name: str) -> Destination | None:
        return self._names.find(name)

    def missing(self, partial: bool) -> list[str]:
        """What parameters still lack."""
        problems = []
        for parameter in self._parameters:
            filled = self._filled.get(parameter)
            if parameter in self._misfits:
                continue
            if filled is None:
                if not partial and self._needed(parameter):
                    problems.append(f"parameter {parameter!r} is not sent")
                continue
            lacking = [part for part in self._needed(parameter) if part not in filled]
            if lacking:
                more = f" and {len(lacking) - 3} more" if len(lacking) > 3 else ""
                problems.append(
                    f"parameter {parameter!r} is sent without {', '.join(lacking[:3])}{more}"
                )
        return problems

    def _place(self, tensor: str, destination: Destination) -> None:
        shape, parameter = tuple(self._tensors[tensor]), destination.parameter
        local = tuple(self._parameters[parameter])
        try:
            placed = place_tensor(tensor, shape, destination, local, self._geometry)
        except MisfitError as misfit:
            self.problems.append(
                f"tensor {tensor!r} of shape {shape} doesn't fit parameter {parameter!r} of shape "
                f"{local} on rank {self._geometry.tp_rank} of {self._geometry.tp_size}: {misfit}"
            )
            # What the parameter lacks is not worth reporting too.
            self._misfits.add(parameter)
            return
        half = _rows_of_half(destination, shape)
        other = self._halves.setdefault(parameter, (half, tensor)) if half else (half, tensor)
        if other[0] != half:
            self.problems.append(
                f"tensors {other[1]!r} and {tensor!r} are halves of {other[0]} and {half} rows of "
                f"parameter {parameter!r}"
            )
            self._misfits.add(parameter)
            return
        filled = self._filled.setdefault(parameter, {}) if placed.filled else {}
        for part in placed.filled:
            earlier = filled.setdefault(part, tensor)
            if earlier != tensor:
                what = f"{part} of parameter" if part else "parameter"
                self.problems.append(
                    f"tensors {earlier!r} and {tensor!r} both go to {what} {parameter!r}"
                )
                return
        self.pieces += placed.pieces
        self.padding += placed.padding

    def _tie(self, tied: Mapping[str, str]) -> None:
        """Fill parameters from tensors that are sent under another name."""
        pairs = [(name, tensor) for name, tensor in tied.items() if tensor in self._tensors]
        if self._geometry.tied_embeddings:
            embeddings = [p for p in self._parameters if is_embedding(p)]
            outputs = [p for p in self._parameters if is_output(p)]
            if len(embeddings) == len(outputs) == 1 and embeddings[0] in self._filled:
                pairs.append((outputs[0], self._filled[embeddings[0]][""]))
        sent = {parameter: set(parts) for parameter, parts in self._filled.items()}
        for name, tensor in pairs:
            destination = self._names.find(name)
            if destination is None:
                continue
            parts, now = self._parts(destination), self._filled.get(destination.parameter, {})
            # Tied both on the wire and by the geometry.
            if {now.get(part) for part in parts} == {tensor}:
                continue
            # What has a tensor of its own keeps that.
            if sent.get(destination.parameter, set()).isdisjoint(parts):
                self._place(tensor, destination)

    def _shared(self, name: str, aliases: Mapping[str, str]) -> Destination | None:
        """The parameter that holds a name's values under another name."""
        if name in aliases:
            return self._names.destination(aliases[name])
        embeddings = [p for p in self._parameters if is_embedding(p)]
        return self._names.destination(embeddings[0]) if len(embeddings) == 1 else None

    def _already_filled(self, tensor: str, destination: Destination) -> bool:
        """Whether a tensor that is known to have the same values fills a parameter; one that isn't
        is a problem."""
        fillers = set(self._filled.get(destination.parameter, {}).values())
        if not fillers:
            return False
        first = next(iter(fillers))
        declared = tensor in (self._tied.get(first), first) or self._tied.get(tensor) == first
        if self._geometry.tied_embeddings and is_vocabulary(destination.parameter):
            declared = True
        same = tuple(self._tensors[first]) == tuple(self._tensors[tensor])
        if len(fillers) == 1 and same and not declared:
            self.problems.append(
                f"tensors {first!r} and {tensor!r} both go to parameter "
                f"{destination.parameter!r}, but aren't declared to be tied"
                f"{self._hint(tensor)}"
            )
            return True
        return len(fillers) == 1 and same

    def _needed(self, parameter: str) -> list[str]:
        return self._parts(self._names.destination(parameter))

    def _parts(self, destination: Destination) -> list[str]:
        """The parts of a parameter that a destination is, as `Placed.filled` has them."""
        parts = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}.get(
            destination.part, [destination.part]
        )
        if not destination.experts:
            return parts
        experts: Iterable[int] = self._geometry.experts or range(
            self._parameters[destination.parameter][0]
        )
        if destination.expert is not None:
            experts = (destination.expert,)
        return [f"expert {expert} {part}" for expert in experts for part in parts]

    def _hint(self, name: str) -> str:
        if is_output(name) and any(map(is_embedding, self._parameters)):
            return " (if it is the embedding, set tied_embeddings)"
        return ""


def _rows_of_half(destination: Destination, shape: tuple[int, ...]) -> int:
    """Rows of the gate or the up projection that a tensor is; 0 for all other tensors."""
    if destination.part not in ("gate", "up", "gate_up"):
        return 0
    dim = len(shape) - 2 if destination.experts else 0
    return shape[dim] // (2 if destination.part == "gate_up" else 1)
