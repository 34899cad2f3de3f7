"""Entries: what a source sends, between the trainer's tensors and the manifest."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch.nn.parameter import is_lazy

from packedcomm.copying import Part, describe_tensors
from packedcomm.errors import ManifestError, TensorError, listed
from packedcomm.manifest import Manifest, TensorSpec

__all__ = [
    "Attributes",
    "Description",
    "Entry",
    "NamedTensor",
    "Transform",
    "check_tensors",
    "describe",
    "entries_of",
    "is_dtensor",
    "local_of",
]


@dataclass(frozen=True, slots=True)
class NamedTensor:
    """A tensor of the trainer: any device, may require grad, may be a DTensor."""

    name: str
    tensor: torch.Tensor
    scale: float = 1.0
    """Factor for its values while they are packed."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor to be sent, as transforms see and change it."""

    names: tuple[str, ...]
    """The name it is sent under, then the names of weights that are tied to it."""

    dtype: str
    """On the wire; the parts' memory may have another one."""

    shape: tuple[int, ...]
    """On the wire; of all of it, where it is sharded."""

    parts: tuple[Part, ...]
    """The memory that makes it up; meta tensors where that is gathered at every sync."""

    origin: int
    """Position of the tensor among those that the source has."""

    originals: tuple[str, ...] = ()
    """What `names` were before all transforms, one by one; empty if nobody needs to know."""


class Transform(Protocol):
    """A declared change of what is sent. Part of the manifest, so that it changes the digest."""

    def apply(self, entries: list[Entry], left_out: list[str]) -> list[Entry]:
        """The entries after the change; names that are no longer sent are added to `left_out`.

        Raises:
            ManifestError: it doesn't fit these entries; all problems are listed, up to ten.
            LayoutError: a tensor can't be divided as declared.
        """

    def to_json(self) -> dict[str, Any]:
        """The declaration as plain JSON."""


Attributes: TypeAlias = Mapping[str, Any] | Callable[[Sequence[Entry]], Mapping[str, Any]]
"""A manifest's attributes, or a function that makes them of the entries after all transforms."""


@dataclass(frozen=True, slots=True)
class Description:
    """The outcome of `describe`; `entries` are in the manifest's order."""

    manifest: Manifest
    entries: tuple[Entry, ...]
    left_out: tuple[str, ...]

    def parts(self) -> tuple[tuple[Part, ...], ...]:
        """The parts of every tensor of the manifest."""
        return tuple(entry.parts for entry in self.entries)


def is_dtensor(tensor: object) -> bool:
    """Whether it is a torch DTensor, without importing what defines that (a slow import)."""
    return isinstance(tensor, torch.Tensor) and hasattr(tensor, "device_mesh")


def local_of(tensor: torch.Tensor) -> torch.Tensor:
    """What this process has of a DTensor; any other tensor itself."""
    local: torch.Tensor = getattr(tensor, "_local_tensor", tensor)
    return local


def _memory(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same elements in the same memory."""
    local = local_of(tensor)
    if local.numel() == 0:
        # Without an address. On other ranks a shard of the same DTensor may have elements and be
        # tied to another, so storages must tell here what addresses tell there.
        return local.untyped_storage()._cdata if is_dtensor(tensor) else id(tensor)
    shape, strides = tuple(tensor.shape), local.stride()
    return str(local.device), local.data_ptr(), local.dtype, shape, strides


def check_tensors(named: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that tensors can be sent as bytes, whatever devices they are on.

    Raises:
        TensorError: one is without memory, sparse, quantised, lazy, or a wrapper; it is named.
    """
    by_device: dict[torch.device, tuple[list[str], list[torch.Tensor]]] = {}
    for name, tensor in named:
        if is_lazy(tensor):
            raise TensorError(f"tensor {name!r}: is uninitialised, run a forward pass first")
        if tensor.device.type == "meta":
            raise TensorError(f"tensor {name!r}: is on the meta device, which has no memory")
        if getattr(tensor, "quant_state", None) is not None:
            raise TensorError(
                f"tensor {name!r}: is a quantised {type(tensor).__name__}, whose bytes mean "
                f"nothing without its quantisation state"
            )
        names, tensors = by_device.setdefault(tensor.device, ([], []))
        names.append(name)
        tensors.append(tensor)
    for device, (names, tensors) in by_device.items():
        describe_tensors(tensors, device, names)


def entries_of(
    named: Sequence[NamedTensor], stand_ins: Mapping[int, Sequence[Part]] | None = None
) -> list[Entry]:
    """One entry per tensor, in order; names of the same memory are tied to the first of them.

    Args:
        named: the source's tensors, checked by `check_tensors`.
        stand_ins: by position in `named`, the parts of tensors that are gathered.

    Raises:
        ManifestError: a dtype or shape has no place in a manifest.
    """
    origins: dict[object, int] = {}
    names: dict[int, list[str]] = {}
    for index, item in enumerate(named):
        origin = origins.setdefault((_memory(item.tensor), item.scale), index)
        names.setdefault(origin, []).append(item.name)
    entries = []
    for origin, tied in names.items():
        item = named[origin]
        parts = tuple(stand_ins[origin]) if stand_ins and origin in stand_ins else None
        if parts is None:
            parts = (Part(local_of(item.tensor.detach()), None, item.scale),)
        spec = TensorSpec(item.name, str(item.tensor.dtype), tuple(item.tensor.shape))
        entries.append(Entry(tuple(tied), spec.dtype, spec.shape, parts, origin, tuple(tied)))
    return entries


def describe(
    entries: list[Entry],
    transforms: Sequence[Transform],
    attributes: Attributes | None = None,
) -> Description:
    """Apply the transforms in order and make the manifest.

    The manifest's attributes get `tied`, the other names of tensors that are sent once, each with
    the name that is sent, also where there are none; and where there are any `transforms`, the list
    of their declarations.

    Args:
        entries: what the source has.
        transforms: applied in order.
        attributes: more of the manifest's attributes.

    Raises:
        ManifestError, LayoutError: a transform doesn't fit, or two tensors have one name.
    """
    left_out: list[str] = []
    for transform in transforms:
        entries = transform.apply(entries, left_out)
    check_names(entries)
    attributes = dict((attributes(entries) if callable(attributes) else attributes) or {})
    if transforms:
        attributes["transforms"] = [transform.to_json() for transform in transforms]
    # Also when empty: a receiver can then tell that nothing is tied from not knowing.
    attributes["tied"] = {n: entry.names[0] for entry in entries for n in entry.names[1:]}
    specs = [TensorSpec(entry.names[0], entry.dtype, entry.shape) for entry in entries]
    return Description(Manifest(specs, attributes), tuple(entries), tuple(left_out))


def check_names(entries: Iterable[Entry]) -> None:
    """Raise ManifestError, listing all, when two tensors have one name."""
    owners: dict[str, int] = {}
    twice: dict[str, None] = {}
    for entry in entries:
        for name in entry.names:
            if owners.setdefault(name, entry.origin) != entry.origin:
                twice[name] = None
    if twice:
        problems = [f"several tensors are named {name!r}" for name in twice]
        raise ManifestError(listed(problems))
