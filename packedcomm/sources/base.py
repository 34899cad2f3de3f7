"""The protocol of every source: what a trainer has to send, and where its bytes are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from packedcomm.copying import Part
from packedcomm.manifest import Manifest

__all__ = ["BoundedSource", "Snapshot", "Source"]


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
    the same calls in the same order, and one of them, the leader, sends. Such a source may be a
    `BoundedSource` too.
    """

    leader: bool
    """Whether this process is the one that sends."""

    def snapshot(self) -> Snapshot:
        """The present snapshot; without Python per tensor when nothing has changed.

        Raises:
            ManifestError: names collide or a transform doesn't fit, all of them listed, up to ten.
            TensorError: a tensor can't be sent as bytes.
            LayoutError: shards don't make up their tensor.
            RemoteError: a process of the source failed with an error that isn't packedcomm's.
            DeadlineExceeded: a process of the source hasn't come in time; as `PeerLost` it ends the
                group of processes, and what is called afterwards raises `SessionStateError`.
            PeerLost: the connection to a process of the source has broken.

        With several processes a failure of one is raised on all of them, with its rank in the text.
        """

    def gather(self, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """For each tensor of the manifest, in order, its parts; where `snapshot.parts` is None.

        Lazy, so that no more than a layer is gathered at once. A tensor's memory is the taker's
        until it drops the parts. Processes that don't lead get no parts (empty sequences).

        Where there are several processes, each must take all items up to the iterator's end,
        whatever happens to it meanwhile, and call `share` after that in any case: taking an item is
        what gathers it, and at the end all processes tell each other whether they have failed. One
        that has failed goes on taking part, with zeros for its own data, so what others were given
        of this gather is worthless. Closing the iterator early counts as taking the rest, but
        raises nothing.

        Raises:
            DeadlineExceeded, PeerLost: as `snapshot`.
            PackedCommError: at the end, on every process, if any of them has failed: the class of
                the first failure, `RemoteError` for an error that isn't packedcomm's; ranks and
                causes are in the text. A process that has failed may raise before it has given all
                items, but not before all transfers are done.
        """

    def share(self, outcome: str | None) -> str | None:
        """Tell all processes of the source what happened on the leader, and return that.

        A collective over the processes of a sharded trainer; the identity where there is only one.

        Raises:
            DeadlineExceeded, PeerLost: as `snapshot`.
        """


@runtime_checkable
class BoundedSource(Source, Protocol):
    """A source of several processes that wait for each other no longer than the leader says.

    A sender calls `set_timeout` of every source that has it. Other sources wait for as long as
    their own means let them.
    """

    def set_timeout(self, timeout_s: float, others_s: float | None) -> None:
        """On the leader: how long the processes may wait for each other. What other processes are
        given here has no effect: they do what the leader has told them last.

        Args:
            timeout_s: deadline in seconds for each later `snapshot`, `gather` and `share` of the
                leader, from its beginning to its end; and from now on for a gather that is under
                way. The time that a gather's items are in the taker's hands doesn't count.
            others_s: the same for the other processes from the leader's next word on, which ends
                each of these calls. They wait for the leader while it does something else, and all
                that time counts, so this is longer. None is for as long as torch.distributed lets
                them, as before the leader's first word: the next thing is another sync.
        """
