"""What tests of a communicator's operations share: tensors of every kind, and caught errors."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any

import torch

from packedcomm import GlooCommunicator, NcclCommunicator, Settings
from packedcomm.errors import PackedCommError
from tests.helpers.ranks import AddressBox

__all__ = [
    "DTYPES",
    "SHAPES",
    "broadcast_everything",
    "connect_gloo",
    "connect_nccl",
    "expected_broadcasts",
    "raised",
    "random_tensor",
    "send_around",
    "sum_of_ranks",
    "tensor_bytes",
    "use_gpu",
]

DTYPES = [
    torch.float32,
    torch.float64,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.bool,
    torch.uint8,
    torch.int8,
    torch.int16,
    torch.int32,
    torch.int64,
    torch.complex64,
    torch.complex128,
]
SHAPES = [(), (1,), (7,), (0, 4), (3, 5, 2), (300_000,)]


def connect_gloo(
    box: AddressBox, rank: int, world_size: int, operation_timeout_s: float = 20.0
) -> GlooCommunicator:
    """A Gloo communicator over all ranks."""
    settings = Settings(operation_timeout_s=operation_timeout_s)
    return GlooCommunicator.connect(
        box.endpoint(rank), rank, world_size, timeout_s=20, settings=settings
    )


def use_gpu(index: int) -> torch.device:
    """Make a GPU this process's current one."""
    # NVLink multicast stays off on shared machines; NCCL reads this once, at its first use.
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    device = torch.device("cuda", index)
    torch.cuda.set_device(device)
    return device


def connect_nccl(
    box: AddressBox, rank: int, world_size: int, operation_timeout_s: float = 30.0
) -> NcclCommunicator:
    """An NCCL communicator over all ranks, each on the GPU of its number."""
    settings = Settings(operation_timeout_s=operation_timeout_s)
    return NcclCommunicator.connect(
        box.endpoint(rank),
        rank,
        world_size,
        device=use_gpu(rank),
        timeout_s=30,
        settings=settings,
    )


def random_tensor(
    dtype: torch.dtype,
    shape: tuple[int, ...],
    seed: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Random bits, NaN and all; valid ones for bool."""
    generator = torch.Generator().manual_seed(seed)
    nbytes = torch.empty(shape, dtype=dtype).nbytes
    data = torch.randint(0, 2 if dtype == torch.bool else 256, (nbytes,), generator=generator)
    return data.to(torch.uint8).view(dtype).view(shape).to(device)


def tensor_bytes(tensor: torch.Tensor) -> bytes:
    """The tensor's bytes in row-major order."""
    return bytes(tensor.cpu().reshape(-1).view(torch.uint8).numpy())


def broadcast_everything(communicator: Any) -> list[bytes]:
    """Broadcast every dtype and shape from every rank; returns what this rank then holds."""
    received = []
    for src in range(communicator.world_size):
        for seed, dtype in enumerate(DTYPES):
            for shape in SHAPES:
                own = seed if communicator.rank == src else 1000 + communicator.rank
                tensor = random_tensor(dtype, shape, own, communicator.device)
                communicator.broadcast(tensor, src)
                received.append(tensor_bytes(tensor))
    return received


def expected_broadcasts(world_size: int) -> list[bytes]:
    """What `broadcast_everything` must return on every rank."""
    once = [
        tensor_bytes(random_tensor(dtype, shape, seed))
        for seed, dtype in enumerate(DTYPES)
        for shape in SHAPES
    ]
    return once * world_size


def send_around(communicator: Any) -> int:
    """Everyone sends to the next rank at once, every dtype and shape; returns how many agreed."""
    rank, world_size = communicator.rank, communicator.world_size
    agreed = 0
    for seed, dtype in enumerate(DTYPES):
        for shape in SHAPES:
            mine = random_tensor(dtype, shape, seed + rank, communicator.device)
            theirs = torch.zeros(shape, dtype=dtype, device=communicator.device)
            before = (rank - 1) % world_size
            # Only a group can do that without all waiting for each other.
            with communicator.group():
                communicator.send(mine, (rank + 1) % world_size)
                communicator.recv(theirs, before)
            expected = random_tensor(dtype, shape, seed + before)
            agreed += tensor_bytes(theirs) == tensor_bytes(expected)
    return agreed


def sum_of_ranks(communicator: Any) -> float:
    """1 + 2 + ... if every rank takes part in a reduction."""
    tensor = torch.full((1000,), float(communicator.rank + 1), device=communicator.device)
    communicator.all_reduce(tensor)
    return float(tensor[-1].item())


def raised(operation: Callable[[], Any]) -> tuple[type[PackedCommError] | None, str, float]:
    """Class and message of what `operation` raised, and after how many seconds."""
    started = time.monotonic()
    try:
        operation()
    except PackedCommError as error:
        return type(error), str(error), time.monotonic() - started
    return None, "", time.monotonic() - started
