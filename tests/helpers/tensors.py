"""Tensors that are hard to move, and byte-exact comparison: shared by the CPU and the GPU tests."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from hypothesis import strategies as st

DTYPES = [
    torch.uint8,
    torch.int8,
    torch.bool,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
    torch.float8_e8m0fnu,
    torch.int16,
    torch.uint16,
    torch.float16,
    torch.bfloat16,
    torch.int32,
    torch.float32,
    torch.int64,
    torch.float64,
    torch.complex32,
    torch.complex64,
    torch.complex128,
]


def random_bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """A contiguous CPU tensor of random bytes: NaN payloads, denormals and -0.0 included.

    Bool tensors hold 0 and 1 only, since no other byte is a bool.
    """
    generator = torch.Generator().manual_seed(seed)
    count = 1
    for extent in shape:
        count *= extent
    high = 2 if dtype == torch.bool else 256
    raw = torch.randint(0, high, (count * dtype.itemsize,), dtype=torch.uint8, generator=generator)
    return raw.view(dtype).view(shape)


def content(tensor: torch.Tensor) -> bytes:
    """The elements in row-major order as bytes, made without any of packedcomm's code."""
    tensor = tensor.detach().cpu()
    itemsize = tensor.itemsize
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
    if tensor.numel() == 0:
        return b""
    index = torch.zeros(tensor.shape, dtype=torch.int64)
    for d, (extent, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        view = [1] * tensor.dim()
        view[d] = extent
        index += (torch.arange(extent) * stride).view(view)
    starts = (index.reshape(-1, 1) + tensor.storage_offset()) * itemsize
    return bytes(raw[(starts + torch.arange(itemsize)).reshape(-1)].tolist())


def digest(tensor: torch.Tensor) -> str:
    """SHA-256 of a contiguous tensor's bytes."""
    flat = tensor.detach().cpu().contiguous()
    raw = torch.empty(0, dtype=torch.uint8).set_(
        flat.untyped_storage(), flat.storage_offset() * flat.itemsize, (flat.nbytes,)
    )
    return hashlib.sha256(raw.numpy().tobytes()).hexdigest()


def digests(tensors: Mapping[str, torch.Tensor]) -> dict[str, str]:
    """Digest of each tensor by name."""
    return {name: digest(tensor) for name, tensor in tensors.items()}


def odd_tensors(device: torch.device | str = "cpu") -> dict[str, torch.Tensor]:
    """One of everything that FEATURES calls odd, in an order that misaligns its neighbours."""
    tensors = {
        "scalar": random_bits((), torch.float32, 1),
        "three_bytes": random_bits((3,), torch.uint8, 2),
        "after_odd_neighbour": random_bits((5, 7), torch.float64, 3),
        "empty": torch.zeros(0, 4),
        "transposed": random_bits((6, 10), torch.bfloat16, 4).t(),
        "sliced": random_bits((9, 12), torch.float32, 5)[1::3, 2:11:2],
        "one_bool": random_bits((1,), torch.bool, 6),
        "permuted": random_bits((3, 4, 5, 6), torch.complex64, 7).permute(2, 0, 3, 1),
        "fp8": random_bits((17,), torch.float8_e4m3fn, 8),
        "oversize": random_bits((4099,), torch.int64, 9),
        "broadcast_view": random_bits((4, 1), torch.float16, 10).expand(4, 5),
        "last_byte": random_bits((1,), torch.int8, 11),
    }
    for number, dtype in enumerate(DTYPES):
        tensors[f"dtype_{str(dtype).removeprefix('torch.')}"] = random_bits(
            (3, number + 1), dtype, 20 + number
        )
    # A strided view keeps its strides on the device only if its base is moved.
    return {name: _moved(tensor, device) for name, tensor in tensors.items()}


def _moved(tensor: torch.Tensor, device: torch.device | str) -> torch.Tensor:
    if torch.device(device).type == "cpu":
        return tensor
    raw = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage()).to(device)
    return raw.view(tensor.dtype).as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


@st.composite
def strided_layouts(draw: st.DrawFn) -> tuple[tuple[int, ...], torch.dtype, list[int], list[slice]]:
    """(base shape, dtype, permutation, slices): a random view of a random tensor."""
    dims = draw(st.integers(0, 6))
    shape = tuple(
        draw(st.integers(0 if dims < 3 else 1, 9 if dims < 4 else 4)) for _ in range(dims)
    )
    dtype = draw(st.sampled_from(DTYPES))
    permutation = draw(st.permutations(range(dims)))
    slices = []
    for extent in shape:
        start = draw(st.integers(0, max(extent - 1, 0)))
        stop = draw(st.integers(start, extent))
        slices.append(slice(start, stop, draw(st.integers(1, 3))))
    return shape, dtype, list(permutation), slices


def view_of(
    layout: tuple[tuple[int, ...], torch.dtype, list[int], list[slice]],
    device: torch.device | str,
    seed: int,
    lead: int = 0,
) -> torch.Tensor:
    """The tensor that a layout describes, over random bytes, `lead` items into its storage."""
    shape, dtype, permutation, slices = layout
    count = 1
    for extent in shape:
        count *= extent
    base = random_bits((count + lead,), dtype, seed).to(device)[lead:]
    return base.view(shape)[tuple(slices)].permute(permutation)
