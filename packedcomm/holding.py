"""What a receiver holds: which version, and what failed syncs have left part new, part old."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from packedcomm.byte_ranges import byte_ranges, ranges_without
from packedcomm.manifest import Manifest
from packedcomm.session.states import SyncState

__all__ = ["Holding", "Vote", "Writing"]


@dataclass(frozen=True, slots=True)
class Writing:
    """What a sync writes."""

    manifest: Manifest

    memory: Callable[[], Sequence[torch.Tensor]] | None
    """Where it goes, asked for when it matters; None where only a callback knows."""

    known: tuple[Manifest, ...] = ()
    """For a callback: everything that has been sent lately."""


@dataclass(frozen=True, slots=True)
class Vote:
    """A version that a receiver has voted for."""

    epoch: str
    number: int
    """Of the sync in its epoch."""

    version: int
    writing: Writing | None = None
    """None where the version has the weights of the one before."""

    target: Any = None
    """Who is to commit it; None for a callback."""

    @property
    def nbytes(self) -> int:
        """Bytes that were received for it."""
        return 0 if self.writing is None else self.writing.manifest.nbytes


@dataclass(frozen=True, slots=True)
class Torn:
    """What a failed sync may have left part new, part old, and no later one has written whole."""

    names: Set[str]

    ranges: torch.Tensor | None
    """Bytes; None where only a callback knows."""

    elements: int
    """For a callback: of all tensors that had been sent up to then, each name once."""

    @classmethod
    def by(cls, writing: Writing) -> Torn:
        """What a sync leaves that failed while it wrote."""
        ranges = None if writing.memory is None else byte_ranges(writing.memory())
        sizes = {spec.name: math.prod(spec.shape) for m in writing.known for spec in m.specs}
        return cls(writing.manifest.by_name.keys(), ranges, sum(sizes.values()))

    def without(self, manifest: Manifest, written: torch.Tensor) -> Torn | None:
        """What is left when a manifest's tensors have been written whole; None if nothing is.

        Names that are sent again count, wherever they go now; and memory that is written, under
        whatever names. For a callback a sync as large as all that it may hold is all of it.

        Args:
            manifest: what was written.
            written: the bytes that it went to.
        """
        names = self.names - manifest.by_name.keys()
        if self.ranges is None:
            whole = sum(math.prod(spec.shape) for spec in manifest.specs) >= self.elements
            return replace(self, names=names) if names and not whole else None
        ranges = ranges_without(self.ranges, written)
        return replace(self, names=names, ranges=ranges) if names and len(ranges) else None


@dataclass(frozen=True, slots=True)
class Holding:
    """What a receiver holds. Immutable: one assignment goes from one to the next, so that a version
    is never shown over weights of another one, wherever the receiver is interrupted."""

    committed: int | None = None
    """The last version that was committed."""

    epoch: str = ""
    """Of the session that it was committed in."""

    update_count: int = 0
    last_update_time: float | None = None

    writing: Writing | None = None
    """What is being written in place, or committed."""

    torn_before: tuple[Torn, ...] = ()
    """What earlier syncs have left."""

    @property
    def torn(self) -> bool:
        """Whether some destinations are new and some old, if nothing is written any more."""
        return self.writing is not None or bool(self.torn_before)

    @property
    def version(self) -> int | None:
        """The version of which all is held, as far as the present sync leaves it."""
        return None if self.torn_before else self.committed

    @property
    def state(self) -> SyncState:
        """The state of rest."""
        if self.torn:
            return SyncState.TORN
        return SyncState.IDLE if self.committed is None else SyncState.COMMITTED

    def begun(self, writing: Writing) -> Holding:
        """When old weights are overwritten from here on."""
        return self if self.writing is writing else replace(self.failed(), writing=writing)

    def failed(self) -> Holding:
        """When nothing is written any more, and nothing was committed."""
        if self.writing is None:
            return self
        torn = (*self.torn_before, Torn.by(self.writing))
        return replace(self, writing=None, torn_before=torn)

    def after(self, vote: Vote, zeroed: Callable[[], Sequence[torch.Tensor]] = tuple) -> Holding:
        """When a version has been committed.

        Args:
            vote: for it.
            zeroed: what was overwritten beside what was received; asked only if something is torn.
        """
        torn = (self if self.writing is vote.writing else self.failed()).torn_before
        if torn and vote.writing is not None:
            memory = vote.writing.memory or tuple
            written = byte_ranges([*memory(), *zeroed()])
            left = [part.without(vote.writing.manifest, written) for part in torn]
            torn = tuple(part for part in left if part is not None)
        return Holding(vote.version, vote.epoch, self.update_count + 1, time.time(), None, torn)
