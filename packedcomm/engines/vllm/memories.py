"""Memory by address, and what it was given while somebody watched."""

from __future__ import annotations

from bisect import bisect_right, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from packedcomm.engines.vllm.moves import Move

__all__ = ["Memory", "Places", "Write", "dense", "everywhere", "fills", "kind_of", "steps_of"]

_KINDS: dict[torch.dtype, str] = {}


@dataclass(frozen=True, slots=True)
class Write:
    """What some memory was given. Later ones lie over earlier ones."""

    move: Move
    """Where it went. It comes from `origin`, whose first byte has address 0; of what can't be
    followed and of constants only the destination means something."""

    origin: str | None = None
    """Name of the received tensor; None for constants and for what can't be followed."""

    reason: str = ""
    """Why it can't be followed; empty if it can."""

    sources: frozenset[str] = frozenset()
    """Names of the received tensors that it depends on."""

    @property
    def constant(self) -> bool:
        """Whether it is the same in every update."""
        return self.origin is None and not self.reason


@dataclass(slots=True)
class Memory:
    """A storage or a received tensor, and what it was given."""

    start: int
    end: int
    storage: StorageWeakRef
    writes: list[Write] = field(default_factory=list)

    received: str = ""
    """Name of the received tensor that it is."""

    live: tuple[str, ...] = ()
    """Names of the engine's tensors that are in it."""

    layers: frozenset[str] = frozenset()
    """The layers that those belong to."""

    @classmethod
    def of_storage(cls, tensor: torch.Tensor) -> Memory:
        """All of the storage that a tensor is in."""
        storage = tensor.untyped_storage()
        start = storage.data_ptr()
        return cls(start, start + storage.nbytes(), StorageWeakRef(storage))  # type: ignore[no-untyped-call]

    @property
    def varies(self) -> bool:
        """Whether it was given something else than constants."""
        return any(not write.constant for write in self.writes)

    @property
    def sources(self) -> frozenset[str]:
        """Names of the received tensors that its contents depend on."""
        if len(self.writes) == 1:
            return self.writes[0].sources
        return frozenset().union(*(write.sources for write in self.writes))


class Places:
    """Memory by address, none over another; what was freed isn't found. Keeps nothing alive."""

    def __init__(self) -> None:
        self._starts: list[int] = []
        self._by_start: dict[int, Memory] = {}

    def add(self, memory: Memory) -> list[Memory]:
        """Add memory.

        Returns:
            What was there before and isn't found any longer.
        """
        replaced = []
        index = max(bisect_right(self._starts, memory.start) - 1, 0)
        while index < len(self._starts) and self._starts[index] < memory.end:
            if self._by_start[self._starts[index]].end > memory.start:
                replaced.append(self._by_start.pop(self._starts.pop(index)))
            else:
                index += 1
        insort(self._starts, memory.start)
        self._by_start[memory.start] = memory
        return replaced

    def find(self, address: int) -> Memory | None:
        """The memory that an address is in."""
        index = bisect_right(self._starts, address) - 1
        if index < 0:
            return None
        memory = self._by_start[self._starts[index]]
        if address >= memory.end or memory.storage.expired():  # type: ignore[no-untyped-call]
            return None
        return memory

    def __iter__(self) -> Iterator[Memory]:
        return iter(self._by_start.values())


def kind_of(dtype: torch.dtype) -> str:
    """A dtype's name."""
    kind = _KINDS.get(dtype)
    if kind is None:
        kind = _KINDS[dtype] = str(dtype).removeprefix("torch.")
    return kind


def steps_of(tensor: torch.Tensor) -> list[int]:
    """A tensor's strides in bytes."""
    size = tensor.element_size()
    return [stride * size for stride in tensor.stride()]


def everywhere(tensor: torch.Tensor) -> Move:
    """A movement to all of a tensor, from nowhere."""
    kind = kind_of(tensor.dtype)
    return Move.of(
        0, [0] * tensor.dim(), tensor.data_ptr(), steps_of(tensor), tensor.shape, (kind, kind)
    )


def fills(tensor: torch.Tensor, memory: Memory) -> bool:
    """Whether a tensor is all of some memory."""
    if tensor.numel() * tensor.element_size() != memory.end - memory.start:
        return False
    if tensor.data_ptr() != memory.start:
        return False
    return tensor.is_contiguous() or dense(tensor.shape, tensor.stride())


def dense(sizes: Sequence[int], steps: Sequence[int], item: int = 1) -> bool:
    """Whether memory of these sizes and steps is one piece, without gaps and overlaps."""
    for step, size in sorted(zip(steps, sizes, strict=True)):
        if size == 1:
            continue
        if step != item:
            return False
        item *= size
    return True
