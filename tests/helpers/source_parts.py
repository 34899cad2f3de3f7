"""Puts a source's parts together with plain torch operations, apart from the copy engine."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from packedcomm.copying import Part
from packedcomm.manifest import Manifest
from packedcomm.sources import Source

__all__ = ["assembled", "everything"]


def assembled(manifest: Manifest, parts: Sequence[Sequence[Part]]) -> dict[str, torch.Tensor]:
    """The tensors that a receiver would have; every element must be covered exactly once."""
    assert len(parts) == len(manifest)
    tensors = {}
    for spec, pieces in zip(manifest.specs, parts, strict=True):
        tensor = torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype))
        covered = torch.zeros(spec.shape, dtype=torch.int32)
        for piece in pieces:
            assert not piece.tensor.requires_grad
            assert piece.tensor.dim() == len(spec.shape)
            offset = piece.offset or (0,) * len(spec.shape)
            box = tuple(slice(o, o + n) for o, n in zip(offset, piece.tensor.shape, strict=True))
            value = piece.tensor if piece.scale == 1.0 else piece.tensor * piece.scale
            assert tensor[box].shape == value.shape
            tensor[box] = value.to(tensor.dtype)
            covered[box] += 1
        assert covered.eq(1).all(), f"{spec.name} isn't covered exactly once"
        tensors[spec.name] = tensor
    return tensors


def everything(source: Source) -> dict[str, torch.Tensor]:
    """What one sync of the source sends, tied names included; empty where it doesn't lead."""
    snapshot = source.snapshot()
    parts = snapshot.parts
    if parts is None:
        parts = list(source.gather(snapshot))
    if not source.leader:
        return {}
    tensors = assembled(snapshot.manifest, parts)
    for name, first in snapshot.manifest.attributes.get("tied", {}).items():
        tensors[name] = tensors[first]
    return tensors
