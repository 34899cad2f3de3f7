"""Syncs that fail: what each rank must see, and what must still work afterwards."""

from __future__ import annotations

import os
import time
from typing import Any

import pytest
import torch

from packedcomm import FullWeightSender, ModuleSource, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.errors import (
    ArgumentError,
    IntegrityError,
    ManifestError,
    PackedCommError,
    PeerLost,
    RemoteError,
    SessionStateError,
)
from tests.helpers.corruption import flipped_on_arrival
from tests.helpers.scenarios import device_of
from tests.helpers.syncs import Meeting

__all__ = [
    "REFUSALS",
    "corrupted_destination",
    "dying_receiver",
    "raising_callback",
    "raising_on_update",
    "raising_source",
    "refusal",
]

REFUSALS = ("unknown", "missing", "shape", "dtype", "statistics without staging")


def _odd_receiver_has(case: str, tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Destinations of the receiver that can't take what is offered."""
    if case == "unknown":
        del tensors["b"]
    elif case == "missing":
        tensors["c"] = torch.zeros_like(tensors["a"])
    elif case == "shape":
        tensors["a"] = torch.zeros(7, device=tensors["a"].device)
    elif case == "dtype":
        tensors["a"] = tensors["a"].to(torch.float16)
    return tensors


def refusal(rank: int, world_size: int, backend: str, meeting: Meeting, case: str) -> None:
    """The last receiver can't take the first offer, all can take the second one."""
    device = device_of(backend, rank)
    good = {name: torch.full((5,), float(rank == 0), device=device) for name in "ab"}
    statistics = case == "statistics without staging"
    kind, text = {
        "unknown": (ManifestError, "no destination for tensor 'b'"),
        "missing": (ManifestError, "'c' is not sent"),
        "shape": (ManifestError, r"received as float32 \(5,\), its destination is float32 \(7,\)"),
        "dtype": (ManifestError, "its destination is float16"),
        "statistics without staging": (ArgumentError, "StagedTarget"),
    }[case]
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(good, session, statistics=statistics)
            with pytest.raises(kind, match=f"rank [12]: .*{text}") as caught:
                sender.sync()
            assert isinstance(caught.value.__cause__, RemoteError)
            assert "Traceback" in str(caught.value.__cause__)
            assert sender.version is None
            assert FullWeightSender(good, session).sync(3).version == 3
            return
        bad = _odd_receiver_has(case, dict(good)) if rank == world_size - 1 else good
        staged = StagedTarget(TensorTarget(bad))
        target: Any = staged if rank == 1 or not statistics else TensorTarget(bad)
        receiver = WeightReceiver(target, session)
        with pytest.raises(kind, match=text):
            receiver.receive()
        receiver._following._target = TensorTarget(good)
        result = receiver.receive()
        assert result is not None
        assert result.version == 3
        assert good["a"].tolist() == [1.0] * 5


def raising_callback(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """Receiver 2's callback raises in the middle."""
    device = device_of(backend, rank)
    tensors = {f"t{i}": torch.zeros(1 << 19, device=device) for i in range(80)}

    def on_weights(version: int, items: list[Any]) -> None:
        if rank == world_size - 1:
            raise ZeroDivisionError("of the callback")

    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(tensors, session)
            with pytest.raises(
                RemoteError, match="rank [12]: ZeroDivisionError: of the callback"
            ) as e:
                sender.sync()
            assert "on_weights" in str(e.value.__cause__)
            assert sender.version is None
            return
        receiver = WeightReceiver(on_weights, session)
        expected = ZeroDivisionError if rank == world_size - 1 else (RemoteError, PeerLost)
        with pytest.raises(expected, match="of the callback"):
            receiver.receive()
        assert receiver.status().version is None


class HalfWay(ModuleSource):
    """Gathers anew, and fails at the third tensor."""

    def snapshot(self) -> Any:
        whole = super().snapshot()
        self._parts = whole.parts
        return type(whole)(whole.manifest, None, ())

    def gather(self, snapshot: Any) -> Any:
        for number, parts in enumerate(self._parts or ()):
            if number == 2:
                raise ZeroDivisionError("of the source")
            yield parts


def raising_source(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """The sender's source fails half-way."""
    device = device_of(backend, rank)
    tensors = {f"t{i}": torch.zeros(1 << 20, device=device) for i in range(4)}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            with pytest.raises(ZeroDivisionError):
                FullWeightSender(HalfWay(tensors), session).sync()
            return
        live = {name: torch.ones_like(t) for name, t in tensors.items()}
        receiver = WeightReceiver(StagedTarget(TensorTarget(live)), session)
        with pytest.raises(RemoteError, match="ZeroDivisionError: of the source"):
            receiver.receive()
        status = receiver.status()
        # By now the sender may have left.
        assert status.state in ("idle", "failed")
        assert status.version is None
        assert all(bool((t == 1).all()) for t in live.values())


def raising_on_update(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """The hook of a background receiver raises after the second sync."""
    device = device_of(backend, rank)
    tensors = {"w": torch.zeros(4, device=device)}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(tensors, session)
            sender.sync()
            sender.sync()
            deadline = time.monotonic() + 20
            while session.failure() is None and time.monotonic() < deadline:
                time.sleep(0.01)
            with pytest.raises(RemoteError, match="ZeroDivisionError: in the hook"):
                sender.sync()
            return
        receiver = WeightReceiver(TensorTarget(tensors), session)

        def on_update(version: int) -> None:
            if version == 1:
                raise ZeroDivisionError("in the hook")

        receiver.start(on_update)
        deadline = time.monotonic() + 20
        while receiver.status().state != "failed" and time.monotonic() < deadline:
            time.sleep(0.01)
        status = receiver.status()
        assert isinstance(status.error, ZeroDivisionError)
        assert status.version == 1
        with pytest.raises(SessionStateError):
            receiver.start()
        # Until the sender has seen it.
        time.sleep(1.0)


def corrupted_destination(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """A byte is flipped on its way into staging memory."""
    device = device_of(backend, rank)
    tensors = {name: torch.ones(1000, device=device) for name in "abc"}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(tensors, session, verify=True)
            with pytest.raises(IntegrityError, match="rank 1: .*'b'"):
                sender.sync()
            assert sender.version is None
            assert sender.sync(4).verified
            return
        live = {name: torch.zeros(1000, device=device) for name in "abc"}
        receiver = WeightReceiver(StagedTarget(TensorTarget(live)), session)
        # All three are packed into one buffer.
        flipped = flipped_on_arrival(backend, 0, 4077)
        with flipped, pytest.raises(IntegrityError, match="'b'"):
            receiver.receive()
        assert all(bool((t == 0).all()) for t in live.values())
        result = receiver.receive()
        assert result is not None
        assert result.version == 4
        assert all(bool((t == 1).all()) for t in live.values())


def dying_receiver(rank: int, world_size: int, backend: str, meeting: Meeting) -> float:
    """The last receiver's process ends in the middle of the second sync; returns after how many
    seconds the others knew."""
    device = device_of(backend, rank)
    elements = 1 << (22 if backend == "nccl" else 18)
    tensors = {f"t{i}": torch.zeros(elements, device=device) for i in range(100)}

    def on_weights(version: int, items: list[Any]) -> None:
        if version == 1 and rank == world_size - 1:
            os._exit(1)

    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(tensors, session)
            sender.sync()
            begin = time.monotonic()
            with pytest.raises(PeerLost):
                sender.sync()
            assert sender.version == 0
        else:
            receiver = WeightReceiver(on_weights, session)
            assert receiver.receive() is not None
            begin = time.monotonic()
            with pytest.raises(PackedCommError):
                receiver.receive()
            # The callback has been shown some of the next version.
            assert (receiver.status().state, receiver.status().version) == ("torn", None)
        return time.monotonic() - begin
