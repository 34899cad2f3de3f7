"""The ways to bring a sender's parameters into the receivers' parameters, all with one interface.

Besides packedcomm's own: one broadcast per tensor, grouped broadcasts into place, vLLM's own packed
code with a `copy_` per tensor, and as their limit one broadcast of a single buffer.
"""

from __future__ import annotations

import importlib.util
import sys
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any, Literal

import torch

import packedcomm
from benchmarks.content import Content
from benchmarks.groups import CupyNccl, PeerGroup
from benchmarks.measure import Transfer
from packedcomm.communicators.base import Communicator
from packedcomm.manifest import Manifest
from packedcomm.targets import TensorTarget

__all__ = [
    "BUFFER_SIZES",
    "VLLM_FILES",
    "Endpoint",
    "broadcast_transfers",
    "load_vllm_packed",
]

MiB = 1 << 20
BUFFER_SIZES: dict[str, tuple[int, ...]] = {
    "cpu": (1024 * MiB, 8 * MiB),
    "cuda": (1024 * MiB, 256 * MiB, 32 * MiB),
}
"""Chunk sizes of the packed ways by device: the default of both libraries first, then tuned ones.
A tuned size is left out where the payload fits into one chunk of it."""

NUM_BUFFERS = 2
GROUP_TENSORS = 64
VLLM_FILES = Path(__file__).resolve().parent.parent / ".peers" / "vllm-0.29.0"
_SRC = 0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What a rank has for one case."""

    rank: int
    device: torch.device
    manifest: Manifest
    parameters: dict[str, torch.Tensor]
    """Source of rank 0, destination of the others, in the manifest's order."""
    packedcomm: Communicator
    peer: PeerGroup
    vllm: ModuleType | None
    """vLLM's packed_tensor.py; None where it was not fetched."""
    content: Content

    @property
    def is_sender(self) -> bool:
        """True on the rank that all ways send from."""
        return self.rank == _SRC

    def into_parameters(self, family: str, run: Callable[[], None]) -> Transfer:
        """A way that ends in the parameters."""
        tensors = list(self.parameters.values())
        return Transfer(run, lambda: tensors, family, receives=not self.is_sender)


def size_label(nbytes: int) -> str:
    """A buffer size as it stands in a way's name."""
    return f"{nbytes >> 30} GiB" if nbytes % (1 << 30) == 0 else f"{nbytes / MiB:g} MiB"


def broadcast_transfers(
    endpoint: Endpoint, buffer_sizes: Sequence[int], excluded: frozenset[str]
) -> dict[str, Transfer]:
    """Make every way of the endpoint's device ready, but the excluded ones and vLLM's if absent."""
    sizes = [
        size
        for number, size in enumerate(buffer_sizes)
        if number == 0 or size < endpoint.manifest.nbytes
    ]
    return {
        name: prepare(endpoint)
        for name, prepare in _ways(endpoint, sizes).items()
        if name not in excluded
    }


def _ways(
    endpoint: Endpoint, buffer_sizes: Sequence[int]
) -> dict[str, Callable[[Endpoint], Transfer]]:
    ways: dict[str, Callable[[Endpoint], Transfer]] = {}
    for size in buffer_sizes:
        label = size_label(size)
        ways[f"packedcomm native {label}"] = partial(
            _packedcomm, buffer_size=size, wire_format="native"
        )
        ways[f"packedcomm vLLM format {label}"] = partial(
            _packedcomm, buffer_size=size, wire_format="vllm"
        )
        if endpoint.vllm is not None:
            ways[f"vLLM packed {label}"] = partial(
                _vllm_packed, buffer_size=size, tuned=size != buffer_sizes[0]
            )
    ways["per tensor"] = _per_tensor
    if endpoint.device.type == "cuda":
        ways[f"grouped {GROUP_TENSORS}"] = _grouped
    ways["raw broadcast"] = _raw
    return ways


def _packedcomm(
    endpoint: Endpoint, buffer_size: int, wire_format: Literal["vllm", "native"]
) -> Transfer:
    group = endpoint.packedcomm
    target = TensorTarget(endpoint.parameters)

    def run() -> None:
        if endpoint.is_sender:
            packedcomm.broadcast_producer(
                iter(endpoint.parameters.items()),
                group,
                _SRC,
                None,
                buffer_size,
                NUM_BUFFERS,
                wire_format=wire_format,
            )
        else:
            packedcomm.broadcast_consumer(
                endpoint.manifest,
                group,
                _SRC,
                target,
                buffer_size,
                NUM_BUFFERS,
                endpoint.device,
                wire_format=wire_format,
            )

    family = "packedcomm native" if wire_format == "native" else "packedcomm vLLM format"
    return endpoint.into_parameters(family, run)


def _per_tensor(endpoint: Endpoint) -> Transfer:
    def run() -> None:
        for tensor in endpoint.parameters.values():
            endpoint.peer.broadcast(tensor, _SRC)

    return endpoint.into_parameters("per tensor", run)


def _grouped(endpoint: Endpoint) -> Transfer:
    tensors = list(endpoint.parameters.values())
    peer = endpoint.peer
    assert isinstance(peer, CupyNccl)

    def run() -> None:
        for first in range(0, len(tensors), GROUP_TENSORS):
            with peer.group():
                for tensor in tensors[first : first + GROUP_TENSORS]:
                    peer.broadcast(tensor, _SRC)

    return endpoint.into_parameters("grouped", run)


def _vllm_packed(endpoint: Endpoint, buffer_size: int, tuned: bool) -> Transfer:
    vllm = endpoint.vllm
    assert vllm is not None
    parameters = endpoint.parameters
    metadata = [
        (name, (list(shape), getattr(torch, dtype))) for name, (shape, dtype) in endpoint.manifest
    ]

    def load(items: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in items:
            parameters[name].copy_(tensor)

    def run() -> None:
        if endpoint.is_sender:
            vllm.packed_nccl_broadcast_producer(
                iter(parameters.items()),
                endpoint.peer,
                _SRC,
                lambda item: item[1],
                buffer_size,
                NUM_BUFFERS,
            )
        else:
            vllm.packed_nccl_broadcast_consumer(
                iter(metadata), endpoint.peer, _SRC, load, buffer_size, NUM_BUFFERS, endpoint.device
            )

    return endpoint.into_parameters("vLLM packed, tuned" if tuned else "vLLM packed", run)


def _raw(endpoint: Endpoint) -> Transfer:
    buffer = torch.empty(endpoint.manifest.nbytes, dtype=torch.uint8, device=endpoint.device)
    if endpoint.is_sender:
        endpoint.content.write([buffer])

    def run() -> None:
        endpoint.peer.broadcast(buffer, _SRC)

    return Transfer(run, lambda: [buffer], "raw broadcast", receives=not endpoint.is_sender)


def load_vllm_packed(device_type: str) -> ModuleType | None:
    """vLLM's packed_tensor.py as a module of its own; None where it was not fetched.

    It needs torch alone. On a CPU its streams are replaced by ones that do nothing, which leaves
    the code as it is: what it would enqueue is done when it returns.
    """
    path = VLLM_FILES / "vllm" / "distributed" / "weight_transfer" / "packed_tensor.py"
    if not path.exists():
        return None
    spec = importlib.util.spec_from_file_location("vllm_packed_tensor", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    warnings.filterwarnings("ignore", r"Tensor '.*' has size .* bytes, which exceeds buffer_size")
    # Its dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    if device_type == "cpu":
        names: Any = module
        names.torch = _TorchWithoutStreams()
        names._get_streams = lambda _device, count: (
            (SimpleNamespace(synchronize=lambda: None),) * count
        )
    return module


class _TorchWithoutStreams:
    """torch as packed_tensor.py uses it, on a machine where there are no streams."""

    accelerator = SimpleNamespace(current_device_index=lambda: 0)
    cuda = SimpleNamespace(stream=lambda _stream: nullcontext())

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)
