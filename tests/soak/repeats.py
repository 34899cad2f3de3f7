"""Many syncs over one session, and many sessions one after the other: nothing may grow."""

from __future__ import annotations

import os
import time
from functools import partial
from typing import Any

import torch

from benchmarks.cases import load_case
from packedcomm import FullWeightSender, Session
from tests.helpers.peers import (
    PATIENT,
    SECRET,
    Peer,
    Receiving,
    Tensors,
    checksum,
    receive_on,
    training,
)
from tests.soak.footprints import Footprints

__all__ = ["PART", "soak_connections", "soak_syncs"]

RECEIVERS = 2
CASE = "llama-3-8b-lora-r16"
# The part of the adapter that each session brings, or each of a few syncs: some of its layers.
PART = 0.1

# Before the first sample, and samples after it.
WARM = 0.2
SAMPLES = 5


def adapter(scale: float = 1.0) -> Tensors:
    """A LoRA adapter of Llama-3-8B, or as many of its layers as have this part of its bytes."""
    specs = load_case(CASE, scale=scale).manifest.specs
    return {spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs}


def _changed(tensors: Tensors, step: int) -> None:
    for tensor in tensors.values():
        tensor.view(-1).view(torch.uint8)[step % tensor.nbytes] ^= 1 + step % 255


def _moments(count: int) -> set[int]:
    """After which of so many repetitions a sample is taken."""
    first = int(count * WARM)
    return {first + (count - 1 - first) * i // (SAMPLES - 1) for i in range(SAMPLES)}


def soak_syncs(count: int, scale: float = 1.0) -> dict[str, Any]:
    """So many verified syncs of an adapter to two receivers.

    Args:
        count: how many.
        scale: as for `adapter`.
    """
    sent = adapter(scale)
    how = Receiving(make=partial(adapter, scale))
    seen = Footprints()
    moments = _moments(count)
    wrong = 0
    begin = time.monotonic()
    with training(RECEIVERS, how, sent=sent, wire_format="native", verify=True) as group:
        pids = {f"rank {peer.rank}": peer.pid for peer in group.peers}
        pids["rank 0"] = os.getpid()
        for step in range(count):
            _changed(sent, step)
            assert group.sender.sync().verified
            new = checksum(sent)
            wrong += sum(peer.outcome().checksum != new for peer in group.peers)
            if step in moments:
                seen.take(pids)
    return {
        "syncs": count,
        "receivers": RECEIVERS,
        "case": CASE if scale == 1.0 else f"{CASE}, at most {scale:.0%} of its bytes",
        "tensors": len(sent),
        "bytes": sum(tensor.nbytes for tensor in sent.values()),
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": wrong,
        **seen.as_dict(),
    }


def soak_connections(count: int) -> dict[str, Any]:
    """So many sessions between the same processes, with a sync of some layers in each."""
    sent = adapter(PART)
    seen = Footprints()
    moments = _moments(count)
    wrong = 0
    begin = time.monotonic()
    peers: list[Peer] = []
    try:
        for cycle in range(count):
            _changed(sent, cycle)
            with Session.listen(
                "127.0.0.1:0", receivers=RECEIVERS, secret=SECRET, settings=PATIENT, device="cpu"
            ) as session:
                if not peers:
                    how = Receiving(make=partial(adapter, PART))
                    peers = [Peer(receive_on, session.address, how) for _ in range(RECEIVERS)]
                else:
                    for peer in peers:
                        peer.tell("reconnect", session.address)
                for peer in peers:
                    assert peer.outcome().kind in ("joined", "reconnected")
                FullWeightSender(sent, session).sync(cycle)
                new = checksum(sent)
                wrong += sum(peer.outcome().checksum != new for peer in peers)
            assert [peer.outcome().kind for peer in peers] == ["closed"] * RECEIVERS
            if cycle in moments:
                pids = {f"receiver {i}": peer.pid for i, peer in enumerate(peers, 1)}
                seen.take({**pids, "sender": os.getpid()})
    finally:
        for peer in peers:
            peer.end()
    return {
        "cycles": count,
        "receivers": RECEIVERS,
        "case": f"{CASE}, at most {PART:.0%} of its bytes",
        "tensors": len(sent),
        "seconds": round(time.monotonic() - begin, 1),
        "wrong": wrong,
        **seen.as_dict(),
    }
