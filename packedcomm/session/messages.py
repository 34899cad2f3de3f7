"""The control messages of a session: what each says, and which values it may have.

A message that breaks a rule can't be made, neither here nor from a frame: the constructor raises
`ProtocolError`. What each message is for:

    receiver → sender            sender → receiver
    Hello                        Welcome, Refused
    Ready, NeedManifest          Offer, Proceed, NoChange
    Staged, Committed            Moved, Commit
    Failure, Close               Cancel, Close
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, get_args

from packedcomm.errors import ManifestError
from packedcomm.manifest import DTYPE_SIZES, checked_nbytes
from packedcomm.planning.chunks import WireFormat
from packedcomm.results import ChangeStatistics
from packedcomm.session.rules import (
    Checked,
    finite,
    flag,
    integer,
    one_of,
    short_bytes,
    text,
    tuple_of,
)
from packedcomm.settings import DEFAULTS

__all__ = [
    "MESSAGES",
    "Cancel",
    "Close",
    "Commit",
    "Committed",
    "Failure",
    "Hello",
    "Message",
    "Moved",
    "NeedManifest",
    "NoChange",
    "Offer",
    "Proceed",
    "Ready",
    "Refused",
    "Region",
    "Staged",
    "Transport",
    "Welcome",
]

Transport = Literal["nccl", "gloo"]

MOST = (1 << 63) - 1
UNIQUE_ID_BYTES = 128

# More phases than a sync will ever be timed by.
MAX_PHASES = 64


def _region(value: Any) -> str | None:
    # It has checked itself when it was made.
    return None if type(value) is Region else "must be a Region"


def _regions(value: Any) -> str | None:
    return None if value is None else tuple_of(_region, DEFAULTS.max_tensors)(value)


def _changes(value: Any) -> str | None:
    if type(value) is not dict or len(value) > DEFAULTS.max_tensors:
        return f"must map at most {DEFAULTS.max_tensors:,} names to ChangeStatistics"
    for name, change in value.items():
        if problem := text(DEFAULTS.max_name_bytes, 1)(name):
            return f"name {problem}"
        if type(change) is not ChangeStatistics:
            return f"{name!r:.80} must have ChangeStatistics"
        # Weights may hold NaN and infinity, and so may what is computed from them.
        if any(type(n) is not float for n in (change.mean, change.std, change.maximum)):
            return f"{name!r:.80} must have three floats"
        if problem := integer(0, MOST)(change.elements):
            return f"{name!r:.80} elements {problem}"
    return None


def _phases(value: Any) -> str | None:
    if type(value) is not dict or len(value) > MAX_PHASES:
        return f"must map at most {MAX_PHASES} names to seconds"
    for name, seconds in value.items():
        if problem := text(64, 1)(name) or finite(0.0)(seconds):
            return f"{name!r:.80} {problem}"
    return None


Count = Annotated[int, integer(0, MOST)]
Version = Annotated[int, integer(-MOST, MOST)]
ShortText = Annotated[str, text(4096)]
LongText = Annotated[str, text(1 << 18)]
Extents = Annotated[tuple[int, ...], tuple_of(integer(0, MOST), DEFAULTS.max_dimensions)]


class Message(Checked):
    """Base of all control messages. Immutable, equal by content."""

    __slots__ = ()

    from_sender: ClassVar[bool] = False
    """Whether a sender may say it."""

    from_receiver: ClassVar[bool] = False
    """Whether a receiver may say it."""


@dataclass(frozen=True, slots=True)
class Region(Checked):
    """A box of a tensor as a receiver holds it, whose bytes are to be digested.

    Raises:
        ProtocolError: the box is malformed.
    """

    tensor: Count
    """Index in the manifest."""

    offset: Extents
    """Index in the tensor of the box's first element."""

    shape: Extents
    """The box's shape, as many dimensions as the offset."""

    dtype: Annotated[str, one_of(*DTYPE_SIZES)]
    """Dtype of the receiver's memory, a name of `DTYPE_SIZES`."""

    scale: Annotated[float, finite(-math.inf)]
    """Factor that is applied on the way there; 1.0 leaves bytes as they are."""

    def conflict(self) -> str | None:
        if len(self.offset) != len(self.shape):
            return f"offset has {len(self.offset)} dimensions, shape {len(self.shape)}"
        try:
            checked_nbytes(self.shape, self.dtype)
        except ManifestError as error:
            return str(error)
        if any(o + s > MOST for o, s in zip(self.offset, self.shape, strict=True)):
            return "offset + shape overflows 63 bits"
        return None


@dataclass(frozen=True, slots=True)
class Hello(Message):
    """A receiver says what it is. The sender compares it with its own."""

    from_receiver = True

    package: Annotated[str, text(64, 1)]
    """packedcomm's version."""

    pid: Count
    host: Annotated[str, text(256)]
    """Name of the machine, for messages."""

    device: Annotated[str, one_of("cpu", "cuda")]
    nccl_version: Annotated[str, text(64)] = ""
    """NCCL's version as "2.28.9"; empty without a GPU."""

    nccl_path: ShortText = ""
    """File of the NCCL library; empty without a GPU."""

    wire_versions: Annotated[tuple[int, ...], tuple_of(integer(1, 1 << 31), 16, 1)] = (1,)
    """Versions of the native byte format that it speaks."""


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """Everybody has come and fits; the receiver connects the communicator now."""

    from_sender = True

    epoch: Annotated[str, text(64, 1)]
    """Random name of this session."""

    rank: Count
    """The receiver's rank, from 1; the sender is rank 0."""

    world_size: Count
    transport: Annotated[Transport, one_of(*get_args(Transport))]
    unique_id: Annotated[bytes, short_bytes(UNIQUE_ID_BYTES)]
    """NCCL's unique id; empty for Gloo."""

    address: Annotated[str, text(512)]
    """Where Gloo's ranks meet, "host:port"; empty for NCCL."""

    buffer_size_bytes: Annotated[int, integer(1, MOST)]
    wire_format: Annotated[WireFormat, one_of(*get_args(WireFormat))]

    def conflict(self) -> str | None:
        if not 1 <= self.rank < self.world_size:
            return f"rank {self.rank} is not a receiver's of world size {self.world_size}"
        wanted = UNIQUE_ID_BYTES if self.transport == "nccl" else 0
        if len(self.unique_id) != wanted:
            return f"{self.transport} with a unique id of {len(self.unique_id)} bytes"
        if bool(self.address) == (self.transport == "nccl"):
            return f"{self.transport} with address {self.address!r}"
        return None


@dataclass(frozen=True, slots=True)
class Refused(Message):
    """The session doesn't come about, or has no place for this receiver."""

    from_sender = True

    kind: Annotated[str, text(64)]
    """Name of the error class."""

    text: LongText


@dataclass(frozen=True, slots=True)
class Offer(Message):
    """The sender has a version to send."""

    from_sender = True

    version: Version
    digest: Annotated[str, text(64, 64)]
    """The manifest's digest."""

    manifest: Annotated[str, text(MOST)] = ""
    """The manifest's JSON; empty where the receivers have agreed to this digest before."""

    verify: Annotated[bool, flag] = False
    statistics: Annotated[bool, flag] = False

    regions_known: Annotated[bool, flag] = False
    """Whether the sender knows what every receiver holds of this manifest."""


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """The receiver agrees to what is offered."""

    from_receiver = True

    regions: Annotated[tuple[Region, ...] | None, _regions] = None
    """What it wants to verify, in the order of the digests that it expects; None where it has said
    so before or doesn't verify."""


@dataclass(frozen=True, slots=True)
class NeedManifest(Message):
    """The receiver doesn't know the digest that was offered."""

    from_receiver = True


@dataclass(frozen=True, slots=True)
class Proceed(Message):
    """Every receiver is ready: data follows."""

    from_sender = True

    version: Version


@dataclass(frozen=True, slots=True)
class NoChange(Message):
    """The version is new, the bytes are those of the last one."""

    from_sender = True

    version: Version

    since: Version
    """The version whose bytes these are."""


@dataclass(frozen=True, slots=True)
class Moved(Message):
    """All data has been sent."""

    from_sender = True

    digests: Annotated[bytes, short_bytes(8 * DEFAULTS.max_tensors)] = b""
    """One for each region that this receiver asked for, 8 bytes each, little-endian."""

    def conflict(self) -> str | None:
        size = len(self.digests)
        return f"{size} bytes are no digests of 8 bytes" if size % 8 else None


@dataclass(frozen=True, slots=True)
class Staged(Message):
    """The receiver holds all data and votes for the commit."""

    from_receiver = True

    seconds: Annotated[dict[str, float], _phases]
    """How long each phase took there."""

    changes: Annotated[dict[str, ChangeStatistics], _changes] = field(default_factory=dict)
    """Statistics by tensor, where they were asked for."""


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """Every receiver has voted: the version is decided."""

    from_sender = True

    version: Version


@dataclass(frozen=True, slots=True)
class Committed(Message):
    """The receiver shows the version from now on."""

    from_receiver = True

    version: Version


@dataclass(frozen=True, slots=True)
class Cancel(Message):
    """What was offered is given up, because the sender or another receiver failed."""

    from_sender = True

    kind: Annotated[str, text(64)]
    """Name of the error class."""

    text: LongText
    traceback: LongText = ""


@dataclass(frozen=True, slots=True)
class Failure(Message):
    """A receiver failed."""

    from_receiver = True

    kind: Annotated[str, text(64)]
    """Name of the error class."""

    text: LongText
    traceback: LongText = ""

    ended: Annotated[bool, flag] = False
    """Whether the receiver can't take part in the session any more."""


@dataclass(frozen=True, slots=True)
class Close(Message):
    """This end leaves the session for good."""

    from_sender = True
    from_receiver = True

    reason: LongText = ""

    in_order: Annotated[bool, flag] = True
    """False where it leaves because something failed."""


MESSAGES: dict[str, type[Message]] = {
    kind.__name__: kind
    for kind in (
        Hello,
        Welcome,
        Refused,
        Offer,
        Proceed,
        Ready,
        NeedManifest,
        NoChange,
        Moved,
        Staged,
        Commit,
        Committed,
        Cancel,
        Failure,
        Close,
    )
}
