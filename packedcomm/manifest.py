"""`TensorSpec` and `Manifest`: what is sent, described, validated and digested without any
tensor."""

from __future__ import annotations

import hashlib
import json
import math
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from types import MappingProxyType
from typing import Any

from packedcomm.errors import ArgumentError, ManifestError, TensorError
from packedcomm.settings import DEFAULTS, LOWERED, Settings

__all__ = ["DTYPE_SIZES", "Manifest", "TensorSpec", "checked_nbytes", "dtype_name", "named_pairs"]

# Names are torch's, without the "torch." prefix; sizes are in bytes. Quantised and sub-byte types
# have no byte-exact row-major form and are left out on purpose.
DTYPE_SIZES: dict[str, int] = {
    "bool": 1,
    "uint8": 1,
    "int8": 1,
    "uint16": 2,
    "int16": 2,
    "uint32": 4,
    "int32": 4,
    "uint64": 8,
    "int64": 8,
    "float8_e4m3fn": 1,
    "float8_e4m3fnuz": 1,
    "float8_e5m2": 1,
    "float8_e5m2fnuz": 1,
    "float8_e8m0fnu": 1,
    "float16": 2,
    "bfloat16": 2,
    "float32": 4,
    "float64": 8,
    "complex32": 4,
    "complex64": 8,
    "complex128": 16,
}

_MAX_BYTES = (1 << 63) - 1

# Deeper than any attributes of ours, and far from where JSON's recursion ends.
_MAX_NESTING = 32

# For messages: what is wrong may be of any size and depth.
_SHORT = reprlib.Repr()
_SHORT.maxtuple = _SHORT.maxlist = 16
_SHORT.maxstring = _SHORT.maxother = 80


def named_pairs(tensors: Any) -> Iterator[tuple[str, Any]]:
    """The names and tensors of a mapping, or of an iterable of `(name, tensor)`.

    Raises:
        ArgumentError: it is neither.
    """
    pairs = tensors.items() if hasattr(tensors, "items") else tensors
    if not isinstance(pairs, Iterable):
        raise ArgumentError(f"expected named tensors, got {type(tensors).__name__}")
    for pair in pairs:
        try:
            name, tensor = pair
        except (TypeError, ValueError):
            raise ArgumentError(
                f"expected pairs of a name and a tensor, got {type(pair).__name__}"
            ) from None
        yield name, tensor


def _shown(value: Any) -> str:
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python writes no integers of thousands of digits
        return f"{type(value).__name__} with an integer that is too long to show"


def _nested_deeper(value: Any, most: int) -> bool:
    level = [value]
    for _ in range(most):
        inner = [outer.values() if isinstance(outer, dict) else outer for outer in level]
        level = [entry for outer in inner for entry in outer if isinstance(entry, dict | list)]
    return bool(level)


@lru_cache(maxsize=4096)
def dtype_name(dtype: Any) -> str:
    """The manifest's name of a torch dtype or of a dtype name, with or without `torch.`.

    Raises:
        ManifestError: the dtype isn't one of `DTYPE_SIZES`.
    """
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPE_SIZES:
        raise ManifestError(
            f"unknown or unsupported dtype {_shown(str(dtype))}; known: {', '.join(DTYPE_SIZES)}"
        )
    return name


def checked_nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    """Bytes of a dense tensor of this shape and dtype.

    Args:
        shape: dimensions, each >= 0.
        dtype: a torch dtype or its name.

    Raises:
        ManifestError: a dimension isn't an integer >= 0, there are too many of them, the byte count
            doesn't fit 63 bits, or the dtype is unknown.
    """
    # Outside the cache, which takes True and 1.0 for 1.
    for dimension in shape:
        if type(dimension) is not int:
            raise ManifestError(
                f"shape {_shown(shape)}: dimension {_shown(dimension)} is not an integer >= 0"
            )
    return _nbytes(shape, dtype)


@lru_cache(maxsize=65536)
def _nbytes(shape: tuple[int, ...], dtype: Any) -> int:
    itemsize = DTYPE_SIZES[dtype_name(dtype)]
    if len(shape) > DEFAULTS.max_dimensions:
        raise ManifestError(
            f"shape has {len(shape)} dimensions, at most {DEFAULTS.max_dimensions} are allowed"
        )
    for dimension in shape:
        if dimension < 0:
            raise ManifestError(
                f"shape {_shown(shape)}: dimension {_shown(dimension)} is not an integer >= 0"
            )
    # Strides of a tensor with a zero-sized dimension are computed from the others, so these must
    # not overflow either.
    extent = math.prod(d for d in shape if d) * itemsize
    if extent > _MAX_BYTES:
        raise ManifestError(
            f"shape {_shown(shape)} of {dtype_name(dtype)} overflows 63 bits of bytes"
        )
    return 0 if 0 in shape else extent


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor: its name, dtype name (torch's, without prefix) and shape.

    Raises:
        ManifestError: the name is empty, not text or too long, the dtype is unknown, or the shape
            is negative or overflows; the message names the tensor.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.name, str) or not self.name:
            raise ManifestError(f"tensor name must be a non-empty string, got {_shown(self.name)}")
        try:
            size = len(self.name.encode())
        except UnicodeEncodeError:
            raise ManifestError(f"tensor name {_shown(self.name)} is not valid text") from None
        if size > DEFAULTS.max_name_bytes:
            raise ManifestError(
                f"tensor name {self.name[:60]!r}... has {size} bytes, "
                f"at most {DEFAULTS.max_name_bytes} are allowed"
            )
        try:
            object.__setattr__(self, "dtype", dtype_name(self.dtype))
            object.__setattr__(self, "shape", tuple(self.shape))
            checked_nbytes(self.shape, self.dtype)
        except (TypeError, ValueError) as error:
            raise ManifestError(f"tensor {self.name!r}: {error}") from None

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor's elements in row-major order."""
        return checked_nbytes(self.shape, self.dtype)


def _spec_of(name: str, tensor: Any) -> TensorSpec:
    try:
        dtype, shape = tensor.dtype, tensor.shape
    except AttributeError:
        raise TensorError(f"{name!r}: expected a tensor, got {type(tensor).__name__}") from None
    return TensorSpec(name, str(dtype), tuple(shape))


class Manifest:
    """An ordered, validated list of tensors with unique names. Immutable; equal by content.

    Iterating yields `(name, (shape, dtype))` with dtype as a name, which is what
    `broadcast_consumer` takes.

    Args:
        specs: the tensors in the order in which they are sent.
        attributes: what else both sides must agree on, as plain JSON values by name: `transforms`
            that the sender applies, and `lora` for an adapter (see `packedcomm.sources`). Part of
            the digest.

    Raises:
        ManifestError: a name occurs twice (all such names are listed, up to ten), there are more
            entries than `Settings.max_tensors`, or the attributes aren't JSON of at most 32 levels.
    """

    def __init__(
        self, specs: Iterable[TensorSpec], attributes: Mapping[str, Any] | None = None
    ) -> None:
        self.specs: tuple[TensorSpec, ...] = tuple(specs)
        try:
            self._attributes = json.dumps(dict(attributes or {}), allow_nan=False, sort_keys=True)
            deep = _nested_deeper(self.attributes, _MAX_NESTING)
        except (TypeError, ValueError, RecursionError) as error:
            raise ManifestError(f"manifest attributes are not JSON: {error}") from None
        if deep:
            raise ManifestError(f"manifest attributes nest deeper than {_MAX_NESTING} levels")
        if len(self.specs) > DEFAULTS.max_tensors:
            raise ManifestError(
                f"manifest has {len(self.specs)} tensors, "
                f"at most {DEFAULTS.max_tensors} are allowed"
            )
        counts = Counter(spec.name for spec in self.specs)
        if len(counts) != len(self.specs):
            twice = [name for name, count in counts.items() if count > 1]
            more = f" and {len(twice) - 10} more" if len(twice) > 10 else ""
            raise ManifestError(f"duplicate tensor names: {', '.join(twice[:10])}{more}")

    @classmethod
    def from_tensors(cls, tensors: Any, attributes: Mapping[str, Any] | None = None) -> Manifest:
        """Describe tensors.

        Args:
            tensors: a mapping of names to tensors, or an iterable of `(name, tensor)`; anything
                with `dtype` and `shape` is a tensor here, nothing is read from its memory.
            attributes: as for the constructor.

        Raises:
            ArgumentError: that isn't what `tensors` is.
            TensorError: one has no dtype or shape.
            ManifestError: as the constructors'.
        """
        return cls((_spec_of(name, tensor) for name, tensor in named_pairs(tensors)), attributes)

    @classmethod
    def from_lists(
        cls,
        names: Sequence[str],
        dtype_names: Sequence[str],
        shapes: Sequence[Sequence[int]],
    ) -> Manifest:
        """Build from three lists of equal length, the form of vLLM's update request.

        Raises:
            ManifestError: the lengths differ, or an entry is invalid.
        """
        if not len(names) == len(dtype_names) == len(shapes):
            raise ManifestError(
                f"names, dtype_names and shapes must have equal lengths, "
                f"got {len(names)}, {len(dtype_names)} and {len(shapes)}"
            )
        return cls(
            TensorSpec(name, dtype, shape)  # type: ignore[arg-type]  # made a tuple there
            for name, dtype, shape in zip(names, dtype_names, shapes, strict=True)
        )

    @cached_property
    def digest(self) -> str:
        """SHA-256, in hex, of `to_json()`: equal digests mean equal manifests."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    @property
    def attributes(self) -> dict[str, Any]:
        """A copy of what was given, as JSON has it: tuples have become lists."""
        attributes: dict[str, Any] = json.loads(self._attributes)
        return attributes

    @cached_property
    def by_name(self) -> Mapping[str, TensorSpec]:
        """The specs by name, in order."""
        return MappingProxyType({spec.name: spec for spec in self.specs})

    @cached_property
    def nbytes(self) -> int:
        """Bytes of all tensors together."""
        return sum(spec.nbytes for spec in self.specs)

    def check_limits(self, settings: Settings) -> None:
        """Refuse what is more than these settings allow; the defaults hold for every manifest.

        Raises:
            ManifestError: there are too many tensors, or a name or a shape is too long.
        """
        if all(getattr(settings, name) >= getattr(DEFAULTS, name) for name in LOWERED):
            return
        if len(self.specs) > settings.max_tensors:
            raise ManifestError(
                f"manifest has {len(self.specs)} tensors, at most {settings.max_tensors} are "
                "allowed (Settings.max_tensors)"
            )
        for spec in self.specs:
            if len(spec.name.encode()) > settings.max_name_bytes:
                raise ManifestError(
                    f"tensor {spec.name!r:.200}: the name has more than {settings.max_name_bytes} "
                    "bytes of UTF-8 (Settings.max_name_bytes)"
                )
            if len(spec.shape) > settings.max_dimensions:
                raise ManifestError(
                    f"tensor {spec.name!r:.200}: shape has {len(spec.shape)} dimensions, at most "
                    f"{settings.max_dimensions} are allowed (Settings.max_dimensions)"
                )

    def to_json(self) -> str:
        """Canonical JSON: the same manifest always gives the same text."""
        rows = [[spec.name, spec.dtype, list(spec.shape)] for spec in self.specs]
        document = {"attributes": self.attributes, "tensors": rows, "version": 1}
        return json.dumps(document, separators=(",", ":"), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Manifest:
        """Read what `to_json` wrote.

        Raises:
            ManifestError: the text isn't JSON, has another version, or an entry is malformed (the
                message gives its index).
        """
        try:
            document = json.loads(text)
        except (TypeError, ValueError, RecursionError) as error:
            raise ManifestError(f"manifest is not valid JSON: {error}") from None
        if not isinstance(document, dict) or set(document) != {"attributes", "tensors", "version"}:
            raise ManifestError(
                'manifest must be an object with "attributes", "tensors" and "version"'
            )
        if not isinstance(document["attributes"], dict):
            raise ManifestError('manifest "attributes" must be an object')
        if type(document["version"]) is not int or document["version"] != 1:
            raise ManifestError(f"manifest version {_shown(document['version'])}, expected 1")
        rows = document["tensors"]
        if not isinstance(rows, list):
            raise ManifestError(f'manifest "tensors" must be a list, got {type(rows).__name__}')
        specs = []
        for index, row in enumerate(rows):
            match row:
                case [str(name), str(dtype), list(shape)]:
                    specs.append(TensorSpec(name, dtype, tuple(shape)))
                case _:
                    raise ManifestError(f"manifest entry {index} is not [name, dtype, shape]")
        return cls(specs, document["attributes"])

    def __iter__(self) -> Iterator[tuple[str, tuple[tuple[int, ...], str]]]:
        for spec in self.specs:
            yield spec.name, (spec.shape, spec.dtype)

    def __len__(self) -> int:
        return len(self.specs)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Manifest)
            and self.specs == other.specs
            and self._attributes == other._attributes
        )

    def __hash__(self) -> int:
        return hash(self.digest)

    def __repr__(self) -> str:
        return f"Manifest({len(self)} tensors, {self.nbytes:,} bytes, digest {self.digest[:12]})"
