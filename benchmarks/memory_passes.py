"""Passes over memory on one device: casts into a buffer, digests, and the plain copies beside them.

Speeds count every byte that is read and every byte that is written, for all ways alike: a plain
copy here moves half as many bytes as it is counted with.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from benchmarks.cases import Case
from benchmarks.content import Content, as_bytes
from benchmarks.measure import Transfer, measure, row
from benchmarks.world import World
from packedcomm.copying import BufferPlan, CopyPlan, Part, pack
from packedcomm.digests import DigestPlan

__all__ = ["casting_suite", "digest_ways", "plain_copies", "reference_digest"]

_FROM, _TO = torch.float32, torch.bfloat16

# Of the digest, see `packedcomm.digests`.
_GAMMA = 0x9E3779B97F4A7C15
_MULTIPLIERS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))
_BLOCK_WORDS = 4 << 20


def casting_suite(
    world: World,
    cases: Sequence[Case],
    excluded: Mapping[str, frozenset[str]],
    repeats: int,
    threads: int,
    corrupt: str | None,
) -> None:
    """Measure float32 tensors of every case's shapes into one buffer of bfloat16.

    Arguments and reports are those of `packing_suite`.
    """
    torch.set_num_threads(threads)
    content = Content(world.device)
    for case in cases:
        shapes = [spec.shape for spec in case.manifest.specs if "float" in spec.dtype]
        generator = torch.Generator(world.device).manual_seed(1)
        tensors = [
            torch.empty(shape, dtype=_FROM, device=world.device).uniform_(
                -1.0, 1.0, generator=generator
            )
            for shape in shapes
        ]
        elements = sum(tensor.numel() for tensor in tensors)
        moved = elements * (_FROM.itemsize + _TO.itemsize)
        transfers = {
            name: way
            for name, way in _cast_ways(tensors, elements, moved, threads, content).items()
            if name not in excluded.get(case.name, frozenset())
        }
        results = measure(
            world, transfers, content, repeats=repeats, corrupt=corrupt, on_device=True
        )
        rows = [
            row("cast", case.name, 1, len(tensors), moved, way, result)
            for way, result in results.items()
        ]
        world.result((case.name, rows))
        del tensors, transfers
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _cast_ways(
    tensors: list[torch.Tensor], elements: int, moved: int, threads: int, content: Content
) -> dict[str, Transfer]:
    device = tensors[0].device
    # What torch makes of the same values is the reference, bit by bit.
    expected = torch.cat([tensor.to(_TO).view(-1) for tensor in tensors])
    packed = torch.empty(elements * _TO.itemsize, dtype=torch.uint8, device=device)
    pieces = [
        piece.view(tensor.shape)
        for piece, tensor in zip(
            packed.view(_TO).split([tensor.numel() for tensor in tensors]), tensors, strict=True
        )
    ]
    plan = CopyPlan(list(zip(tensors, pieces, strict=True)), cast=True, threads=threads)
    fused = BufferPlan(device, into_buffer=True, threads=threads)
    offset = 0
    for number, tensor in enumerate(tensors):
        fused.add_parts([Part(tensor)], _TO, tuple(tensor.shape), offset, f"#{number}")
        offset += tensor.numel() * _TO.itemsize

    def cast_then_pack() -> None:
        pack([tensor.to(_TO) for tensor in tensors], packed)

    def count_wrong() -> int:
        return int((packed != as_bytes(expected)).sum())

    def into_packed(run: Callable[[], object], family: str) -> Transfer:
        return Transfer(run, lambda: pieces, family, count_wrong=count_wrong)

    half = moved // 2
    source = torch.empty(half, dtype=torch.uint8, device=device)
    destination = torch.empty_like(source)
    content.write([source])
    return {
        "packedcomm BufferPlan": into_packed(lambda: fused.run(packed), "packedcomm BufferPlan"),
        "packedcomm CopyPlan": into_packed(plan.run, "packedcomm CopyPlan"),
        "to(bfloat16), then pack": into_packed(cast_then_pack, "to, then pack"),
        "torch._foreach_copy_": into_packed(
            lambda: torch._foreach_copy_(pieces, tensors), "foreach"
        ),
        **plain_copies(source, destination, [destination], threads),
    }


def digest_ways(
    tensors: list[torch.Tensor],
    packed: torch.Tensor,
    flat: torch.Tensor,
    threads: int,
    content: Content,
) -> dict[str, Transfer]:
    """Digests of the tensors, and copies between halves of two buffers of their size."""
    plan = DigestPlan(tensors, threads=threads)
    expected = torch.cat([reference_digest(tensor).view(1) for tensor in tensors])
    found = torch.empty_like(expected)

    def run() -> None:
        found.copy_(plan.run())

    def count_wrong() -> int:
        return int((as_bytes(found) != as_bytes(expected)).sum())

    source, destination = (buffer[: plan.nbytes // 2] for buffer in (packed, flat))
    content.write([source])
    return {
        "packedcomm DigestPlan": Transfer(
            run, lambda: [found], "packedcomm DigestPlan", count_wrong=count_wrong
        ),
        **plain_copies(source, destination, [destination], threads),
    }


def reference_digest(tensor: torch.Tensor) -> torch.Tensor:
    """The digest that `packedcomm.digests` defines, by torch's integers, which wrap as it does.

    Args:
        tensor: contiguous.
    """
    data = as_bytes(tensor)
    nbytes = data.numel()
    total = _finalised(torch.tensor(_signed(nbytes + _GAMMA), device=data.device))
    for words, first in _words(data):
        positions = torch.arange(
            first + 1, first + 1 + len(words), dtype=torch.int64, device=data.device
        )
        total = total + _finalised(words ^ (positions * _signed(_GAMMA))).sum()
    return total


def _words(data: torch.Tensor) -> Iterator[tuple[torch.Tensor, int]]:
    """Aligned 64-bit words, a block at a time, with the number of the first one."""
    for begin in range(0, data.numel(), 8 * _BLOCK_WORDS):
        block = data[begin : begin + 8 * _BLOCK_WORDS]
        padded = torch.zeros(-(-block.numel() // 8) * 8, dtype=torch.uint8, device=data.device)
        padded[: block.numel()] = block
        yield padded.view(torch.int64), begin // 8


def _finalised(values: torch.Tensor) -> torch.Tensor:
    for shift, multiplier in _MULTIPLIERS:
        values = (values ^ _shifted(values, shift)) * _signed(multiplier)
    return values ^ _shifted(values, 31)


def _shifted(values: torch.Tensor, bits: int) -> torch.Tensor:
    """To the right, filled with zeros."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    value &= (1 << 64) - 1
    return value - (1 << 64) if value >> 63 else value


def plain_copies(
    source: torch.Tensor,
    destination: torch.Tensor,
    delivered: Sequence[torch.Tensor],
    threads: int,
) -> dict[str, Transfer]:
    """One copy of the same bytes: torch's, and on a CPU also C's memmove, a slice per thread.

    Args:
        source, destination: contiguous uint8 tensors of one size.
        delivered: the destination in pieces, which hold content 0, 1, 2, ... afterwards.
    """

    def plain(run: Callable[[], object]) -> Transfer:
        return Transfer(run, lambda: delivered, "memcpy")

    ways = {"memcpy (copy_)": plain(lambda: destination.copy_(source))}
    if source.device.type == "cpu":
        pool = ThreadPoolExecutor(threads)
        step = -(-source.nbytes // threads)

        def move(start: int) -> None:
            # ctypes gives the GIL back while the foreign function runs.
            ctypes.memmove(
                destination.data_ptr() + start,
                source.data_ptr() + start,
                min(step, source.nbytes - start),
            )

        starts = range(0, source.nbytes, step)
        ways["memcpy (threads)"] = plain(lambda: list(pool.map(move, starts)))
    return ways
