"""Functions of vLLM's that do something of ours too."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

__all__ = ["wrap"]

# Marks functions that are wrapped already.
_WRAPPED = "packedcomm_wrapped"


def wrap(owner: Any, name: str, around: Callable[..., Any]) -> None:
    """Put a function in the place of a method, which it is given to call. Idempotent.

    Args:
        owner: the class.
        name: of the method.
        around: called with the method, bound, the object, and the method's own arguments.
    """
    original = getattr(owner, name)
    if getattr(original, _WRAPPED, False):
        return

    @functools.wraps(original)
    def wrapper(self: Any, *arguments: Any, **options: Any) -> Any:
        return around(functools.partial(original, self), self, *arguments, **options)

    setattr(wrapper, _WRAPPED, True)
    setattr(owner, name, wrapper)
