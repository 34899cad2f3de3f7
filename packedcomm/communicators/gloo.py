"""The communicator between CPUs: torch's Gloo, with deadlines, abort and typed errors."""

from __future__ import annotations

import contextlib
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any, NoReturn, Self

import torch

from packedcomm.communicators.base import Communicator, Operands
from packedcomm.communicators.gloo_group import connect_gloo
from packedcomm.communicators.gloo_transfers import (
    BROADCAST_TAG,
    Batch,
    Transfer,
    TransferThread,
    broadcast_tree,
)
from packedcomm.communicators.listener import Listener
from packedcomm.communicators.peer_sockets import PeerSockets
from packedcomm.errors import (
    DeadlineExceeded,
    PeerLost,
    SessionStateError,
    TensorError,
)
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["GlooCommunicator"]

# How often a waiting operation looks at its deadline, at `abort` and at its peer's connection.
SLICE_S = 0.1

# How long a reduction may go on after a rank has hung up. Such a rank has all contributions, so
# what is left is passing on the sums.
REDUCTION_GRACE_S = 5.0

# What an operation that was given up may still take of `close`.
GIVEN_UP_S = 1.0

# What Gloo can add up.
SUMMABLE = (
    torch.uint8,
    torch.int8,
    torch.int32,
    torch.int64,
    torch.float16,
    torch.bfloat16,
    torch.float32,
    torch.float64,
)


class StartedBroadcast:
    """A broadcast that the communicator's own thread carries out."""

    def __init__(self, wait: Callable[[Batch], None], batch: Batch | None) -> None:
        """Use `GlooCommunicator.start_broadcast`."""
        self._wait = wait
        self._batch = batch
        self.seconds = 0.0
        """How long it ran, once `wait` has returned."""

    def wait(self) -> None:
        """Return when it is done. Raises as `Communicator.broadcast` does. May be called again."""
        if self._batch is not None:
            self._wait(self._batch)
            self.seconds = self._batch.seconds
            # Whoever keeps this keeps neither the tensors nor the communicator.
            self._batch = None
            del self._wait


class GlooCommunicator(Communicator):
    """Ranks on CPUs, connected to each other over TCP.

    Beyond what `Communicator` says: a broadcast goes along a binomial tree, straight from and into
    the tensors' memory. A send is done when the operating system has the bytes. The operations of
    one `group()` start together at its end, so that sends and receives of one group can cross, and
    their order among each other is not defined; their tensors must not be touched until then.

    After a failed operation the communicator is ended: its connections are cut, so that the other
    ranks fail too instead of waiting, and later operations raise `SessionStateError`.

    Make one with `connect`. It belongs to one thread at a time; only `abort` may be called from
    another.
    """

    def __init__(
        self, group: Any, sockets: PeerSockets, rank: int, world_size: int, settings: Settings
    ) -> None:
        """Use `GlooCommunicator.connect`."""
        self.rank = rank
        self.world_size = world_size
        self.device = torch.device("cpu")
        self._timeout_s = settings.operation_timeout_s
        self._close_timeout_s = settings.close_timeout_s
        self._sockets = sockets
        self._thread = TransferThread(group, settings.operation_timeout_s)
        self._grouped: list[Transfer] | None = None
        self._ended: str | None = None
        # A signal handler may abort what it interrupts.
        self._ending = threading.RLock()
        self._closed = False

    @classmethod
    def connect(
        cls,
        address: str | Listener,
        rank: int,
        world_size: int,
        *,
        timeout_s: float = DEFAULTS.connect_timeout_s,
        settings: Settings = DEFAULTS,
        check: Callable[[], None] | None = None,
    ) -> Self:
        """Meet the other ranks at rank 0's address and connect to all of them.

        Rank 0 listens on exactly the address given, and only until all are connected; Gloo listens
        on the address by which this machine reaches rank 0.

        Args:
            address: where rank 0 listens, "host:port"; rank 0 may pass a `Listener`, which is taken
                over.
            rank: this process's rank.
            world_size: number of ranks.
            timeout_s: deadline for the whole, in seconds.
            settings: `operation_timeout_s` is the deadline of each later operation or group.
            check: called at least every 100 ms meanwhile; what it raises ends the meeting.

        Raises:
            ArgumentError: an argument is malformed or out of range.
            AddressInUse: rank 0's address is taken.
            RendezvousTimeout: the message names the ranks that are missing.
            ConfigMismatch: world sizes or backends differ, or two processes claim one rank.
            PeerLost, ProtocolError, RemoteError, VersionMismatch: the meeting failed.
        """
        group, sockets = connect_gloo(
            address, rank, world_size, timeout_s, settings.operation_timeout_s, check
        )
        return cls(group, sockets, rank, world_size, settings)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:
        """As `Communicator.broadcast`. Returns when this rank's part is done."""
        self._check_peer("broadcast", "src", src)
        operation = f"broadcast from rank {src}"
        data = self._checked_bytes(operation, tensor)
        parent, children = broadcast_tree(self.rank, src, self.world_size)
        self._issue(Transfer(operation, data, parent, children, BROADCAST_TAG))

    def start_broadcast(self, operands: Operands, src: int) -> StartedBroadcast:
        """Start the broadcast of several tensors, as one group, and return at once.

        What is started runs in order, on the communicator's own thread. The tensors must not be
        touched before `wait()` of the result returns; every result must be waited for.

        Raises:
            As `broadcast`; failures of the operation itself are raised by `wait()`.
        """
        with self._collected() as transfers:
            for tensor in operands.tensors:
                self.broadcast(tensor, src)
        return StartedBroadcast(self._wait, self._thread.start(transfers) if transfers else None)

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        """As `Communicator.send`. `dst` must be another rank."""
        self._check_other("send", "dst", dst)
        operation = f"send to rank {dst}"
        data = self._checked_bytes(operation, tensor)
        self._issue(Transfer(operation, data, send_to=(dst,)))

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        """As `Communicator.recv`. `src` must be another rank."""
        self._check_other("recv", "src", src)
        operation = f"recv from rank {src}"
        data = self._checked_bytes(operation, tensor)
        self._issue(Transfer(operation, data, receive_from=src))

    def all_reduce(self, tensor: torch.Tensor) -> None:
        """As `Communicator.all_reduce`, for integers of 8, 32 and 64 bits, floats and complex.

        Raises:
            TensorError: the dtype can't be summed.
        """
        self._checked_bytes("all_reduce", tensor)
        data = torch.view_as_real(tensor.detach()) if tensor.is_complex() else tensor.detach()
        if data.dtype not in SUMMABLE:
            raise TensorError(
                f"all_reduce on rank {self.rank}: {tensor.dtype} can't be summed, only "
                f"{', '.join(str(dtype) for dtype in SUMMABLE)} and complex of these can"
            )
        self._issue(Transfer("all_reduce", data, reduce=True))

    @contextlib.contextmanager
    def group(self) -> Iterator[None]:
        """As `Communicator.group`. An exception inside drops the group's operations."""
        with self._collected() as transfers:
            yield
        if transfers:
            self._run(transfers)

    @contextlib.contextmanager
    def _collected(self) -> Iterator[list[Transfer]]:
        """Operations inside are noted, not started."""
        if self._grouped is not None:
            raise SessionStateError(f"group on rank {self.rank}: groups don't nest")
        self._check_open("group")
        transfers: list[Transfer] = []
        self._grouped = transfers
        try:
            yield transfers
        finally:
            self._grouped = None

    def set_timeout(self, timeout_s: float) -> None:
        """As `Communicator.set_timeout`."""
        self._timeout_s = timeout_s
        self._thread.set_timeout(timeout_s)

    def abort(self, reason: str) -> None:
        """As `Communicator.abort`: cuts the connections, so that the other ranks learn of it."""
        self._end(reason)

    def close(self) -> None:
        """As `Communicator.close`."""
        if self._closed:
            return
        self._closed = True
        with self._ending:
            failed = self._ended is not None
            self._ended = self._ended or "the communicator is closed"
        if failed:
            self._sockets.cut()
        # Idle unless an operation was given up. Gloo may not notice its end before its own timeout;
        # the thread then stays behind with the group and the tensors.
        self._thread.stop(GIVEN_UP_S if failed else self._close_timeout_s)

    def _issue(self, transfer: Transfer) -> None:
        self._check_open(transfer.operation)
        if transfer.tensor.numel() == 0 or self.world_size == 1:
            return
        if self._grouped is not None:
            self._grouped.append(transfer)
        else:
            self._run([transfer])

    def _run(self, transfers: list[Transfer]) -> None:
        self._wait(self._thread.start(transfers))

    def _wait(self, batch: Batch) -> None:
        # Counted from here: what was started before may have had to wait for its turn.
        deadline = time.monotonic() + self._timeout_s
        hung_up_at: float | None = None
        try:
            while not batch.wait(SLICE_S):
                self._check_open(batch.current.operation)
                now = time.monotonic()
                if now >= deadline:
                    raise self._deadline_exceeded(batch)
                # Gloo doesn't tell a receive that has begun that its sender is gone.
                if not self._hung_up(batch):
                    hung_up_at = None
                elif hung_up_at is None:
                    hung_up_at = now + (REDUCTION_GRACE_S if batch.peer is None else 0.0)
                elif now > hung_up_at and not batch.wait(0.0):
                    self._raise_lost(batch, "connection closed")
            if batch.error is not None:
                self._raise_failure(batch, batch.error)
        except BaseException as error:
            # Half-done operations can't be taken up again, whatever ended them: a deadline, a lost
            # peer, or Ctrl-C.
            self._end(f"{type(error).__name__}: {error}")
            raise

    def _deadline_exceeded(self, batch: Batch) -> DeadlineExceeded:
        waiting = "" if batch.peer is None else f", waiting for rank {batch.peer}"
        return DeadlineExceeded(
            f"{batch.current.operation} on rank {self.rank} of {self.world_size}: not done after "
            f"{self._timeout_s:.3g} s{waiting}"
        )

    def _hung_up(self, batch: Batch) -> bool:
        """Whether a rank that is waited for, or in a reduction any, has closed its connection."""
        closed = self._sockets.closed_ranks()
        if batch.peer is None:
            # Otherwise its turn hasn't come yet.
            return batch.current.reduce and bool(closed)
        return batch.peer in closed

    def _raise_failure(self, batch: Batch, error: Exception) -> NoReturn:
        self._check_open(batch.current.operation)
        text = str(error)
        if "timed out" in text.lower():
            raise self._deadline_exceeded(batch) from error
        self._raise_lost(batch, text.partition(". ")[0])

    def _raise_lost(self, batch: Batch, reason: str) -> NoReturn:
        # Before this end is cut as well. Ranks that failed for the same reason have hung up too.
        lost = set(self._sockets.closed_ranks())
        if batch.peer is not None:
            lost.add(batch.peer)
        ranks = f"ranks {sorted(lost)}" if lost else "another rank"
        raise PeerLost(
            f"{batch.current.operation} on rank {self.rank} of {self.world_size}: lost the "
            f"connection to {ranks} ({reason})"
        )

    def _end(self, reason: str) -> None:
        with self._ending:
            if self._ended is None:
                self._ended = reason
        self._sockets.cut()

    def __del__(self) -> None:
        if not getattr(self, "_closed", True):
            # The thread has the last reference to the group. It isn't waited for here.
            self._thread.let_end()
            warnings.warn(f"{self!r} was never closed", ResourceWarning, source=self, stacklevel=2)

    def __repr__(self) -> str:
        state = "" if self._ended is None else f", ended: {self._ended}"
        return f"GlooCommunicator(rank={self.rank}, world_size={self.world_size}{state})"
