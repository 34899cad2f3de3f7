"""Watches an engine's own loader, and notes which box of what it was given ends up where.

The loader may go through any temporaries. Every operation that torch dispatches is looked at:
copies are followed by address, constants are noted, and whatever is computed taints what it is
written to. What can't be followed isn't guessed: its layer stays on the loader's path.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode

from packedcomm.engines.vllm.hidden_reads import HiddenReads
from packedcomm.engines.vllm.memories import (
    Memory,
    Places,
    Write,
    everywhere,
    fills,
    kind_of,
    steps_of,
)
from packedcomm.engines.vllm.moves import Move, compose, dense_steps
from packedcomm.engines.vllm.operations import leaves, tensors_in, written_by

__all__ = ["Recorder", "Write"]

_CONSTANT = (
    "zeros", "ones", "full", "zeros_like", "ones_like", "full_like", "new_zeros", "new_ones",
    "new_full", "scalar_tensor", "arange", "eye",
)  # fmt: skip
_EMPTY = ("empty", "empty_strided", "empty_like", "new_empty", "new_empty_strided")
_WHAT = {
    **dict.fromkeys(_CONSTANT, "constant"),
    **dict.fromkeys(_EMPTY, "nothing"),
    **dict.fromkeys(("fill_", "zero_"), "fill_"),
    **dict.fromkeys(("clone", "_to_copy"), "copy"),
    **dict.fromkeys(("cat", "stack"), "pieces"),
    "copy_": "copy_",
}


class Recorder(TorchDispatchMode):
    """While it is entered, follows what becomes of received tensors, up to live memory.

    Belongs to one thread. Nothing is kept alive by it.

    Args:
        live: the engine's parameters and buffers by qualified name.
    """

    def __init__(self, live: Mapping[str, torch.Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._live = Places()
        self._received = Places()
        self._between = Places()
        self._layer: str | None = None
        self.reasons: dict[str, str] = {}
        """Layers that can't be followed, and why; "" is the model as a whole."""
        self.fed: dict[str, set[str]] = {}
        """Names of the received tensors that each layer was loaded from."""
        self.read: dict[str, set[str]] = {}
        """Those of them that were looked at while it was loaded; others are other ranks'."""
        self.outside: set[str] = set()
        """Names of the received tensors that live memory got outside of any layer."""
        self._kept: list[tuple[StorageWeakRef, str, str]] = []
        self._early: list[tuple[Memory, str, str]] = []
        self._kinds: dict[Any, str] = {}
        self._hidden = HiddenReads(self.look)
        self._busy = False
        names: dict[int, list[str]] = {}
        for name, tensor in live.items():
            if tensor.numel() and not _nowhere(tensor):
                names.setdefault(tensor.untyped_storage().data_ptr(), []).append(name)
        for mine in names.values():
            memory = Memory.of_storage(live[mine[0]])
            memory.live = tuple(mine)
            memory.layers = frozenset(name.rpartition(".")[0] for name in mine)
            for other in self._live.add(memory):
                self._give_up(f"{mine[0]} and {other.live[0]} share memory as two storages", "")

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that the loader is about to be given: nobody else keeps its storage, so that it
        shows in the end whether the loader does."""
        if not tensor.numel():
            return
        steps = steps_of(tensor)
        start = tensor.data_ptr()
        size = tensor.element_size()
        reach = sum(step * (n - 1) for step, n in zip(steps, tensor.shape, strict=True))
        kind = kind_of(tensor.dtype)
        dense = dense_steps(tensor.shape, size)
        move = Move.of(0, dense, start, steps, tensor.shape, (kind, kind))
        memory = Memory(start, start + reach + size, StorageWeakRef(tensor.untyped_storage()))  # type: ignore[no-untyped-call]
        memory.received = name
        memory.writes.append(Write(move, name, sources=frozenset([name])))
        self._received.add(memory)

    def enter_layer(self, layer: str, loaded: Iterable[object]) -> None:
        """From here on what happens belongs to a layer.

        Args:
            layer: its qualified name.
            loaded: what its loaders are given, received tensors and what was made of them among it.
        """
        self._layer = layer
        fed = self.fed.setdefault(layer, set())
        busy, self._busy = self._busy, True
        for value in tensors_in(list(loaded)):
            if _nowhere(value) or not value.numel():
                continue
            memory = self._find(value)
            if memory is None:
                self._give_up(f"{layer} is loaded from memory of unknown contents", "")
                continue
            fed.update(memory.sources)
            for write in memory.writes:
                if write.reason:
                    self._give_up(write.reason)
        self._busy = busy

    def leave_layer(self) -> None:
        """The layer is done."""
        self._layer = None

    def close(self) -> list[Memory]:
        """The live memory that was written, once the loader is through. Layers that keep what they
        were given, or memory which was computed from it, are given up."""
        for memory in self._received:
            if not memory.storage.expired():  # type: ignore[no-untyped-call]
                reason = f"{memory.received} itself is kept beside the weights"
                fed = [layer for layer, names in self.fed.items() if memory.received in names]
                for layer in fed or [""]:
                    self._give_up(reason, layer)
        for storage, layer, operation in self._kept:
            if not storage.expired():  # type: ignore[no-untyped-call]
                self._give_up(f"{operation}: the result is kept beside the weights", layer)
        for memory, layer, reason in self._early:
            if memory.varies:
                self._give_up(reason, layer)
        return [memory for memory in self._live if memory.writes]

    def look(self, tensor: torch.Tensor, how: str) -> None:
        """Somebody gets at a tensor's values in a way that isn't followed."""
        if self._busy or _nowhere(tensor) or not tensor.numel():
            return
        self._busy = True
        memory = self._find(tensor)
        if memory is not None:
            self._reads_values(memory, how)
        self._busy = False

    def __enter__(self) -> Any:
        super().__enter__()  # type: ignore[no-untyped-call]
        self._hidden.__enter__()  # type: ignore[no-untyped-call]
        return self

    def __exit__(self, *error: Any) -> None:
        self._hidden.__exit__(*error)  # type: ignore[no-untyped-call]
        super().__exit__(*error)  # type: ignore[no-untyped-call]

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        kind = self._kinds.get(func)
        if kind is None:
            kind = self._kinds[func] = _what(func)
        if kind == "parts":
            # Inference mode hands on whole what is made of other operations. Functions of torch
            # would be called anew by the other mode.
            with torch._C.DisableTorchFunction(), self:
                return func.decompose(*args, **kwargs)
        result = func(*args, **kwargs)
        if kind != "nothing":
            self._busy = True
            self._note(kind, func, args, kwargs, result)
            self._busy = False
        return result

    def _note(self, kind: str, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        if kind == "copy_":
            self._copy(args[1], args[0])
        elif kind == "copy":
            self._copy(args[0], result)
        elif kind == "fill_":
            self._fill(args[0], args[1] if len(args) > 1 else None)
        elif kind == "constant":
            self._write_constant(result)
        elif kind == "pieces":
            # Plain arithmetic on views; nothing of it is dispatched to here.
            dimension = args[1] if len(args) > 1 else kwargs.get("dim", 0)
            stacked = func._schema.name == "aten::stack"
            at = 0
            for tensor in args[0]:
                if stacked:
                    self._copy(tensor, result.select(dimension, at))
                    at += 1
                elif tensor.numel():
                    length = tensor.shape[dimension]
                    self._copy(tensor, result.narrow(dimension, at, length))
                    at += length
        else:
            self._compute(func, args, kwargs, result)

    def _fill(self, tensor: torch.Tensor, value: Any) -> None:
        if isinstance(value, torch.Tensor):
            self._copy(value, tensor)
        else:
            self._write_constant(tensor)

    def _copy(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        if _nowhere(destination) or not destination.numel():
            return
        contents = None if _nowhere(source) else self._find(source)
        if contents is None:
            if self._find(destination) is not None:
                self._write_unknown(destination, "written from memory of unknown contents")
            return
        if _same_memory(source, destination):
            return
        if contents.live and not contents.writes:
            self._early.append((contents, self._layer or "", "read before it was written"))
            self._write_unknown(destination, "copied from weights that were not yet written")
            return
        if source.is_conj() or source.is_neg() or destination.is_conj() or destination.is_neg():
            self._write_unknown(destination, "copied with another sign", contents.sources)
            return
        if source.shape != destination.shape:
            source = source.expand(destination.shape)
        carry = Move.of(
            source.data_ptr(),
            steps_of(source),
            destination.data_ptr(),
            steps_of(destination),
            destination.shape,
            (kind_of(source.dtype), kind_of(destination.dtype)),
        )
        writes = list(_carried(contents.writes, carry, destination))
        read = frozenset().union(*(write.sources for write in writes))
        if self._layer is not None:
            self.read.setdefault(self._layer, set()).update(read)
        constant = all(write.constant for write in writes)
        # Biases (from vLLM 0.27 on) are loaded before their layers have everything else.
        plain = not contents.live and not any(write.reason for write in writes)
        early = self._layer is None and plain
        memory = self._written(destination, constant=constant, early=early)
        if early:
            self.outside.update(read)
            for layer in memory.layers:
                self.fed.setdefault(layer, set()).update(read)
                self.read.setdefault(layer, set()).update(read)
        if not any(write.move.numel == destination.numel() for write in writes):
            # What is between them isn't what it was before, either.
            place = everywhere(destination)
            memory.writes.append(Write(place, None, "written from memory of unknown contents"))
        memory.writes.extend(writes)
        if not memory.live and contents.varies:
            self._kept.append((memory.storage, self._layer or "", "a copy"))
            if destination.device.type == "cpu" and source.device.type != "cpu":
                self._reads_values(contents, "a copy to the host")

    def _compute(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name
        inputs = [t for t in tensors_in((args, kwargs)) if not _nowhere(t)]
        known = [m for t in inputs if t.numel() and (m := self._find(t)) is not None]
        if not known:
            return
        sources = frozenset().union(*(memory.sources for memory in known))
        varies = any(memory.varies for memory in known)
        layer = self._layer or ""
        if self._layer is not None:
            self.read.setdefault(self._layer, set()).update(sources)
        for memory in known:
            if memory.live and not memory.writes:
                self._early.append((memory, layer, f"{name} reads values of the update before"))
        mine = {t.untyped_storage()._cdata for t in inputs}
        changed = list(tensors_in(written_by(func, args, kwargs)))
        for value in (*changed, *leaves(result)):
            if not isinstance(value, torch.Tensor):
                if value is not None and varies:
                    self._give_up(f"{name} reads values", layer)
                continue
            if _nowhere(value) or not value.numel():
                continue
            if value.untyped_storage()._cdata not in mine or any(value is c for c in changed):
                if not varies and self._find(value) is None:
                    continue  # made of what is the same in every update
                written = self._write_unknown(value, f"{name} computes it", sources)
                if varies and not written.live:
                    self._kept.append((written.storage, layer, name))

    def _reads_values(self, memory: Memory, how: str) -> None:
        layer = self._layer or ""
        if memory.varies:
            self._give_up(f"{how}: values are read", layer)
        elif memory.live and not memory.writes:
            self._early.append((memory, layer, f"{how}: values of the update before are read"))

    def _give_up(self, reason: str, layer: str | None = None) -> None:
        self.reasons.setdefault(self._layer or "" if layer is None else layer, reason)

    def _find(self, tensor: torch.Tensor) -> Memory | None:
        address = tensor.data_ptr()
        for places in (self._live, self._received, self._between):
            memory = places.find(address)
            if memory is not None:
                return memory
        return None

    def _written(self, tensor: torch.Tensor, *, constant: bool, early: bool = False) -> Memory:
        """The memory of a tensor that is being written; known from now on."""
        memory = self._find(tensor)
        if memory is None:
            memory = Memory.of_storage(tensor)
            self._between.add(memory)
        elif memory.received:
            self._give_up("the loader changes what it is given", "")
        elif memory.live and not (constant or early or self._layer in memory.layers):
            self._give_up(f"{memory.live[0]} is written by another layer or by none", "")
        if fills(tensor, memory):
            memory.writes.clear()
        return memory

    def _write_constant(self, tensor: torch.Tensor) -> None:
        if not _nowhere(tensor) and tensor.numel():
            self._written(tensor, constant=True).writes.append(Write(everywhere(tensor)))

    def _write_unknown(
        self, tensor: torch.Tensor, reason: str, sources: frozenset[str] = frozenset()
    ) -> Memory:
        memory = self._written(tensor, constant=False)
        memory.writes.append(Write(everywhere(tensor), None, reason, sources))
        return memory


def _what(func: Any) -> str:
    """What is to be done about an operation."""
    space, _, name = func._schema.name.partition("::")
    if space == "aten" and name in _WHAT:
        return _WHAT[name]
    if func._can_decompose():
        return "parts"
    return "nothing" if space == "aten" and func.is_view else "compute"


def _carried(writes: list[Write], carry: Move, destination: torch.Tensor) -> Iterator[Write]:
    """What of some memory's contents a copy from it brings to a destination."""
    for write in writes:
        try:
            move = compose(write.move, carry)
        except ValueError as error:
            reason = write.reason or str(error)
            yield Write(everywhere(destination), None, reason, write.sources)
            continue
        if move is not None:
            yield Write(move, write.origin, write.reason, write.sources)


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.data_ptr() == other.data_ptr() and (one.shape, one.stride(), one.dtype) == (
        other.shape,
        other.stride(),
        other.dtype,
    )


def _nowhere(tensor: torch.Tensor) -> bool:
    return tensor.device.type == "meta"
