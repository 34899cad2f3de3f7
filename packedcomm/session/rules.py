"""What a field of a message may hold: rules that are written into its annotation and checked."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from functools import cache
from typing import Any, get_args, get_type_hints

from packedcomm.errors import ProtocolError

__all__ = [
    "Checked",
    "Rule",
    "finite",
    "flag",
    "integer",
    "one_of",
    "short_bytes",
    "text",
    "tuple_of",
]

# What a rule finds wrong with a value; None is nothing.
Rule = Callable[[Any], str | None]


def integer(least: int, most: int) -> Rule:
    def rule(value: Any) -> str | None:
        if type(value) is int and least <= value <= most:
            return None
        return f"must be an integer in {least}..{most}"

    return rule


def text(most_bytes: int, least_bytes: int = 0) -> Rule:
    def rule(value: Any) -> str | None:
        if type(value) is not str:
            return "must be text"
        try:
            size = len(value.encode())
        except UnicodeEncodeError:
            return "is not valid text"
        if least_bytes <= size <= most_bytes:
            return None
        return f"has {size:,} bytes of UTF-8, {least_bytes} to {most_bytes:,} are allowed"

    return rule


def one_of(*choices: str) -> Rule:
    def rule(value: Any) -> str | None:
        if type(value) is str and value in choices:
            return None
        return f"must be one of {', '.join(choices)}"

    return rule


def finite(least: float) -> Rule:
    def rule(value: Any) -> str | None:
        if type(value) is float and math.isfinite(value) and value >= least:
            return None
        return "must be a finite number" if least < 0 else f"must be a finite number >= {least:g}"

    return rule


def flag(value: Any) -> str | None:
    return None if type(value) is bool else "must be true or false"


def short_bytes(most: int) -> Rule:
    def rule(value: Any) -> str | None:
        return None if type(value) is bytes and len(value) <= most else f"must be <= {most} bytes"

    return rule


def tuple_of(item: Rule, most: int, least: int = 0) -> Rule:
    def rule(value: Any) -> str | None:
        if type(value) is not tuple:
            return "must be a tuple"
        if not least <= len(value) <= most:
            return f"has {len(value):,} entries, {least} to {most:,} are allowed"
        for index, entry in enumerate(value):
            if problem := item(entry):
                return f"entry {index} {problem}"
        return None

    return rule


@cache
def _rules(kind: type) -> tuple[tuple[str, Rule], ...]:
    hints = get_type_hints(kind, include_extras=True)
    return tuple((field.name, get_args(hints[field.name])[1]) for field in fields(kind))


class Checked:
    """Checks every field by the rule in its annotation."""

    __slots__ = ()

    def __post_init__(self) -> None:
        kind: Any = type(self)
        for name, rule in _rules(kind):
            if problem := rule(getattr(self, name)):
                raise ProtocolError(f"{kind.__name__}.{name} {problem}")
        if problem := self.conflict():
            raise ProtocolError(f"{kind.__name__}: {problem}")

    def conflict(self) -> str | None:
        """What is wrong with the fields together, each being right for itself."""
        return None
