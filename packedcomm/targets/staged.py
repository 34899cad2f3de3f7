"""`StagedTarget`: data is received aside, and the old weights stay whole until the commit."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from packedcomm.copying import CopyPlan, Part, TensorRecord
from packedcomm.endpoints import Target, is_target
from packedcomm.errors import ArgumentError, CapacityError, SessionStateError, TensorError
from packedcomm.manifest import Manifest

__all__ = ["StagedTarget"]

# Every piece starts at a multiple of this many bytes, so that any dtype can be viewed there.
_ALIGNMENT = 16

# Commits that are kept planned: more than the plans that a receiver keeps for one manifest each.
_KEPT = 32


@dataclass(frozen=True, slots=True)
class StagedPart:
    """A piece of a named tensor, in staging memory and where it belongs."""

    name: str
    staged: torch.Tensor
    live: torch.Tensor


@dataclass(frozen=True, slots=True)
class Staging:
    """Everything that one manifest brings."""

    parts: list[list[Part]]
    pairs: list[StagedPart]
    copy: CopyPlan
    live: list[torch.Tensor]
    """What the live parts are views of."""
    record: TensorRecord
    """Where that was when this was planned."""

    def holds(self, live: list[torch.Tensor]) -> bool:
        """Whether all memory, staged and live, is where it was."""
        same = len(live) == len(self.live) and self.record.first_change(live) < 0
        return same and self.copy.moved() is None


class StagedTarget:
    """Another target, written by one batched copy when all data has arrived and is verified.

    Until `commit` the destinations hold the old weights. The copy itself runs on the device's
    current stream: work on that stream sees the old weights or the new ones, never some of each.

    Memory: the bytes of all destinations that a transfer writes, each rounded up to 16, once per
    device, and a table for the copy; for a tensor-parallel rank its own slices only. It is taken at
    the first transfer, kept for the next one, and grows if a later manifest needs more; `release`
    frees it. Not thread-safe.

    Args:
        target: where the data goes in the end, a target with fixed destinations.

    Raises:
        ArgumentError: it isn't a target; callbacks can't be staged.
    """

    @property
    def fixed_destinations(self) -> bool:
        """Whether the inner target's are."""
        return getattr(self._target, "fixed_destinations", False)

    @property
    def whole(self) -> bool:
        """Whether what the inner target writes is all that there is to be held."""
        return getattr(self._target, "whole", False)

    def __init__(self, target: Target) -> None:
        if not is_target(target):
            raise ArgumentError(
                f"StagedTarget needs a target with place and commit, got {type(target).__name__}"
            )
        self._target = target
        self._live: list[torch.Tensor] = []
        self._memory: dict[torch.device, torch.Tensor] = {}
        self._staging: dict[str, Staging] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of staging memory held now."""
        return sum(memory.nbytes for memory in self._memory.values())

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """The staging memory, and what the inner target's parts are views of."""
        return [*self._memory.values(), *getattr(self._target, "memory", self._live)]

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """Staging memory for each part of the inner target.

        Raises:
            ManifestError: as the inner target does.
            CapacityError: no memory.
        """
        final = self._target.place(manifest)
        self._live = list(
            getattr(self._target, "memory", [part.tensor for parts in final for part in parts])
        )
        kept = self._staging.pop(manifest.digest, None)
        if kept is not None and kept.holds(self._live):
            self._staging[manifest.digest] = kept
            return kept.parts
        offsets: dict[torch.device, int] = {}
        rows = []
        for spec, parts in zip(manifest.specs, final, strict=True):
            for part in parts:
                device = part.tensor.device
                offset = offsets.get(device, 0)
                offsets[device] = offset + -(-part.tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
                rows.append((spec.name, part, offset))
        for device, nbytes in offsets.items():
            self._reserve(device, nbytes)
        staged = []
        for name, part, offset in rows:
            live = part.tensor
            flat = self._memory[live.device][offset : offset + live.nbytes]
            staged.append(StagedPart(name, flat.view(live.dtype).view(live.shape), live))
        placed = iter(staged)
        parts_of = [
            [Part(next(placed).staged, part.offset, part.scale) for part in parts]
            for parts in final
        ]
        plan = CopyPlan(
            [(pair.staged, pair.live) for pair in staged], names=[pair.name for pair in staged]
        )
        while len(self._staging) >= _KEPT:
            del self._staging[next(iter(self._staging))]
        record = TensorRecord(self._live)
        self._staging[manifest.digest] = Staging(parts_of, staged, plan, self._live, record)
        return parts_of

    def commit(self, manifest: Manifest) -> None:
        """Copy everything that the last transfer of this manifest staged to where it belongs.

        On a GPU this is enqueued on the current stream.

        Raises:
            SessionStateError: nothing of this manifest is staged.
            TensorError: a destination has been replaced since it was planned.
        """
        staging = self._staging.get(manifest.digest)
        if staging is None:
            raise SessionStateError("commit: no transfer of this manifest is staged")
        if not staging.holds(list(getattr(self._target, "memory", staging.live))):
            raise TensorError(
                f"commit: {self._moved(manifest, staging)} has been given other memory, or none, "
                "since it was planned"
            )
        staging.copy.run()
        self._target.commit(manifest)

    def _moved(self, manifest: Manifest, staging: Staging) -> str:
        """Which destination isn't where it was, for messages."""
        if (moved := staging.copy.moved()) is not None:
            return f"tensor {staging.pairs[int(moved.rpartition('#')[2])].name!r}"
        # The inner target may name it itself. Else it follows its owners, such as parameters.
        now = (part.tensor for parts in self._target.place(manifest) for part in parts)
        # Tied tensors may have been untied meanwhile: then there are more.
        for pair, tensor in zip(staging.pairs, now, strict=False):
            if tensor.data_ptr() != pair.live.data_ptr():
                return f"tensor {pair.name!r}"
        return "a destination that this manifest doesn't fill"

    def zeroed(self, manifest: Manifest) -> Sequence[torch.Tensor]:
        """What the inner target's `commit` overwrites beside its parts."""
        zeroed = getattr(self._target, "zeroed", None)
        return () if zeroed is None else zeroed(manifest)

    def staged_pairs(self, manifest: Manifest) -> Sequence[StagedPart]:
        """Every piece of a manifest that was received, before its commit."""
        return self._staging[manifest.digest].pairs

    def release(self) -> None:
        """Free the staging memory; the next transfer takes it anew."""
        for device in list(self._memory):
            self._release(device)

    def _release(self, device: torch.device) -> None:
        memory = self._memory.pop(device, None)
        if memory is not None:
            # Plans that are kept elsewhere see by this that their destinations are gone.
            memory.untyped_storage().resize_(0)
            self._staging.clear()

    def _reserve(self, device: torch.device, nbytes: int) -> None:
        held = self._memory.get(device)
        if held is not None and held.nbytes >= nbytes:
            return
        self._release(device)
        try:
            with torch.inference_mode(False):
                self._memory[device] = torch.empty(nbytes, dtype=torch.uint8, device=device)
        except RuntimeError as error:  # torch.OutOfMemoryError on a GPU
            raise CapacityError(
                f"no memory to stage {nbytes:,} bytes on {device}: {str(error).splitlines()[0]}"
            ) from error
