"""Types of the fields of control messages, each with the rule that its values must keep."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Any

from packedcomm.errors import ManifestError
from packedcomm.manifest import DTYPE_SIZES, checked_nbytes
from packedcomm.results import ChangeStatistics
from packedcomm.session.rules import Checked, finite, integer, one_of, text, tuple_of
from packedcomm.settings import DEFAULTS

__all__ = [
    "MOST",
    "UNIQUE_ID_BYTES",
    "Changes",
    "Count",
    "LongText",
    "Region",
    "Regions",
    "Seconds",
    "ShortText",
    "Version",
]

MOST = (1 << 63) - 1
UNIQUE_ID_BYTES = 128

_tensor_name = text(DEFAULTS.max_name_bytes, 1)
_count = integer(0, MOST)


def _changes(value: Any) -> str | None:
    if type(value) is not dict or len(value) > DEFAULTS.max_tensors:
        return f"must map at most {DEFAULTS.max_tensors:,} names to ChangeStatistics"
    for name, change in value.items():
        if problem := _tensor_name(name):
            return f"name {problem}"
        if type(change) is not ChangeStatistics:
            return f"{name!r:.80} must have ChangeStatistics"
        # Weights may hold NaN and infinity, and so may what is computed from them.
        if any(type(n) is not float for n in (change.mean, change.std, change.maximum)):
            return f"{name!r:.80} must have three floats"
        if problem := _count(change.elements):
            return f"{name!r:.80} elements {problem}"
    return None


Count = Annotated[int, _count]
Version = Annotated[int, integer(-MOST, MOST)]
ShortText = Annotated[str, text(4096)]
LongText = Annotated[str, text(1 << 18)]
Extents = Annotated[tuple[int, ...], tuple_of(_count, DEFAULTS.max_dimensions)]


@dataclass(frozen=True, slots=True)
class Region(Checked):
    """A box of a tensor as a receiver holds it, whose bytes are to be digested.

    Raises:
        ProtocolError: the box is malformed.
    """

    tensor: Count
    """Index in the manifest."""

    offset: Extents
    """Index in the tensor of the box's first element."""

    shape: Extents
    """The box's shape, as many dimensions as the offset."""

    dtype: Annotated[str, one_of(*DTYPE_SIZES)]
    """Dtype of the receiver's memory, a name of `DTYPE_SIZES`."""

    scale: Annotated[float, finite(-math.inf)]
    """Factor that is applied on the way there; 1.0 leaves bytes as they are."""

    def conflict(self) -> str | None:
        if len(self.offset) != len(self.shape):
            return f"offset has {len(self.offset)} dimensions, shape {len(self.shape)}"
        try:
            checked_nbytes(self.shape, self.dtype)
        except ManifestError as error:
            return str(error)
        if any(o + s > MOST for o, s in zip(self.offset, self.shape, strict=True)):
            return "offset + shape overflows 63 bits"
        return None


def _region(value: Any) -> str | None:
    # It has checked itself when it was made.
    return None if type(value) is Region else "must be a Region"


_all_regions = tuple_of(_region, DEFAULTS.max_tensors)


def _regions(value: Any) -> str | None:
    return None if value is None else _all_regions(value)


Regions = Annotated[tuple[Region, ...] | None, _regions]
Seconds = Annotated[float, finite(0.0)]
Changes = Annotated[dict[str, ChangeStatistics], _changes]
