"""The groups of a benchmark: packedcomm's own, and for the peers torch's Gloo or cupy's NCCL."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, Protocol

import torch
import torch.distributed

from benchmarks.world import World
from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver
from packedcomm.communicators import GlooCommunicator, Listener, NcclCommunicator
from packedcomm.communicators.base import Communicator
from packedcomm.planning.chunks import WireFormat
from packedcomm.session import ReceiverSession, SenderSession

__all__ = ["PeerGroup", "connect_packedcomm", "connect_peers", "connect_session"]

_TIMEOUT_S = 120.0
_SECRET = "known to every rank of a benchmark"


class PeerGroup(Protocol):
    """What the peers need of a group."""

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """As vLLM calls it: on the current stream."""

    def close(self) -> None:
        """Release the group."""


class TorchGloo:
    """torch.distributed's default group with the Gloo backend, on the loopback interface."""

    def __init__(self, rank: int, size: int, store: str) -> None:
        torch.distributed.init_process_group(
            "gloo",
            store=torch.distributed.FileStore(store, size),
            rank=rank,
            world_size=size,
            timeout=timedelta(seconds=_TIMEOUT_S),
        )

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        torch.distributed.broadcast(tensor, src)

    def close(self) -> None:
        torch.distributed.destroy_process_group()


class CupyNccl:
    """cupy's NCCL communicator: blocking, one rank per process, on torch's current stream."""

    def __init__(self, rank: int, size: int, unique_id: bytes) -> None:
        from cupy.cuda import nccl

        self._nccl: Any = nccl
        self._communicator = nccl.NcclCommunicator(size, unique_id, rank)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        address = tensor.data_ptr()
        stream = torch.cuda.current_stream().cuda_stream
        self._communicator.broadcast(
            address, address, tensor.nbytes, self._nccl.NCCL_UINT8, src, stream
        )

    @contextmanager
    def group(self) -> Iterator[None]:
        """Broadcasts inside are launched together at the end."""
        self._nccl.groupStart()
        yield
        self._nccl.groupEnd()

    def close(self) -> None:
        self._communicator.destroy()


def connect_peers(world: World) -> PeerGroup:
    """The peers' group over all ranks of the world.

    Raises:
        ImportError: on a GPU, without cupy.
    """
    if world.device.type == "cpu":
        return TorchGloo(world.rank, world.size, str(world.folder / "store"))
    from cupy.cuda import nccl

    return CupyNccl(world.rank, world.size, world.from_root(nccl.get_unique_id))


def connect_packedcomm(world: World) -> Communicator:
    """packedcomm's own communicator over all ranks of the world."""
    if world.device.type == "cuda":
        return NcclCommunicator.from_unique_id(
            world.from_root(NcclCommunicator.unique_id),
            world.rank,
            world.size,
            device=world.device,
            timeout_s=_TIMEOUT_S,
        )
    # The listener is bound before its address is told, so no other process can take the port.
    listener = Listener.bind("127.0.0.1:0") if world.rank == 0 else None
    address = world.from_root(lambda: listener.address if listener else None)
    return GlooCommunicator.connect(
        listener or address, world.rank, world.size, timeout_s=_TIMEOUT_S
    )


def connect_session(
    world: World, wire_format: WireFormat = "native"
) -> SenderSession | ReceiverSession:
    """A session of all ranks of the world, after its first sync, which connects a communicator;
    rank 0 sends."""
    first = {"first": torch.zeros(1, device=world.device)}
    if world.rank == 0:
        sender = Session.listen(
            "127.0.0.1:0",
            receivers=world.size - 1,
            secret=_SECRET,
            device=world.device,
            wire_format=wire_format,
        )
        world.from_root(lambda: sender.address)
        FullWeightSender(first, sender).sync()
        return sender
    address = world.from_root(lambda: None)
    receiver = Session.connect(address, secret=_SECRET, device=world.device)
    WeightReceiver(TensorTarget(first), receiver).receive()
    return receiver
