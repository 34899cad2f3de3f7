"""Checks of the copy engine against a plain reference, for whichever device they are given."""

from __future__ import annotations

import torch

from packedcomm.copying import CopyPlan, pack, unpack_from
from tests.helpers.tensors import content, random_bits, view_of

GUARD = 32


def check_pack(layouts: list, device: str, lead: int) -> None:
    """Packing random views gives the reference's bytes, and nothing outside them is written."""
    tensors = [view_of(layout, device, seed, lead) for seed, layout in enumerate(layouts)]
    expected = b"".join(content(tensor) for tensor in tensors)
    out = torch.full((len(expected) + 2 * GUARD + lead,), 0xA5, dtype=torch.uint8, device=device)
    begin = GUARD + lead
    pack(tensors, out[begin : begin + len(expected)])
    written = bytes(out.cpu().tolist())
    assert written[begin : begin + len(expected)] == expected
    assert set(written[:begin] + written[begin + len(expected) :]) <= {0xA5}


def check_unpack(layouts: list, device: str, lead: int) -> None:
    """Unpacking into random views gives them the packed bytes, and leaves the rest of their
    storage alone."""
    tensors = [view_of(layout, device, seed, lead) for seed, layout in enumerate(layouts)]
    sizes = [tensor.nbytes for tensor in tensors]
    offsets = [lead + sum(sizes[:i]) for i in range(len(sizes))]
    packed = random_bits((lead + sum(sizes),), torch.uint8, 77)
    if any(tensor.dtype == torch.bool for tensor in tensors):
        packed &= 1
    outside = [_outside(tensor) for tensor in tensors]
    unpack_from(packed.to(device), tensors, offsets, sizes)
    raw = bytes(packed.tolist())
    for tensor, offset, size, before in zip(tensors, offsets, sizes, outside, strict=True):
        assert content(tensor) == raw[offset : offset + size]
        assert _outside(tensor) == before


def _outside(tensor: torch.Tensor) -> bytes:
    """The bytes of the tensor's storage that no element of it covers."""
    raw = torch.empty(0, dtype=torch.uint8, device=tensor.device)
    raw = raw.set_(tensor.untyped_storage()).cpu()
    covered = torch.zeros(raw.numel() // tensor.itemsize, dtype=torch.bool)
    covered.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset()).fill_(True)
    return bytes(raw[~covered.repeat_interleave(tensor.itemsize)].tolist())


def check_plan_between_views(first: tuple, device: str, seed: int) -> None:
    """A plan copies between two different strided views of one shape, again and again."""
    source = view_of(first, device, seed, 1)
    # The destination has the reversed memory order of the source.
    flat = torch.empty(source.numel() * 2 + 3, dtype=source.dtype, device=device)
    reversed_shape = tuple(reversed(source.shape))
    destination = flat[3 : 3 + source.numel()].view(reversed_shape)
    destination = destination.permute(tuple(reversed(range(source.dim()))))
    plan = CopyPlan([(source, destination)])
    for _ in range(2):
        plan.run()
        assert content(destination) == content(source)
        if source.dtype != torch.bool and source.numel():
            torch.empty(0, dtype=torch.uint8, device=device).set_(
                source.untyped_storage()
            ).bitwise_xor_(0xFF)
