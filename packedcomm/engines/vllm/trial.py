"""What a loader would write where, tried on descriptions: nothing is read and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["Trial"]

_WRITES = ("aten::copy_", "aten::fill_", "aten::zero_")


@dataclass(frozen=True, slots=True)
class Box:
    """Written memory of a storage, in bytes."""

    begin: int
    itemsize: int
    shape: tuple[int, ...]
    steps: tuple[int, ...]

    @classmethod
    def of(cls, tensor: torch.Tensor) -> Box:
        """A view's."""
        size = tensor.element_size()
        steps = tuple(stride * size for stride in tensor.stride())
        return cls(int(tensor.storage_offset()) * size, size, tuple(tensor.shape), steps)

    @property
    def nbytes(self) -> int:
        """Bytes that are written."""
        return torch.Size(self.shape).numel() * self.itemsize

    def runs(self) -> tuple[torch.Tensor, int]:
        """Where its contiguous runs begin, and how long each of them is."""
        length = self.itemsize
        begins = torch.tensor([self.begin], device="cpu")
        for step, extent in sorted(zip(self.steps, self.shape, strict=True)):
            if step == length:
                length *= extent
            elif extent > 1:
                further = torch.arange(extent, device="cpu") * step
                begins = (begins[:, None] + further).flatten()
        return begins, length


@dataclass(slots=True)
class Parameter:
    """One of the engine's, and what the loader has written of it."""

    name: str
    box: Box
    whole_bytes: int
    """That a checkpoint has of it, without declared padding."""

    asked: bool = False
    """Whether its loader was called."""

    written: set[Box] = field(default_factory=set)

    @property
    def missing(self) -> str:
        """What of it gets nothing; "" if that is only padding. A gap is none that is as large as
        the smallest piece that is loaded."""
        if not self.asked:
            return self.name
        if not self.written or sum(box.nbytes for box in self.written) >= self.whole_bytes:
            return ""
        if self._largest_gap() < min(box.nbytes for box in self.written):
            return ""
        return f"{self.name} (a part of it)"

    def _largest_gap(self) -> int:
        runs = [box.runs() for box in self.written]
        begins, order = torch.cat([begin for begin, _ in runs]).sort()
        ends = torch.cat([begin + length for begin, length in runs])[order].cummax(0).values
        own = self.box
        reach = sum((n - 1) * s for n, s in zip(own.shape, own.steps, strict=True))
        last = own.begin + reach + own.itemsize
        edges = torch.cat([begins, torch.tensor([last], device="cpu")])
        covered = torch.cat([torch.tensor([own.begin], device="cpu"), ends])
        return int((edges - covered).max())


class Trial(TorchDispatchMode):
    """Notes what loaders write to a model's parameters, which are on the meta device or else aren't
    written. To be entered only inside a parameter's loader, as `noting` does.

    Args:
        parameters: the model's, by qualified name.
        whole: how many elements a checkpoint has of a parameter.
    """

    def __init__(
        self, parameters: Mapping[str, torch.Tensor], whole: Callable[[torch.Tensor], int]
    ) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._parameters = {
            name: Parameter(name, Box.of(t), whole(t) * t.element_size())
            for name, t in parameters.items()
            if t.numel()
        }
        self._by_storage: dict[int, list[Parameter]] = {}
        for name, parameter in self._parameters.items():
            storage = parameters[name].untyped_storage()._cdata
            self._by_storage.setdefault(storage, []).append(parameter)
        # Their storages are known by address.
        self._kept = list(parameters.values())
        self.given = ""
        """What the loader was given last, for messages."""
        self.misfits: list[str] = []
        """Tensors whose values can't be the parameters'."""

    def noting(self, loader: Callable[..., Any], name: str) -> Callable[..., Any]:
        """A parameter's loader that is watched."""

        @wraps(loader)
        def watched(*arguments: Any, **options: Any) -> Any:
            if name in self._parameters:
                self._parameters[name].asked = True
            with self:
                return loader(*arguments, **options)

        return watched

    def following(self, items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        """Named tensors, one of which is being loaded whenever the next one isn't asked for."""
        for name, tensor in items:
            self.given = f"{name!r} of shape {tuple(tensor.shape)}"
            yield name, tensor

    def missing(self, *, partial: bool) -> list[str]:
        """Parameters that get nothing or too little; with `partial` only of the layers that get
        something, since these are made anew as a whole."""
        layers = {
            parameter.name.rpartition(".")[0]
            for parameter in self._parameters.values()
            if parameter.asked
        }
        found = [
            parameter.missing
            for parameter in self._parameters.values()
            if not partial or parameter.name.rpartition(".")[0] in layers
        ]
        return sorted(filter(None, found))

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func._schema.name in _WRITES:
            destination = args[0]
            if destination.numel():
                self._note(destination, args[1] if len(args) > 1 else None)
            if destination.device.type != "meta":
                return destination  # live memory isn't touched
        return func(*args, **(kwargs or {}))

    def _note(self, destination: torch.Tensor, source: Any) -> None:
        found = self._by_storage.get(destination.untyped_storage()._cdata, ())
        for parameter in found:
            parameter.written.add(Box.of(destination))
        if not found or not isinstance(source, torch.Tensor):
            return
        if source.is_floating_point() != destination.is_floating_point():
            text = f"{self.given}: {_short(source.dtype)} into {_short(destination.dtype)}"
            if text not in self.misfits:
                self.misfits.append(text)


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
