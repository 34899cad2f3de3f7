"""The exception hierarchy: one class per cause, all below `PackedCommError`.

Each class also derives from the built-in exception that a caller without packedcomm in mind would
catch for the same cause. Messages name the operation, the object, what was expected and what was
found. The native extension raises these same classes.
"""

from __future__ import annotations

from collections.abc import Sequence

__all__ = [
    "AddressInUse",
    "ArgumentError",
    "AuthenticationError",
    "CapacityError",
    "CheckpointError",
    "ConfigMismatch",
    "ContextLost",
    "CudaError",
    "DeadlineExceeded",
    "IntegrityError",
    "LayoutError",
    "ManifestError",
    "NcclError",
    "PackedCommError",
    "PeerLost",
    "ProtocolError",
    "RemoteError",
    "RendezvousTimeout",
    "SessionStateError",
    "TensorError",
    "TooManyOpenFiles",
    "VersionMismatch",
    "listed",
    "summary",
    "text_of",
]


class PackedCommError(Exception):
    """Base of every error that packedcomm raises on purpose."""


class ArgumentError(PackedCommError, ValueError):
    """An argument is outside its documented range."""


class ManifestError(PackedCommError, ValueError):
    """A tensor description is malformed, duplicated, unknown or missing."""


class TensorError(PackedCommError, ValueError):
    """A tensor can't be sent or written as it is: wrong device, sparse, quantised, no storage."""


class CheckpointError(PackedCommError, ValueError):
    """A checkpoint file is absent, corrupt or truncated."""


class LayoutError(PackedCommError, ValueError):
    """Pieces of a tensor overlap, leave holes or leave its bounds."""


class ConfigMismatch(PackedCommError, ValueError):
    """Two ranks were configured differently where they must agree."""


class VersionMismatch(PackedCommError, RuntimeError):
    """Two ranks run library versions that can't talk to each other, or one library is too old."""


class RendezvousTimeout(PackedCommError, TimeoutError):
    """Not every rank arrived before the deadline."""


class AddressInUse(PackedCommError, OSError):
    """The address to listen on is taken by another socket."""


class TooManyOpenFiles(PackedCommError, OSError):
    """This process may not open another file or socket."""


class AuthenticationError(PackedCommError, PermissionError):
    """A peer doesn't hold the job's secret."""


class ProtocolError(PackedCommError, RuntimeError):
    """A peer sent something that its protocol doesn't allow."""


class DeadlineExceeded(PackedCommError, TimeoutError):
    """An operation didn't finish before its deadline."""


class PeerLost(PackedCommError, ConnectionError):
    """A peer died or closed its connection in the middle of an operation."""


class RemoteError(PackedCommError, RuntimeError):
    """Another rank failed; the message carries its traceback text."""


class IntegrityError(PackedCommError, RuntimeError):
    """Received bytes differ from the bytes that were sent."""


class CapacityError(PackedCommError, MemoryError):
    """Not enough memory for a buffer; a smaller buffer size may fit."""


class NcclError(PackedCommError, RuntimeError):
    """NCCL reported an error, or no usable NCCL library was found."""


class CudaError(PackedCommError, RuntimeError):
    """The CUDA runtime reported an error."""


class ContextLost(PackedCommError, RuntimeError):
    """A communicator can't be aborted or the CUDA context is unusable: this process must
    restart."""


class SessionStateError(PackedCommError, RuntimeError):
    """The object is in a state (closed, aborted, torn) that doesn't allow the operation."""


# Problems that one message lists.
_LISTED = 10


def listed(problems: Sequence[str]) -> str:
    """Problems as one message: the first ten, and how many more there are."""
    more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
    return "; ".join(problems[:_LISTED]) + more


def text_of(error: BaseException) -> str:
    """An error's text, also of one whose `__str__` raises: whatever it is, it must be told."""
    try:
        return str(error)
    except Exception as failed:  # noqa: BLE001  (it may raise anything)
        return f"(its text can't be made: {type(failed).__name__})"


def summary(error: BaseException) -> str:
    """Class and text of an error."""
    return f"{type(error).__name__}: {text_of(error)}"
