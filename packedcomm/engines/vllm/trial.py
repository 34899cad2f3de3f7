"""What a loader would write where, tried on descriptions: nothing is read and nothing changed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from packedcomm.engines.vllm.operations import tensors_in, written_by

__all__ = ["Trial"]

# Those that may be left out where they would write to live memory.
_PLAIN_WRITES = ("aten::copy_", "aten::fill_", "aten::zero_")


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

    parts: int = 1
    """Of how many tensors of a checkpoint its layer says that it is made."""

    asked: bool = False
    """Whether its loader was called."""

    given: set[Any] = field(default_factory=set)
    """The parts that its loader was given; None is all."""

    written: set[Box] = field(default_factory=set)

    @property
    def missing(self) -> str:
        """What of it gets nothing; "" if that is only padding: less than the smallest piece that
        is loaded, in a parameter that was given all of its parts."""
        if not self.asked or not self.written:
            return self.name
        gaps = self._gaps()
        if not gaps.any():
            return ""
        if None not in self.given and len(self.given) < self.parts:
            return f"{self.name} (a part of it)"
        if int(gaps.sum()) <= self.box.nbytes - self.whole_bytes:
            return ""
        if int(gaps.max()) < min(box.nbytes for box in self.written):
            return ""
        return f"{self.name} (a part of it)"

    def _gaps(self) -> torch.Tensor:
        """Bytes that aren't written, between those that are."""
        runs = [box.runs() for box in self.written]
        begins, order = torch.cat([begin for begin, _ in runs]).sort()
        ends = torch.cat([begin + length for begin, length in runs])[order].cummax(0).values
        own = self.box
        reach = sum((n - 1) * s for n, s in zip(own.shape, own.steps, strict=True))
        last = own.begin + reach + own.itemsize
        edges = torch.cat([begins, torch.tensor([last], device="cpu")])
        covered = torch.cat([torch.tensor([own.begin], device="cpu"), ends])
        return (edges - covered).clamp(min=0)


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
        # Of parameters' loaders.
        self._calls = 0
        self._idle: list[str] = []

    def noting(self, loader: Callable[..., Any], name: str, parts: int = 1) -> Callable[..., Any]:
        """A parameter's loader that is watched.

        Args:
            loader: takes the parameter, a tensor, and where there are several parts, which it is.
            name: of the parameter.
            parts: how many its layer puts together in it.
        """
        parameter = self._parameters.get(name)
        if parameter is not None:
            parameter.parts = parts

        @wraps(loader)
        def watched(*arguments: Any, **options: Any) -> Any:
            self._calls += 1
            if parameter is not None:
                parameter.asked = True
                part = arguments[2] if len(arguments) > 2 else options.get("loaded_shard_id")
                parameter.given.update(part if isinstance(part, tuple) else (part,))
            with self:
                result = loader(*arguments, **options)
            given = arguments[0] if arguments else None
            if parameter is not None and isinstance(given, torch.Tensor) and not self._of(given):
                # It was given other memory, of which nothing is known but that.
                parameter.written.add(parameter.box)
            return result

        return watched

    def following(self, items: Iterable[tuple[str, torch.Tensor]]) -> Iterator[Any]:
        """Named tensors, one of which is being loaded whenever the next one isn't asked for."""
        for name, tensor in items:
            self.given = f"{name!r} of shape {tuple(tensor.shape)}"
            before = self._calls
            yield name, tensor
            if self._calls == before:
                self._idle.append(name)

    @property
    def idle(self) -> Sequence[str]:
        """Tensors behind which the loader asked for the next one without a call of any parameter's
        loader in between: it passes over them, or keeps them until others are there."""
        return self._idle

    @property
    def called(self) -> bool:
        """Whether any parameter's loader was."""
        return self._calls > 0

    @property
    def untouched(self) -> set[str]:
        """The model's parameters that the loader did nothing with."""
        return {n for n, p in self._parameters.items() if not p.asked and not p.written}

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
        plain = func._schema.name in _PLAIN_WRITES
        for destination in tensors_in(written_by(func, args, kwargs or {})):
            if destination.numel():
                self._note(destination, args[1] if plain and len(args) > 1 else None)
                if destination.device.type != "meta":
                    if plain:
                        return destination  # live memory isn't touched
                    if self._of(destination):
                        raise NotImplementedError(f"{func} writes to live memory")
        return func(*args, **(kwargs or {}))

    def _of(self, tensor: torch.Tensor) -> Sequence[Parameter]:
        return self._by_storage.get(tensor.untyped_storage()._cdata, ())

    def _note(self, destination: torch.Tensor, source: Any) -> None:
        found = self._of(destination)
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
