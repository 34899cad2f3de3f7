"""How an error of packedcomm's passes through vLLM, which keeps nothing of one but its text.

A worker's exception reaches vLLM's caller as text inside another exception or an HTTP body. The
text of ours therefore names the class, in a form that is found wherever vLLM puts it.
"""

from __future__ import annotations

import re

from packedcomm import errors
from packedcomm.errors import ContextLost, PackedCommError, PeerLost, RemoteError

__all__ = ["marked", "unmarked"]

_MARK = re.compile(r"\[packedcomm:(\w{1,64})\] ?")

# What vLLM's executor of several workers puts after a worker's text (0.25 to 0.33).
_AFTER = re.compile(r"'?, please check the stack trace above for the root cause.*\Z", re.DOTALL)


def marked(error: BaseException) -> str:
    """An error as text that `unmarked` makes the error of again: `[packedcomm:Class] message`.

    An error that isn't packedcomm's becomes a `RemoteError` whose message has its class. A text
    that is marked already stays as it is.
    """
    text = str(error)
    if isinstance(error, PackedCommError):
        return f"[packedcomm:{type(error).__name__}] {text}"
    if _MARK.search(text):
        return text
    return f"[packedcomm:{RemoteError.__name__}] {type(error).__name__}: {text}"


def unmarked(text: str) -> PackedCommError | None:
    """The error in a text that vLLM has passed on.

    Where one error's text is quoted in another's, the innermost counts.

    Args:
        text: of an exception, or of an HTTP body.

    Returns:
        An error of the class that is named; a `RemoteError` if packedcomm has no such class; for
        `ContextLost`, which is about the worker's process, `PeerLost`. None if nothing in the text
        is marked.
    """
    marks = list(_MARK.finditer(text))
    if not marks:
        return None
    name, message = marks[-1][1], _AFTER.sub("", text[marks[-1].end() :])
    found = getattr(errors, name, None) if name in errors.__all__ else None
    if found is ContextLost:
        return PeerLost(f"{name}: {message}")
    if isinstance(found, type) and issubclass(found, PackedCommError):
        return found(message)
    return RemoteError(f"{name}: {message}")
