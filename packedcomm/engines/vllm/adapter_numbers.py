"""Which of vLLM's numbers are the adapter of one name: those without files, and those of files."""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Files", "Numbers"]

# Numbers of one adapter that are remembered: some callers make a new one for every request.
_KEPT_IDS = 256


@dataclass(frozen=True)
class Files:
    """Where an adapter was loaded from."""

    path: str
    read: Callable[[], Any]
    """Loads it again; returns vLLM's `LoRAModel`."""


class Numbers:
    """vLLM's numbers for the adapter of one name."""

    def __init__(self) -> None:
        self.without_files: list[int] = []
        # With what reads the files.
        self._of_files: dict[int, Files] = {}
        # Those of them that a sync has written: they aren't read from their files any more.
        self._written: set[int] = set()
        # Those whose place other files have taken, with their own files' path. Requests that have
        # waited since may still bring them back.
        self._old: dict[int, str] = {}

    @property
    def current(self) -> list[int]:
        """All that the next sync writes."""
        return [*self.without_files, *self._of_files]

    @property
    def synced(self) -> list[int]:
        """All that have what was received last."""
        return [*self.without_files, *(n for n in self._of_files if n in self._written)]

    def all_synced(self) -> list[int]:
        """A sync is written to all that are current, which are returned."""
        self._written.update(self._of_files)
        return self.current

    def known(self, number: int, files: Files | None) -> bool:
        """Whether it has come before, in that way."""
        if files is None:
            return number in self.without_files
        if number in self._of_files:
            # Perhaps from elsewhere.
            self._of_files[number] = files
        # An old number with other files than it had is a new adapter.
        return number in self and self._old.get(number, files.path) == files.path

    def add(
        self, number: int, files: Files | None, registered: Container[int]
    ) -> Mapping[int, Files]:
        """Take a new one, of whichever way.

        Args:
            number: the adapter's, which isn't known in that way.
            files: reads them; None without.
            registered: those that vLLM has at present: no other one is given up when there are too
                many.

        Returns:
            Those whose place it has taken and that a sync had written.
        """
        self.drop(number)
        replaced: dict[int, Files] = {}
        if files is not None:
            self._old |= {n: other.path for n, other in self._of_files.items()}
            replaced = {n: other for n, other in self._of_files.items() if n in self._written}
            self._of_files = {number: files}
            self._written.clear()
        else:
            self.without_files.append(number)
        for numbers in (self.without_files, list(self._old)):
            gone = [n for n in numbers[:-1] if n not in registered]
            for first in gone[: max(0, len(numbers) - _KEPT_IDS)]:
                self.drop(first)
        return replaced

    def drop(self, number: int) -> None:
        """It isn't this name's any more."""
        if number in self.without_files:
            self.without_files.remove(number)
        self._old.pop(number, None)
        self._of_files.pop(number, None)
        self._written.discard(number)

    def __contains__(self, number: int) -> bool:
        return any(number in n for n in (self.without_files, self._of_files, self._old))
