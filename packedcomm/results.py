"""What a sync tells its caller: frozen records, usable as dicts by loggers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

__all__ = [
    "ChangeStatistics",
    "ReceiverStatus",
    "SyncResult",
    "UnchangedWeightsWarning",
    "combined_changes",
]


class UnchangedWeightsWarning(UserWarning):
    """A sync sent exactly the bytes of the last one: the trainer probably doesn't train what is
    sent."""


@dataclass(frozen=True, slots=True)
class ChangeStatistics:
    """How much a tensor changed by a sync: statistics of |new - old| over its elements."""

    mean: float
    std: float
    """Population standard deviation."""
    maximum: float
    elements: int


def combined_changes(
    reports: Sequence[Mapping[str, ChangeStatistics]],
) -> dict[str, ChangeStatistics]:
    """Statistics over what several receivers hold: of a sharded tensor over all shards."""
    combined: dict[str, ChangeStatistics] = {}
    for report in reports:
        for name, new in report.items():
            old = combined.get(name)
            if old is None:
                combined[name] = new
                continue
            count = old.elements + new.elements
            mean = (old.mean * old.elements + new.mean * new.elements) / count
            squares = sum((c.std**2 + c.mean**2) * c.elements for c in (old, new)) / count
            std = max(squares - mean * mean, 0.0) ** 0.5
            combined[name] = ChangeStatistics(mean, std, max(old.maximum, new.maximum), count)
    return combined


@dataclass(frozen=True, slots=True)
class SyncResult(Mapping[str, Any]):
    """What one sync did. A mapping too: `dict(result)` is `result.as_dict()`."""

    version: int
    """The version that this sync committed."""

    epoch: str
    """Identity of the session that it belongs to."""

    transport: str
    """`"nccl"` or `"gloo"`."""

    tensors: int
    """Named tensors on the wire; 0 if the trainer announced that nothing has changed."""

    bytes: int
    """Their bytes on the wire."""

    seconds: Mapping[str, float]
    """Time by stage: `describe` (sender: reading the source), `connect` (if the members had
    changed), `agree`, `pack` (sender), `wire`, `unpack` (receivers, the slowest), `verify`,
    `commit`, and `total` from call to return. Stages overlap, and `wire` includes waiting for the
    other side."""

    changed_tensors: int | None = None
    """How many tensors differ from the last sync's; None unless digests were compared, or at the
    first sync."""

    verified: bool = False
    """Whether the digests of what was sent and of what the receivers hold were compared."""

    receivers: int = 0
    """Receivers that have committed it, where the sender says so."""

    left_out: tuple[str, ...] = ()
    """Names that a filter of the source kept from being sent."""

    changes: Mapping[str, ChangeStatistics] = field(default_factory=dict)
    """Statistics of the change by tensor, where the receiver was asked for them."""

    notes: tuple[str, ...] = ()
    """What receivers have to say of how they took it in, such as which layers of an engine can't be
    written in place, and why."""

    fallback_reason: str | None = None
    """Why a slower transport than the one asked for was used."""

    def __post_init__(self) -> None:
        # Plain dicts: a record must be picklable.
        object.__setattr__(self, "seconds", dict(self.seconds))
        object.__setattr__(self, "changes", dict(self.changes))

    @property
    def gb_per_s(self) -> float:
        """10^9 bytes per second of the whole call."""
        total = self.seconds.get("total", 0.0)
        return self.bytes / total / 1e9 if total > 0 else 0.0

    def as_dict(self) -> dict[str, Any]:
        """Plain values by name, ready for a logger; stages are `seconds/pack` and so on, change
        statistics the largest and the mean over all tensors."""
        record: dict[str, Any] = {}
        for entry in fields(self):
            value = getattr(self, entry.name)
            if entry.name == "seconds":
                record |= {f"seconds/{stage}": seconds for stage, seconds in value.items()}
            elif entry.name in ("left_out", "notes"):
                record[entry.name] = len(value)
            elif entry.name == "changes":
                if value:
                    record["change/max"] = max(change.maximum for change in value.values())
                    record["change/mean"] = sum(c.mean for c in value.values()) / len(value)
            else:
                record[entry.name] = value
        record["gb_per_s"] = self.gb_per_s
        return record

    def __getitem__(self, key: str) -> Any:
        return self.as_dict()[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.as_dict())

    def __len__(self) -> int:
        return len(self.as_dict())


@dataclass(frozen=True, slots=True)
class ReceiverStatus:
    """A receiver at one moment."""

    state: str
    """A `SyncState`: `idle`, `agreed`, `moving`, `staged`, `committed`, `torn` (a transfer failed
    while it wrote in place: serve nothing until a full sync), `failed` or `closed`."""

    version: int | None
    """The last committed version; None before the first one, while torn, and while a sync writes
    over it in place."""

    epoch: str
    """Identity of the session that `version` was committed in; before that, of the present one."""

    update_count: int
    """Syncs that were committed."""

    last_update_time: float | None
    """When the last one was committed, in seconds since the epoch (`time.time`)."""

    error: BaseException | None
    """What the last sync or the receiver failed with; None again after the next commit."""

    connected: bool = True
    """Whether more can come from the sender; if not, `WeightReceiver.reconnect` with a new session
    is the way on."""

    @property
    def ready(self) -> bool:
        """Whether there are weights of a committed version that may be served. While a sync writes
        over them in place there aren't."""
        return self.version is not None and self.state != "torn"
