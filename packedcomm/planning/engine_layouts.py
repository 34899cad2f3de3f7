"""The layout of one engine rank: every tensor on the wire against every parameter it holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from packedcomm.errors import ManifestError, listed
from packedcomm.layout import Box, Layout, Piece
from packedcomm.planning.engine_names import Destination, EngineNames
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
    the shapes differ, or whole.

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
        tied: names that share the values of a tensor that is sent under another name.
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
        spare = []
        for tensor in tensors:
            name = rename(tensor) if rename else tensor
            destination = self._names.find(name)
            if destination is not None:
                self._place(tensor, destination)
            elif name in aliases or (geometry.tied_embeddings and _is_output(name)):
                spare.append((tensor, self._shared(name, aliases)))
            else:
                self.problems.append(f"no destination for tensor {tensor!r}{self._hint(name)}")
        # Only now is known which parameters have a tensor of their own.
        for tensor, destination in spare:
            if destination is None:
                self.problems.append(f"no destination for tensor {tensor!r}")
            elif not self._already_filled(tensor, destination):
                self._place(tensor, destination)
        self._tie(tied)

    def missing(self, partial: bool) -> list[str]:
        """What parameters still lack."""
        problems = []
        for parameter in self._parameters:
            filled = self._filled.get(parameter)
            if parameter in self._misfits:
                continue
            if filled is None:
                if not partial:
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
            embeddings = [p for p in self._parameters if _is_embedding(p)]
            outputs = [p for p in self._parameters if _is_output(p)]
            if len(embeddings) == len(outputs) == 1 and embeddings[0] in self._filled:
                pairs.append((outputs[0], self._filled[embeddings[0]][""]))
        for name, tensor in pairs:
            destination = self._names.find(name)
            if destination is not None and destination.parameter not in self._filled:
                self._place(tensor, destination)

    def _shared(self, name: str, aliases: Mapping[str, str]) -> Destination | None:
        """The parameter that holds a name's values under another name."""
        if name in aliases:
            return self._names.destination(aliases[name])
        embeddings = [p for p in self._parameters if _is_embedding(p)]
        return self._names.destination(embeddings[0]) if len(embeddings) == 1 else None

    def _already_filled(self, tensor: str, destination: Destination) -> bool:
        """Whether a tensor of the same shape, and so of the same values, fills a parameter."""
        fillers = set(self._filled.get(destination.parameter, {}).values())
        shape = tuple(self._tensors[tensor])
        return len(fillers) == 1 and tuple(self._tensors[next(iter(fillers))]) == shape

    def _needed(self, parameter: str) -> list[str]:
        destination = self._names.destination(parameter)
        parts = {"qkv": ["q", "k", "v"], "gate_up": ["gate", "up"]}.get(
            destination.part, [destination.part]
        )
        if not destination.experts:
            return parts
        experts = self._geometry.experts or range(self._parameters[parameter][0])
        return [f"expert {expert} {part}" for expert in experts for part in parts]

    def _hint(self, name: str) -> str:
        if _is_output(name) and any(map(_is_embedding, self._parameters)):
            return " (if it is the embedding, set tied_embeddings)"
        return ""


def _is_output(name: str) -> bool:
    return name == "lm_head.weight" or name.endswith(".lm_head.weight")


def _is_embedding(name: str) -> bool:
    return name == "embed_tokens.weight" or name.endswith(".embed_tokens.weight")
