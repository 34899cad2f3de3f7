"""Declared transforms: what a source changes on the way from the trainer's tensors to the wire."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from packedcomm.copying import CASTABLE
from packedcomm.errors import ArgumentError, ManifestError, listed
from packedcomm.manifest import dtype_name
from packedcomm.planning.rotary import RotaryDirection
from packedcomm.sources.entries import Entry, check_names
from packedcomm.sources.rotary import permuted_entry

__all__ = [
    "Cast",
    "Filter",
    "NamePatterns",
    "Rename",
    "RotaryPermutation",
    "Selection",
]

Selection = str | Sequence[str] | Callable[[str], bool]
"""Which names: a glob pattern, several, or a function of the name."""


class NamePatterns:
    """A selection, and which of its patterns have matched nothing yet.

    Globs are those of `fnmatch`, case matters: `*` also matches dots.

    Raises:
        ArgumentError: the selection is empty or of another type.
    """

    def __init__(self, selection: Selection) -> None:
        self._function: Callable[[str], bool] | None = None
        self.patterns: tuple[str, ...] = ()
        if isinstance(selection, str):
            self.patterns = (selection,)
        elif callable(selection):
            self._function = selection
        else:
            self.patterns = tuple(selection)
            if not self.patterns or not all(isinstance(p, str) for p in self.patterns):
                raise ArgumentError(
                    f"expected a pattern, patterns or a function of names, got {selection!r}"
                )
        self._compiled = [re.compile(fnmatch.translate(p)) for p in self.patterns]
        self._unused = set(self.patterns)

    def matches(self, name: str) -> bool:
        """Whether the selection has this name; every pattern is tried."""
        if self._function is not None:
            return bool(self._function(name))
        found = False
        for pattern, compiled in zip(self.patterns, self._compiled, strict=True):
            if compiled.match(name):
                self._unused.discard(pattern)
                found = True
        return found

    def check_used(self, what: str) -> None:
        """Raise ManifestError, listing all, when patterns matched no name so far."""
        unused = [p for p in self.patterns if p in self._unused]
        if unused:
            raise ManifestError(listed([f"{what}: pattern {p!r} matches no name" for p in unused]))

    def to_json(self) -> list[str] | str:
        """The patterns; what a function selects is seen in the tensors only."""
        return "function" if self._function is not None else list(self.patterns)


def _frozen(selection: Selection | None) -> Selection | None:
    if selection is None:
        return None
    NamePatterns(selection)
    return selection if isinstance(selection, str) or callable(selection) else tuple(selection)


@dataclass(frozen=True, slots=True)
class Cast:
    """Send floats in another dtype, such as float32 master weights as bfloat16.

    Values are rounded once, to nearest even, from the memory's dtype to the last `Cast`'s. Only
    `CASTABLE` dtypes are cast: integers, bools, complex and 8-bit floats stay as they are.

    Args:
        dtype: a torch dtype or its name, one of `CASTABLE`.
        only: names to cast; None for all.

    Raises:
        ArgumentError: the dtype isn't castable, or `only` isn't a selection.
    """

    dtype: str
    only: Selection | None = None

    def __post_init__(self) -> None:
        name = str(self.dtype).removeprefix("torch.")
        if name not in CASTABLE:
            raise ArgumentError(f"can't cast to {name!r}, expected one of {', '.join(CASTABLE)}")
        object.__setattr__(self, "dtype", dtype_name(name))
        object.__setattr__(self, "only", _frozen(self.only))

    def apply(self, entries: list[Entry], left_out: list[str]) -> list[Entry]:  # noqa: ARG002
        """See `Transform`."""
        only = None if self.only is None else NamePatterns(self.only)
        cast = []
        for entry in entries:
            # All names are tried, so that every pattern that fits one counts as used.
            selected = only is None or sum(only.matches(name) for name in entry.names) > 0
            castable = selected and entry.dtype in CASTABLE
            cast.append(replace(entry, dtype=self.dtype) if castable else entry)
        if only is not None:
            only.check_used("Cast")
        return cast

    def to_json(self) -> dict[str, Any]:
        """See `Transform`."""
        only = None if self.only is None else NamePatterns(self.only).to_json()
        return {"kind": "cast", "dtype": self.dtype, "only": only}


@dataclass(frozen=True, slots=True)
class Rename:
    """Send tensors under other names; tied names are renamed too.

    Args:
        names: the new name by old name, or a function of the old name.
        strict: whether a mapping must have every name; otherwise names it lacks are kept.

    Raises:
        ArgumentError: `names` is neither a mapping nor a function.
    """

    names: Mapping[str, str] | Callable[[str], str]
    strict: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.names, Mapping) and not callable(self.names):
            raise ArgumentError(f"expected a mapping or a function of names, got {self.names!r}")

    def apply(self, entries: list[Entry], left_out: list[str]) -> list[Entry]:  # noqa: ARG002
        """See `Transform`."""
        problems = []
        before = [name for entry in entries for name in entry.names]
        if isinstance(self.names, Mapping):
            known = set(before)
            problems = [f"Rename: no tensor is named {n!r}" for n in self.names if n not in known]
            if self.strict:
                problems += [
                    f"Rename: no new name for {n!r}" for n in before if n not in self.names
                ]
            after = {name: self.names.get(name, name) for name in before}
        else:
            after = {name: self.names(name) for name in before}
        problems += [
            f"Rename: {old!r} became {new!r}, expected a non-empty name"
            for old, new in after.items()
            if not isinstance(new, str) or not new
        ]
        if problems:
            raise ManifestError(listed(problems))
        renamed = [_renamed(entry, after) for entry in entries]
        _check_collisions(entries, renamed, after)
        return renamed

    def to_json(self) -> dict[str, Any]:
        """See `Transform`. The new names themselves are in the manifest."""
        return {"kind": "rename"}


def _renamed(entry: Entry, after: Mapping[str, str]) -> Entry:
    # Tied names that become one name are still the same tensor: no collision.
    originals: dict[str, str] = {}
    for name, original in zip(entry.names, entry.originals or entry.names, strict=True):
        originals.setdefault(after[name], original)
    return replace(entry, names=tuple(originals), originals=tuple(originals.values()))


def _check_collisions(
    entries: Iterable[Entry], renamed: list[Entry], after: Mapping[str, str]
) -> None:
    try:
        check_names(renamed)
    except ManifestError:
        sources: dict[str, dict[int, str]] = {}
        for entry in entries:
            for name in entry.names:
                sources.setdefault(after[name], {}).setdefault(entry.origin, name)
        raise ManifestError(
            listed(
                [
                    f"Rename: {', '.join(map(repr, old.values()))} all became {new!r}"
                    for new, old in sources.items()
                    if len(old) > 1
                ]
            )
        ) from None


@dataclass(frozen=True, slots=True)
class Filter:
    """Send some of the tensors; the other names are the snapshot's `left_out`.

    A tensor with tied names is sent as long as one of them is kept.

    Args:
        keep: which names to send.

    Raises:
        ArgumentError: `keep` isn't a selection.
    """

    keep: Selection

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", _frozen(self.keep))

    def apply(self, entries: list[Entry], left_out: list[str]) -> list[Entry]:
        """See `Transform`."""
        patterns = NamePatterns(self.keep)
        kept_entries = []
        for entry in entries:
            kept = {name: patterns.matches(name) for name in entry.names}
            left_out.extend(name for name, keep in kept.items() if not keep)
            if any(kept.values()):
                pairs = zip(entry.names, entry.originals or entry.names, strict=True)
                originals = {name: original for name, original in pairs if kept[name]}
                kept_entries.append(
                    replace(entry, names=tuple(originals), originals=tuple(originals.values()))
                )
        patterns.check_used("Filter")
        return kept_entries

    def to_json(self) -> dict[str, Any]:
        """See `Transform`."""
        return {"kind": "filter", "keep": NamePatterns(self.keep).to_json()}


@dataclass(frozen=True, slots=True)
class RotaryPermutation:
    """Reorder the rows of query and key projections between two conventions of rotary embeddings.

    Meta's checkpoints rotate neighbouring rows of a head, Hugging Face's the two halves. With head
    size d, row 2i+s of a head in Meta's order is row s*d/2+i in Hugging Face's. Weights, biases,
    rows of LoRA's B and DoRA's magnitudes are reordered; LoRA's A and value projections never are.

    Args:
        num_heads: query heads.
        num_kv_heads: key heads.
        direction: `"meta_to_hf"` or `"hf_to_meta"`.
        q: names of query projections, matched as the last components of a module's name.
        k: names of key projections, likewise.

    Raises:
        ArgumentError: a count isn't an integer > 0, or the direction is unknown.
    """

    num_heads: int
    num_kv_heads: int
    direction: RotaryDirection = "meta_to_hf"
    q: Sequence[str] = ("q_proj", "wq")
    k: Sequence[str] = ("k_proj", "wk")
    _rows: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        for name in ("num_heads", "num_kv_heads"):
            count = getattr(self, name)
            if type(count) is not int or count <= 0:
                raise ArgumentError(f"{name} must be an integer > 0, got {count!r}")
        if self.direction not in ("meta_to_hf", "hf_to_meta"):
            raise ArgumentError(
                f"direction must be 'meta_to_hf' or 'hf_to_meta', got {self.direction!r}"
            )
        for name in ("q", "k"):
            value = getattr(self, name)
            object.__setattr__(self, name, (value,) if isinstance(value, str) else tuple(value))

        def either(names: Sequence[str]) -> str:
            return "|".join(map(re.escape, names)) or "(?!)"

        pattern = rf"(?:.*\.)?(?:(?P<q>{either(self.q)})|(?P<k>{either(self.k)}))\.(?P<rest>.+)"
        object.__setattr__(self, "_rows", re.compile(pattern))

    def apply(self, entries: list[Entry], left_out: list[str]) -> list[Entry]:  # noqa: ARG002
        """See `Transform`."""
        permuted = []
        for entry in entries:
            match = next(filter(None, map(self._rows.fullmatch, entry.names)), None)
            if match is not None:
                heads = self.num_heads if match["q"] else self.num_kv_heads
                entry = permuted_entry(entry, match["rest"], heads, self.direction)
            permuted.append(entry)
        if all(new is old for new, old in zip(permuted, entries, strict=True)):
            projections = ", ".join((*self.q, *self.k))
            raise ManifestError(f"RotaryPermutation: no tensor belongs to any of {projections}")
        return permuted

    def to_json(self) -> dict[str, Any]:
        """See `Transform`."""
        return {
            "kind": "rotary_permutation",
            "num_heads": self.num_heads,
            "num_kv_heads": self.num_kv_heads,
            "direction": self.direction,
            "q": list(self.q),
            "k": list(self.k),
        }
