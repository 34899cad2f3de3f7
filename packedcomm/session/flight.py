"""The flight record: the last events of one end of a session, written down when a sync fails."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import tempfile
import threading
import time
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from packedcomm.errors import text_of
from packedcomm.settings import Settings

__all__ = ["FLIGHT_SCHEMA_VERSION", "FlightRecord", "write_json"]

logger = logging.getLogger("packedcomm")

FLIGHT_SCHEMA_VERSION = 1

# Texts of events and errors are cut to this length.
_MOST_TEXT = 2000


class FlightRecord:
    """The last `Settings.flight_record_events` events. Any thread may note one or write them.

    One end has one file, which the latest failure replaces, so a loop of failing syncs doesn't fill
    a disk.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._events: deque[dict[str, Any]] = deque(maxlen=settings.flight_record_events)
        self._lock = threading.RLock()
        self._written: Path | None = None

    def note(self, event: str, **details: Any) -> None:
        """Remember an event, with JSON values that belong to it."""
        with self._lock:
            self._events.append({"time": time.time(), "event": event, **details})

    def write(
        self,
        facts: Mapping[str, Any],
        error: BaseException,
        waiting_for: Sequence[Mapping[str, Any]],
    ) -> Path | None:
        """Write everything down as JSON.

        Args:
            facts: what the session says of itself; `epoch`, `rank` and `pid` name the file.
            error: what failed.
            waiting_for: whom this end waited for, one record each.

        Returns:
            The file; None if it couldn't be written, which is logged: the error matters more.
        """
        with self._lock:
            events = list(self._events)
        record = {
            "schema_version": FLIGHT_SCHEMA_VERSION,
            "written": time.time(),
            **facts,
            "error": {"kind": type(error).__name__, "text": text_of(error)[:_MOST_TEXT]},
            "waiting_for": list(waiting_for),
            "events": events,
        }
        folder = Path(self._settings.flight_record_dir or tempfile.gettempdir())
        epoch = str(facts.get("epoch", ""))[:8] or "none"
        name = f"packedcomm-flight-{epoch}-rank{facts.get('rank')}-{facts.get('pid')}.json"
        try:
            write_json(folder / name, record)
        except OSError as failed:
            logger.warning("the flight record can't be written to %s: %s", folder, failed)
            return None
        if self._written is not None and self._written != folder / name:
            # Its rank has changed since.
            with contextlib.suppress(OSError):
                self._written.unlink()
        self._written = folder / name
        return folder / name


def write_json(target: Path, value: Mapping[str, Any]) -> None:
    """Write JSON; a reader sees the whole file or none, never a part.

    Raises:
        OSError: the file can't be written.
    """
    # Readable by its owner only, made under a name that nobody could have prepared.
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=2, default=str)
            file.write("\n")
        Path(name).replace(target)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise
