"""What a receiver holds: which version, and what failed syncs have left part new, part old."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import torch

from packedcomm.byte_ranges import byte_ranges, ranges_without
from packedcomm.manifest import Manifest
from packedcomm.session.messages import Commit
from packedcomm.session.states import SyncState

__all__ = ["Holding", "Vote", "Writing"]

logger = logging.getLogger("packedcomm")


@dataclass(frozen=True, slots=True)
class Writing:
    """What a sync writes."""

    manifest: Manifest

    memory: Callable[[], Sequence[torch.Tensor]] | None
    """Where it goes, asked for when it matters; None where only a callback knows."""

    whole: bool = False
    """Whether it is all that there is to be held."""


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

    def is_of(self, decided: Commit) -> bool:
        """Whether that is the sync that has been decided."""
        return (decided.number, decided.version) == (self.number, self.version)

    @property
    def nbytes(self) -> int:
        """Bytes that were received for it."""
        return 0 if self.writing is None else self.writing.manifest.nbytes


@dataclass(frozen=True, slots=True)
class Torn:
    """What a failed sync may have left part new, part old, and no later one has written whole."""

    names: Set[str]

    ranges: torch.Tensor | None
    """Bytes; None where only a callback knows, or there are too many pieces."""

    @classmethod
    def by(cls, writing: Writing) -> Torn:
        """What a sync leaves that failed while it wrote."""
        ranges = None if writing.memory is None else _ranges(writing.memory)
        return cls(writing.manifest.by_name.keys(), ranges)

    def without(self, manifest: Manifest, written: torch.Tensor | None) -> Torn | None:
        """What is left when a manifest's tensors have been written whole; None if nothing is.

        Names that are sent again count, wherever they go now; and memory that is written, under
        whatever names.

        Args:
            manifest: what was written.
            written: the bytes that it went to, if they are known.
        """
        names = self.names - manifest.by_name.keys()
        if not names:
            return None
        if self.ranges is None or written is None:
            return replace(self, names=names)
        ranges = ranges_without(self.ranges, written)
        return replace(self, names=names, ranges=ranges) if len(ranges) else None


def _ranges(memory: Callable[[], Sequence[torch.Tensor]]) -> torch.Tensor | None:
    """The bytes of some memory, if they can be told: this is asked after failures, and must not
    fail."""
    try:
        return byte_ranges(memory())
    except Exception:
        logger.warning("what is torn is known by names only", exc_info=True)
        return None


@dataclass(frozen=True, slots=True)
class Holding:
    """What a receiver holds. Immutable: one assignment goes from one to the next, so that a version
    is never shown over weights of another one, wherever the receiver is interrupted."""

    committed: int | None = None
    """The last version that was committed."""

    epoch: str = ""
    """Of the session that it was committed in."""

    number: int = 0
    """Of the sync in its epoch."""

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

    def lost(self) -> Holding:
        """When all memory has been given other contents: torn until a sync that is whole."""
        if self.committed is None and not self.torn:
            return self
        failed = self.failed()
        # No tensor has this name.
        return replace(failed, torn_before=(*failed.torn_before, Torn(frozenset([""]), None)))

    def after(self, vote: Vote, zeroed: Callable[[], Sequence[torch.Tensor]] = tuple) -> Holding:
        """When a version has been committed.

        Args:
            vote: for it.
            zeroed: what was overwritten beside what was received; asked only if something is torn.
        """
        torn = (self if self.writing is vote.writing else self.failed()).torn_before
        if vote.writing is not None and vote.writing.whole:
            torn = ()
        elif torn and vote.writing is not None:
            memory = vote.writing.memory or tuple
            written = _ranges(lambda: [*memory(), *zeroed()])
            left = [part.without(vote.writing.manifest, written) for part in torn]
            torn = tuple(part for part in left if part is not None)
        return Holding(
            committed=vote.version,
            epoch=vote.epoch,
            number=vote.number,
            update_count=self.update_count + 1,
            last_update_time=time.time(),
            torn_before=torn,
        )
