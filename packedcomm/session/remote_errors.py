"""Errors that cross from one process to another: as kind, text and traceback, and back."""

from __future__ import annotations

import traceback
from collections.abc import Mapping, Sequence

from packedcomm import errors
from packedcomm.errors import (
    ContextLost,
    PackedCommError,
    PeerLost,
    RemoteError,
    SessionStateError,
    listed,
    summary,
    text_of,
)
from packedcomm.session.messages import Cancel, Failure, Refused

__all__ = ["combined", "described", "remote_error", "valid_text"]

# In bytes of UTF-8, as messages count them.
MAX_KIND = 64
MAX_TEXT = 16_384
MAX_TRACEBACK = 65_536

# Errors that mean the end of the process or the object that raises them, so that whoever hears of
# them must not take them for its own.
_OF_ONE_PROCESS: dict[type[PackedCommError], type[PackedCommError]] = {
    ContextLost: PeerLost,
    SessionStateError: RemoteError,
}


def described(error: BaseException, frame_bytes: int) -> tuple[str, str, str]:
    """Kind, text and traceback of an error, as `Failure` and `Cancel` take them.

    An error of another library keeps its class name in the text: only packedcomm's classes are made
    again on the other side.

    Args:
        error: any.
        frame_bytes: what the message may have at most; text and traceback are cut to fit.
    """
    ours = isinstance(error, PackedCommError)
    kind = type(error).__name__ if ours else RemoteError.__name__
    text = text_of(error) if ours else summary(error)
    lines = "".join(traceback.format_exception(error)).encode("utf-8", "backslashreplace")
    end = lines[-min(MAX_TRACEBACK, frame_bytes // 2) :].decode("utf-8", "ignore")
    return valid_text(kind, MAX_KIND), valid_text(text, min(MAX_TEXT, frame_bytes // 4)), end


def valid_text(text: str, most_bytes: int = MAX_TEXT) -> str:
    """A text as a message may hold it: file names may have bytes that are no text, and what
    replaces them is longer."""
    return text.encode("utf-8", "backslashreplace")[:most_bytes].decode("utf-8", "ignore")


def remote_error(said: Failure | Cancel | Refused, who: str) -> PackedCommError:
    """The error that another process has described.

    Args:
        said: the description.
        who: the process, put before the text.

    Returns:
        An error of the same class where it is one of packedcomm's, else a `RemoteError`. What
        speaks of that process's own end is `PeerLost`, or `RemoteError` for an object's state. Its
        cause is a `RemoteError` with the other side's traceback, where that came.
    """
    found = getattr(errors, said.kind, None) if said.kind in errors.__all__ else None
    is_error = isinstance(found, type) and issubclass(found, PackedCommError)
    kind: type[PackedCommError] = found if is_error and found else RemoteError
    text = f"{who}: {said.text}"
    if kind in _OF_ONE_PROCESS:
        text = f"{who}: {said.kind}: {said.text}"
        kind = _OF_ONE_PROCESS[kind]
    error = kind(text)
    if not isinstance(said, Refused) and said.traceback:
        error.__cause__ = RemoteError(f"traceback of {who}:\n{said.traceback}")
    return error


def combined(failures: Mapping[int, PackedCommError]) -> PackedCommError:
    """One error for those of several ranks, which are listed in its text.

    It has the class of the first one that isn't `PeerLost`: losing each other is what the other
    ranks see when one has failed.
    """
    ordered: Sequence[PackedCommError] = [failures[rank] for rank in sorted(failures)]
    if len(ordered) == 1:
        return ordered[0]
    first = next((e for e in ordered if not isinstance(e, PeerLost)), ordered[0])
    error = type(first)(listed([str(e) for e in (first, *(e for e in ordered if e is not first))]))
    causes = [str(e.__cause__) for e in ordered if e.__cause__ is not None]
    if causes:
        error.__cause__ = RemoteError("\n".join(causes))
    return error
