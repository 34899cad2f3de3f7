"""Kills one of several receivers at a random moment of a sync, again and again."""

from __future__ import annotations

import ctypes
import gc
import os
import random
import statistics
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from typing import Any

from packedcomm import errors
from packedcomm.errors import PackedCommError
from packedcomm.planning.chunks import WireFormat
from tests.helpers.peers import (
    PATIENT,
    Outcome,
    Peer,
    Receiving,
    Tensors,
    Training,
    checksum,
    in_place,
    staged,
    training,
    weights,
)
from tests.soak.footprints import Footprints

__all__ = ["Kills", "left_behind", "soak_kills"]

RECEIVERS = 3

# 64 MiB in 32 tensors.
TENSORS = 32

# How the receivers of one half and of the other receive.
WAYS: tuple[tuple[Any, WireFormat], ...] = ((staged, "native"), (in_place, "vllm"))


# A thread that waits in Gloo for a peer that has gone is left behind, until Gloo's own deadline.
SETTINGS = replace(PATIENT, move_timeout_s=20.0)
LEFT_BEHIND_S = 40.0


def many() -> Tensors:
    return weights(0.0, TENSORS)


@dataclass
class Kills:
    """What was seen of all kills."""

    count: int = 0
    states: Counter[str] = field(default_factory=Counter)
    """Where the sender was at the moment of the kill."""
    failed_syncs: int = 0
    sender_s: list[float] = field(default_factory=list)
    """From the kill until `sync` raised."""
    survivors_s: list[float] = field(default_factory=list)
    """From the kill until a surviving receiver's call raised."""
    errors: Counter[str] = field(default_factory=Counter)
    """Classes, on all surviving ranks."""
    torn: int = 0
    wrong: list[str] = field(default_factory=list)
    """What must never be seen."""

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "kills": self.count,
            "receivers": RECEIVERS,
            "bytes": sum(tensor.nbytes for tensor in many().values()),
            "sender_was": dict(self.states),
            "failed_syncs": self.failed_syncs,
            "errors": dict(self.errors),
            "torn_survivors": self.torn,
            "seconds_to_error": {
                "sender": _spread(self.sender_s),
                "survivors": _spread(self.survivors_s),
            },
            "wrong": self.wrong,
        }

    def check(self, outcome: Outcome, sent: dict[int, int]) -> None:
        """Note what a surviving receiver reports that can't be right."""
        if outcome.shown is not None and outcome.checksum != sent.get(outcome.shown):
            self.wrong.append(f"version {outcome.shown} is shown and not held: {outcome}")
        if outcome.state == "torn":
            self.torn += 1
            if outcome.shown is not None:
                self.wrong.append(f"torn, and shows a version: {outcome}")
        if outcome.kind == "failed":
            self.errors[outcome.error] += 1
            if outcome.error not in errors.__all__:
                self.wrong.append(f"no typed error: {outcome}")
        if outcome.kind not in ("failed", "received"):
            self.wrong.append(f"not expected: {outcome}")


def _spread(seconds: list[float]) -> dict[str, float | int]:
    if not seconds:
        return {"count": 0}
    return {
        "count": len(seconds),
        "median": round(statistics.median(seconds), 3),
        "max": round(max(seconds), 3),
    }


def soak_kills(count: int, seed: int = 0) -> Kills:
    """Kill so many receivers, half of them staging, half of them receiving in place."""
    seen = Kills()
    chance = random.Random(seed)
    for index, (target, wire_format) in enumerate(WAYS):
        how = Receiving(target, make=many, settings=SETTINGS)
        with training(
            RECEIVERS,
            how,
            settings=SETTINGS,
            sent=weights(1.0, TENSORS),
            wire_format=wire_format,
        ) as group:
            rounds = _Rounds(group, how, chance, seen)
            for _ in range((count + index) // len(WAYS)):
                rounds.kill_one()
    return seen


def left_behind(before: Footprints) -> Footprints:
    """Footprints of this process once nothing is left behind by failed syncs, or a minute after.

    Args:
        before: has one sample of this process.
    """
    deadline = time.monotonic() + LEFT_BEHIND_S
    while True:
        now = Footprints({name: list(samples) for name, samples in before.samples.items()})
        gc.collect()
        # What the allocator keeps for later isn't what this process holds.
        ctypes.CDLL(None).malloc_trim(0)
        now.take({"sender": os.getpid()})
        if not now.grown() or time.monotonic() > deadline:
            return now
        time.sleep(1.0)


class _Rounds:
    def __init__(self, group: Training, how: Receiving, chance: random.Random, seen: Kills) -> None:
        self._group = group
        self._how = how
        self._chance = chance
        self._seen = seen
        self._version = 1  # `training` has sent version 0 and a value of 1
        self._sent = {0: checksum(group.sent)}
        self._usual_s = self._sync()

    def _sync(self, begun: threading.Event | None = None) -> float:
        """One sync under another version and with other weights; how long it took."""
        self._version += 1
        # Before the sync, not after: a receiver may have committed where the sender then failed.
        for index, tensor in enumerate(self._group.sent.values()):
            tensor.fill_(self._version + index / 100)
        self._sent[self._version] = checksum(self._group.sent)
        if begun is not None:
            begun.set()
        begin = time.monotonic()
        self._group.sender.sync(self._version)
        return time.monotonic() - begin

    def _settle(self, survivors: list[Peer], killed_at: float | None = None) -> None:
        """Sync until it works, and hear of all survivors that they hold it.

        Args:
            survivors: of whom to hear.
            killed_at: when another one was killed; what they report as failed is measured from
                there, and from the beginning of a sync that failed after that.
        """
        begun = [killed_at or time.monotonic()]
        while True:
            begun.append(time.monotonic())
            if len(begun) > 5:
                raise AssertionError("five syncs after a kill have failed")
            try:
                self._sync()
            except PackedCommError:
                continue
            break
        for peer in survivors:
            while True:
                outcome = peer.outcome()
                self._seen.check(outcome, self._sent)
                if outcome.kind == "failed" and killed_at is not None:
                    since = max(moment for moment in begun if moment <= outcome.at)
                    self._seen.survivors_s.append(outcome.at - since)
                if outcome.version == self._version:
                    break

    def kill_one(self) -> None:
        """Kill one in a sync, look at the others, sync with them, let another one join."""
        group, seen = self._group, self._seen
        self._settle(group.peers)
        victim = self._chance.choice(group.peers)
        survivors = [peer for peer in group.peers if peer is not victim]
        delay = self._chance.uniform(0.0, self._usual_s * 1.1)
        killed_at = 0.0
        begun = threading.Event()

        def kill() -> None:
            nonlocal killed_at
            begun.wait()
            time.sleep(delay)
            seen.states[str(group.session.state)] += 1
            killed_at = time.monotonic()
            victim.kill()

        killer = threading.Thread(target=kill)
        killer.start()
        seen.count += 1
        try:
            self._sync(begun)
        except PackedCommError as error:
            seen.failed_syncs += 1
            seen.errors[type(error).__name__] += 1
            seen.sender_s.append(time.monotonic() - killed_at)
        killer.join()
        self._settle(survivors, killed_at)
        group.remove(victim)
        group.add(self._how)
