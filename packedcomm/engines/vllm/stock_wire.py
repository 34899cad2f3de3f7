"""How stock vLLM's `backend="nccl"` cuts what it sends: packed, or one broadcast per tensor."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from packedcomm.errors import ArgumentError
from packedcomm.planning.chunks import Chunk, Cut, chunk_rule

__all__ = ["StockWire"]


@dataclass(frozen=True, slots=True)
class StockWire:
    """How tensors travel: what vLLM calls its packed settings, with vLLM's defaults for a worker.

    Raises:
        ArgumentError: a value is out of range.
    """

    packed: bool = False
    buffer_size_bytes: int = 1 << 30
    num_buffers: int = 2

    def __post_init__(self) -> None:
        chunk_rule("vllm", self.buffer_size_bytes)
        if type(self.num_buffers) is not int or self.num_buffers < 1:
            raise ArgumentError(f"num_buffers must be an integer >= 1, got {self.num_buffers!r}")

    @classmethod
    def parse(cls, *infos: Mapping[str, Any]) -> StockWire:
        """Read it from an init info and an update info, whichever has it."""
        found = {key: info[key] for info in infos for key in _WIRE_KEYS if key in info}
        return cls(**{_WIRE_KEYS[key]: value for key, value in found.items()})

    def as_dict(self) -> dict[str, Any]:
        """Under vLLM's names."""
        return {key: getattr(self, name) for key, name in _WIRE_KEYS.items()}

    @property
    def cut(self) -> Cut:
        """The rule by which chunks are cut."""
        return chunk_rule("vllm", self.buffer_size_bytes) if self.packed else _one_by_one


_WIRE_KEYS = {
    "packed": "packed",
    "packed_buffer_size_bytes": "buffer_size_bytes",
    "packed_num_buffers": "num_buffers",
}


def _one_by_one(sizes: Iterable[int]) -> Iterator[Chunk]:
    """One broadcast per tensor, from memory to memory."""
    for index, size in enumerate(sizes):
        yield Chunk([index], [size], (), size, direct=True)
