"""`ModuleSource`: all tensors of a module, or of a mapping, that one process has whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from packedcomm.copying import Part
from packedcomm.errors import ArgumentError, ManifestError, SessionStateError, TensorError
from packedcomm.sources.base import Snapshot
from packedcomm.sources.entries import (
    Description,
    NamedTensor,
    Transform,
    check_tensors,
    describe,
    entries_of,
    is_dtensor,
)
from packedcomm.sources.structure import (
    AddressRecord,
    MappingRecord,
    ModuleRecord,
    mapping_tensors,
    module_tensors,
)
from packedcomm.sources.transforms import Selection

__all__ = ["ModuleSource"]


class ModuleSource:
    """A source of whole tensors, on any devices.

    Weights that are tied (the same memory under several names) are sent once, under the first name
    in the order of `state_dict`, and the manifest's attribute `tied` has the other names. Names are
    the module's own, without what torch.compile, DistributedDataParallel, DataParallel and
    activation checkpointing add to them.

    Parameters, `.data`, submodules and buffers may be replaced between syncs: `snapshot` notices.
    In a mapping it notices replaced values; `state_dict()` gives aliases that don't follow a
    swapped `.data`, so pass the module itself if that happens.

    Args:
        tensors: a module; or a mapping of names to tensors, cupy or NumPy arrays; or a function
            that makes such a mapping, called by every `snapshot`, whose tensors are sent by the
            `gather` that follows and may be new ones each time.
        transforms: applied in order; see `packedcomm.sources.transforms`.
        buffers: which buffers of a module to send as well: none, those of `state_dict` (True), or
            those whose names are selected, whether or not `state_dict` has them.
        unwrap: whether to leave wrappers out of names. Of a mapping's names `_orig_mod.` is left
            out but never `module.`, which may be a child's real name.

    Raises:
        ArgumentError: `tensors` is none of these, or `buffers` is given without a module.
    """

    def __init__(
        self,
        tensors: nn.Module | Mapping[str, Any] | Callable[[], Mapping[str, Any]],
        *,
        transforms: Sequence[Transform] = (),
        buffers: bool | Selection = False,
        unwrap: bool = True,
    ) -> None:
        # A module is callable too.
        if not isinstance(tensors, (nn.Module, Mapping)) and not callable(tensors):
            raise ArgumentError(
                f"expected a module, a mapping of tensors or a function that makes one, "
                f"got {type(tensors).__name__}"
            )
        if buffers is not False and not isinstance(tensors, nn.Module):
            raise ArgumentError("buffers can be selected of a module only")
        self.leader = True
        self._tensors = tensors
        self._transforms = tuple(transforms)
        self._buffers = buffers
        self._unwrap = unwrap
        self._snapshot: Snapshot | None = None
        self._structure: ModuleRecord | MappingRecord | None = None
        self._addresses: AddressRecord | None = None
        self._made: tuple[tuple[Part, ...], ...] | None = None

    def snapshot(self) -> Snapshot:
        """See `Source`."""
        if self._snapshot is not None and self._unchanged():
            return self._snapshot
        # A failure below must not leave records that say that nothing has changed.
        self._structure = self._addresses = self._made = None
        description, named = self._describe()
        manifest = description.manifest
        if self._snapshot is not None and self._snapshot.manifest == manifest:
            # The same object, so that its digest needs no second computation.
            manifest = self._snapshot.manifest
        if isinstance(self._tensors, (nn.Module, Mapping)):
            self._snapshot = Snapshot(manifest, description.parts(), description.left_out)
            self._addresses = AddressRecord([item.tensor for item in named])
        else:
            self._made = description.parts()
            same = self._snapshot is not None and self._snapshot.manifest is manifest
            if self._snapshot is None or not same:
                self._snapshot = Snapshot(manifest, None, description.left_out)
        return self._snapshot

    def _unchanged(self) -> bool:
        return (
            self._structure is not None
            and self._addresses is not None
            and self._structure.holds()
            and self._addresses.holds()
        )

    def _describe(self) -> tuple[Description, list[NamedTensor]]:
        tensors = self._tensors
        if isinstance(tensors, nn.Module):
            self._structure = ModuleRecord(tensors)
            named = list(module_tensors(tensors, self._buffers, self._unwrap))
        else:
            if not isinstance(tensors, Mapping):
                tensors = tensors()
                if not isinstance(tensors, Mapping):
                    raise ArgumentError(
                        f"the function must make a mapping of tensors, "
                        f"it made a {type(tensors).__name__}"
                    )
            else:
                self._structure = MappingRecord(tensors)
            named = list(mapping_tensors(tensors, self._unwrap))
        for item in named:
            if is_dtensor(item.tensor):
                raise TensorError(
                    f"tensor {item.name!r}: is a DTensor, which DTensorSource can gather"
                )
        check_tensors((item.name, item.tensor) for item in named)
        return describe(entries_of(named), self._transforms), named

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """See `Source`; only for what a function makes.

        Raises:
            SessionStateError: the snapshot isn't this source's latest.
            ManifestError: what the function made for a second `gather` is something else.
        """
        if snapshot is not self._snapshot:
            raise SessionStateError("gather: expected the source's latest snapshot")
        if snapshot.parts is not None:
            yield from snapshot.parts
            return
        made, self._made = self._made, None
        if made is None:
            description, _ = self._describe()
            if description.manifest != snapshot.manifest:
                raise ManifestError("gather: the function made other tensors than at the snapshot")
            made = description.parts()
        # Dropped one by one, so that the taker decides how long each tensor stays.
        remaining = list(reversed(made))
        del made
        while remaining:
            yield remaining.pop()

    def share(self, outcome: str | None) -> str | None:
        """See `Source`: there is one process."""
        return outcome
