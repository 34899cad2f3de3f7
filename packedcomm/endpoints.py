"""The protocol of targets: what receives named tensors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol, TypeGuard, runtime_checkable

from packedcomm.copying import Part
from packedcomm.manifest import Manifest

__all__ = ["Target", "TargetChooser", "is_target"]


@runtime_checkable
class Target(Protocol):
    """Where received tensors are written, by one batched copy per chunk or by receiving straight
    into them.

    A target whose memory stays where it is says so by an attribute `fixed_destinations = True`:
    `place` is then called once per manifest and group, not at every transfer, and again if memory
    was replaced. A target with many parts in few tensors gives these by an attribute `memory`, a
    sequence of tensors, so that only they are looked at before a transfer; it is asked for them
    each time, as a module may have got other ones. One whose `commit` overwrites more than the
    parts gives that memory by a method `zeroed(manifest)`, a sequence of tensors, so that it isn't
    taken for torn after a failure that is made good. And where a manifest is all that a target, or
    a callback, ever holds, this says so by an attribute `whole = True`: when it has been committed
    nothing is torn any more.
    """

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """For each tensor of the manifest, in order, where its boxes belong; an empty sequence
        where nothing of it is wanted here.

        Raises:
            ManifestError: something is unknown, missing or of another shape or dtype; all of it is
                listed, up to ten.
        """

    def commit(self, manifest: Manifest) -> None:
        """Called when all the data is in the parts, or on a GPU when the current stream is ordered
        after it: do what remains until it counts. What was received is described by `manifest`."""


@runtime_checkable
class TargetChooser(Protocol):
    """Where received tensors are written depends on what is offered.

    A chooser may have an attribute `notes`, up to 16 texts of up to 512 bytes, for whoever sends;
    and a method `foreseen(manifest)`, which is asked after a sync was committed for the target of
    the next one of that manifest, None if it isn't known. One with fixed destinations is planned
    then, before the receiver returns from the sync, and not in the next one; the chooser must keep
    it.
    """

    def choose(self, manifest: Manifest) -> Any:
        """The target or callback for a manifest; asked once per sync, before it is agreed to.

        Raises:
            ManifestError: it can't be taken.
        """


def is_target(value: object) -> TypeGuard[Target]:
    """Whether an object has the methods of a target, by its class: asked several times a sync, and
    `isinstance` takes tens of microseconds over a protocol."""
    return _has_methods(type(value))  # type: ignore[arg-type]  # classes are hashable


@cache
def _has_methods(kind: type) -> bool:
    return all(callable(getattr(kind, name, None)) for name in ("place", "commit"))
