"""What both ends of a session have in common: their state, their end, and their description."""

from __future__ import annotations

import abc
import contextlib
import json
import os
import tempfile
import threading
import time
import warnings
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Self

import torch

from packedcomm.communicators import Communicator
from packedcomm.completion import wait_for_device
from packedcomm.errors import SessionStateError
from packedcomm.planning.chunks import WireFormat
from packedcomm.session.control import ReceiverChannel, SenderChannel
from packedcomm.session.messages import Close, Message, Transport
from packedcomm.settings import Settings

__all__ = ["SCHEMA_VERSION", "SessionEnd", "deadline_after"]

# Of the description that `write_description` writes.
SCHEMA_VERSION = 1


def deadline_after(timeout_s: float | None) -> float:
    """The point on the monotonic clock that many seconds from now; never, for None."""
    return float("inf") if timeout_s is None else time.monotonic() + timeout_s


class SessionEnd(abc.ABC):
    """One end of a session.

    Belongs to one thread at a time; only `abort` may be called from another.
    """

    epoch: str
    """Random name of the session, new at every `Session.listen`."""

    rank: int
    """0 is the sender."""

    world_size: int
    """The sender and all receivers."""

    device: torch.device
    settings: Settings
    wire_format: WireFormat
    buffer_size_bytes: int
    address: str
    """Where the sender listens, "host:port"."""

    _role: ClassVar[str]

    def __init__(self, settings: Settings, device: torch.device) -> None:
        """Use `Session.listen` or `Session.connect`."""
        self.settings = settings
        self.device = device
        self._channel: SenderChannel | ReceiverChannel
        self._communicator: Communicator | None = None
        self._transport: Transport | None = None
        self._ended: str | None = None
        self._ending = threading.Lock()
        self._closed = False

    @property
    @abc.abstractmethod
    def communicator(self) -> Communicator:
        """The communicator of all ranks; the sender is rank 0. The session ends it."""

    @property
    @abc.abstractmethod
    def transport(self) -> Transport:
        """What the data travels over: `"nccl"` or `"gloo"`."""

    @abc.abstractmethod
    def _farewell(self, message: Message) -> None:
        """Say it to whoever is still there; never raises."""

    def abort(self, reason: str) -> None:
        """End the session now, and tell the other side; may be called from any thread.

        What is under way and what is called later raises `SessionStateError` with the reason here.
        `close` still has to be called.
        """
        with self._ending:
            if self._ended is not None:
                return
            self._ended = f"aborted: {reason}"
        if self._communicator is not None:
            self._communicator.abort(reason)
        self._farewell(Close(f"aborted: {reason}"[:4000], in_order=False))

    def close(self) -> None:
        """Leave the session, tell the other side, and release everything. Idempotent."""
        if self._closed:
            return
        self._closed = True
        with self._ending:
            in_order = self._ended is None
            self._ended = self._ended or "the session is closed"
        try:
            if in_order:
                self._farewell(Close("closed"))
        finally:
            try:
                if self._communicator is not None:
                    self._communicator.close()
            finally:
                self._channel.close()

    def _warm_up(self, communicator: Communicator, deadline: float) -> Communicator:
        """Let NCCL open its connections now, which it otherwise does in the first broadcast, where
        a peer that has failed meanwhile would be waited for."""
        if self.device.type == "cuda":
            try:
                communicator.broadcast(torch.zeros(1, dtype=torch.uint8, device=self.device), 0)
                remaining = max(0.1, deadline - time.monotonic())
                wait_for_device(self.device, remaining, lambda: None, "NCCL's first broadcast")
            except BaseException as error:
                communicator.abort(f"{type(error).__name__}: {error}")
                communicator.close()
                raise
        return communicator

    def _check_open(self, operation: str) -> None:
        if self._ended is not None:
            raise SessionStateError(f"{operation} on {self._role}: {self._ended}")

    def describe(self) -> dict[str, Any]:
        """What others may want to know of the session, as JSON values; never the secret.

        `transport` is None on a sender whose receivers haven't all come.
        """
        from packedcomm import __version__

        return {
            "schema_version": SCHEMA_VERSION,
            "address": self.address,
            "epoch": self.epoch,
            "rank": self.rank,
            "world_size": self.world_size,
            "transport": self._transport,
            "wire_format": self.wire_format,
            "buffer_size_bytes": self.buffer_size_bytes,
            "package_version": __version__,
        }

    def write_description(self, path: str | os.PathLike[str]) -> None:
        """Write `describe()` as JSON. A reader sees the whole file or none, never a part.

        Raises:
            OSError: the file can't be written.
        """
        target = Path(path)
        descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(self.describe(), file, indent=2)
                file.write("\n")
                file.flush()
                os.fsync(file.fileno())
            Path(name).replace(target)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                Path(name).unlink()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            # Receivers that wait for data must not wait for this end to close in order.
            self.abort(f"{type(error).__name__}: {error}"[:1000])
        self.close()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "" if self._ended is None else f", ended: {self._ended}"
        return (
            f"{type(self).__name__}(address={self.address!r}, epoch={self.epoch!r}, "
            f"rank={self.rank}, world_size={self.world_size}, device={str(self.device)!r}, "
            f"transport={self._transport!r}{state})"
        )
