"""Ends a sync that waits for receivers whose engine has failed without their knowing."""

from __future__ import annotations

import threading

from packedcomm.errors import PackedCommError
from packedcomm.session import SenderSession

__all__ = ["Interruption"]

# How long the session is given to say by itself what has failed: it knows more.
_OWN_WORD_S = 0.5

# A report is lost where the session is just giving places in a new communicator.
_AGAIN_S = 0.02


class Interruption:
    """What may end one sync of a session from another thread.

    An engine's call can fail (a server's error, a lost connection) while its workers stay in the
    session, idle and well, so that the sync would wait for them up to its deadline. It then fails
    as by their own report: every receiver hears of it, and the session goes on.

    Args:
        session: the sender's.
    """

    def __init__(self, session: SenderSession) -> None:
        self._session = session
        self._over = threading.Event()
        self._lock = threading.Lock()
        self.error: PackedCommError | None = None
        """What the sync was ended with, if it was."""

    def end(self, error: PackedCommError) -> None:
        """End the sync with an error, unless it ends by itself within half a second. Returns when
        it is over. From any thread."""
        while not self._over.wait(_AGAIN_S if self.error is error else _OWN_WORD_S):
            with self._lock:
                if not self._over.is_set():
                    self.error = self.error or error
                    self._session.interrupt(error)

    def close(self, failed: BaseException | None) -> None:
        """The sync is over: nothing that was reported may reach the next one, and every receiver
        must know, also where the sender failed before it had said anything."""
        with self._lock:
            self._over.set()
        error = self.error or failed
        if error is not None:
            self._session.cancel(error)
