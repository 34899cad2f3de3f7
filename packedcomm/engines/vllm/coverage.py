"""What some live memory holds in the end, after everything that was written over one another."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Mapping, Sequence

import torch

from packedcomm.engines.vllm.constants import Ranges
from packedcomm.engines.vllm.memories import Memory, Write, dense, kind_of
from packedcomm.engines.vllm.moves import Move

__all__ = ["holds"]

# What an element is; from _RECEIVED on: of which write.
_UNTOUCHED, _UNKNOWN, _CONSTANT, _RECEIVED = range(4)


def holds(
    memory: Memory, tensors: Mapping[str, torch.Tensor]
) -> tuple[list[Write], dict[str, Ranges | None]]:
    """What live memory holds in the end.

    Args:
        memory: as it was recorded.
        tensors: the live tensors in it.

    Returns:
        The writes of received tensors that it still holds all of, each element once; and of the
        tensors that hold constants, where: None if that isn't in ranges.

    Raises:
        ValueError: some of a tensor isn't known, or a write is partly overwritten.
    """
    if any(t.untyped_storage().data_ptr() != memory.start for t in tensors.values()):
        raise ValueError("it was given other memory")
    kinds = {kind_of(tensor.dtype) for tensor in tensors.values()}
    if len(kinds) > 1:
        raise ValueError("it shares memory with tensors of another dtype")
    first = next(iter(tensors.values()))
    size = first.element_size()
    moves = [write.move for write in memory.writes]
    for move in moves:
        if move.dst_dtype not in kinds:
            raise ValueError(f"written as {move.dst_dtype}, is {min(kinds)}")
        if any(step % size for step in (move.dst - memory.start, *(a.dst for a in move.axes))):
            raise ValueError("written between its elements")
    whole = all(dense(t.shape, t.stride()) for t in tensors.values())
    whole = whole and all(_in_one_piece(move, size) for move in moves)
    surface = _Ranges(memory, size) if whole else _Map(memory, size, first.device)
    for index, write in enumerate(memory.writes):
        code = _UNKNOWN if write.reason else _CONSTANT
        surface.put(write.move, code if write.origin is None or write.reason else index + _RECEIVED)
    held = [surface.codes_in(tensor) for tensor in tensors.values()]
    if any(_UNKNOWN in found for found in held):
        raise ValueError(next(write.reason for write in memory.writes if write.reason))
    if surface.partial():
        raise ValueError("written twice, the second time only in part")
    if any(_UNTOUCHED in found and found != {_UNTOUCHED} for found in held):
        raise ValueError("some elements come from nowhere that was seen")
    received = [memory.writes[index - _RECEIVED] for index in surface.received()]
    constants = {
        name: surface.constants_in(tensor)
        for (name, tensor), found in zip(tensors.items(), held, strict=True)
        if _CONSTANT in found
    }
    return received, constants


def _in_one_piece(move: Move, size: int) -> bool:
    return dense([axis.size for axis in move.axes], [axis.dst for axis in move.axes], size)


class _Ranges:
    """Memory that is only written in ranges."""

    def __init__(self, memory: Memory, size: int) -> None:
        self._first, self._size = memory.start, size
        self._starts = [0]
        self._codes = [_UNTOUCHED]
        self._put: dict[int, int] = {}

    def put(self, move: Move, code: int) -> None:
        low = (move.dst - self._first) // self._size
        high = low + move.numel
        after = self._codes[bisect_right(self._starts, high) - 1]
        cut = slice(bisect_left(self._starts, low), bisect_right(self._starts, high))
        self._starts[cut] = [low, high]
        self._codes[cut] = [code, after]
        if code >= _RECEIVED:
            self._put[code] = move.numel

    def _held(self) -> dict[int, int]:
        held = dict.fromkeys(self._put, 0)
        ends = self._starts[1:]
        for start, end, code in zip(self._starts, ends, self._codes, strict=False):
            if code >= _RECEIVED:
                held[code] += end - start
        return held

    def partial(self) -> bool:
        return any(held not in (0, self._put[code]) for code, held in self._held().items())

    def received(self) -> list[int]:
        return [code for code, held in self._held().items() if held]

    def codes_in(self, tensor: torch.Tensor) -> set[int]:
        return {code for _, _, code in self._within(tensor)}

    def constants_in(self, tensor: torch.Tensor) -> Ranges:
        return [(low, high) for low, high, code in self._within(tensor) if code == _CONSTANT]

    def _within(self, tensor: torch.Tensor) -> Iterator[tuple[int, int, int]]:
        """The ranges of a tensor, from its first element on, and what each of them is."""
        low = (tensor.data_ptr() - self._first) // self._size
        high = low + tensor.numel()
        ends = [*self._starts[1:], high]
        at = slice(bisect_right(self._starts, low) - 1, bisect_left(self._starts, high))
        for start, end, code in zip(self._starts[at], ends[at], self._codes[at], strict=True):
            yield max(start, low) - low, min(end, high) - low, code


class _Map:
    """Memory of which every element is looked at."""

    def __init__(self, memory: Memory, size: int, device: torch.device) -> None:
        count = (memory.end - memory.start) // size
        dtype = torch.int16 if len(memory.writes) < 2**15 - _RECEIVED else torch.int32
        self._elements = torch.zeros(count, dtype=dtype, device=device)
        self._first, self._size = memory.start, size
        self._views: dict[int, torch.Tensor] = {}

    def _view(self, at: int, shape: Sequence[int], steps: Sequence[int]) -> torch.Tensor:
        return self._elements.as_strided(shape, steps, (at - self._first) // self._size)

    def put(self, move: Move, code: int) -> None:
        steps = [axis.dst // self._size for axis in move.axes]
        view = self._view(move.dst, [axis.size for axis in move.axes], steps)
        view.fill_(code)
        if code >= _RECEIVED:
            self._views[code] = view

    def _seen(self) -> list[list[bool]]:
        """Whether each write is held anywhere, and everywhere."""
        if not self._views:
            return []
        same = (view == code for code, view in self._views.items())
        found: list[list[bool]] = torch.stack(
            [torch.stack([held.any(), held.all()]) for held in same]
        ).tolist()
        return found

    def partial(self) -> bool:
        return any(some and not every for some, every in self._seen())

    def received(self) -> list[int]:
        seen = zip(self._views, self._seen(), strict=True)
        return [code for code, (some, _) in seen if some]

    def codes_in(self, tensor: torch.Tensor) -> set[int]:
        view = self._view(tensor.data_ptr(), tensor.shape, tensor.stride())
        return {
            code
            for code, some in (
                (_UNTOUCHED, view == _UNTOUCHED),
                (_UNKNOWN, view == _UNKNOWN),
                (_CONSTANT, view >= _CONSTANT),
            )
            if bool(some.any())
        }

    def constants_in(self, tensor: torch.Tensor) -> None:
        """They are somewhere between the received ones."""
