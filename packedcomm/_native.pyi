"""The compiled core of packedcomm."""

from collections.abc import Sequence
from typing import Protocol

import torch

from packedcomm.copying.tables import Names

# --- NCCL ---

class NcclLibrary:
    """The NCCL library of this process. Immutable."""

    @property
    def path(self) -> str: ...
    @property
    def version(self) -> tuple[int, int, int]: ...
    def unique_id(self) -> bytes:
        """A new unique id of 128 bytes. Raises NcclError."""

def nccl_library(candidates: Sequence[str], named: str = "") -> NcclLibrary:
    """Open `named`, else the library that is loaded, else the first candidate that opens.

    Raises:
        NcclError: none opens, or several are loaded and none is named.
        VersionMismatch: it is older than 2.18.
    """

def loaded_nccl_libraries() -> list[str]:
    """Files of all NCCL libraries that the process has loaded, each once."""

class NcclMove(Protocol):
    """`NcclHandle.broadcast`, `send` and `recv`: pointers and streams are integers."""

    def __call__(
        self, data: int, nbytes: int, peer: int, stream: int, timeout_s: float, /
    ) -> None: ...

class NcclHandle:
    """One NCCL communicator. The GIL is released in everything that can wait.

    Operations raise NcclError, CudaError, PeerLost, DeadlineExceeded, and SessionStateError once
    the communicator is being ended.
    """

    @staticmethod
    def create(
        library: NcclLibrary, unique_id: bytes, rank: int, world_size: int
    ) -> NcclHandle: ...
    @staticmethod
    def adopt(library: NcclLibrary, handle: int, rank: int, world_size: int) -> NcclHandle: ...
    def wait_ready(self, timeout_s: float) -> bool: ...
    def device(self) -> int: ...
    def broadcast(
        self, data: int, nbytes: int, root: int, stream: int, timeout_s: float
    ) -> None: ...
    def send(self, data: int, nbytes: int, peer: int, stream: int, timeout_s: float) -> None: ...
    def recv(self, data: int, nbytes: int, peer: int, stream: int, timeout_s: float) -> None: ...
    def broadcast_many(
        self, buffers: Sequence[tuple[int, int]], root: int, stream: int, timeout_s: float
    ) -> None: ...
    def all_reduce(
        self,
        source: int,
        destination: int,
        count: int,
        data_type: int,
        stream: int,
        timeout_s: float,
    ) -> None: ...
    def group_start(self) -> None: ...
    def group_end(self, timeout_s: float) -> None: ...
    def group_cancel(self) -> None: ...
    def check_async_error(self) -> None: ...
    def begin_abort(self) -> None: ...
    def abort(self, timeout_s: float) -> None:
        """Raises ContextLost."""

    def destroy(self, timeout_s: float) -> None:
        """Raises ContextLost."""

# --- copy engine ---

cuda_architectures: str
"""GPU architectures that the copy kernel was compiled for; empty when built without CUDA."""

class TensorRecord:
    """What tensors were when something was planned for them: address, dtype, shape, strides and
    device of each, without references.

    Raises:
        TensorError: a tensor has no dense memory of its own; the message gives its position.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None: ...
    def first_change(self, tensors: Sequence[torch.Tensor]) -> int:
        """Index of the first tensor that isn't what it was, or -1. As many tensors as were
        recorded, else ArgumentError."""

class DigestTable:
    """Digests of tensors of one device. Built by one thread."""

    def __init__(self, device_type: str, device_index: int) -> None: ...
    def add(
        self, tensors: list[torch.Tensor], names: Names | None, numbers: Sequence[int]
    ) -> None: ...
    def first_change(self, tensors: Sequence[torch.Tensor]) -> int:
        """As `TensorRecord.first_change`."""

    def compute(self, digests: int, threads: int) -> None:
        """Add the digests, each to the one of its number among those of 8 bytes at this address."""

    def write(self, address: int, capacity: int) -> None: ...
    def launch(self, table_address: int, stream: int, digests: int, blocks: int) -> None: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...

def digest_paths() -> list[str]:
    """The implementations of digests that this processor can run; the first one is used."""

def digest_bytes_by(path: str, address: int, nbytes: int, index: int) -> int:
    """What bytes add to a digest, the first one beginning word number `index`, by one of these:
    for tests."""

class CopyTable:
    """Copies between tensors of one device, normalised and tiled. Built by one thread.

    With `buffer_side` "source" or "destination", copies between a buffer and tensors: the buffer's
    address is given when the table is run.
    """

    def __init__(
        self, device_type: str, device_index: int, tile_bytes: int, buffer_side: str = ""
    ) -> None: ...
    def add_pairs(
        self,
        sources: list[torch.Tensor],
        destinations: list[torch.Tensor],
        names: Names | None,
        scales: Sequence[float],
        cast: bool,
    ) -> None: ...
    def add_packed(
        self,
        tensors: list[torch.Tensor],
        names: Names | None,
        offsets: Sequence[int],
        sizes: Sequence[int],
        numbers: Sequence[int],
    ) -> None: ...
    def add_parts(
        self,
        tensors: list[torch.Tensor],
        offsets: list[tuple[int, ...] | None],
        scales: Sequence[float],
        like: torch.Tensor,
        shape: Sequence[int],
        offset: int,
        name: str,
        number: int,
    ) -> None: ...
    def describe(
        self, tensors: list[torch.Tensor], names: Names | None
    ) -> list[tuple[int, int, bool]]: ...
    def first_change(self, tensors: Sequence[torch.Tensor]) -> int:
        """As `TensorRecord.first_change`: pair by pair source and destination, else in the order
        of addition."""

    def copy(self, threads: int, buffer: int = 0, digests: int = 0) -> None: ...
    def write(self, address: int, capacity: int) -> None: ...
    def launch(
        self, table_address: int, stream: int, blocks: int, buffer: int = 0, digests: int = 0
    ) -> None: ...
    @property
    def digested(self) -> list[int]: ...
    @property
    def digest_extent(self) -> int: ...
    @property
    def nbytes(self) -> int: ...
    @property
    def extent(self) -> int: ...
    @property
    def segments(self) -> int: ...
    @property
    def tiles(self) -> int: ...
    @property
    def table_bytes(self) -> int: ...
