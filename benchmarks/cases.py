"""Benchmark cases: model shapes, cut to the memory at hand by dropping whole layers or experts."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.planning.model_shapes import model_shape

__all__ = ["CASES", "EXPERTS", "TINY_EXPERTS", "Case", "load_case", "parse_size", "tiny_experts"]

CASES = (
    "llama-3-8b-lora-r16",
    "llama-3-8b",
    "qwen3-30b-a3b-experts",
    "qwen3-0.6b",
    "minilm",
)
"""Names of `model_shapes`, most important first: that is the order in which they are run."""

EXPERTS = "qwen3-30b-a3b-experts"
TINY_EXPERTS = f"{EXPERTS}-tiny"

_Part = tuple[int, int]
"""What is dropped as a whole: (layer, expert), or (layer, -1) for what is in no expert."""

_PART = re.compile(r"\.layers?\.(\d+)\.(?:mlp\.experts\.(\d+)\.)?")
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([kKMGT]?)(i?)B?")


@dataclass(frozen=True, slots=True)
class Case:
    """A model's tensors, or as many of its whole layers and experts as fit."""

    name: str
    manifest: Manifest
    """What is sent."""
    model_tensors: int
    """Tensors of the whole model."""
    model_nbytes: int
    """Bytes of the whole model."""

    def as_dict(self) -> dict[str, Any]:
        """For the JSON: what was sent and how much of the model that is."""
        return {
            "case": self.name,
            "tensors": len(self.manifest),
            "nbytes": self.manifest.nbytes,
            "model_tensors": self.model_tensors,
            "model_nbytes": self.model_nbytes,
            "kept": round(self.manifest.nbytes / self.model_nbytes, 4),
            "manifest_digest": self.manifest.digest,
        }


def load_case(name: str, *, max_bytes: int | None = None, scale: float = 1.0) -> Case:
    """Build a case of at most `max_bytes` and at most `scale` of the model's bytes.

    No tensor is ever shrunk. Whole layers are dropped from the last one on; of a layer of experts,
    whole experts. Where not even the first layer or expert fits beside the tensors outside of all
    layers (embeddings, head, last norm), these are dropped instead and as many layers are kept as
    fit.

    Args:
        name: a name of `packedcomm.planning.model_shapes`.
        max_bytes: limit in bytes; None for none.
        scale: limit as a fraction of the model's bytes, in (0, 1].

    Raises:
        ValueError: `scale` is out of range, or a single layer or expert is larger than the limit
            (the message gives its size).
        ArgumentError: the name is unknown.
    """
    if not 0 < scale <= 1:
        raise ValueError(f"scale must be in (0, 1], got {scale!r}")
    model = model_shape(name)
    limit = int(model.nbytes * scale)
    if max_bytes is not None:
        limit = min(limit, max_bytes)
    sizes: dict[_Part, int] = {}
    outside = 0
    for spec in model.specs:
        part = _part_of(spec)
        if part is None:
            outside += spec.nbytes
        else:
            sizes[part] = sizes.get(part, 0) + spec.nbytes
    first = sizes[min(sizes)]
    if first > limit:
        raise ValueError(
            f"case {name!r}: one layer or expert has {first:,} bytes, the limit is {limit:,} bytes"
        )
    keep_outside = outside + first <= limit
    left = limit - outside if keep_outside else limit
    kept_parts: set[_Part | None] = {None} if keep_outside else set()
    for part in sorted(sizes):
        left -= sizes[part]
        if left < 0:
            break
        kept_parts.add(part)
    kept = Manifest(spec for spec in model.specs if _part_of(spec) in kept_parts)
    return Case(name, kept, len(model), model.nbytes)


def tiny_experts() -> Case:
    """All of `EXPERTS`' tensors under their names, each cut down to 256 bytes.

    On a CPU a copy's bytes are the host's time too: of tensors this small it is next to nothing.
    """
    model = model_shape(EXPERTS)
    smallest = min(min(spec.shape) for spec in model.specs)
    shapes = {
        spec.shape: tuple(8 if n == smallest else 16 for n in spec.shape) for spec in model.specs
    }
    tiny = Manifest(TensorSpec(s.name, s.dtype, shapes[s.shape]) for s in model.specs)
    return Case(TINY_EXPERTS, tiny, len(model), model.nbytes)


def parse_size(text: str) -> int:
    """Bytes from text such as `8MiB`, `1.5GB`, `4096`.

    Raises:
        ValueError: the text isn't a size, or it is zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is not a size; examples: 8MiB, 1.5GB, 4096")
    number, prefix, binary = match.groups()
    exponent = " kMGT".index(prefix.replace("K", "k") or " ")
    size = int(float(number) * (1024 if binary else 1000) ** exponent)
    if size <= 0:
        raise ValueError(f"{text!r} is not a size > 0")
    return size


def _part_of(spec: TensorSpec) -> _Part | None:
    match = _PART.search(spec.name)
    return (int(match[1]), int(match[2] or -1)) if match else None
