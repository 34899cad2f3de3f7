"""The protocol of every communicator: what a rank can ask of its group."""

from __future__ import annotations

import abc
import numbers
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, Self

import torch

from packedcomm.copying import as_tensor, describe_tensors
from packedcomm.errors import ArgumentError, SessionStateError, TensorError, summary
from packedcomm.settings import MOST_SECONDS

__all__ = ["Communicator", "Operands", "Pending", "check_rank", "check_timeout", "contiguous_bytes"]


def check_rank(rank: int, world_size: int) -> None:
    """Raise `ArgumentError` unless 0 <= rank < world_size."""
    if type(world_size) is not int or world_size < 1:
        raise ArgumentError(f"world_size must be an integer >= 1, got {world_size!r}")
    if type(rank) is not int or not 0 <= rank < world_size:
        raise ArgumentError(f"rank must be in 0..{world_size - 1}, got {rank!r}")


def check_timeout(timeout_s: float) -> None:
    """Raise `ArgumentError` unless it is a number of seconds that every timer can hold."""
    given: object = timeout_s
    is_number = isinstance(given, numbers.Real) and not isinstance(given, bool)
    if not is_number or not 0 < timeout_s <= MOST_SECONDS:
        raise ArgumentError(
            f"timeout_s must be a number > 0 and <= {MOST_SECONDS:,} seconds, got {timeout_s!r}"
        )


def contiguous_bytes(tensor: torch.Tensor, operation: str) -> torch.Tensor:
    """The tensor's memory as a one-dimensional uint8 tensor, without a copy.

    Raises:
        TensorError: the tensor isn't dense and contiguous; the message names the operation.
    """
    if tensor.layout != torch.strided or not tensor.is_contiguous():
        raise TensorError(
            f"{operation}: tensor of shape {tuple(tensor.shape)} and strides "
            f"{tuple(tensor.stride()) if tensor.layout == torch.strided else tensor.layout} "
            f"is not dense and contiguous"
        )
    if tensor.dtype == torch.uint8 and tensor.dim() == 1 and not tensor.requires_grad:
        return tensor
    flat = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    first = tensor.storage_offset() * tensor.itemsize
    return flat.set_(tensor.untyped_storage(), first, (tensor.nbytes,), (1,))


@dataclass(frozen=True, slots=True)
class Operands:
    """Contiguous tensors, checked once, that may be broadcast again and again."""

    tensors: list[torch.Tensor]
    buffers: list[tuple[int, int]]
    """Address and bytes of each tensor that isn't empty."""

    @classmethod
    def of(cls, tensors: list[torch.Tensor], device: torch.device, operation: str) -> Operands:
        """Check tensors.

        Raises:
            TensorError: one is on another device, isn't plain memory or isn't contiguous.
        """
        rows = describe_tensors(tensors, device)
        for i, (_, _, contiguous) in enumerate(rows):
            if not contiguous:
                raise TensorError(f"{operation}: tensor #{i} is not contiguous")
        return cls(tensors, [(address, nbytes) for address, nbytes, _ in rows if nbytes])

    def as_bytes(self) -> list[torch.Tensor]:
        """The tensors' memory as one-dimensional uint8 tensors."""
        return [contiguous_bytes(tensor, "broadcast") for tensor in self.tensors]


class Pending(Protocol):
    """An operation that was started and is finished elsewhere."""

    seconds: float
    """How long it took, once `wait` has returned."""

    def wait(self) -> None:
        """Return when it is done; raise what it failed with. May be called again."""


class Communicator(abc.ABC):
    """A fixed group of ranks, independent of torch.distributed's global state.

    Every rank must issue the same operations in the same order. Tensors are moved as bytes and must
    be dense, contiguous and on `device`. On a GPU an operation is enqueued on the current stream
    and returns; on a CPU it returns when done.

    A communicator belongs to one thread at a time; only `abort` may be called from another.
    """

    rank: int
    world_size: int
    device: torch.device

    _ended: str | None = None
    """Why the communicator can't be used any more."""

    @abc.abstractmethod
    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """Copy `tensor` from rank `src` into `tensor` on every other rank.

        Raises:
            TensorError: the tensor is on another device or isn't contiguous.
            ArgumentError: `src` is out of range.
            DeadlineExceeded, PeerLost, NcclError: the operation failed.
            SessionStateError: the communicator is closed or was aborted.
        """

    def start_broadcast(self, operands: Operands, src: int) -> Pending | None:
        """Broadcast several tensors as one group, possibly in the background.

        Returns:
            What to wait for before the tensors are touched; None where that is not for the host:
            on a GPU everything is enqueued on the current stream, or it is done already.

        Raises:
            As `broadcast`; in the background, by the result's `wait`.
        """
        with self.group():
            for tensor in operands.tensors:
                self.broadcast(tensor, src)
        return None

    @abc.abstractmethod
    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """Send `tensor` to rank `dst`, which must call `recv`. Raises as `broadcast` does."""

    @abc.abstractmethod
    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """Receive into `tensor` what rank `src` sends. Raises as `broadcast` does."""

    @abc.abstractmethod
    def all_reduce(self, tensor: torch.Tensor) -> None:
        """Sum `tensor` over all ranks, in place, by its dtype. Raises as `broadcast` does."""

    @abc.abstractmethod
    def group(self) -> AbstractContextManager[None]:
        """Operations inside the context are issued together at its end. Groups don't nest."""

    def check(self) -> None:
        """Raise what has gone wrong since the last operation, where the transport notices that by
        itself. Any thread may ask.

        Raises:
            PeerLost, NcclError, CudaError: the transport has failed.
            SessionStateError: the communicator is closed or was aborted.
        """
        self._check_open("check")

    def set_timeout(self, timeout_s: float) -> None:  # noqa: B027  (where there are deadlines)
        """Change the deadline of later operations, in seconds, if they have one."""

    @abc.abstractmethod
    def abort(self, reason: str) -> None:
        """End the communicator now; may be called from any thread, any number of times.

        Operations under way and later ones raise `SessionStateError` with the reason here; peers
        find out by their own deadline or by the lost connection.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Release everything. Idempotent; a failure to close in order ends in an abort."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            self.abort(summary(error))
        self.close()

    def _check_peer(self, operation: str, argument: str, peer: int) -> None:
        if type(peer) is not int or not 0 <= peer < self.world_size:
            raise ArgumentError(
                f"{operation} on rank {self.rank}: {argument} must be in "
                f"0..{self.world_size - 1}, got {peer!r}"
            )

    def _check_other(self, operation: str, argument: str, peer: int) -> None:
        self._check_peer(operation, argument, peer)
        if peer == self.rank:
            raise ArgumentError(f"{operation} on rank {self.rank}: {argument} is this rank itself")

    def _check_open(self, operation: str) -> None:
        if self._ended is not None:
            raise SessionStateError(
                f"{operation} on rank {self.rank} of {self.world_size}: {self._ended}"
            )

    def _checked_bytes(self, operation: str, tensor: Any) -> torch.Tensor:
        operation = f"{operation} on rank {self.rank} of {self.world_size}"
        tensor = as_tensor(tensor)
        try:
            describe_tensors([tensor], self.device)
        except TensorError as error:
            raise TensorError(f"{operation}: {error}") from error
        return contiguous_bytes(tensor, operation)
