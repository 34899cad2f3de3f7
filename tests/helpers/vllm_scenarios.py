"""Broadcasts whose other end is vLLM's own code: its packing, its communicator, its bootstrap."""

from __future__ import annotations

from typing import Any

import torch

from packedcomm import (
    Listener,
    Manifest,
    NcclCommunicator,
    TensorTarget,
    broadcast_consumer,
    broadcast_producer,
)
from tests.helpers.ranks import AddressBox
from tests.helpers.scenarios import TIMEOUT_S, empty_like, layer_like
from tests.helpers.tensors import digests, odd_tensors
from tests.helpers.vllm_peer import load_packed_tensor, load_vllm_peer


def with_vllm(
    rank: int,
    world_size: int,
    box: AddressBox,
    sender: str,
    bootstrap: str,
    buffer_size: int,
) -> dict[str, str]:
    """Rank 0 sends to rank 1; `sender` says whose code rank 0 runs, rank 1 runs the other's.

    With `bootstrap` "ours" our side's group is `NcclCommunicator.from_vllm`, with "theirs" it is
    vLLM's PyNcclCommunicator; vLLM's side always uses its own.
    """
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    our_side = (rank == 0) == (sender == "ours")
    host, port = _address(box, rank)
    group: Any
    if our_side and bootstrap == "ours":
        group = NcclCommunicator.from_vllm(
            host, port, rank, world_size, device=device, timeout_s=TIMEOUT_S
        )
    else:
        group = load_vllm_peer().connect(host, port, rank, world_size, rank)
    tensors = _sendable(device)
    received = tensors if rank == 0 else empty_like(tensors, device)
    for _ in range(2):
        if our_side:
            _transfer_with_ours(rank, group, tensors, received, buffer_size)
        else:
            _transfer_with_theirs(rank, group, tensors, received, buffer_size)
        torch.cuda.synchronize(device)
    return digests(received)


def _address(box: AddressBox, rank: int) -> tuple[str, int]:
    # vLLM's rank 0 binds a port by itself, so the one that was found is let go for it.
    endpoint = box.endpoint(rank)
    address = endpoint if isinstance(endpoint, str) else endpoint.address
    if isinstance(endpoint, Listener):
        endpoint.close()
    host, _, port = address.rpartition(":")
    return host, int(port)


def _sendable(device: torch.device) -> dict[str, torch.Tensor]:
    """What vLLM's code can send and receive: it can't view 0-d tensors as bytes nor misaligned
    bytes as tensors, so there are none, and wide dtypes come first."""
    tensors = odd_tensors(device) | layer_like(8, 5, device)
    wide_first = sorted(tensors.items(), key=lambda item: -item[1].itemsize)
    return {name: t.contiguous() for name, t in wide_first if t.dim() > 0}


def _transfer_with_ours(
    rank: int,
    group: Any,
    tensors: dict[str, torch.Tensor],
    received: dict[str, torch.Tensor],
    buffer_size: int,
) -> None:
    if rank == 0:
        broadcast_producer(tensors.items(), group, buffer_size_bytes=buffer_size)
    else:
        manifest = Manifest.from_tensors(tensors)
        target = TensorTarget(received)
        broadcast_consumer(manifest, group, 0, target, buffer_size, 2, f"cuda:{rank}")


def _transfer_with_theirs(
    rank: int,
    group: Any,
    tensors: dict[str, torch.Tensor],
    received: dict[str, torch.Tensor],
    buffer_size: int,
) -> None:
    vllm = load_packed_tensor()
    if rank == 0:
        vllm.packed_nccl_broadcast_producer(
            iter(tensors.items()), group, 0, lambda item: item[1], buffer_size, 2
        )
    else:

        def load(items: list[tuple[str, torch.Tensor]]) -> None:
            for name, tensor in items:
                received[name].copy_(tensor)

        metadata = ((n, (list(t.shape), t.dtype)) for n, t in tensors.items())
        vllm.packed_nccl_broadcast_consumer(metadata, group, 0, load, buffer_size, 2)
