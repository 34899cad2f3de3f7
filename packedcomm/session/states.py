"""The states of a session's end, and which may follow which."""

from __future__ import annotations

from enum import StrEnum

from packedcomm.errors import SessionStateError

__all__ = ["AT_END", "AT_REST", "SyncState", "next_state"]


class SyncState(StrEnum):
    """Where one end of a session is.

    A sync goes from a state of rest (`IDLE`, `COMMITTED`, `TORN`) through `AGREED`, `MOVING` and
    `STAGED` to `COMMITTED`; one that fails goes back to a state of rest.
    """

    IDLE = "idle"
    """No version has been committed yet, and none is under way."""

    AGREED = "agreed"
    """Both sides know what will be sent and where it goes."""

    MOVING = "moving"
    """Data is under way."""

    STAGED = "staged"
    """All data is there; the decision is awaited."""

    COMMITTED = "committed"
    """The last version is shown."""

    TORN = "torn"
    """A failure has left part of the weights new, part old: serve nothing until a full sync."""

    FAILED = "failed"
    """The session has ended because of a failure."""

    CLOSED = "closed"
    """The session has ended in order."""


AT_REST = frozenset({SyncState.IDLE, SyncState.COMMITTED, SyncState.TORN})
AT_END = frozenset({SyncState.FAILED, SyncState.CLOSED})

_FOLLOWING: dict[SyncState, frozenset[SyncState]] = {
    # `no_change` commits a version without data, a decision learnt late one whose data is there.
    SyncState.IDLE: frozenset({SyncState.AGREED}) | AT_REST | AT_END,
    SyncState.AGREED: frozenset({SyncState.MOVING}) | AT_REST | AT_END,
    SyncState.MOVING: frozenset({SyncState.STAGED}) | AT_REST | AT_END,
    SyncState.STAGED: AT_REST | AT_END,
    SyncState.COMMITTED: frozenset({SyncState.AGREED}) | AT_REST | AT_END,
    # Only a sync, or learning that the last one was decided after all, leads out of it.
    SyncState.TORN: frozenset({SyncState.AGREED, SyncState.COMMITTED, SyncState.TORN}) | AT_END,
    SyncState.FAILED: AT_END,
    SyncState.CLOSED: frozenset({SyncState.CLOSED}),
}


def next_state(present: SyncState, wanted: SyncState, who: str) -> SyncState:
    """The state wanted, if it may follow.

    Raises:
        SessionStateError: it may not; the message names both states and `who`.
    """
    if wanted not in _FOLLOWING[present]:
        raise SessionStateError(f"{who} is {present}, which {wanted} can't follow")
    return wanted
