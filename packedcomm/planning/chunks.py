"""Cutting a stream of tensors into chunks: vLLM's rule and the native rule of `docs/wire.md`.

Both rules are lazy: they read sizes one by one and yield a chunk as soon as it is complete, so a
producer holds no more tensors than one chunk needs. Equal sizes and parameters give equal chunks on
every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal

from packedcomm.errors import ArgumentError

__all__ = [
    "NATIVE_ALIGNMENT",
    "NATIVE_DIRECT_BYTES",
    "NATIVE_GROUP_BYTES",
    "NATIVE_GROUP_TENSORS",
    "Chunk",
    "Cut",
    "WireFormat",
    "aligned",
    "chunk_rule",
    "little_follows",
    "native_chunks",
    "slot_bytes",
    "vllm_chunks",
]

# The parameters of version 1 of the native format: part of the wire, so not settings.
NATIVE_ALIGNMENT = 16
"""Bytes. Every tensor of a packed chunk starts at a multiple of it."""

NATIVE_DIRECT_BYTES = 1 << 20
"""A tensor of at least this size travels from memory to memory, unpacked."""

NATIVE_GROUP_BYTES = 512 << 20
"""A direct chunk is complete at this many bytes..."""

NATIVE_GROUP_TENSORS = 64
"""...or this many tensors."""

WireFormat = Literal["vllm", "native"]


def aligned(offset: int) -> int:
    """The next place in a packed chunk at which a tensor may start, in bytes."""
    return -(-offset // NATIVE_ALIGNMENT) * NATIVE_ALIGNMENT


@dataclass(frozen=True, slots=True)
class Chunk:
    """One unit of movement.

    A packed chunk is one broadcast of `nbytes` bytes that holds every tensor at its offset. A
    direct chunk is one broadcast per tensor, issued as one group where the communicator has groups.
    """

    indices: Sequence[int]
    """Positions of the tensors in the stream."""

    sizes: Sequence[int]
    """Bytes of each tensor."""

    offsets: Sequence[int]
    """Where each tensor starts in a packed chunk, in bytes; empty for a direct chunk."""

    nbytes: int
    """Bytes on the wire."""

    direct: bool = False


Cut = Callable[[Iterable[int]], Iterator[Chunk]]
"""A rule with its parameters bound: sizes in, chunks out."""


def vllm_chunks(sizes: Iterable[int], buffer_size_bytes: int) -> Iterator[Chunk]:
    """vLLM's rule: append the tensor, add its size, cut when the total exceeds the buffer size.

    A chunk of exactly `buffer_size_bytes` goes on growing, a tensor is never split, there is no
    padding, and what is left at the end is a last chunk.
    """
    first = 0
    total = 0
    chunk_sizes: list[int] = []
    offsets: list[int] = []
    for size in sizes:
        chunk_sizes.append(size)
        offsets.append(total)
        total += size
        if total > buffer_size_bytes:
            end = first + len(chunk_sizes)
            yield Chunk(range(first, end), chunk_sizes, offsets, total)
            first, total, chunk_sizes, offsets = end, 0, [], []
    if chunk_sizes:
        yield Chunk(range(first, first + len(chunk_sizes)), chunk_sizes, offsets, total)


def native_chunks(
    sizes: Iterable[int],
    buffer_size_bytes: int,
    direct_bytes: int = NATIVE_DIRECT_BYTES,
    group_bytes: int = NATIVE_GROUP_BYTES,
    group_tensors: int = NATIVE_GROUP_TENSORS,
) -> Iterator[Chunk]:
    """The native rule: large tensors travel unpacked in groups, small ones packed and aligned.

    A tensor of at least `direct_bytes`, or larger than the buffer, joins the open direct chunk,
    which is complete at `group_tensors` tensors or `group_bytes` bytes. Any other tensor joins the
    open packed chunk at the next multiple of 16 bytes; the packed chunk is complete before it would
    exceed `buffer_size_bytes`. At the end the open direct chunk comes before the open packed one.
    """
    direct_bytes = min(direct_bytes, buffer_size_bytes + 1)
    direct: list[int] = []
    direct_sizes: list[int] = []
    direct_total = 0
    packed: list[int] = []
    packed_sizes: list[int] = []
    offsets: list[int] = []
    end = 0
    for index, size in enumerate(sizes):
        if size >= direct_bytes:
            direct.append(index)
            direct_sizes.append(size)
            direct_total += size
            if len(direct) >= group_tensors or direct_total >= group_bytes:
                yield Chunk(direct, direct_sizes, (), direct_total, direct=True)
                direct, direct_sizes, direct_total = [], [], 0
            continue
        offset = aligned(end)
        if packed and offset + size > buffer_size_bytes:
            yield Chunk(packed, packed_sizes, offsets, end)
            packed, packed_sizes, offsets, offset = [], [], [], 0
        packed.append(index)
        packed_sizes.append(size)
        offsets.append(offset)
        end = offset + size
    if direct:
        yield Chunk(direct, direct_sizes, (), direct_total, direct=True)
    if packed:
        yield Chunk(packed, packed_sizes, offsets, end)


def chunk_rule(wire_format: WireFormat, buffer_size_bytes: int) -> Cut:
    """The rule of a wire format with its buffer size bound; equal arguments give one object.

    Raises:
        ArgumentError: the format is unknown or the buffer size isn't an integer > 0.
    """
    if type(buffer_size_bytes) is not int or buffer_size_bytes <= 0:
        raise ArgumentError(
            f"buffer_size_bytes must be an integer > 0 bytes, got {buffer_size_bytes!r}"
        )
    if wire_format not in ("vllm", "native"):
        raise ArgumentError(f"wire_format must be 'vllm' or 'native', got {wire_format!r}")
    return _bound_rule(wire_format, buffer_size_bytes)


@lru_cache(maxsize=256)
def _bound_rule(wire_format: WireFormat, buffer_size_bytes: int) -> Cut:
    rule = vllm_chunks if wire_format == "vllm" else native_chunks
    return partial(rule, buffer_size_bytes=buffer_size_bytes)


def slot_bytes(chunks: Iterable[Chunk], num_buffers: int) -> list[int]:
    """Bytes of each slot after these chunks: packed chunks rotate through the slots in order, and a
    slot grows to the largest chunk that it held."""
    slots = [0] * num_buffers
    packed = (chunk for chunk in chunks if not chunk.direct)
    for number, chunk in enumerate(packed):
        slots[number % num_buffers] = max(slots[number % num_buffers], chunk.nbytes)
    return slots


def little_follows(chunks: Sequence[Chunk]) -> list[bool]:
    """Of each chunk whether at most a hundredth of its bytes travels after it. What is left to be
    done with such a chunk may take all of a GPU: the broadcasts that follow are shorter than it."""
    follows = 0
    flags: list[bool] = []
    for chunk in reversed(chunks):
        flags.append(follows * 100 <= chunk.nbytes)
        follows += chunk.nbytes
    return flags[::-1]
