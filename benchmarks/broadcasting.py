"""The broadcast suite, run by every rank: parameters of rank 0 into those of the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

import packedcomm
from benchmarks.cases import Case
from benchmarks.content import Content
from benchmarks.groups import connect_packedcomm, connect_peers
from benchmarks.measure import measure, row
from benchmarks.peers import Endpoint, broadcast_transfers, load_vllm_packed
from benchmarks.world import World

__all__ = ["broadcast_suite"]


def broadcast_suite(
    world: World,
    cases: Sequence[Case],
    excluded: Mapping[str, frozenset[str]],
    buffer_sizes: Sequence[int],
    repeats: int,
    threads: int,
    corrupt: str | None,
) -> None:
    """Measure every case and report `(case name, rows)` after each.

    Args:
        excluded: by case, the ways that ended an earlier world.
        threads: torch's threads in each rank, on a CPU.
    """
    torch.set_num_threads(threads)
    content = Content(world.device)
    ours = connect_packedcomm(world)
    peer = connect_peers(world)
    vllm = load_vllm_packed(world.device.type)
    for case in cases:
        parameters = {
            spec.name: torch.empty(
                spec.shape, dtype=getattr(torch, spec.dtype), device=world.device
            )
            for spec in case.manifest.specs
        }
        if world.rank == 0:
            content.write(list(parameters.values()))
        endpoint = Endpoint(
            world.rank, world.device, case.manifest, parameters, ours, peer, vllm, content
        )
        transfers = broadcast_transfers(
            endpoint, buffer_sizes, excluded.get(case.name, frozenset())
        )
        results = measure(world, transfers, content, repeats=repeats, corrupt=corrupt)
        rows = [
            row(
                "broadcast",
                case.name,
                world.size,
                len(case.manifest),
                case.manifest.nbytes,
                way,
                result,
            )
            for way, result in results.items()
        ]
        world.result((case.name, rows))
        # Before the next case's tensors are made: two cases together needn't fit.
        del parameters, endpoint, transfers
        packedcomm.release_buffers(ours)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.barrier()
    peer.close()
    ours.close()
