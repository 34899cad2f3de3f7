"""Watches an engine's own loader, and notes which box of what it was given ends up where.

The loader may go through any temporaries. Every operation that torch dispatches is looked at:
copies are followed by address, constants are noted, and whatever is computed taints what it is
written to. What can't be followed isn't guessed: its layer stays on the loader's path.
"""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from packedcomm.engines.vllm.moves import Move, compose, dense_steps

__all__ = ["Recorder", "Write"]

_CONSTANT = frozenset({"aten::fill_", "aten::zero_"})
_NEW_CONSTANT = frozenset(
    f"aten::{name}"
    for name in (
        "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
        "new_full", "scalar_tensor", "arange", "eye",
    )
)  # fmt: skip
_NEW_COPY = frozenset({"aten::clone", "aten::_to_copy"})
_EMPTY = frozenset(
    f"aten::{name}"
    for name in ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
)


@dataclass(frozen=True, slots=True)
class Write:
    """What some memory was given."""

    move: Move
    """Where it went. It comes from `origin`, whose first byte has address 0; of what has no origin
    only the destination means something."""

    origin: str | None = None
    """Name of the received tensor; None for constants and for what can't be followed."""

    reason: str = ""
    """Why it can't be followed; empty if it can."""


@dataclass(slots=True)
class _Memory:
    """A storage, a live tensor or a received one, and what it was given."""

    start: int
    end: int
    storage: StorageWeakRef
    writes: list[Write] = field(default_factory=list)
    name: str = ""
    live: bool = False


class _Places:
    """Memory by address; what was freed isn't found."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, _Memory] = {}

    def add(self, memory: _Memory) -> None:
        if memory.start not in self._by_start:
            insort(self._starts, memory.start)
        self._by_start[memory.start] = memory

    def find(self, address: int) -> _Memory | None:
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        memory = self._by_start[self._starts[index]]
        if address >= memory.end or memory.storage.expired():
            return None
        return memory

    def __iter__(self) -> Iterator[_Memory]:
        return iter(self._by_start.values())


class Recorder(TorchDispatchMode):
    """While it is entered, follows what becomes of received tensors, up to live memory.

    Belongs to one thread. Nothing is kept alive by it.

    Args:
        live: the engine's parameters and buffers by qualified name.
    """

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        super().__init__()
        self._live = _Places()
        self._received = _Places()
        self._between = _Places()
        self._layer: str | None = None
        self.reasons: dict[str, str] = {}
        """Layers that can't be followed, and why; "" is the model as a whole."""
        self.fed: dict[str, set[str]] = {}
        """Names of the received tensors that each layer was loaded from."""
        self.read: dict[str, set[str]] = {}
        """Those of them that were looked at while it was loaded; others are other ranks'."""
        self._computed: list[tuple[StorageWeakRef, str, str]] = []
        for name, tensor in live.items():
            start = tensor.data_ptr()
            if tensor.numel() and self._live.find(start) is None:
                self._live.add(self._memory_of(tensor, name=name, live=True))

    @staticmethod
    def _memory_of(tensor: torch.Tensor, **options: Any) -> _Memory:
        start = tensor.data_ptr()
        # The bytes from the first element to the last.
        reach = sum(
            s * (n - 1) for s, n in zip(tensor.stride(), tensor.shape, strict=True) if n > 1
        )
        end = start + (reach + 1) * tensor.element_size()
        return _Memory(start, end, StorageWeakRef(tensor.untyped_storage()), **options)

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        """A contiguous tensor that the loader is about to be given."""
        if not tensor.numel():
            return
        memory = self._memory_of(tensor, name=name)
        size = tensor.element_size()
        steps = dense_steps(tensor.shape, size)
        kind = _kind(tensor.dtype)
        move = Move.of(0, steps, memory.start, steps, tensor.shape, (kind, kind))
        memory.writes.append(Write(move, name))
        self._received.add(memory)

    def enter_layer(self, layer: str, loaded: Iterable[object]) -> None:
        """From here on what happens belongs to a layer.

        Args:
            layer: its qualified name.
            loaded: what its loaders are given, received tensors and what was made of them among it.
        """
        self._layer = layer
        fed = self.fed.setdefault(layer, set())
        for value in loaded:
            if isinstance(value, torch.Tensor) and value.device.type != "meta":
                fed.update(w.origin for w in self._contents(value) or () if w.origin)
                memory = self._find(value)
                if memory is not None and any(w.reason for w in memory.writes):
                    self._give_up(next(w.reason for w in memory.writes if w.reason))

    def leave_layer(self) -> None:
        """The layer is done."""
        self._layer = None

    def close(self) -> dict[str, list[Write]]:
        """What every live tensor was given, once the loader is through; and layers that keep memory
        which was computed from their weights are given up."""
        for storage, layer, operation in self._computed:
            if not storage.expired():
                self.reasons.setdefault(
                    layer, f"{operation}: the result is kept beside the weights"
                )
        return {memory.name: memory.writes for memory in self._live if memory.writes}

    def _give_up(self, reason: str, layer: str | None = None) -> None:
        self.reasons.setdefault(layer or self._layer or "", reason)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name
        if name not in _EMPTY:
            self._note(func, name, args, kwargs or {}, result)
        return result

    def _note(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        if name == "aten::copy_":
            self._copy(args[1], args[0])
        elif name in _CONSTANT:
            self._write_constant(args[0])
        elif name in _NEW_CONSTANT:
            self._write_constant(result)
        elif name in _NEW_COPY:
            self._copy(args[0], result)
        elif name == "aten::cat":
            self._concatenate(args, kwargs, result)
        else:
            self._compute(func, name, args, kwargs, result)

    def _concatenate(self, args: Any, kwargs: Any, result: torch.Tensor) -> None:
        dimension = args[1] if len(args) > 1 else kwargs.get("dim", 0)
        at = 0
        for tensor in args[0]:
            if tensor.numel():
                length = tensor.shape[dimension]
                # Plain arithmetic on a view; nothing of it is dispatched to here.
                self._copy(tensor, result.narrow(dimension, at, length))
                at += length

    def _copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        if _nowhere(destination) or not destination.numel():
            return
        contents = None if _nowhere(source) else self._contents(source)
        if contents is None:
            if self._find(destination) is not None:
                self._write_unknown(destination, "written from memory of unknown contents")
            return
        if source.shape != destination.shape:
            source = source.expand(destination.shape)
        carry = Move.of(
            source.data_ptr(),
            _steps(source),
            destination.data_ptr(),
            _steps(destination),
            destination.shape,
            (_kind(source.dtype), _kind(destination.dtype)),
        )
        memory = self._written(destination)
        if self._layer is not None:
            self.read.setdefault(self._layer, set()).update(w.origin for w in contents if w.origin)
        for write in contents:
            try:
                composed = compose(write.move, carry)
            except ValueError as error:
                reason = write.reason or str(error)
                memory.writes.append(Write(_everywhere(destination), None, reason))
                continue
            if composed is not None:
                memory.writes.append(Write(composed, write.origin, write.reason))
        if not memory.live:
            self._computed.append((memory.storage, self._layer or "", "a copy"))

    def _compute(self, func: Any, name: str, args: Any, kwargs: Any, result: Any) -> None:
        inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        known = [t for t in inputs if not _nowhere(t) and self._find(t) is not None]
        if not known:
            return
        if self._layer is not None:
            names = {w.origin for t in known for w in self._contents(t) or () if w.origin}
            self.read.setdefault(self._layer, set()).update(names)
        for argument, value in zip(func._schema.arguments, args, strict=False):
            alias = argument.alias_info
            if alias is not None and alias.is_write and isinstance(value, torch.Tensor):
                self._write_unknown(value, f"{name} computes it")
        mine = {t.untyped_storage()._cdata for t in inputs}
        outputs = tree_leaves(result)
        for value in outputs:
            if isinstance(value, torch.Tensor):
                if not _nowhere(value) and value.untyped_storage()._cdata not in mine:
                    self._write_unknown(value, f"{name} computes it")
                    storage = StorageWeakRef(value.untyped_storage())
                    for tensor in known:
                        self._computed.append((storage, self._owner(tensor), name))
            elif value is not None:
                for tensor in known:
                    self._give_up(f"{name} reads values", self._owner(tensor))

    def _owner(self, tensor: torch.Tensor) -> str:
        """The layer that a tensor's contents belong to."""
        if self._layer is not None:
            return self._layer
        memory = self._find(tensor)
        return memory.name.rpartition(".")[0] if memory is not None and memory.live else ""

    def _find(self, tensor: torch.Tensor) -> _Memory | None:
        address = tensor.data_ptr()
        for places in (self._live, self._between, self._received):
            memory = places.find(address)
            if memory is not None:
                return memory
        return None

    def _contents(self, tensor: torch.Tensor) -> list[Write] | None:
        """What a tensor's memory was given; None if nothing is known of it."""
        memory = self._find(tensor) if tensor.numel() else None
        if memory is None:
            return None
        if memory.live and not memory.writes:
            return [Write(_everywhere(tensor), None, "read before it was written")]
        return list(memory.writes)

    def _written(self, tensor: torch.Tensor) -> _Memory:
        """The memory of a tensor that is being written; known from now on."""
        memory = self._find(tensor)
        if memory is None:
            storage = tensor.untyped_storage()
            start = storage.data_ptr()
            memory = _Memory(start, start + storage.nbytes(), StorageWeakRef(storage))
            self._between.add(memory)
        elif not memory.live and memory.name:
            self._give_up("the loader changes what it is given", "")
        if tensor.numel() * tensor.element_size() == memory.end - memory.start:
            memory.writes.clear()
        return memory

    def _write_constant(self, tensor: torch.Tensor) -> None:
        if not _nowhere(tensor) and tensor.numel():
            self._written(tensor).writes.append(Write(_everywhere(tensor)))

    def _write_unknown(self, tensor: torch.Tensor, reason: str) -> None:
        if not _nowhere(tensor) and tensor.numel():
            self._written(tensor).writes.append(Write(_everywhere(tensor), None, reason))


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _nowhere(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta"


def _steps(tensor: torch.Tensor) -> list[int]:
    size = tensor.element_size()
    return [stride * size for stride in tensor.stride()]


def _everywhere(tensor: torch.Tensor) -> Move:
    """A movement to all of a tensor, from nowhere."""
    kind = _kind(tensor.dtype)
    return Move.of(
        0, [0] * tensor.dim(), tensor.data_ptr(), _steps(tensor), tensor.shape, (kind, kind)
    )
