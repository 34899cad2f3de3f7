"""The operations of an NCCL communicator over its native handle, and the ways to end it."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator

import torch

from packedcomm import _native
from packedcomm.communicators.base import Communicator, Operands
from packedcomm.copying import as_tensor, describe_tensors
from packedcomm.errors import PackedCommError, SessionStateError, TensorError
from packedcomm.settings import Settings

__all__ = ["NcclOperations", "abort_all"]

# ncclDataType_t. Complex numbers are added as pairs of these.
SUMMABLE = {
    torch.int8: 0,
    torch.uint8: 1,
    torch.int32: 2,
    torch.uint32: 3,
    torch.int64: 4,
    torch.uint64: 5,
    torch.float16: 6,
    torch.float32: 7,
    torch.float64: 8,
    torch.bfloat16: 9,
}

WARM_UP_POLL_S = 0.001


class NcclOperations(Communicator):
    """What `NcclCommunicator` does once it is connected; documented there."""

    def __init__(
        self,
        handle: _native.NcclHandle,
        library: _native.NcclLibrary,
        rank: int,
        world_size: int,
        device: torch.device,
        settings: Settings,
        *,
        adopted: bool = False,
    ) -> None:
        """Use one of the constructors of `NcclCommunicator`."""
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self._handle = handle
        self._library = library
        self._timeout_s = settings.operation_timeout_s
        self._close_timeout_s = settings.close_timeout_s
        self._adopted = adopted
        # Tensors of the group under way: nothing is issued before its end, so they must live.
        self._grouped: list[torch.Tensor] | None = None
        self._ended: str | None = None
        # A signal handler may abort what it interrupts.
        self._ending = threading.RLock()
        self._closed = False

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """As `Communicator.broadcast`."""
        self._check_peer("broadcast", "src", src)
        self._move(f"broadcast from rank {src}", self._handle.broadcast, tensor, src)

    def start_broadcast(self, operands: Operands, src: int) -> None:
        """Enqueue the broadcast of several tensors as one NCCL group, in one native call.

        Raises:
            As `broadcast`; not inside `group()`.
        """
        self._check_peer("broadcast", "src", src)
        operation = f"broadcast of {len(operands.tensors)} tensors from rank {src}"
        self._check_open(operation)
        with self._failures(operation):
            self._handle.broadcast_many(operands.buffers, src, self._stream(), self._timeout_s)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """As `Communicator.send`. `dst` must be another rank."""
        self._check_other("send", "dst", dst)
        self._move(f"send to rank {dst}", self._handle.send, tensor, dst)

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """As `Communicator.recv`. `src` must be another rank."""
        self._check_other("recv", "src", src)
        self._move(f"recv from rank {src}", self._handle.recv, tensor, src)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """As `Communicator.all_reduce`, for integers of 8, 32 and 64 bits, floats and complex.

        Raises:
            TensorError: the dtype can't be summed.
        """
        self._checked_bytes("all_reduce", tensor)
        data = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        data_type = SUMMABLE.get(data.dtype)
        if data_type is None:
            raise TensorError(
                f"all_reduce on rank {self.rank}: {tensor.dtype} can't be summed, only "
                f"{', '.join(str(dtype) for dtype in SUMMABLE)} and complex of these can"
            )
        if not self._is_empty("all_reduce", data):
            address, count = data.data_ptr(), data.numel()
            with self._failures("all_reduce"):
                self._handle.all_reduce(
                    address, address, count, data_type, self._stream(), self._timeout_s
                )

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """As `Communicator.group`: one NCCL group, which NCCL fuses into few launches.

        An exception inside drops the group's operations.
        """
        if self._grouped is not None:
            raise SessionStateError(f"group on rank {self.rank}: groups don't nest")
        self._check_open("group")
        self._grouped = []
        self._handle.group_start()
        try:
            yield
        except BaseException:
            self._handle.group_cancel()
            self._grouped = None
            raise
        try:
            with self._failures(f"group of {len(self._grouped)} operations"):
                self._handle.group_end(self._timeout_s)
        finally:
            self._grouped = None

    def set_timeout(self, timeout_s: float) -> None:
        """As `Communicator.set_timeout`."""
        self._timeout_s = timeout_s

    def check(self) -> None:
        """Raise what NCCL has noticed on its own threads since the last operation.

        Raises:
            PeerLost: the connection to another rank broke.
            NcclError, CudaError: NCCL or CUDA failed.
            SessionStateError: the communicator is closed or was aborted.
        """
        self._check_open("check")
        with self._failures("check"):
            self._handle.check_async_error()

    def abort(self, reason: str) -> None:
        """As `Communicator.abort`: kernels that wait on this GPU end too.

        Several communicators whose kernels may wait for each other are ended by `abort_all`.

        Raises:
            ContextLost: NCCL didn't let go in time or failed: this process must restart.
        """
        self._end(reason)
        self._handle.abort(self._close_timeout_s)

    def close(self) -> None:
        """As `Communicator.close`: waits for what is enqueued, then frees. Raises as `abort`."""
        if self._closed:
            return
        self._closed = True
        with self._ending:
            failed = self._ended is not None
            self._ended = self._ended or "the communicator is closed"
        with torch.cuda.device(self.device):
            if failed:
                self._handle.abort(self._close_timeout_s)
            else:
                self._handle.destroy(self._close_timeout_s)

    def _move(
        self, operation: str, function: _native.NcclMove, tensor: torch.Tensor, peer: int
    ) -> None:
        tensor = as_tensor(tensor)
        try:
            ((address, nbytes, contiguous),) = describe_tensors([tensor], self.device)
        except TensorError as error:
            raise TensorError(f"{operation} on rank {self.rank}: {error}") from error
        if not contiguous:
            raise TensorError(
                f"{operation} on rank {self.rank}: tensor of shape {tuple(tensor.shape)} and "
                f"strides {tuple(tensor.stride())} is not contiguous"
            )
        if not self._is_empty(operation, tensor):
            with self._failures(operation):
                function(address, nbytes, peer, self._stream(), self._timeout_s)

    def _is_empty(self, operation: str, tensor: torch.Tensor) -> bool:
        self._check_open(operation)
        if self._grouped is not None:
            self._grouped.append(tensor)
        return tensor.numel() == 0

    def _stream(self) -> int:
        stream: int = torch.cuda.current_stream(self.device).cuda_stream
        return stream

    def _warm_up(self, check: Callable[[], None]) -> None:
        """vLLM's first operation on a new group, awaited: a sum of one zero, out of place."""
        with torch.cuda.device(self.device):
            source = torch.zeros(1, device=self.device)
            result = torch.empty_like(source)
            with self._failures("warm-up"):
                self._handle.all_reduce(
                    source.data_ptr(),
                    result.data_ptr(),
                    1,
                    SUMMABLE[torch.float32],
                    self._stream(),
                    self._timeout_s,
                )
            done = torch.cuda.Event()  # type: ignore[no-untyped-call]
            done.record()
            while not done.query():  # type: ignore[no-untyped-call]
                self.check()
                check()
                time.sleep(WARM_UP_POLL_S)

    @contextlib.contextmanager
    def _failures(self, operation: str) -> Iterator[None]:
        try:
            yield
        except PackedCommError as error:
            # An abort from another thread shows as NCCL's or the native part's error.
            self._check_open(operation)
            text = f"{operation} on rank {self.rank} of {self.world_size} ({self.device}): {error}"
            self._end(text)
            raise type(error)(text) from error

    @contextlib.contextmanager
    def _ending_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            self._end(f"{type(error).__name__}: {error}")
            self._closed = True
            raise

    def _end(self, reason: str) -> None:
        with self._ending:
            if self._ended is None:
                self._ended = reason
        # Returns at once; an error must not wait for NCCL.
        self._handle.begin_abort()

    def __del__(self) -> None:
        if not (getattr(self, "_closed", True) or self._adopted):
            # Nothing is freed here: that may wait for other ranks.
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "" if self._ended is None else f", ended: {self._ended}"
        version = ".".join(map(str, self._library.version))
        return (
            f"NcclCommunicator(rank={self.rank}, world_size={self.world_size}, "
            f"device='{self.device}', nccl={version}{state})"
        )


def abort_all(communicators: Iterable[NcclOperations], reason: str) -> None:
    """Abort several communicators at once: all are marked first, then freed.

    One after the other could deadlock: freeing the first waits for the GPU, where a kernel of the
    second may wait for another rank.

    Raises:
        ContextLost: as `NcclOperations.abort`.
    """
    ending = list(communicators)
    for communicator in ending:
        communicator._end(reason)
    for communicator in ending:
        communicator.abort(reason)
