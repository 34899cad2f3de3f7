"""Checks of digests that come with copies, for whichever device they are given."""

from __future__ import annotations

from itertools import pairwise

import torch

from packedcomm.copying import BufferPlan, Part
from packedcomm.digests import digest_tensors
from tests.helpers.copy_checks import written_out_digest
from tests.helpers.tensors import content, random_bits

# Around words, vectors, pieces and tiles of either device.
SIZES = (0, 1, 7, 8, 9, 15, 16, 17, 255, 256, 4096, 16_383, 16_385, 65_535, 65_536, 65_544, 131_081,
         262_143, 262_144, 262_152, 600_011)  # fmt: skip
# What isn't made by a copy must not be touched.
UNTOUCHED = 5
_MASK = (1 << 64) - 1


def unsigned(digests: torch.Tensor) -> list[int]:
    return [digest & _MASK for digest in digests.tolist()]


def check_packed(
    device: str, lead: int, offset: int, into_buffer: bool, threads: int = 0, blocks: int = 0
) -> None:
    """Contiguous tensors of many sizes, each `lead` bytes beyond an aligned address, to or from a
    buffer of which they begin at `offset`, an odd number of bytes apart."""
    tensors = [
        random_bits((size + lead,), torch.uint8, seed).to(device)[lead:]
        for seed, size in enumerate(SIZES)
    ]
    offsets = [offset]
    for size in SIZES[:-1]:
        offsets.append(offsets[-1] + size + 3)
    plan = BufferPlan(torch.device(device), into_buffer=into_buffer, threads=threads, blocks=blocks)
    numbers = [2 * i + 1 for i in range(len(SIZES))]
    plan.add_tensors(tensors, offsets, SIZES, None, numbers)
    assert sorted(plan.digested) == numbers[1:], "all but the empty one come with the copy"
    buffer = random_bits((plan.extent,), torch.uint8, 99).to(device)
    expected = [written_out_digest(content(t)) for t in tensors[:12]]
    sums = torch.zeros(numbers[-1] + 1, dtype=torch.int64, device=device)
    sums[::2] = UNTOUCHED
    if not into_buffer:
        for tensor, begin in zip(tensors, offsets, strict=True):
            buffer[begin : begin + tensor.nbytes] = tensor
            tensor.zero_()
    plan.run(buffer, sums)
    found = unsigned(sums)
    assert found[::2] == [UNTOUCHED] * len(SIZES)
    assert found[1] == 0
    assert found[3:24:2] == expected[1:]
    assert found[3::2] == digest_tensors(tensors)[1:]
    for tensor, begin in zip(tensors, offsets, strict=True):
        assert torch.equal(tensor, buffer[begin : begin + tensor.nbytes])


def check_cut(tensors: list[dict], device: str, into_buffer: bool, lead: int) -> None:
    """Parts of named tensors, cast, scaled and in any memory order: those digests that come with
    the copy are right, and none is there that wasn't announced."""
    plan = BufferPlan(torch.device(device), into_buffer=into_buffer)
    offset = 0
    first = 0
    expected_of = {}
    for seed, tensor in enumerate(tensors):
        offset += tensor["gap"]
        parts = []
        for piece in tensor["pieces"]:
            shape, start = list(tensor["shape"]), [0] * len(tensor["shape"])
            shape[tensor["dim"]] = piece["end"] - piece["begin"]
            start[tensor["dim"]] = piece["begin"]
            order = piece["order"]
            back = sorted(range(len(order)), key=order.__getitem__)
            values = torch.randn(torch.Size(shape).numel() + piece["lead"]).to(piece["dtype"])
            memory = values.to(device)[piece["lead"] :].view([shape[d] for d in order])
            parts.append(Part(memory.permute(back), tuple(start), piece["scale"]))
        nbytes = torch.Size(tensor["shape"]).numel() * tensor["dtype"].itemsize
        plan.add_parts(parts, tensor["dtype"], tensor["shape"], offset, f"t{seed}", first)
        if into_buffer:
            expected_of[first] = (offset, nbytes)
        else:
            expected_of |= {first + i: part.tensor for i, part in enumerate(parts)}
        first += len(parts)
        offset += nbytes
    buffer = random_bits((lead + offset,), torch.uint8, 7).to(device)[lead:]
    sums = torch.zeros(first + 1, dtype=torch.int64, device=device)
    plan.run(buffer, sums)
    found = unsigned(sums)
    for number in range(first + 1):
        if number not in plan.digested:
            assert found[number] == 0
            continue
        expected = expected_of[number]
        if not isinstance(expected, torch.Tensor):
            begin, nbytes = expected
            expected = buffer[begin : begin + nbytes]
        assert found[number] == digest_tensors([expected])[0]


def check_shards(device: str) -> None:
    """A tensor put together from contiguous runs has one digest, if they begin at whole words."""
    for cuts, comes in (
        ((0, 8, 100_000, 262_152, 300_001), True),
        ((0, 300_001), True),
        ((0, 12, 300_001), False),
    ):
        whole = random_bits((300_001,), torch.uint8)
        parts = [Part(whole[a:b].to(device), (a,)) for a, b in pairwise(cuts)]
        plan = BufferPlan(torch.device(device), into_buffer=True)
        plan.add_parts(parts, torch.uint8, (300_001,), 5, "w", 1)
        buffer = torch.zeros(plan.extent, dtype=torch.uint8, device=device)
        sums = torch.zeros(2, dtype=torch.int64, device=device)
        plan.run(buffer, sums)
        assert torch.equal(buffer[5:].cpu(), whole)
        assert unsigned(sums) == [0, digest_tensors([whole])[0] if comes else 0]
        # Without one of its parts it isn't the tensor.
        plan = BufferPlan(torch.device(device), into_buffer=True)
        plan.add_parts(parts[:-1], torch.uint8, (300_001,), 5, "w", 1)
        assert plan.digested == []


def check_cast(device: str, lead: int) -> None:
    """What is converted is digested as it is written, large and at any alignment."""
    for source, wire in (
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float16),
        (torch.float16, torch.float16),
    ):
        for count in (1, 3, 1000, 40_009, 300_001):
            values = torch.randn(count).to(source).to(device)
            plan = BufferPlan(torch.device(device), into_buffer=True)
            plan.add_parts([Part(values, None, 0.5)], wire, (count,), lead, "w", 0)
            assert plan.digested == [0]
            buffer = torch.zeros(plan.extent, dtype=torch.uint8, device=device)
            sums = torch.zeros(1, dtype=torch.int64, device=device)
            plan.run(buffer, sums)
            packed = buffer[lead:].cpu().clone().view(wire)
            assert torch.equal(packed, (values.cpu() * 0.5).to(wire))
            assert unsigned(sums) == digest_tensors([packed])
