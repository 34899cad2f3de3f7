"""The sync suite, run by every rank: whole syncs of a session beside the bare broadcast in them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

import packedcomm
from benchmarks.cases import Case
from benchmarks.content import Content
from benchmarks.groups import connect_session
from benchmarks.measure import Row, Transfer, measure, row
from benchmarks.world import World
from packedcomm import (
    FullWeightSender,
    LoraSender,
    ModuleSource,
    StagedTarget,
    SyncResult,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.session import ReceiverSession, SenderSession
from packedcomm.transports.slots import release_buffers

__all__ = ["BARE", "SYNC_CASES", "sync_suite"]

SYNC_CASES = ("llama-3-8b-lora-r16", "minilm", "llama-3-8b")
BARE = "bare broadcast"

# Name to (everything packed, staged, verified). Where not everything is packed, large tensors are
# sent from where they are.
_SYNCS = {
    "sync in place": (False, False, False),
    "sync in place, verified": (False, False, True),
    "sync staged": (False, True, False),
    "sync staged, verified": (False, True, True),
    "sync packed": (True, False, False),
    "sync packed, verified": (True, False, True),
}
_SRC = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a rank has for one case."""

    session: SenderSession | ReceiverSession
    packing: SenderSession | ReceiverSession
    """Another session of the same ranks, whose wire format packs everything."""
    case: Case
    parameters: dict[str, torch.Tensor]
    """Source of rank 0, destination of the others."""
    staged: StagedTarget

    def transfer(self, family: str, run: Callable[[], Any], **options: Any) -> Transfer:
        """A way that ends in the parameters."""
        tensors = list(self.parameters.values())
        receives = isinstance(self.session, ReceiverSession)
        return Transfer(run, lambda: tensors, family, receives=receives, **options)

    def bare(self) -> Transfer:
        """The two functions that know nothing of sessions, over the session's communicator."""
        session, manifest = self.session, self.case.manifest
        wire_format, size = session.wire_format, session.buffer_size_bytes
        if isinstance(session, SenderSession):
            return self.transfer(
                BARE,
                lambda: packedcomm.broadcast_producer(
                    self.parameters.items(),
                    session.communicator,
                    _SRC,
                    buffer_size_bytes=size,
                    wire_format=wire_format,
                ),
            )
        target = TensorTarget(self.parameters)
        return self.transfer(
            BARE,
            lambda: packedcomm.broadcast_consumer(
                manifest,
                session.communicator,
                _SRC,
                target,
                size,
                device=session.device,
                wire_format=wire_format,
            ),
        )

    def sync(self, family: str, packed: bool, staged: bool, verify: bool) -> Transfer:
        """A sender and its receivers, which remember what they have agreed on."""
        session = self.packing if packed else self.session
        if isinstance(session, ReceiverSession):
            target = self.staged if staged else TensorTarget(self.parameters)
            return self.transfer(family, WeightReceiver(target, session).receive)
        kind = LoraSender if "lora" in self.case.name else FullWeightSender
        sender = kind(ModuleSource(self.parameters), session, verify=verify)
        last: list[SyncResult] = []

        def run() -> None:
            last[:] = [sender.sync()]

        return self.transfer(family, run, stages=lambda: last[0].seconds)


def sync_suite(
    world: World,
    cases: Sequence[Case],
    excluded: Mapping[str, frozenset[str]],
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
    # Here every sync sends the same bytes.
    warnings.simplefilter("ignore", packedcomm.UnchangedWeightsWarning)
    content = Content(world.device)
    session, packing = connect_session(world), connect_session(world, "vllm")
    for case in cases:
        parameters = {
            spec.name: torch.empty(
                spec.shape, dtype=getattr(torch, spec.dtype), device=world.device
            )
            for spec in case.manifest.specs
        }
        if world.rank == _SRC:
            content.write(list(parameters.values()))
        staged = StagedTarget(TensorTarget(parameters))
        endpoint = Endpoint(session, packing, case, parameters, staged)
        makers = {BARE: endpoint.bare} | {
            name: partial(endpoint.sync, name, *options) for name, options in _SYNCS.items()
        }
        skipped = excluded.get(case.name, frozenset())
        transfers = {name: make() for name, make in makers.items() if name not in skipped}
        staging = _staging_bytes(world, endpoint, transfers)
        results = measure(world, transfers, content, repeats=repeats, corrupt=corrupt)
        rows = [
            row(
                "sync",
                case.name,
                world.size,
                len(case.manifest),
                case.manifest.nbytes,
                way,
                result,
                **(staging if "staged" in way else {}),
            )
            for way, result in results.items()
        ]
        _fill_overheads(rows)
        _fill_digest_costs(rows)
        world.result((case.name, rows))
        del parameters, staged, endpoint, makers, transfers
        release_buffers(session.communicator)
        release_buffers(packing.communicator)
        if world.device.type == "cuda":
            torch.cuda.empty_cache()
    world.barrier()
    session.close()
    packing.close()


def _staging_bytes(
    world: World, endpoint: Endpoint, transfers: Mapping[str, Transfer]
) -> dict[str, int]:
    """What staging takes on the first receiver, and what `StagedTarget` says that it takes.

    On a GPU the difference of two peaks: of a staged sync and of one in place, after a first one in
    place has made what both need.
    """
    ways = ("sync in place", "sync in place", "sync staged")
    if not all(way in transfers for way in ways):
        return {}
    peaks = []
    for way in ways:
        world.progress(way)
        world.barrier()
        if world.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        transfers[way].run()
        world.synchronize()
        if world.device.type == "cuda":
            peaks.append(torch.cuda.max_memory_allocated())
    world.progress(None)
    taken = peaks[2] - peaks[1] if peaks else endpoint.staged.nbytes
    return {
        "staging_bytes": world.total(taken if world.rank == 1 else 0),
        "staging_formula_bytes": sum(-(-s.nbytes // 16) * 16 for s in endpoint.case.manifest.specs),
    }


def _fill_overheads(rows: Sequence[Row]) -> None:
    """What a session adds to the bare broadcast of the same tensors in the same run."""
    bare = next((row for row in rows if row["way"] == BARE), None)
    for each in rows:
        if bare is not None and each is not bare:
            overhead = each["median_us"] - bare["median_us"]
            each["details"]["overhead_us"] = round(overhead, 2)


def _fill_digest_costs(rows: Sequence[Row]) -> None:
    """How much longer a sync takes when it is verified, as a fraction, measured in the same run."""
    by_way = {row["way"]: row for row in rows}
    for way, each in by_way.items():
        plain = by_way.get(way.removesuffix(", verified"))
        if plain is not None and plain is not each:
            cost = each["median_us"] / plain["median_us"] - 1
            each["details"]["digest_cost"] = round(cost, 4)
