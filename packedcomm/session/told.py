"""What a receiver's end has told the senders of its session, which they needn't be told again."""

from __future__ import annotations

import weakref

__all__ = ["Told"]

# Told and remembered; whatever is forgotten is told again.
_MOST = 64


class Told:
    """By sender and manifest: the object for whose regions that sender takes those held here.

    Of one session, since several receivers may use it; by sender, since one doesn't know what
    another has been told. Objects are referred to weakly.
    """

    def __init__(self) -> None:
        self._told: weakref.WeakValueDictionary[tuple[int, str], object]
        self._told = weakref.WeakValueDictionary()

    def note(self, sender: int, digest: str, held: object) -> bool:
        """A sender knows of this from now on; whether it took something else to be held."""
        key = (sender, digest)
        if self._told.get(key) is held:
            return False
        if len(self._told) >= _MOST:
            self._told.pop(next(iter(self._told.keys())), None)
        self._told[key] = held
        return True

    def forget(self, sender: int, digest: str) -> None:
        """A sender forgets what it has been told of a manifest."""
        self._told.pop((sender, digest), None)
