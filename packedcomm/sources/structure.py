"""Which tensors a module tree or a mapping has, and whether it still has the same ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, compress
from operator import attrgetter, eq, is_
from typing import Any

import torch
from torch import nn

from packedcomm.copying import TensorRecord, as_tensor
from packedcomm.errors import ArgumentError, TensorError
from packedcomm.sources.entries import NamedTensor, is_dtensor
from packedcomm.sources.transforms import NamePatterns, Selection

__all__ = [
    "PARTS",
    "AddressRecord",
    "MappingRecord",
    "ModuleRecord",
    "is_fsdp",
    "joined",
    "mapping_tensors",
    "module_tensors",
    "modules_by_name",
]

# Wrappers that hold the real module under a name of their own, which nobody else uses: of
# torch.compile, activation checkpointing and the older FSDP.
_WRAPPED = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")

# Wrappers whose `module` is an ordinary name elsewhere, so they are told by their class.
_WRAPPERS = (nn.DataParallel, nn.parallel.DistributedDataParallel)

# What a module keeps others, parameters and buffers in.
PARTS = ("_modules", "_parameters", "_buffers")


def modules_by_name(root: nn.Module, unwrap: bool) -> Iterator[tuple[str, nn.Module]]:
    """Every path in the tree and its module, in the order of `state_dict`. A module that is in
    several places comes several times; wrappers add nothing to a path when `unwrap`."""
    stack = [("", root)]
    while stack:
        path, module = stack.pop()
        yield path, module
        children = []
        for name, child in module._modules.items():
            transparent = unwrap and (
                name in _WRAPPED or (name == "module" and isinstance(module, _WRAPPERS))
            )
            if child is not None:
                children.append((path if transparent else joined(path, name), child))
        stack.extend(reversed(children))


def joined(path: str, name: str) -> str:
    """A name below a path of the tree."""
    return f"{path}.{name}" if path else name


def is_fsdp(module: nn.Module) -> bool:
    """Whether `fully_shard` was applied to this module."""
    return any(base.__name__ == "FSDPModule" for base in type(module).__mro__)


def module_tensors(
    root: nn.Module, buffers: bool | Selection, unwrap: bool
) -> Iterator[NamedTensor]:
    """Parameters and the buffers asked for, named and ordered as in `state_dict`.

    Args:
        root: any module.
        buffers: False for none, True for those of `state_dict`, else which names, whether or not
            they are in `state_dict`.
        unwrap: whether to leave wrappers out of names.

    Raises:
        ManifestError: a pattern matches no buffer.
    """
    patterns = None if isinstance(buffers, bool) else NamePatterns(buffers)
    for path, module in modules_by_name(root, unwrap):
        for name, parameter in module._parameters.items():
            if parameter is not None:
                yield NamedTensor(joined(path, name), parameter)
        for name, buffer in module._buffers.items():
            full = joined(path, name)
            if patterns is not None:
                wanted = patterns.matches(full)
            else:
                wanted = bool(buffers) and name not in module._non_persistent_buffers_set
            if buffer is not None and wanted:
                yield NamedTensor(full, buffer)
    if patterns is not None:
        patterns.check_used("buffers")


def mapping_tensors(tensors: Mapping[str, Any], unwrap: bool) -> Iterator[NamedTensor]:
    """The tensors and arrays of a mapping.

    A leading `module.` stays: without the module nothing tells a wrapper from a child of that name.

    Raises:
        ArgumentError: a name isn't text.
        TensorError: a value isn't a tensor or array; it is named.
    """
    for name, array in tensors.items():
        if not isinstance(name, str):
            raise ArgumentError(f"expected tensors by name, got a key {name!r}")
        try:
            tensor = as_tensor(array)
        except TensorError as error:
            raise TensorError(f"tensor {name!r}: {error}") from None
        if unwrap:
            name = ".".join(part for part in name.split(".") if part not in _WRAPPED)
        yield NamedTensor(name, tensor)


class ModuleRecord:
    """Remembers a module tree: which objects are where, not what they hold.

    Comparing runs no Python per module or tensor: all loops are in C. Modules that FSDP2 has left
    unsharded after a forward pass are resharded first, since that puts other parameters in place.

    Args:
        root: the tree.
        parts_of: which of a module's `PARTS` are remembered, all by default.
    """

    def __init__(
        self,
        root: nn.Module,
        parts_of: Callable[[nn.Module], Sequence[str]] = lambda _: PARTS,
    ) -> None:
        unique = {id(module): module for _, module in modules_by_name(root, unwrap=False)}
        self.modules = list(unique.values())
        self._by_part = [
            (attrgetter(part), [module for module in self.modules if part in parts_of(module)])
            for part in PARTS
        ]
        self._fsdp_modules: list[Any] = [module for module in self.modules if is_fsdp(module)]
        self._reshard()
        dictionaries = self._dictionaries()
        self._lengths = list(map(len, dictionaries))
        filled = list(compress(dictionaries, self._lengths))
        self._names = list(chain.from_iterable(filled))
        self._objects = list(chain.from_iterable(map(dict.values, filled)))

    def _reshard(self) -> None:
        for module in self._fsdp_modules:
            module.reshard()

    def _dictionaries(self) -> list[dict[str, Any]]:
        return list(chain.from_iterable(map(part, modules) for part, modules in self._by_part))

    def holds(self) -> bool:
        """Whether every module still has the same children, parameters and buffers, as far as they
        are remembered, by identity and name."""
        self._reshard()
        dictionaries = self._dictionaries()
        # Lengths first: equal lengths are what lets the flattened lists be compared one by one.
        if list(map(len, dictionaries)) != self._lengths:
            return False
        # Most are empty, since most modules have no buffers and no children.
        filled = list(compress(dictionaries, self._lengths))
        return all(map(is_, chain.from_iterable(map(dict.values, filled)), self._objects)) and all(
            map(eq, chain.from_iterable(filled), self._names)
        )


class MappingRecord:
    """Remembers a mapping's names and values; values are compared by identity, or, with `lists`,
    the elements of each value are."""

    def __init__(self, mapping: Mapping[str, Any], *, lists: bool = False) -> None:
        self._mapping = mapping
        self._lists = lists
        self._names = list(mapping)
        self._lengths = list(map(len, mapping.values())) if lists else []
        self._objects = list(self._flat())

    def _flat(self) -> Iterable[Any]:
        values = self._mapping.values()
        return chain.from_iterable(values) if self._lists else values

    def holds(self) -> bool:
        """Whether the mapping has the same names, in order, and the same objects."""
        if list(self._mapping) != self._names:
            return False
        if self._lists and list(map(len, self._mapping.values())) != self._lengths:
            return False
        return all(map(is_, self._flat(), self._objects))


class AddressRecord:
    """Remembers where tensors have their memory; the tensors themselves are held, not aliases, so
    that a swapped `.data` is noticed. For DTensors it is the local tensors that count."""

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        self._plain = [tensor for tensor in tensors if not is_dtensor(tensor)]
        self._sharded = [tensor for tensor in tensors if is_dtensor(tensor)]
        self._record = TensorRecord(self._present())

    def _present(self) -> list[torch.Tensor]:
        return [*self._plain, *map(_local, self._sharded)]

    def holds(self) -> bool:
        """Whether addresses, dtypes, shapes and strides are what they were."""
        try:
            return self._record.first_change(self._present()) < 0
        except TensorError:
            # A tensor has lost its memory; reading it anew names it.
            return False


_local = attrgetter("_local_tensor")
