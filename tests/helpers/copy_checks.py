"""Checks of the copy engine against a plain reference, for whichever device they are given."""

from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import strategies as st

from packedcomm.copying import BufferPlan, CopyPlan, Part, pack, unpack_from
from tests.helpers.tensors import content, random_bits, view_of

GUARD = 32
FLOATS = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
SCALES = [1.0, 0.5, -3.0, 1 / 3, 0.0, 1e-6, 65536.0]


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


def floats(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> torch.Tensor:
    """Half of the values of random bits (NaN, infinity, denormals), half of ordinary size."""
    bits = random_bits(shape, dtype, seed)
    generator = torch.Generator().manual_seed(seed)
    ordinary = torch.randn(shape, generator=generator, dtype=torch.float64) * 100
    return torch.where(torch.rand(shape, generator=generator) < 0.5, bits, ordinary.to(dtype))


def torch_cast(values: torch.Tensor, scale: float, dtype: torch.dtype) -> torch.Tensor:
    """What torch makes of it: scaled in float32, or float64 if either side is that, then cast."""
    if values.dtype == dtype and scale == 1.0:
        return values.clone()
    wide = torch.float64 if torch.float64 in (values.dtype, dtype) else torch.float32
    return (values.to(wide) * scale).to(dtype)


def assert_same_values(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal bits, except that one NaN is as good as another."""
    found, expected = found.cpu(), expected.cpu()
    assert found.dtype == expected.dtype
    assert found.shape == expected.shape
    nan = expected.isnan()
    assert torch.equal(found.isnan(), nan)
    word = {2: torch.int16, 4: torch.int32, 8: torch.int64}[expected.itemsize]
    assert torch.equal(found[~nan].view(word), expected[~nan].view(word))


def check_cast(
    layout: tuple, types: tuple[torch.dtype, torch.dtype], scale: float, device: str, lead: int
) -> None:
    """A plan casts any view into another memory order as torch does, and writes nothing else."""
    shape, _, permutation, slices = layout
    source = view_of((shape, types[0], permutation, slices), device, 3, lead)
    room = torch.full((source.numel() + lead + GUARD,), 7.0, dtype=types[1], device=device)
    turned = tuple(reversed(source.shape))
    inside = room[lead : lead + source.numel()]
    destination = inside.view(turned).permute(tuple(reversed(range(source.dim()))))
    CopyPlan([(source, destination, scale)], cast=True).run()
    assert_same_values(destination, torch_cast(source.cpu(), scale, types[1]))
    outside = torch.cat([room[:lead], room[lead + source.numel() :]])
    assert bool((outside == 7.0).all())


@st.composite
def cut_tensors(draw: st.DrawFn) -> dict:
    """A named float tensor, cut into parts of any dtype, memory order and scale."""
    shape = tuple(draw(st.lists(st.integers(1, 40), min_size=1, max_size=3)))
    dim = draw(st.integers(0, len(shape) - 1))
    cuts = sorted(draw(st.sets(st.integers(1, shape[dim]), max_size=3)) | {0, shape[dim]})
    pieces = [
        {
            "begin": begin,
            "end": end,
            "dtype": draw(st.sampled_from(FLOATS)),
            "scale": draw(st.sampled_from(SCALES)),
            "order": draw(st.permutations(range(len(shape)))),
            "lead": draw(st.integers(0, 3)),
        }
        for begin, end in pairwise(cuts)
        if draw(st.integers(0, 3)) or begin == 0
    ]
    return {
        "dtype": draw(st.sampled_from(FLOATS)),
        "shape": shape,
        "dim": dim,
        "pieces": pieces,
        "gap": draw(st.integers(0, 17)),
    }


def _memory_of(piece: dict, shape: list[int], device: str, seed: int) -> torch.Tensor:
    order = piece["order"]
    count = torch.Size(shape).numel()
    flat = floats((count + piece["lead"],), piece["dtype"], seed).to(device)[piece["lead"] :]
    back = sorted(range(len(order)), key=order.__getitem__)
    return flat.view([shape[d] for d in order]).permute(back)


def check_parts(tensors: list[dict], device: str, into_buffer: bool, lead: int) -> None:
    """Parts of several named tensors, between memory of any kind and two buffers in turn."""
    plan = BufferPlan(torch.device(device), into_buffer=into_buffer)
    offset = 0
    planned = []
    for number, tensor in enumerate(tensors):
        offset += tensor["gap"]
        parts = []
        for index, piece in enumerate(tensor["pieces"]):
            shape, start = list(tensor["shape"]), [0] * len(tensor["shape"])
            shape[tensor["dim"]] = piece["end"] - piece["begin"]
            start[tensor["dim"]] = piece["begin"]
            memory = _memory_of(piece, shape, device, 10 * number + index)
            parts.append(Part(memory, tuple(start), piece["scale"]))
        plan.add_parts(parts, tensor["dtype"], tensor["shape"], offset, f"t{number}")
        planned.append((tensor, offset, parts))
        offset += torch.Size(tensor["shape"]).numel() * tensor["dtype"].itemsize
    assert plan.extent == offset
    for seed in range(2):
        room = random_bits((lead + offset + GUARD,), torch.uint8, 100 + seed).to(device)
        before = room.cpu()
        memories = [[part.tensor.cpu().clone() for part in parts] for _, _, parts in planned]
        plan.run(room[lead : lead + offset])
        after = room.cpu()
        expected_room = before.clone()
        for (tensor, begin, parts), old in zip(planned, memories, strict=True):
            end = begin + torch.Size(tensor["shape"]).numel() * tensor["dtype"].itemsize
            here = slice(lead + begin, lead + end)
            held = before[here].clone().view(tensor["dtype"]).view(tensor["shape"])
            found = after[here].clone().view(tensor["dtype"]).view(tensor["shape"])
            for part, values in zip(parts, old, strict=True):
                box = tuple(slice(a, a + n) for a, n in zip(part.offset, values.shape, strict=True))
                if into_buffer:
                    expected = torch_cast(values, part.scale, tensor["dtype"])
                    assert_same_values(found[box], expected)
                    held[box] = found[box]
                else:
                    expected = torch_cast(held[box], part.scale, values.dtype)
                    assert_same_values(part.tensor, expected)
            expected_room[here] = held.reshape(-1).view(torch.uint8)
        # Outside of the parts every byte is as it was; inside, their values were compared.
        assert torch.equal(after, expected_room)


_MASK = (1 << 64) - 1
_STEP = 0x9E3779B97F4A7C15


def _scrambled(x: int) -> int:
    x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 & _MASK
    x = (x ^ x >> 27) * 0x94D049BB133111EB & _MASK
    return x ^ x >> 31


def written_out_digest(raw: bytes) -> int:
    """The definition in the docstring of packedcomm.digests."""
    total = _scrambled((len(raw) + _STEP) & _MASK)
    for number, begin in enumerate(range(0, len(raw), 8), start=1):
        word = int.from_bytes(raw[begin : begin + 8], "little")
        total += _scrambled(word ^ (number * _STEP & _MASK))
    return total & _MASK
