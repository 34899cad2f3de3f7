"""`TensorTarget`: received tensors are written in place into tensors of the same names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain, pairwise
from operator import attrgetter, is_
from typing import Any

import torch

from packedcomm.copying import Part, as_destination, describe_tensors
from packedcomm.errors import ManifestError, TensorError, listed
from packedcomm.manifest import Manifest, TensorSpec, dtype_name, named_pairs

__all__ = ["TensorTarget", "checked_destinations"]

_dictionaries = attrgetter("_modules", "_parameters")


def checked_destinations(
    tensors: torch.nn.Module | Mapping[str, Any] | Iterable[tuple[str, Any]],
) -> dict[str, torch.Tensor]:
    """Named memory that may be written in place; of a module its parameters.

    Raises:
        ArgumentError: these are no named tensors.
        ManifestError: a name is empty or occurs twice.
        TensorError: a tensor requires grad (writing it in place would corrupt a graph: pass
            `tensor.detach()`), is read-only, overlaps itself, has no memory or can't be written as
            bytes; the message names it.
    """
    checked: dict[str, torch.Tensor] = {}
    if isinstance(tensors, torch.nn.Module):
        # Whoever gives the module means it: no graph is kept from updating weights.
        tensors = {name: parameter.detach() for name, parameter in tensors.named_parameters()}
    for name, array in named_pairs(tensors):
        if type(name) is not str or not name:
            raise ManifestError(f"tensor name must be a non-empty string, got {name!r}")
        if name in checked:
            raise ManifestError(f"duplicate tensor name {name!r}")
        try:
            tensor = as_destination(array)
            describe_tensors([tensor], tensor.device)
        except TensorError as error:
            raise TensorError(f"tensor {name!r}: {error}") from error
        if tensor.requires_grad:
            raise TensorError(
                f"tensor {name!r} requires grad and can't be written in place: pass its detach()"
            )
        _check_storage(name, tensor)
        checked[name] = tensor
    return checked


def _check_storage(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor's memory is there: a storage may have been made smaller under it, or
    freed, and whoever writes by its address would write to somebody else's.

    Raises:
        TensorError: it isn't; the message names the tensor.
    """
    last = tensor.numel() - 1
    if not tensor.is_contiguous():
        last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    needed = (tensor.storage_offset() + last + 1) * tensor.element_size()
    has = tensor.untyped_storage().nbytes()
    if has < needed and tensor.numel():
        raise TensorError(
            f"tensor {name!r} has no storage: it needs {needed:,} bytes, of which {has:,} are left"
        )


class TensorTarget:
    """In-place destinations by name. Their addresses never change.

    A failed transfer leaves tensors of which some are new and some are old; `StagedTarget` around
    this one prevents that.

    Args:
        tensors: a module, whose parameters are meant, as `ModuleSource` sends them by default;
            or a mapping or `(name, tensor)` pairs; cupy and NumPy arrays count as tensors. Strided
            views are fine. Two names may have one tensor (tied weights). Of a module, memory that
            its parameters are given later (`.data = ...`, `.to(...)`) is followed, and so are
            parameters and modules that are put in place of others; tensors such as
            `parameter.detach()` are memory of their own account, and a target of them must be made
            anew.
        partial: whether a transfer may leave out some of the names; otherwise that is an error.

    Raises:
        ArgumentError, ManifestError, TensorError: as `checked_destinations`.
    """

    fixed_destinations = True

    def __init__(
        self,
        tensors: torch.nn.Module | Mapping[str, Any] | Iterable[tuple[str, Any]],
        *,
        partial: bool = False,
    ) -> None:
        self._tensors = checked_destinations(tensors)
        self._module = tensors if isinstance(tensors, torch.nn.Module) else None
        self._parameters: dict[str, torch.nn.Parameter] = {}
        # The module and those in it; their children and parameters.
        self._modules: list[torch.nn.Module] = []
        self._objects: list[Any] = []
        self._partial = partial
        self._look()

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """All tensors; of a module the parameters that it has now, whose memory may be replaced."""
        # In C: this is asked for at every transfer.
        now = self._present()
        if len(now) != len(self._objects) or not all(map(is_, now, self._objects)):
            self._look()
        return list((self._parameters or self._tensors).values())

    def _look(self) -> None:
        """Look which parameters a module has now."""
        if self._module is None:
            return
        self._parameters = dict(self._module.named_parameters())
        self._tensors = {name: p.detach() for name, p in self._parameters.items()}
        self._modules = list(self._module.modules())
        self._objects = self._present()

    def _present(self) -> list[Any]:
        dictionaries = chain.from_iterable(map(_dictionaries, self._modules))
        return list(chain.from_iterable(map(dict.values, dictionaries)))

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """The tensor of each name, and those of the names that are tied to it.

        Raises:
            ManifestError: lists unknown, missing and mismatched tensors, and those that share
                memory though they are sent apart, up to ten of them.
            TensorError: the memory of a tensor was freed.
        """
        self._look()
        tied: dict[str, list[str]] = {}
        for name, sent_as in manifest.attributes.get("tied", {}).items():
            if name in self._tensors:
                tied.setdefault(sent_as, []).append(name)
        problems: list[str] = []
        placed: list[Sequence[Part]] = []
        for spec in manifest.specs:
            aliases = tied.get(spec.name, [])
            names = [spec.name] if spec.name in self._tensors or not aliases else []
            names += aliases
            problems += filter(None, (self._mismatch(name, spec) for name in names))
            tensors = []
            for name in names:
                if name in self._tensors:
                    tensors.append(self._tensors[name])
                    _check_storage(name, tensors[-1])
            placed.append([Part(tensor) for tensor in _distinct(tensors)])
        problems += self._missing(
            {*manifest.by_name, *(n for names in tied.values() for n in names)}
        )
        problems += self._shared(manifest)
        if problems:
            raise ManifestError(listed(problems))
        return placed

    def commit(self, manifest: Manifest) -> None:
        """Nothing is left to do: the data is where it belongs."""

    def _mismatch(self, name: str, spec: TensorSpec) -> str | None:
        tensor = self._tensors.get(name)
        if tensor is None:
            return f"no destination for tensor {name!r}"
        found = (dtype_name(tensor.dtype), tuple(tensor.shape))
        if found != (spec.dtype, spec.shape):
            return (
                f"tensor {name!r} is received as {spec.dtype} {spec.shape}, "
                f"its destination is {found[0]} {found[1]}"
            )
        return None

    def _missing(self, sent: set[str]) -> list[str]:
        if self._partial:
            return []
        missing = [f"tensor {name!r} is not sent" for name in self._tensors if name not in sent]
        if missing:
            hint = "sources send buffers with buffers=True, and partial=True lets names be left out"
            missing[-1] += f" ({hint})"
        return missing

    def _shared(self, manifest: Manifest) -> list[str]:
        """Tensors that would be written twice, with different values as far as is known.

        One memory under two names is a tied weight, and right unless the sender says that it ties
        nothing of the kind. Tensors with gaps in their memory may interleave and aren't compared.
        """
        says_ties = "tied" in manifest.attributes
        spans = sorted(
            (tensor.data_ptr(), tensor.data_ptr() + tensor.nbytes, str(tensor.device), name)
            for name, tensor in self._tensors.items()
            if name in manifest.by_name and tensor.nbytes and tensor.is_contiguous()
        )
        problems = []
        for before, after in pairwise(spans):
            same = before[:3] == after[:3]
            if before[2] == after[2] and after[0] < before[1] and (says_ties or not same):
                problems.append(f"tensors {before[3]!r} and {after[3]!r} share memory")
        return problems

    def __len__(self) -> int:
        return len(self._tensors)


def _distinct(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Without those that are the memory of an earlier one: tied weights."""
    found = {(t.data_ptr(), t.shape, t.stride()): t for t in reversed(tensors)}
    return list(reversed(found.values()))
