"""What the demo's processes do: the trainer trains and sends, receivers receive and compare."""

from __future__ import annotations

import ctypes
import hashlib
import multiprocessing
import multiprocessing.connection
import os
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
import torch.utils.deterministic

from packedcomm.cli.demo_messages import (
    DemoOptions,
    Failed,
    Link,
    Listening,
    Moved,
    Output,
    Snapshot,
)
from packedcomm.cli.demo_model import DemoModel, load_model
from packedcomm.cli.parent import end_with_parent
from packedcomm.communicators import Communicator, GlooCommunicator, Listener, NcclCommunicator
from packedcomm.errors import ArgumentError, CheckpointError, ConfigMismatch
from packedcomm.events import ChunkMoved, TransferFinished
from packedcomm.manifest import Manifest
from packedcomm.settings import Settings
from packedcomm.sources.checkpoint import Checkpoint
from packedcomm.targets import TensorTarget
from packedcomm.transports.broadcast import broadcast_consumer, broadcast_producer

__all__ = ["Role", "process_main", "receiver", "tensor_digest", "trainer"]

TRAINER_RANK = 0
LISTEN_ADDRESS = "127.0.0.1:0"

Role = Callable[[Link, DemoOptions, int], None]
"""What one process does: (its pipe to the parent, the options, its rank)."""


def process_main(
    role: Role, connection: multiprocessing.connection.Connection, options: DemoOptions, rank: int
) -> None:
    """Entry point of a process: run the role, report its failure, exit with status 1."""
    end_with_parent()
    _make_comparable(options)
    link = Link(connection)
    try:
        role(link, options, rank)
    except Exception as error:  # noqa: BLE001 - the parent prints whatever went wrong
        wrong_input = isinstance(error, (ArgumentError, CheckpointError))
        link.send(Failed(rank, str(error), traceback.format_exc(), wrong_input))
        raise SystemExit(1) from None


def trainer(link: Link, options: DemoOptions, rank: int) -> None:
    """Load the weights, send them as version 1, then train and send after each step."""
    device = _device(options, rank)
    model = load_model(Checkpoint.open(options.checkpoint), device, weights=True)
    tensors = model.tensors()
    with Listener.bind(LISTEN_ADDRESS) as listener:
        manifest = Manifest.from_tensors(tensors).to_json()
        link.send(Listening(rank, str(listener.address), manifest, model.notes))
        with _connect(listener, options, rank, device) as communicator:
            for version in range(1, options.steps + 2):
                loss = model.train_step() if version > 1 else None
                watch = _Watch(link, rank, report_chunks=False)
                _barrier(communicator)
                broadcast_producer(
                    model.tensors().items(),
                    communicator,
                    TRAINER_RANK,
                    None,
                    options.buffer_size_bytes,
                    options.num_buffers,
                    wire_format=options.wire_format,
                    on_event=watch,
                )
                link.send(_snapshot(model, rank, version, watch.seconds, loss))


def receiver(
    link: Link,
    options: DemoOptions,
    rank: int,
    make_target: Callable[[dict[str, torch.Tensor]], Any] = TensorTarget,
) -> None:
    """Start from random weights, receive every version into the live parameters."""
    device = _device(options, rank)
    torch.manual_seed(1000 + rank)
    model = load_model(Checkpoint.open(options.checkpoint), device, weights=False)
    tensors = model.tensors()
    link.send(_snapshot(model, rank, 0, {}, None))
    listening = link.receive()
    assert isinstance(listening, Listening)
    manifest = Manifest.from_json(listening.manifest)
    if manifest != Manifest.from_tensors(tensors):
        raise ConfigMismatch(
            f"rank {rank}: the trainer sends {manifest!r}, this process expects "
            f"{Manifest.from_tensors(tensors)!r}"
        )
    target = make_target(tensors)
    with _connect(listening.address, options, rank, device) as communicator:
        for version in range(1, options.steps + 2):
            watch = _Watch(link, rank, report_chunks=True)
            _barrier(communicator)
            broadcast_consumer(
                manifest,
                communicator,
                TRAINER_RANK,
                target,
                options.buffer_size_bytes,
                options.num_buffers,
                device,
                wire_format=options.wire_format,
                on_event=watch,
            )
            link.send(_snapshot(model, rank, version, watch.seconds, None))


def tensor_digest(tensor: torch.Tensor) -> str:
    """SHA-256, in hex, of a tensor's bytes in row-major order."""
    return hashlib.sha256(_bytes(tensor)).hexdigest()


def _bytes(tensor: torch.Tensor) -> bytes:
    whole = tensor.detach().cpu().contiguous()
    # Not by NumPy, which has no bfloat16 and may not be installed.
    return ctypes.string_at(whole.data_ptr(), whole.nbytes) if whole.nbytes else b""


class _Watch:
    """Takes a transfer's events: passes chunks on to the parent, keeps the times."""

    def __init__(self, link: Link, rank: int, *, report_chunks: bool) -> None:
        self.seconds: dict[str, float] = {}
        self._link = link
        self._rank = rank
        self._report_chunks = report_chunks

    def __call__(self, event: ChunkMoved | TransferFinished) -> None:
        if isinstance(event, TransferFinished):
            self.seconds = event.seconds
        elif self._report_chunks:
            self._link.send(Moved(self._rank, event.nbytes))


def _snapshot(
    model: DemoModel, rank: int, version: int, seconds: dict[str, float], loss: float | None
) -> Snapshot:
    digests = {name: tensor_digest(tensor) for name, tensor in model.tensors().items()}
    tensor = model.output()
    output = None
    if tensor is not None:
        finite = bool(torch.isfinite(tensor).all())
        output = Output(str(tensor.dtype), list(tensor.shape), _bytes(tensor).hex(), finite)
    return Snapshot(rank, version, digests, output, seconds, loss)


def _device(options: DemoOptions, rank: int) -> torch.device:
    if options.device == "cpu":
        return torch.device("cpu")
    device = torch.device("cuda", rank)
    torch.cuda.set_device(device)
    return device


def _connect(
    address: str | Listener, options: DemoOptions, rank: int, device: torch.device
) -> AbstractContextManager[Communicator]:
    size, timeout_s = options.world_size, options.timeout_s
    settings = replace(Settings.from_environment(), operation_timeout_s=timeout_s)
    if device.type == "cpu":
        return GlooCommunicator.connect(address, rank, size, timeout_s=timeout_s, settings=settings)
    return NcclCommunicator.connect(
        address, rank, size, device=device, timeout_s=timeout_s, settings=settings
    )


def _barrier(communicator: Communicator) -> None:
    """Let all ranks start a transfer together, so that its times don't include training."""
    communicator.all_reduce(torch.zeros(1, device=communicator.device))
    if communicator.device.type == "cuda":
        torch.cuda.synchronize(communicator.device)


def _make_comparable(options: DemoOptions) -> None:
    """Equal bytes in must give equal bytes out, in every process."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    torch.use_deterministic_algorithms(True, warn_only=True)
    # Filling is for finding uses of memory that was never written; it costs time and changes none.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if options.device == "cuda":
        # Read by cuBLAS when it is first used; without it torch warns at every product.
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
