"""Whether a sender and its receivers fit together, and by which transport: pure comparisons."""

from __future__ import annotations

import os
import socket
from typing import cast

import torch

from packedcomm.communicators.nccl_library import find_nccl
from packedcomm.errors import ArgumentError, ConfigMismatch, CudaError, VersionMismatch
from packedcomm.session.messages import Hello, Transport
from packedcomm.settings import Settings

__all__ = ["WIRE_VERSIONS", "agreed_transport", "choose_device", "own_hello"]

# Versions of the native byte format (docs/wire.md) that this package speaks.
WIRE_VERSIONS = (1,)


def choose_device(device: torch.device | str | int | None) -> torch.device:
    """The device that a session's data is on.

    Args:
        device: the CPU or a GPU; an integer is a GPU; None is the current GPU if there is one, else
            the CPU.

    Raises:
        ArgumentError: it is something else.
        CudaError: this process doesn't see that GPU.
    """
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        device = "cuda" if found else "cpu"
    try:
        chosen = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device {device!r}: {error}") from None
    if chosen.type == "cpu":
        return torch.device("cpu")
    if chosen.type != "cuda":
        raise ArgumentError(f"a session's device must be a GPU or the CPU, got {str(chosen)!r}")
    index = cast("int | None", chosen.index)
    if index is None and found:
        index = torch.cuda.current_device()
    if index is None or index >= found:
        raise CudaError(f"device {str(chosen)!r} is asked for, but this process sees {found} GPUs")
    return torch.device("cuda", index)


def own_hello(device: torch.device, settings: Settings) -> Hello:
    """What this process says of itself.

    Raises:
        NcclError, VersionMismatch: the device is a GPU, and no usable NCCL library was found.
    """
    # Imported late: the package imports this module.
    from packedcomm import __version__

    version = path = ""
    if device.type == "cuda":
        library = find_nccl(settings)
        version, path = ".".join(map(str, library.version)), library.path[-512:]
    return Hello(
        package=__version__,
        pid=os.getpid(),
        host=socket.gethostname()[:200],
        device=device.type,
        nccl_version=version,
        nccl_path=path,
        wire_versions=WIRE_VERSIONS,
        heartbeat_interval_s=float(settings.heartbeat_interval_s),
        heartbeat_timeout_s=float(settings.heartbeat_timeout_s),
        max_frame_bytes=settings.max_frame_bytes,
    )


def agreed_transport(sender: Hello, receiver: Hello, rank: int) -> Transport:
    """The transport between a sender and a receiver.

    Args:
        sender, receiver: what they say of themselves.
        rank: the receiver's, for messages.

    Raises:
        ConfigMismatch: one is on a GPU and one on a CPU, or one would take the other for stopped
            between two of its heartbeats. The message names both sides' values.
        VersionMismatch: versions of packedcomm, of its byte format or of NCCL differ; the message
            names both sides' versions, and for NCCL their libraries.
    """
    versions: list[str] = []
    own = f"the sender ({_place(sender)})"
    other = f"receiver rank {rank} ({_place(receiver)})"
    if receiver.package != sender.package:
        versions.append(
            f"{own} runs packedcomm {sender.package}, {other} packedcomm {receiver.package}"
        )
    if not set(receiver.wire_versions) & set(sender.wire_versions):
        versions.append(
            f"{own} speaks versions {list(sender.wire_versions)} of the byte format, "
            f"{other} versions {list(receiver.wire_versions)}"
        )
    if receiver.device == sender.device and receiver.nccl_version != sender.nccl_version:
        versions.append(
            f"NCCL versions differ: {own} uses {sender.nccl_version} from {sender.nccl_path}, "
            f"{other} uses {receiver.nccl_version} from {receiver.nccl_path}"
        )
    if versions:
        raise VersionMismatch("; ".join(versions))
    if receiver.device != sender.device:
        raise ConfigMismatch(f"{own} is on {sender.device}, {other} on {receiver.device}")
    for speaks, speaker, hears, hearer in (
        (sender, own, receiver, other),
        (receiver, other, sender, own),
    ):
        if speaks.heartbeat_interval_s >= hears.heartbeat_timeout_s:
            raise ConfigMismatch(
                f"heartbeat_timeout_s of {hearer} is {hears.heartbeat_timeout_s:g}, and "
                f"heartbeat_interval_s of {speaker} {speaks.heartbeat_interval_s:g}"
            )
    return "nccl" if sender.device == "cuda" else "gloo"


def _place(hello: Hello) -> str:
    return f"process {hello.pid} on {hello.host}"
