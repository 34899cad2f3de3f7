"""The communicator between GPUs: NCCL, with deadlines, abort and typed errors."""

from __future__ import annotations

import base64
import time
from collections.abc import Callable
from typing import Self, cast

import torch

from packedcomm import _native
from packedcomm.communicators.base import check_rank, check_timeout
from packedcomm.communicators.listener import Address, Listener, closing_on_error
from packedcomm.communicators.nccl_library import find_nccl
from packedcomm.communicators.nccl_operations import NcclOperations, abort_all
from packedcomm.communicators.rendezvous import Rendezvous
from packedcomm.communicators.vllm_bootstrap import exchange_unique_id
from packedcomm.errors import (
    ArgumentError,
    CudaError,
    NcclError,
    PeerLost,
    RendezvousTimeout,
)
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["NcclCommunicator", "abort_all", "find_nccl"]

# How often the deadline and the other ranks are looked at while NCCL connects.
SLICE_S = 0.05

UNIQUE_ID_BYTES = 128


class NcclCommunicator(NcclOperations):
    """Ranks on GPUs, one GPU each, connected by NCCL.

    Beyond what `Communicator` says: an operation is enqueued on `torch.cuda.current_stream(device)`
    and is on the stream when the call returns, so an event recorded afterwards covers it. Its
    deadline is for getting there; what runs on the GPU waits for the other ranks as long as it
    takes, and ends when a rank calls `abort`. A tensor's memory must stay valid until the stream
    has passed the operation.

    After a failed operation the communicator is ended: its abort has begun, so that kernels on this
    GPU stop waiting, and later operations raise `SessionStateError`.

    Make one with `connect`, `from_unique_id`, `from_handle` or `from_vllm`. It belongs to one
    thread at a time; only `abort` may be called from another.
    """

    @classmethod
    def connect(
        cls,
        address: str | Listener,
        rank: int,
        world_size: int,
        *,
        device: torch.device | str | int,
        timeout_s: float = DEFAULTS.connect_timeout_s,
        settings: Settings = DEFAULTS,
    ) -> Self:
        """Meet the other ranks at rank 0's address and connect to all of them.

        Args:
            address: where rank 0 listens, "host:port"; rank 0 may pass a `Listener`, which is taken
                over. Rank 0 listens only until all are connected.
            rank: this process's rank.
            world_size: number of ranks.
            device: this rank's GPU.
            timeout_s: deadline for the whole, in seconds.
            settings: `nccl_library`; `operation_timeout_s` and `close_timeout_s` for later.

        Raises:
            ArgumentError: an argument is malformed or out of range.
            CudaError: there is no such GPU, or CUDA failed.
            AddressInUse: rank 0's address is taken.
            RendezvousTimeout: the message names the ranks that are missing.
            ConfigMismatch: world sizes or backends differ, or two processes claim one rank.
            VersionMismatch: NCCL's versions differ; the message has both with their paths.
            NcclError: no usable NCCL library, or NCCL failed.
            PeerLost, ProtocolError, RemoteError: the meeting failed.
        """
        with closing_on_error(address):
            gpu = _checked_device(device)
            library = find_nccl(settings)
        with Rendezvous(address, rank, world_size, timeout_s) as rendezvous:
            unique_id = rendezvous.agree(
                "nccl",
                str(gpu),
                nccl_version=".".join(map(str, library.version)),
                nccl_path=library.path,
                message=library.unique_id,
            )
            try:
                joined = cls._join(
                    library, unique_id, rank, world_size, gpu, settings, rendezvous.check
                )
            except (NcclError, PeerLost) as error:
                rendezvous.raise_if_ranks_are_silent(error)
                raise
            with joined._ending_on_error():
                rendezvous.finish()
        return joined

    @classmethod
    def from_unique_id(
        cls,
        uid: bytes | str,
        rank: int,
        world_size: int,
        *,
        device: torch.device | str | int,
        timeout_s: float = DEFAULTS.connect_timeout_s,
        settings: Settings = DEFAULTS,
        check: Callable[[], None] | None = None,
    ) -> Self:
        """Connect by a unique id that all ranks have been given.

        All ranks must run the same NCCL version; NCCL refuses others with an error of its own.

        Args:
            uid: what `unique_id` returned on one rank: 128 bytes, or those in base64 (standard
                alphabet). Each id serves for one communicator.
            rank, world_size, device, timeout_s, settings: as for `connect`.
            check: called every 50 ms meanwhile; what it raises gives the connecting up.

        Raises:
            RendezvousTimeout: not every rank arrived in time. Which ones isn't known here.
            ArgumentError, CudaError, NcclError, VersionMismatch, PeerLost: as for `connect`.
        """
        check_rank(rank, world_size)
        check_timeout(timeout_s)
        parsed = _parse_unique_id(uid)
        gpu = _checked_device(device)
        library = find_nccl(settings)
        look = _deadline_check(rank, world_size, library, timeout_s, check)
        return cls._join(library, parsed, rank, world_size, gpu, settings, look)

    @classmethod
    def from_vllm(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        *,
        device: torch.device | str | int,
        timeout_s: float = DEFAULTS.connect_timeout_s,
        settings: Settings = DEFAULTS,
        listener: Listener | None = None,
        check: Callable[[], None] | None = None,
    ) -> Self:
        """Connect as stock vLLM's weight-transfer group does; the other ranks may be stock vLLM.

        Speaks vLLM's bootstrap (a torch TCPStore served by rank 0) and takes part in its warm-up.
        vLLM tells no versions: a rank with another NCCL version fails with NCCL's own error, and
        vLLM 0.30 and later takes part in nothing with an NCCL older than 2.29.7, without an error.

        Args:
            host: where rank 0 listens; rank 0 binds to this address only.
            port: rank 0's port.
            rank: rank 0 is the trainer, the workers come after.
            world_size: number of ranks.
            device: this rank's GPU.
            timeout_s: deadline for the whole, in seconds.
            settings: as for `connect`.
            listener: on rank 0, used and taken over instead of binding `host` and `port`.
            check: called every 50 ms meanwhile; what it raises gives the connecting up, and rank
                0's port is free then.

        Raises:
            RendezvousTimeout: not every rank arrived in time; the message says how many did.
            ProtocolError: what rank 0 published isn't vLLM's form of a unique id.
            AddressInUse, ArgumentError, CudaError, NcclError, PeerLost: as for `connect`.
        """
        with closing_on_error(listener):
            check_rank(rank, world_size)
            check_timeout(timeout_s)
            if listener is not None and rank != 0:
                raise ArgumentError(f"rank {rank}: only rank 0 takes a Listener")
            address = Address.parse(f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
            deadline = time.monotonic() + timeout_s
            gpu = _checked_device(device)
            library = find_nccl(settings)
        remaining = deadline - time.monotonic()
        look = _deadline_check(rank, world_size, library, remaining, check)
        with exchange_unique_id(
            address, rank, world_size, deadline, library.unique_id, listener, check
        ) as unique_id:
            joined = cls._join(library, unique_id, rank, world_size, gpu, settings, look)
        with joined._ending_on_error():
            joined._warm_up(look)
        return joined

    @classmethod
    def from_handle(
        cls,
        comm: int,
        rank: int,
        world_size: int,
        *,
        device: torch.device | str | int,
        library: str | None = None,
        settings: Settings = DEFAULTS,
    ) -> Self:
        """Use an NCCL communicator that belongs to somebody else, such as cupy's `.comm`.

        It is called through the library that made it and is never aborted or destroyed here: its
        owner keeps it alive for longer than this object, and ends it.

        Args:
            comm: the `ncclComm_t` as an integer.
            rank, world_size, device: those of the communicator.
            library: path of the NCCL library that made it; needed where the process has two.
            settings: `operation_timeout_s`.

        Raises:
            ArgumentError: the handle is null or has another rank, size or device.
            CudaError, NcclError, VersionMismatch: as for `connect`.
        """
        check_rank(rank, world_size)
        gpu = _checked_device(device)
        nccl = find_nccl(settings) if library is None else _native.nccl_library([], library)
        with torch.cuda.device(gpu):
            handle = _native.NcclHandle.adopt(nccl, comm, rank, world_size)
            found = handle.device()
        if found != gpu.index:
            raise ArgumentError(f"the communicator handle is on cuda:{found}, not on {gpu}")
        return cls(handle, nccl, rank, world_size, gpu, settings, adopted=True)

    @staticmethod
    def unique_id(settings: Settings = DEFAULTS) -> bytes:
        """A new unique id (128 bytes) for `from_unique_id`, to be made on one rank.

        NCCL listens for the other ranks in this process from then on.

        Raises:
            NcclError, VersionMismatch: no usable NCCL library.
        """
        return find_nccl(settings).unique_id()

    @classmethod
    def _join(
        cls,
        library: _native.NcclLibrary,
        unique_id: bytes,
        rank: int,
        world_size: int,
        device: torch.device,
        settings: Settings,
        check: Callable[[], None],
    ) -> Self:
        with torch.cuda.device(device):
            handle = _native.NcclHandle.create(library, unique_id, rank, world_size)
        try:
            while not handle.wait_ready(SLICE_S):
                check()
            if (found := handle.device()) != device.index:
                raise CudaError(f"NCCL connected rank {rank} on cuda:{found}, not on {device}")
        except BaseException:
            # Not waited for: the error must not come later than its deadline.
            handle.begin_abort()
            raise
        return cls(handle, library, rank, world_size, device, settings)


def _checked_device(device: torch.device | str | int) -> torch.device:
    try:
        gpu = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    except RuntimeError as error:
        raise ArgumentError(f"device {device!r}: {error}") from None
    if gpu.type != "cuda":
        raise ArgumentError(f"NCCL works on GPUs, not on device {str(gpu)!r}")
    found = torch.cuda.device_count() if torch.cuda.is_available() else 0
    index = cast("int | None", gpu.index)
    if index is None:
        index = torch.cuda.current_device() if found else 0
    if index >= found:
        raise CudaError(f"device cuda:{index} is asked for, but this process sees {found} GPUs")
    return torch.device("cuda", index)


def _parse_unique_id(uid: bytes | str) -> bytes:
    try:
        data = base64.b64decode(uid, validate=True) if isinstance(uid, str) else bytes(uid)
    except ValueError as error:
        raise ArgumentError(f"the unique id isn't base64: {error}") from None
    if len(data) != UNIQUE_ID_BYTES:
        raise ArgumentError(f"a unique id has {UNIQUE_ID_BYTES} bytes, got {len(data)}")
    return data


def _deadline_check(
    rank: int,
    world_size: int,
    library: _native.NcclLibrary,
    timeout_s: float,
    check: Callable[[], None] | None,
) -> Callable[[], None]:
    """What to call while NCCL connects without a rendezvous of ours: the caller's own check, and
    one of the deadline."""
    deadline = time.monotonic() + timeout_s

    def look() -> None:
        if check is not None:
            check()
        if time.monotonic() >= deadline:
            version = ".".join(map(str, library.version))
            raise RendezvousTimeout(
                f"rank {rank} of {world_size}: not all ranks have connected after {timeout_s:.3g} s"
                f" (which ones isn't known here; all must run NCCL {version} as this one does)"
            )

    return look
