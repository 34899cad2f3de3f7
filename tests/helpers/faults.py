"""Faults in the middle of syncs, the same over Gloo and over NCCL.

Rank 0 sends. Rank 1 receives until its fault; rank 2 comes afterwards, on rank 1's device, as a
restarted receiver would. So two GPUs are enough.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import psutil
import pytest
import torch

from packedcomm import (
    FullWeightSender,
    ModuleSource,
    Session,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.errors import (
    CapacityError,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    RemoteError,
)
from tests.helpers.ranks import pipes
from tests.helpers.scenarios import device_of
from tests.helpers.syncs import SECRET, SETTINGS

__all__ = [
    "Addresses",
    "fault_of_a_receiver",
    "lost_sender",
    "many_failures",
    "no_memory_for_buffers",
]

TENSORS = 60

# A deadline of less than four seconds for the data of a sync here.
QUICK_TO_GIVE_UP: dict[str, Any] = {"move_timeout_s": 3.0, "least_bytes_per_second": 2 * 10**9}


class Addresses:
    """Hands the sender's address to one receiver at a time."""

    def __init__(self) -> None:
        self._pipes: list[tuple[Connection, Connection]] = pipes(3)

    def give(self, rank: int, address: str) -> None:
        self._pipes[rank][1].send(address)

    def take(self, rank: int) -> str:
        reader = self._pipes[rank][0]
        assert reader.poll(90.0), "the sender has published no address"
        address: str = reader.recv()
        return address


def _tensors(backend: str, device: torch.device, value: float) -> dict[str, torch.Tensor]:
    elements = 1 << (22 if backend == "nccl" else 18)
    return {f"t{i}": torch.full((elements,), value, device=device) for i in range(TENSORS)}


def _place(backend: str, rank: int) -> torch.device:
    return device_of(backend, min(rank, 1))


def _listen(backend: str, **changes: Any) -> Any:
    # Small buffers: a fault is in the middle of many chunks.
    settings = replace(SETTINGS, buffer_size_bytes=8 << 20, **changes)
    return Session.listen(
        "127.0.0.1:0",
        receivers=1,
        secret=SECRET,
        device=_place(backend, 0),
        settings=settings,
        wire_format="vllm",
    )


def _connect(backend: str, rank: int, addresses: Addresses) -> Any:
    address = addresses.take(rank)
    device = _place(backend, rank)
    return Session.connect(address, secret=SECRET, device=device, settings=SETTINGS)


def _set(tensors: dict[str, torch.Tensor], value: float) -> None:
    for tensor in tensors.values():
        tensor.fill_(value)


def _all_are(tensors: dict[str, torch.Tensor], value: float) -> bool:
    return all(bool((tensor == value).all()) for tensor in tensors.values())


def fault_of_a_receiver(
    rank: int, world_size: int, backend: str, addresses: Addresses, how: str
) -> Any:
    """Rank 1 is killed or stopped in the middle of its second sync; rank 2 takes its place.

    Returns:
        On the sender the class and text of the error, and after how many seconds it came.
    """
    if rank == 1:
        _receive_until_the_fault(backend, addresses, how)
    if rank == 2:
        live = _tensors(backend, _place(backend, rank), 0.0)
        with _connect(backend, rank, addresses) as session:
            receiver = WeightReceiver(TensorTarget(live), session)
            assert not receiver.status().ready
            result = receiver.receive()
            assert result is not None
            assert (result.version, result.verified) == (2, True)
            assert _all_are(live, 3.0)
            assert receiver.status().ready
        return None
    source = _tensors(backend, _place(backend, rank), 1.0)
    with _listen(backend, **(QUICK_TO_GIVE_UP if how == "stopped" else {})) as session:
        addresses.give(1, session.address)
        sender = FullWeightSender(source, session, verify=True)
        sender.sync()
        _set(source, 2.0)
        begin = time.monotonic()
        with pytest.raises((PeerLost, DeadlineExceeded)) as caught:
            sender.sync()
        seconds = time.monotonic() - begin
        assert sender.version == 0
        addresses.give(2, session.address)
        while not session.members.present:
            time.sleep(0.02)
        _set(source, 3.0)
        assert sender.sync(2).receivers == 1
        assert session.generation == 2
    return type(caught.value), str(caught.value), seconds


def _receive_until_the_fault(backend: str, addresses: Addresses, how: str) -> None:
    number = {"killed": signal.SIGKILL, "stopped": signal.SIGSTOP}[how]

    def on_weights(version: int, items: list[Any]) -> None:
        if version == 1 and "t20" in dict(items):
            os.kill(os.getpid(), number)

    with _connect(backend, 1, addresses) as session:
        receiver = WeightReceiver(on_weights, session)
        while True:
            receiver.receive()


class _Dying(ModuleSource):
    """Gathers anew; half-way its process is killed or stopped."""

    def __init__(self, tensors: dict[str, torch.Tensor], how: str) -> None:
        super().__init__(tensors)
        self._how = how

    def snapshot(self) -> Any:
        whole = super().snapshot()
        self._parts = whole.parts or ()
        return type(whole)(whole.manifest, None, ())

    def gather(self, snapshot: Any) -> Any:
        for number, parts in enumerate(self._parts):
            if number == TENSORS // 2:
                # What was sent has to be on its way.
                time.sleep(0.3)
                os.kill(os.getpid(), signal.SIGKILL if self._how == "killed" else signal.SIGSTOP)
            yield parts


def lost_sender(
    rank: int, world_size: int, backend: str, addresses: Addresses, staged: bool, how: str
) -> Any:
    """The sender is killed or stopped in the middle of its second sync.

    Returns:
        On the receiver the error's class, and after how many seconds it came.
    """
    device = _place(backend, rank)
    if rank == 0:
        source = _tensors(backend, device, 1.0)
        with _listen(backend) as session:
            addresses.give(1, session.address)
            FullWeightSender(source, session, verify=False).sync()
            FullWeightSender(_Dying(source, how), session, verify=False).sync(1)
    live = _tensors(backend, device, 0.0)
    target = TensorTarget(live)
    address = addresses.take(1)
    settings = replace(SETTINGS, **QUICK_TO_GIVE_UP)
    with Session.connect(address, secret=SECRET, device=device, settings=settings) as session:
        receiver = WeightReceiver(StagedTarget(target) if staged else target, session)
        assert receiver.receive() is not None
        begin = time.monotonic()
        with pytest.raises((PeerLost, DeadlineExceeded)) as caught:
            receiver.receive()
        seconds = time.monotonic() - begin
        status = receiver.status()
        if staged:
            assert (status.state, status.version) == ("committed", 0) or how == "killed"
            assert status.version == 0
            assert _all_are(live, 1.0)
        else:
            assert (status.state, status.version, status.ready) == ("torn", None, False)
    return type(caught.value), seconds


def no_memory_for_buffers(rank: int, world_size: int, backend: str, addresses: Addresses) -> None:
    """The receiver has no memory for buffers; with smaller ones it has."""
    device = _place(backend, rank)
    if rank == 0:
        source = _tensors(backend, device, 1.0)
        with _listen(backend) as session:
            addresses.give(1, session.address)
            sender = FullWeightSender(source, session)
            sender.sync()
            session.buffer_size_bytes = 512 << 20
            _set(source, 2.0)
            with pytest.raises(CapacityError, match="receiver rank 1: no memory for a buffer"):
                sender.sync()
            session.buffer_size_bytes = 1 << 20
            assert sender.sync(7).version == 7
        return
    live = _tensors(backend, device, 0.0)
    with _connect(backend, 1, addresses) as session:
        receiver = WeightReceiver(TensorTarget(live), session)
        receiver.receive()
        hog = _all_but(device, 300 << 20)
        with pytest.raises(CapacityError, match="no memory for a buffer"):
            receiver.receive()
        assert receiver.status().state == "torn"
        result = receiver.receive()
        assert result is not None
        assert result.version == 7
        assert _all_are(live, 2.0)
        del hog


def _all_but(device: torch.device, nbytes: int) -> torch.Tensor:
    """Memory that leaves only so much of a GPU free."""
    torch.cuda.empty_cache()
    free, _ = torch.cuda.mem_get_info(device)
    return torch.empty(free - nbytes, dtype=torch.uint8, device=device)


def many_failures(rank: int, world_size: int, backend: str, addresses: Addresses) -> Any:
    """Syncs that fail in the middle and ones that succeed, in turn; returns what was used at the
    beginning and at the end: bytes of the GPU and threads."""
    device = _place(backend, rank)
    rounds = 8
    used: list[tuple[int, int]] = []

    def note() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            free, total = torch.cuda.mem_get_info(device)
            used.append((total - free, psutil.Process().num_threads()))
        else:
            used.append((0, psutil.Process().num_threads()))

    if rank == 0:
        source = _tensors(backend, device, 1.0)
        with _listen(backend) as session:
            addresses.give(1, session.address)
            sender = FullWeightSender(source, session)
            for round_ in range(rounds):
                with pytest.raises(RemoteError, match="rank 1: ZeroDivisionError: on purpose"):
                    sender.sync(2 * round_)
                assert sender.sync(2 * round_ + 1).receivers == 1
                note()
            assert session.generation == rounds + 1
        return used[2], used[-1]
    failing = [True]

    def on_weights(version: int, items: list[Any]) -> None:
        if failing[0] and "t20" in dict(items):
            raise ZeroDivisionError("on purpose")

    with _connect(backend, 1, addresses) as session:
        receiver = WeightReceiver(on_weights, session)
        for _ in range(rounds):
            failing[0] = True
            with pytest.raises((ZeroDivisionError, PackedCommError)):
                receiver.receive()
            failing[0] = False
            assert receiver.receive() is not None
            note()
    return used[2], used[-1]
