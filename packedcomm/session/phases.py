"""The present phase of one end of a session: its state, its deadline, and what cut it short."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packedcomm.errors import ArgumentError, DeadlineExceeded, PackedCommError, SessionStateError
from packedcomm.session.flight import FlightRecord
from packedcomm.session.states import AT_REST, SyncState, next_state

__all__ = ["Phase", "Phases", "deadline_after"]


def deadline_after(timeout_s: float | None) -> float:
    """The point on the monotonic clock that many seconds from now; never, for None.

    Raises:
        ArgumentError: it isn't a number.
    """
    if timeout_s is None:
        return float("inf")
    if not isinstance(timeout_s, (int, float)) or math.isnan(timeout_s):
        raise ArgumentError(f"timeout_s must be a number of seconds or None, got {timeout_s!r}")
    return time.monotonic() + timeout_s


@dataclass(frozen=True, slots=True)
class Phase:
    """A state, and until when it may last."""

    state: SyncState
    seconds: float = float("inf")
    """How long it may last."""

    deadline: float = float("inf")
    """When that is over, on the monotonic clock."""

    @property
    def remaining(self) -> float:
        """Seconds that are left."""
        return self.deadline - time.monotonic()


class Phases:
    """Goes from phase to phase. Any thread may ask; one moves it, the supervisor interrupts it.

    Args:
        who: "the sender" or "the receiver", for messages.
        flight: notes every change.
    """

    def __init__(self, who: str, flight: FlightRecord) -> None:
        self._who = who
        self._flight = flight
        self._lock = threading.RLock()
        self._present = Phase(SyncState.IDLE)
        self._rest = SyncState.IDLE
        self._interruption: PackedCommError | None = None

    @property
    def present(self) -> Phase:
        """The present phase."""
        return self._present

    @property
    def interruption(self) -> PackedCommError | None:
        """What the supervisor has cut the present phase short with."""
        return self._interruption

    def enter(self, state: SyncState, seconds: float = float("inf")) -> None:
        """Go to another state.

        Args:
            state: which.
            seconds: how long it may last.

        Raises:
            SessionStateError: it can't follow the present one.
            PackedCommError: what has interrupted the present one, where the next would go on with
                the sync.
        """
        with self._lock:
            interruption = self._interruption
            if state is SyncState.STAGED and interruption is not None:
                raise interruption
            following = next_state(self._present.state, state, self._who)
            self._present = Phase(following, seconds, time.monotonic() + seconds)
            self._interruption = None
            if following in AT_REST:
                self._rest = following
        self._flight.note("state", state=str(state))

    def settle(self, state: SyncState) -> None:
        """Go to a state of rest; after the end of the session nothing happens."""
        with contextlib.suppress(SessionStateError):
            self.enter(state)

    def rest(self) -> None:
        """After a failed sync: back to the state of rest that it began in. After the end of the
        session nothing happens."""
        self.settle(self._rest)

    def interrupt(self, phase: Phase, error: PackedCommError) -> bool:
        """Cut a phase short, if it is still the present one and nothing has done so yet; whether
        this did."""
        with self._lock:
            if self._present is not phase or self._interruption is not None:
                return False
            self._interruption = error
        self._flight.note("interrupted", kind=type(error).__name__, text=str(error)[:500])
        return True

    def overdue(
        self, phase: Phase, peers: Sequence[Mapping[str, Any]], quiet_s: float
    ) -> DeadlineExceeded | None:
        """The error of a phase that has lasted too long.

        Args:
            phase: the present one.
            peers: those that are waited for, with "name" and "silent_s".
            quiet_s: seconds of silence above which it is mentioned.
        """
        if phase.remaining > 0:
            return None
        waits_for = [
            f"{peer['name']} (silent for {peer['silent_s']:.1f} s)"
            if peer["silent_s"] > quiet_s
            else str(peer["name"])
            for peer in peers
        ]
        return DeadlineExceeded(
            f"{self._who}: {phase.state} for more than {phase.seconds:.3g} s, waiting for "
            f"{', '.join(waits_for) or 'its end'}"
        )
