"""`DTensorSource`: a trainer sharded over processes by FSDP2, tensor parallelism or both."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from packedcomm.errors import ArgumentError
from packedcomm.sources.entries import Attributes, NamedTensor, Transform, is_dtensor
from packedcomm.sources.exchange import Exchange
from packedcomm.sources.gathering import GatheringSource
from packedcomm.sources.structure import (
    MappingRecord,
    ModuleRecord,
    is_fsdp,
    mapping_tensors,
    module_tensors,
)
from packedcomm.sources.transforms import Selection

__all__ = ["DTensorSource", "holds_dtensors"]


def holds_dtensors(tensors: object) -> bool:
    """Whether a module or a mapping has a tensor that only `DTensorSource` can send."""
    if isinstance(tensors, nn.Module):
        # What FSDP2 left unsharded after a forward pass is no DTensor at present.
        return any(map(is_fsdp, tensors.modules())) or any(map(is_dtensor, tensors.parameters()))
    return isinstance(tensors, Mapping) and any(map(is_dtensor, tensors.values()))


class DTensorSource(GatheringSource):
    """A source of DTensors and plain tensors, whole in no process.

    Every process makes one and calls `snapshot`, `gather` and `share` in the same order, between
    training steps; the group's rank 0 leads. A plain tensor is taken to be the same on all
    processes. Modules that FSDP2 has left unsharded after a forward pass are resharded, as
    `state_dict()` does.

    Names, ties and replaced parameters: as for `ModuleSource`. With CPU offloading the shards
    travel on the CPU if the group has a CPU backend such as Gloo.

    Args:
        tensors: a module, or a mapping of names to tensors such as a sharded `state_dict()`.
        transforms: applied in order; see `packedcomm.sources.transforms`.
        group: the processes of the source; None for torch.distributed's default group, or for this
            process alone if torch.distributed isn't initialised.
        buffers: as for `ModuleSource`.
        unwrap: as for `ModuleSource`.

    Raises:
        ArgumentError: `tensors` is neither, or `buffers` is given without a module.
    """

    def __init__(
        self,
        tensors: nn.Module | Mapping[str, torch.Tensor],
        *,
        transforms: Sequence[Transform] = (),
        group: dist.ProcessGroup | None = None,
        buffers: bool | Selection = False,
        unwrap: bool = True,
    ) -> None:
        if not isinstance(tensors, (nn.Module, Mapping)):
            raise ArgumentError(
                f"expected a module or a mapping of tensors, got {type(tensors).__name__}"
            )
        if buffers is not False and not isinstance(tensors, nn.Module):
            raise ArgumentError("buffers can be selected of a module only")
        super().__init__(transforms, Exchange(group) if dist.is_initialized() else None)
        self._tensors = tensors
        self._buffers = buffers
        self._unwrap = unwrap
        self._structure: ModuleRecord | MappingRecord | None = None

    def _read(self) -> tuple[list[NamedTensor], Attributes]:
        self._structure = None
        if isinstance(self._tensors, nn.Module):
            self._structure = ModuleRecord(self._tensors)
            return list(module_tensors(self._tensors, self._buffers, self._unwrap)), {}
        self._structure = MappingRecord(self._tensors)
        return list(mapping_tensors(self._tensors, self._unwrap)), {}

    def _structure_holds(self) -> bool:
        return self._structure is not None and self._structure.holds()
