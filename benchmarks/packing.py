"""The packing suite on one device: many tensors into one buffer and back, and their digests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch

from benchmarks.cases import Case
from benchmarks.content import Content
from benchmarks.measure import Transfer, measure, row
from benchmarks.memory_passes import digest_ways, plain_copies
from benchmarks.world import World
from packedcomm.copying import CopyPlan, pack

__all__ = ["packing_suite"]

_INTEGERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def packing_suite(
    world: World,
    cases: Sequence[Case],
    excluded: Mapping[str, frozenset[str]],
    repeats: int,
    threads: int,
    corrupt: str | None,
) -> None:
    """Measure packing, unpacking and digests; report `(case name, rows)` after every case.

    Args:
        excluded: by case, the ways that ended an earlier world.
        threads: of every way on a CPU, packedcomm's included.
    """
    torch.set_num_threads(threads)
    content = Content(world.device)
    for case in cases:
        tensors = [
            torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=world.device)
            for spec in case.manifest.specs
        ]
        content.write(tensors)
        packed = torch.empty(case.manifest.nbytes, dtype=torch.uint8, device=world.device)
        # A second buffer, since a plain copy needs a source as large as what is packed.
        flat = torch.empty_like(packed)
        rows = []
        for suite, make in (("pack", _pack_ways), ("apply", _apply_ways), ("digest", digest_ways)):
            prepared = make(tensors, packed, flat, threads, content)
            skipped = excluded.get(case.name, frozenset())
            transfers = {name: way for name, way in prepared.items() if name not in skipped}
            results = measure(
                world, transfers, content, repeats=repeats, corrupt=corrupt, on_device=True
            )
            rows += [
                row(suite, case.name, 1, len(tensors), case.manifest.nbytes, way, result)
                for way, result in results.items()
            ]
        world.result((case.name, rows))
        del tensors, packed, flat, prepared, transfers
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _slices(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The buffer cut into one uint8 piece per tensor."""
    return list(buffer.split([tensor.nbytes for tensor in tensors]))


def _integer_views(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Tensors as integers of their item size, in which torch keeps every bit (NaN payloads)."""
    return [tensor.view(_INTEGERS[tensor.itemsize]) for tensor in tensors]


def _typed_slices(buffer: torch.Tensor, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The buffer's pieces with the tensors' dtypes and shapes."""
    return [
        piece.view(tensor.dtype).view(tensor.shape)
        for piece, tensor in zip(_slices(buffer, tensors), tensors, strict=True)
    ]


def _pack_ways(
    tensors: list[torch.Tensor],
    packed: torch.Tensor,
    flat: torch.Tensor,
    threads: int,
    content: Content,
) -> dict[str, Transfer]:
    content.write(_slices(flat, tensors))
    pieces = _slices(packed, tensors)
    sources = _integer_views(tensors)
    destinations = _integer_views(_typed_slices(packed, tensors))
    plan = CopyPlan(
        list(zip(tensors, _typed_slices(packed, tensors), strict=True)), threads=threads
    )
    fresh: list[torch.Tensor] = []

    def cat_fresh() -> None:
        fresh.clear()
        # The views are made in the call, as vLLM makes them at every update.
        fresh.append(torch.cat([tensor.view(torch.uint8).view(-1) for tensor in tensors]))

    def cat_out() -> None:
        torch.cat([tensor.view(torch.uint8).view(-1) for tensor in tensors], out=packed)

    def into_packed(run: Callable[[], object], family: str) -> Transfer:
        return Transfer(run, lambda: pieces, family)

    return {
        "torch.cat": Transfer(
            cat_fresh, lambda: _slices(fresh[0], tensors) if fresh else [], "torch.cat"
        ),
        "torch.cat(out=)": into_packed(cat_out, "torch.cat(out=)"),
        "torch._foreach_copy_": into_packed(
            lambda: torch._foreach_copy_(destinations, sources), "foreach"
        ),
        "packedcomm pack": into_packed(lambda: pack(tensors, packed), "packedcomm pack"),
        "packedcomm CopyPlan": into_packed(plan.run, "packedcomm CopyPlan"),
        **plain_copies(flat, packed, pieces, threads),
    }


def _apply_ways(
    tensors: list[torch.Tensor],
    packed: torch.Tensor,
    flat: torch.Tensor,
    threads: int,
    content: Content,
) -> dict[str, Transfer]:
    content.write(_slices(packed, tensors))
    sources = _typed_slices(packed, tensors)
    integer_sources = _integer_views(sources)
    integer_destinations = _integer_views(tensors)
    plan = CopyPlan(list(zip(sources, tensors, strict=True)), threads=threads)

    def copy_each() -> None:
        # The views are made in the call, as vLLM makes them at every update.
        for tensor, piece in zip(tensors, _slices(packed, tensors), strict=True):
            tensor.copy_(piece.view(tensor.dtype).view(tensor.shape))

    def into_tensors(run: Callable[[], object], family: str) -> Transfer:
        return Transfer(run, lambda: tensors, family)

    return {
        "copy_ per tensor": into_tensors(copy_each, "copy_ per tensor"),
        "torch._foreach_copy_": into_tensors(
            lambda: torch._foreach_copy_(integer_destinations, integer_sources), "foreach"
        ),
        "packedcomm CopyPlan": into_tensors(plan.run, "packedcomm CopyPlan"),
        **plain_copies(packed, flat, _slices(flat, tensors), threads),
    }
