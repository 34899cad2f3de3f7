"""The control messages of a session: what each says, and which values it may have.

A message that breaks a rule can't be made, neither here nor from a frame: the constructor raises
`ProtocolError`. What each message is for:

    receiver → sender            sender → receiver
    Hello                        Welcome, Refused
    Present, Connected           Assemble, Connect
    Ready, NeedManifest          Offer, Proceed, NoChange
    Staged, Committed            Commit
    Failure, Beat, Close         Cancel, Beat, Close
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal, get_args

from packedcomm.planning.chunks import WireFormat
from packedcomm.session.fields import (
    MOST,
    UNIQUE_ID_BYTES,
    Changes,
    Count,
    LongText,
    Region,
    Regions,
    Seconds,
    ShortText,
    Version,
)
from packedcomm.session.rules import (
    Checked,
    flag,
    integer,
    one_of,
    short_bytes,
    text,
    tuple_of,
)
from packedcomm.session.states import SyncState
from packedcomm.settings import DEFAULTS

__all__ = [
    "MESSAGES",
    "Assemble",
    "Beat",
    "Cancel",
    "Close",
    "Commit",
    "Committed",
    "Connect",
    "Connected",
    "Failure",
    "Hello",
    "Message",
    "NeedManifest",
    "NoChange",
    "Offer",
    "Present",
    "Proceed",
    "Ready",
    "Refused",
    "Region",
    "Staged",
    "Transport",
    "Verify",
    "Welcome",
]

Transport = Literal["nccl", "gloo"]

Verify = Literal["always", "staged", "never"]
"""Which receivers compare digests: all, those that stage, or none."""


def _not_a_receiver(rank: int, world_size: int) -> str | None:
    if 1 <= rank < world_size:
        return None
    return f"rank {rank} is not a receiver's of world size {world_size}"


class Message(Checked):
    """Base of all control messages. Immutable, equal by content."""

    __slots__ = ()

    from_sender: ClassVar[bool] = False
    """Whether a sender may say it."""

    from_receiver: ClassVar[bool] = False
    """Whether a receiver may say it."""


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

    heartbeat_interval_s: Seconds = DEFAULTS.heartbeat_interval_s
    heartbeat_timeout_s: Seconds = DEFAULTS.heartbeat_timeout_s
    max_frame_bytes: Annotated[int, integer(1, MOST)] = DEFAULTS.max_frame_bytes
    """As in `Settings`: what the other side must fit."""


@dataclass(frozen=True, slots=True)
class Welcome(Message):
    """The receiver fits, and belongs to the session from now on."""

    from_sender = True

    epoch: Annotated[str, text(64, 1)]
    """Random name of this session."""

    rank: Count
    """The receiver's rank, from 1, if nobody leaves before the first sync; the sender is rank 0."""

    world_size: Count
    """The ranks that there will be by then."""

    transport: Annotated[Transport, one_of(*get_args(Transport))]
    wire_format: Annotated[WireFormat, one_of(*get_args(WireFormat))]
    buffer_size_bytes: Annotated[int, integer(1, MOST)]

    decided: Count
    """Number of the last sync of this epoch that was decided to be committed; 0 if none was."""

    def conflict(self) -> str | None:
        return _not_a_receiver(self.rank, self.world_size)


@dataclass(frozen=True, slots=True)
class Assemble(Message):
    """The members have changed, or the communicator was given up: another one will be connected."""

    from_sender = True

    rank: Count
    """The receiver's rank from now on."""

    world_size: Count

    def conflict(self) -> str | None:
        return _not_a_receiver(self.rank, self.world_size)


@dataclass(frozen=True, slots=True)
class Present(Message):
    """The receiver isn't busy, and will connect at once when it is told to."""

    from_receiver = True


@dataclass(frozen=True, slots=True)
class Connect(Message):
    """Everybody is present: connect the communicator now."""

    from_sender = True

    unique_id: Annotated[bytes, short_bytes(UNIQUE_ID_BYTES)] = b""
    """NCCL's unique id; empty for Gloo."""

    address: Annotated[str, text(512)] = ""
    """Where Gloo's ranks meet, "host:port"; empty for NCCL."""

    def conflict(self) -> str | None:
        if len(self.unique_id) not in (0, UNIQUE_ID_BYTES):
            return f"a unique id of {len(self.unique_id)} bytes"
        if bool(self.unique_id) is bool(self.address):
            return "either a unique id or an address is needed"
        return None


@dataclass(frozen=True, slots=True)
class Connected(Message):
    """The receiver's communicator is connected."""

    from_receiver = True


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

    number: Count = 0
    """Number of the sync in this epoch, from 1."""

    buffer_size_bytes: Annotated[int, integer(1, MOST)] = DEFAULTS.buffer_size_bytes
    """Size at which packed chunks are cut."""

    verify: Annotated[Verify, one_of(*get_args(Verify))] = "never"
    statistics: Annotated[bool, flag] = False

    regions_known: Annotated[bool, flag] = False
    """Whether the sender knows what every receiver holds of this manifest."""

    at_once: Annotated[bool, flag] = False
    """Whether the data follows when all are ready, without `Proceed`."""

    sender: Count = 0
    """Which of those that send over this session; what one was told of regions another doesn't
    know."""


@dataclass(frozen=True, slots=True)
class Ready(Message):
    """The receiver agrees to what is offered; to `NoChange` this is its vote."""

    from_receiver = True

    verifies: Annotated[bool, flag] = False
    """Whether its vote will have digests."""

    regions: Regions = None
    """What it verifies, in the order of its digests; None where it has said so before or doesn't
    verify."""


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

    number: Count = 0
    """As an offer's: it is decided and committed as a sync is."""

    since_number: Count = 0
    """Number of the sync that was committed as that version; other senders may have equal ones."""


@dataclass(frozen=True, slots=True)
class Staged(Message):
    """The receiver holds all data and votes for the commit; said without being asked again."""

    from_receiver = True

    unpack_s: Seconds = 0.0
    """How long unpacking took there."""

    digests: Annotated[bytes, short_bytes(8 * DEFAULTS.max_tensors)] = b""
    """Of what it holds, one for each of its regions, 8 bytes each, little-endian."""

    changes: Changes = field(default_factory=dict)
    """Statistics by tensor, where they were asked for."""

    notes: Annotated[tuple[str, ...], tuple_of(text(512, 1), 16)] = ()
    """What whoever sent this should know of how it was taken in."""

    def conflict(self) -> str | None:
        size = len(self.digests)
        return f"{size} bytes are no digests of 8 bytes" if size % 8 else None


@dataclass(frozen=True, slots=True)
class Commit(Message):
    """Every receiver has voted: the version is decided."""

    from_sender = True

    version: Version

    number: Count = 0
    """Of the sync, as its offer's: another sender's may have the same version."""


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

    untouched: Annotated[bool, flag] = False
    """Whether no data was sent, so that whoever was waiting for it has the old weights."""


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
class Beat(Message):
    """This end is alive. Said every `Settings.heartbeat_interval_s`, and never answered."""

    from_sender = True
    from_receiver = True

    state: Annotated[str, one_of(*SyncState)]
    waits_for: Annotated[str, text(256)] = ""
    """Whom or what it waits for, for messages and flight records."""


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
        Hello, Welcome, Refused, Assemble, Present, Connect, Connected, Offer, Proceed, Ready,
        NeedManifest, NoChange, Staged, Commit, Committed, Cancel, Failure, Beat, Close,
    )
}  # fmt: skip
