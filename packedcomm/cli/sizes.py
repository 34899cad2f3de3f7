"""Byte counts as people write them: parsing `1GiB`, printing `1.00 GiB`."""

from __future__ import annotations

import re

from packedcomm.errors import ArgumentError

__all__ = ["format_size", "parse_size"]

_UNITS = {"": 1, "B": 1}
for _power, _letter in enumerate("KMGT", start=1):
    _UNITS[f"{_letter}B"] = 1000**_power
    _UNITS[f"{_letter}IB"] = 1024**_power

_SIZE = re.compile(r"\s*(\d{1,18}(?:\.\d{1,9})?)\s*([A-Za-z]*)\s*", re.ASCII)


def parse_size(text: str) -> int:
    """Bytes of a size such as `1048576`, `64MiB`, `1.5 GiB` (powers of 1024) or `1GB` (of 1000).

    Raises:
        ArgumentError: the text isn't a number with a known unit, or isn't a whole number of bytes
            that is > 0.
    """
    match = _SIZE.fullmatch(text)
    unit = match and _UNITS.get(match[2].upper())
    if match is None or unit is None:
        raise ArgumentError(f"size {text!r} is not a number with a unit such as 64MiB or 1GB")
    nbytes = float(match[1]) * unit if "." in match[1] else int(match[1]) * unit
    if nbytes < 1 or nbytes != int(nbytes):
        raise ArgumentError(f"size {text!r} is not a whole number of bytes that is > 0")
    return int(nbytes)


def format_size(nbytes: int) -> str:
    """A byte count in the largest binary unit that keeps it >= 1, with three digits or more."""
    if nbytes < 1024:
        return f"{nbytes} B"
    size = float(nbytes)
    for unit in ("KiB", "MiB", "GiB"):
        size /= 1024
        if size < 1024:
            return f"{size:.2f} {unit}"
    return f"{size / 1024:.2f} TiB"
