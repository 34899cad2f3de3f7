"""The protocol of every source: what a trainer has to send, and where its bytes are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from packedcomm.copying import Part
from packedcomm.manifest import Manifest

__all__ = ["Snapshot", "Source"]


@dataclass(frozen=True, slots=True, eq=False, weakref_slot=True)
class Snapshot:
    """What a source has to send, as of now. Compared by identity.

    A source gives the same object again for as long as neither its structure nor the place of its
    memory has changed, so whatever was planned for it holds.
    """

    manifest: Manifest
    """What is sent, in order, after all transforms; they are among the manifest's attributes."""

    parts: Sequence[Sequence[Part]] | None
    """For each tensor of the manifest the parts that make it up, in memory that stays where it is;
    None where tensors are gathered or made anew at every sync."""

    left_out: tuple[str, ...] = ()
    """Names that a filter kept from being sent."""


@runtime_checkable
class Source(Protocol):
    """What can be sent again and again, and tells cheaply that nothing but values has changed.

    A source may be spread over several processes (a sharded trainer). Then all of them must make
    the same calls in the same order, and one of them, the leader, sends.
    """

    leader: bool
    """Whether this process is the one that sends."""

    def snapshot(self) -> Snapshot:
        """The present snapshot; without Python per tensor when nothing has changed.

        Raises:
            ManifestError: names collide or a transform doesn't fit, all of them listed, up to ten.
            TensorError: a tensor can't be sent as bytes.
            LayoutError: shards don't make up their tensor.
        """

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """For each tensor of the manifest, in order, its parts; where `snapshot.parts` is None.

        Lazy, so that no more than a layer is gathered at once. A tensor's memory is the taker's
        until it drops the parts. Processes that don't lead get no parts (empty sequences), but must
        take every item, since taking it is what gathers.
        """

    def share(self, failure: str | None) -> str | None:
        """Tell all processes of the source what happened on the leader, and return that.

        A collective over the processes of a sharded trainer; the identity where there is only one.
        None means success.
        """
