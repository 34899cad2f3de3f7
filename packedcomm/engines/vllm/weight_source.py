"""vLLM's `WeightSource` as a source of packedcomm's."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from packedcomm.copying import Part
from packedcomm.errors import ManifestError, SessionStateError
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.sources import Snapshot

__all__ = ["WeightSourceAdapter"]


class WeightSourceAdapter:
    """What vLLM's trainer interface gives: metadata of all tensors, and a pass over them, whole.

    Both may be collectives among the trainer's processes, which vLLM runs in the same order on each
    of them: `begin_round` on all, then one pass, whatever happens. There is nothing by which the
    sender could tell the others that it failed; they only take part in its passes.

    Args:
        source: with `metadata` (a method up to vLLM 0.32, a property after) and `iter_full()` (from
            0.33) or `__iter__`.
    """

    def __init__(self, source: Any) -> None:
        self.leader = True
        self._source = source
        self._snapshot: Snapshot | None = None
        self._pass: Iterator[tuple[str, torch.Tensor]] | None = None
        self._passed = True

    def begin_round(self) -> None:
        """Read the metadata, once for what follows up to the next call.

        Raises:
            ManifestError: a name, dtype or shape can't be sent, or a name occurs twice.
        """
        self._passed = False
        self._pass = None
        metadata = self._source.metadata
        specs = [
            TensorSpec(meta.name, str(meta.dtype), tuple(meta.shape))
            for meta in (metadata() if callable(metadata) else metadata)
        ]
        manifest = Manifest(specs, {"tied": {}})
        if self._snapshot is None or self._snapshot.manifest != manifest:
            self._snapshot = Snapshot(manifest, None)

    def snapshot(self) -> Snapshot:
        """See `Source`."""
        if self._snapshot is None:
            raise SessionStateError("snapshot: no round of this source has begun")
        return self._snapshot

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """See `Source`.

        Raises:
            ManifestError: the pass gives other tensors than the metadata, in content or in order.
        """
        specs = snapshot.manifest.specs
        given = 0
        self._pass = self._begin_pass()
        for name, tensor in self._pass:
            found = TensorSpec(name, str(tensor.dtype), tuple(tensor.shape))
            if given >= len(specs) or found != specs[given]:
                expected = specs[given] if given < len(specs) else "no more tensors"
                raise ManifestError(
                    f"the weight source gives {found} as number {given}, its metadata says "
                    f"{expected}"
                )
            given += 1
            yield (Part(tensor.detach(), None, 1.0),)
            del tensor
        self._passed = True
        if given != len(specs):
            raise ManifestError(
                f"the weight source gives {given} tensors, its metadata has {len(specs)}"
            )

    def take_part(self) -> None:
        """Take the rest of this round's pass, or all of it, for the other processes' sake."""
        if not self._passed:
            self._passed = True
            for _ in self._pass or self._begin_pass():
                pass

    def end_failed_round(self) -> None:
        """As `take_part`, after a failure: what fails again is of no interest."""
        with contextlib.suppress(Exception):
            self.take_part()

    def share(self, outcome: str | None) -> str | None:
        """See `Source`: vLLM has no way to share it."""
        return outcome

    def _begin_pass(self) -> Iterator[tuple[str, torch.Tensor]]:
        iterate = getattr(self._source, "iter_full", None)
        return iter(self._source) if iterate is None else iter(iterate())
