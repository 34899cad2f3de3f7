"""What the demo's processes tell their parent, as JSON over the pipes that it gave them."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from packedcomm.planning.chunks import WireFormat

__all__ = ["DemoOptions", "Failed", "Link", "Listening", "Message", "Moved", "Output", "Snapshot"]


@dataclass(frozen=True, slots=True)
class DemoOptions:
    """What every process of a demo must agree on."""

    checkpoint: str
    receivers: int
    steps: int
    device: str
    """`cpu` or `cuda`; on `cuda` each rank has the GPU of its number."""

    buffer_size_bytes: int
    num_buffers: int
    wire_format: WireFormat
    timeout_s: float
    threads: int
    """Threads of torch in each process: sums over different numbers of threads differ."""

    @property
    def world_size(self) -> int:
        return 1 + self.receivers


@dataclass(frozen=True, slots=True)
class Listening:
    """The trainer has loaded its model and waits for the receivers."""

    rank: int
    address: str
    manifest: str
    """JSON of the manifest of everything that each sync moves."""

    notes: list[str]
    """What a reader of the result should know about the model."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A receiver has another chunk."""

    rank: int
    nbytes: int


@dataclass(frozen=True, slots=True)
class Output:
    """A model's outputs for the fixed inputs, byte by byte."""

    dtype: str
    shape: list[int]
    data: str
    """The elements in row-major order, in hex."""

    finite: bool


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a process holds after it has a version; version 0 is before the first sync."""

    rank: int
    version: int
    digests: dict[str, str]
    """SHA-256 of each tensor's bytes in row-major order, in hex."""

    output: Output | None
    seconds: dict[str, float]
    """Of the sync: `pack` and `wire` on the trainer, `wire` and `unpack` on receivers, `total`."""

    loss: float | None = None
    """Of the training step before the sync, on the trainer."""


@dataclass(frozen=True, slots=True)
class Failed:
    """A process ends with an error."""

    rank: int
    message: str
    traceback: str
    wrong_input: bool
    """Whether the checkpoint or the options are to blame."""


Message = Listening | Moved | Snapshot | Failed

_TYPES: dict[str, type[Any]] = {t.__name__: t for t in (Listening, Moved, Snapshot, Failed)}


class Link:
    """One end of a pipe between a demo process and its parent. One thread at a time per end."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def send(self, message: Message) -> None:
        """Raises OSError when the other end is gone."""
        document = {"type": type(message).__name__, **dataclasses.asdict(message)}
        self.connection.send_bytes(json.dumps(document).encode())

    def receive(self) -> Message:
        """Wait for a message. Raises EOFError when the other end is gone."""
        document = json.loads(self.connection.recv_bytes())
        kind = document.pop("type")
        if kind == "Snapshot" and document["output"] is not None:
            document["output"] = Output(**document["output"])
        message: Message = _TYPES[kind](**document)
        return message
