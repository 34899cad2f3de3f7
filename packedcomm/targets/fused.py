"""`FusedTarget`: received tensors are written in place into an engine rank's fused parameters."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch

from packedcomm.copying import Part
from packedcomm.layout import Layout
from packedcomm.manifest import Manifest
from packedcomm.planning.engine_layouts import ModelGeometry, engine_layout
from packedcomm.targets.placement import (
    Placement,
    Placements,
    check_apart,
    check_one_device,
    renaming,
    tied_names,
)
from packedcomm.targets.tensors import checked_destinations

__all__ = ["FusedTarget"]


class FusedTarget:
    """In-place destinations in the parameters of one tensor-parallel rank of an engine.

    A manifest of whole tensors is cut to the rank's slices of `qkv_proj`, `gate_up_proj`, fused
    experts, padded vocabularies and divided layers; `packedcomm.planning.engine_layouts` has the
    rules. Padding rows are zeroed at the commit. Parameters must be laid out as they were when the
    engine made them: backends that swap the halves of `w13` or repack weights after loading can't
    be written in place.

    A failed transfer leaves parameters of which some are new and some are old; `StagedTarget`
    around this one prevents that. Not thread-safe.

    Args:
        parameters: this rank's, mapping or `(name, tensor)` pairs, any strides, one device. Two
            names may be one tensor (tied weights); what is sent must be tied too, or
            `tied_embeddings` be set.
        geometry: the model's dimensions and this rank's place.
        partial: whether a transfer may leave out whole parameters. One that gets only some of its
            tensors is always an error.
        cast: whether floating-point tensors of another dtype than the parameter's are cast;
            otherwise they are errors.
        rename: from names on the wire to names under which the engine knows them, a function or a
            mapping (names that it lacks stay).

    Raises:
        ManifestError: a name is empty or occurs twice.
        TensorError: a parameter requires grad (pass `parameter.detach()`), overlaps itself, can't
            be written as bytes, is on another device than the first one, or shares memory with
            another one without being the same tensor.
    """

    fixed_destinations = True

    def __init__(
        self,
        parameters: Mapping[str, Any] | Iterable[tuple[str, Any]],
        geometry: ModelGeometry,
        *,
        partial: bool = False,
        cast: bool = False,
        rename: Callable[[str], str] | Mapping[str, str] | None = None,
    ) -> None:
        named = checked_destinations(parameters)
        check_one_device(named)
        self._parameters: dict[str, torch.Tensor] = {}
        self._aliases: dict[str, str] = {}
        first: dict[Any, str] = {}
        for name, tensor in named.items():
            memory = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            owner = first.setdefault(memory, name) if tensor.numel() else name
            if owner == name:
                self._parameters[name] = tensor
            else:
                self._aliases[name] = owner
        check_apart(self._parameters)
        self._shapes = {name: tuple(t.shape) for name, t in self._parameters.items()}
        self._geometry = geometry
        self._partial = partial
        self._cast = cast
        self._rename = renaming(rename)
        self._placements = Placements(self._parameters)

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """The parameters, each once."""
        return self._placements.tensors

    def layout(self, manifest: Manifest) -> Layout:
        """Which box of each tensor lies where in this rank's parameters.

        Raises:
            ManifestError: as `place`.
        """
        return self._placements.get(manifest, self._place).layout

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """This rank's boxes of each tensor; none of tensors that are other ranks'.

        Raises:
            ManifestError: tensors or parameters are unknown, missing, duplicated, of other shapes
                or of other dtypes without `cast`; all are listed, up to ten.
            TensorError: a parameter's memory has been replaced.
        """
        return self._placements.get(manifest, self._place).parts

    def commit(self, manifest: Manifest) -> None:
        """Zero the padding of the parameters that the manifest fills; on a GPU enqueued on the
        current stream.

        Raises:
            TensorError: a parameter's memory has been replaced, so it didn't get the data.
        """
        self._placements.get(manifest, self._place).zero()

    def zeroed(self, manifest: Manifest) -> Sequence[torch.Tensor]:
        """What `commit` overwrites beside the parts."""
        return self._placements.get(manifest, self._place).zeroed

    def _place(self, manifest: Manifest) -> Placement:
        layout = engine_layout(
            self._shapes,
            {spec.name: spec.shape for spec in manifest.specs},
            self._geometry,
            partial=self._partial,
            tied=tied_names(manifest),
            aliases=self._aliases,
            rename=self._rename,
        )
        return Placement.of(manifest, layout, self._parameters, cast=self._cast)

    def __repr__(self) -> str:
        rank, size = self._geometry.tp_rank, self._geometry.tp_size
        return f"FusedTarget({len(self._parameters)} parameters, rank {rank} of {size})"
