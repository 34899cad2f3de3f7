"""A transfer without a transport: a target's parts are filled from tensors at hand."""

from __future__ import annotations

import torch

from packedcomm.copying import BufferPlan
from packedcomm.layout import Box
from packedcomm.manifest import Manifest


def box_of_part(part):
    """The region of the named tensor that a part is, as slices."""
    offset = part.offset or (0,) * part.tensor.dim()
    box = Box(offset, tuple(part.tensor.shape))
    return tuple(slice(a, b) for a, b in zip(box.offset, box.stop, strict=True))


def deliver(target, wire, attributes=None):
    """Write tensors into a target as a transfer would, by the copy engine; the manifest."""
    manifest = Manifest.from_tensors(wire, attributes)
    placed = target.place(manifest)
    device = next((tensor.device for tensor in wire.values()), None)
    buffer = torch.empty(manifest.nbytes, dtype=torch.uint8, device=device)
    plan = BufferPlan(buffer.device, into_buffer=False)
    offset = 0
    for spec, parts in zip(manifest.specs, placed, strict=True):
        tensor = wire[spec.name].detach().contiguous()
        buffer[offset : offset + spec.nbytes] = tensor.reshape(-1).view(torch.uint8)
        plan.add_parts(parts, tensor.dtype, spec.shape, offset, spec.name)
        offset += spec.nbytes
    plan.run(buffer)
    target.commit(manifest)
    return manifest


def counting(*shape, dtype=torch.float32, start=0):
    """A tensor whose elements all differ."""
    return (
        (torch.arange(torch.Size(shape).numel(), dtype=torch.float64) + start)
        .reshape(shape)
        .to(dtype)
    )
