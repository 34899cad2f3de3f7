"""The byte stream itself: the published test vector, vLLM's own packing, and the native format."""

from __future__ import annotations

import hashlib

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm import (
    Manifest,
    TensorTarget,
    broadcast_consumer,
    broadcast_producer,
    release_buffers,
)
from packedcomm.planning.chunks import chunk_rule
from tests.helpers.groups import RecordingGroup, ReplayingGroup
from tests.helpers.tensors import content, odd_tensors, random_bits, strided_layouts, view_of
from tests.helpers.vllm_peer import load_packed_tensor

VECTOR = [
    ("matrix", torch.arange(6, dtype=torch.float32).view(2, 3)),
    ("vector", torch.arange(3, dtype=torch.float32)),
    ("transposed", torch.arange(8).to(torch.bfloat16).view(4, 2).t()),
    ("scalar", torch.tensor(1.5)),
    ("empty", torch.zeros(0, 4)),
    ("integers", torch.arange(40, dtype=torch.int32)),
    ("aligned", torch.arange(16, dtype=torch.float32)),
    ("bytes", torch.arange(5, dtype=torch.uint8)),
]
VECTOR_DIGESTS = [
    "54e4cd91f7511bce9b47048081fe1a40936a39d2c982062fc6fe6cfba3970693",
    "ea5cee6652aa7ffac53872b3a1cf2b33cdac4baa0f37b2cb81a2ba3f1c2d4556",
]
NATIVE_DIGESTS = [
    "387e0848ac2e9d66ccbd9c437b22f143b635ddd0d154e48601cfa6b9b9bdf94b",
    "ea5cee6652aa7ffac53872b3a1cf2b33cdac4baa0f37b2cb81a2ba3f1c2d4556",
]
NAMED = st.lists(strided_layouts(), min_size=1, max_size=12)


def send(tensors, **options) -> list[bytes]:
    group = RecordingGroup()
    broadcast_producer(tensors, group, **options)
    return group.sent


def receive(sent, manifest, receiver, **options) -> None:
    group = ReplayingGroup(sent)
    broadcast_consumer(manifest, group, 0, receiver, device="cpu", **options)
    assert group.unread == 0


NATIVE_SIZES = [(1 << 20) - 1, 1 << 20, 5, *[1 << 20] * 65, 48, 16, 1]


def test_the_native_formats_constants_are_pinned():
    # 1 MiB is direct; 64 tensors make a group; B is filled to the last byte, tensors start at 16.
    chunks = list(chunk_rule("native", (1 << 20) + 16 + 48 + 16)(NATIVE_SIZES))
    assert [(c.direct, len(c.indices), c.nbytes) for c in chunks] == [
        (True, 64, 64 << 20),
        (False, 4, (1 << 20) + 80),
        (True, 2, 2 << 20),
        (False, 1, 1),
    ]
    assert list(chunks[1].offsets) == [0, 1 << 20, (1 << 20) + 16, (1 << 20) + 64]
    (group,) = chunk_rule("native", 1 << 40)([256 << 20, 256 << 20])
    assert group.nbytes == 512 << 20
    assert len(list(chunk_rule("native", 1 << 40)([512 << 20, 1 << 20]))) == 2


def test_the_native_vector():
    sent = send(VECTOR, buffer_size_bytes=256, wire_format="native")
    assert [len(chunk) for chunk in sent] == [240, 69]
    # Padding has no defined value.
    padding = [(24, 32), (44, 48), (64, 64), (68, 80)]
    clean = bytearray(sent[0])
    for begin, end in padding:
        clean[begin:end] = bytes(end - begin)
    digests = [hashlib.sha256(chunk).hexdigest() for chunk in (clean, sent[1])]
    assert digests == NATIVE_DIGESTS


def test_the_published_vector():
    sent = send(VECTOR, buffer_size_bytes=64)
    assert [len(chunk) for chunk in sent] == [216, 69]
    assert [hashlib.sha256(chunk).hexdigest() for chunk in sent] == VECTOR_DIGESTS


@pytest.mark.parametrize("num_buffers", [1, 2, 3, 7])
def test_the_number_of_buffers_does_not_change_the_bytes(num_buffers):
    sent = send(VECTOR, buffer_size_bytes=16, num_buffers=num_buffers)
    assert sent == send(VECTOR, buffer_size_bytes=16)


def viewable(item: tuple[str, torch.Tensor]) -> torch.Tensor:
    """vLLM's code can't view 0-d tensors as bytes, nor those with odd strides of short dimensions;
    these forms of the same elements it can."""
    fresh = torch.empty(item[1].shape, dtype=item[1].dtype).copy_(item[1])
    return fresh.reshape(1) if fresh.dim() == 0 else fresh


@pytest.mark.filterwarnings("ignore:Tensor .* exceeds buffer_size_bytes")
@settings(max_examples=150, deadline=None)
@given(NAMED, st.integers(1, 3000))
def test_chunks_equal_those_of_vllms_own_packing(layouts, buffer_size):
    vllm = load_packed_tensor()
    tensors = [(str(i), view_of(layout, "cpu", i)) for i, layout in enumerate(layouts)]
    expected = []
    remaining = iter(tensors)
    while (chunk := vllm.pack_tensors(remaining, viewable, buffer_size)) is not None:
        expected.append(bytes(chunk.packed_tensor.tolist()))
    assert send(tensors, buffer_size_bytes=buffer_size) == expected


@settings(max_examples=100, deadline=None)
@given(NAMED, st.integers(1, 3000), st.sampled_from(["vllm", "native"]), st.integers(1, 3))
def test_a_callback_gets_what_was_sent(layouts, buffer_size, wire_format, num_buffers):
    tensors = {str(i): view_of(layout, "cpu", i) for i, layout in enumerate(layouts)}
    options = {"buffer_size_bytes": buffer_size, "wire_format": wire_format}
    received = {}
    receive(
        send(tensors.items(), **options),
        Manifest.from_tensors(tensors),
        received.update,
        num_buffers=num_buffers,
        **options,
    )
    assert {name: content(t) for name, t in received.items()} == {
        name: content(t) for name, t in tensors.items()
    }
    for name, tensor in received.items():
        assert (tensor.dtype, tensor.shape) == (tensors[name].dtype, tensors[name].shape)


@settings(max_examples=100, deadline=None)
@given(NAMED, st.integers(1, 3000), st.sampled_from(["vllm", "native"]))
def test_a_target_is_written_in_place_whatever_its_strides(layouts, buffer_size, wire_format):
    tensors = {str(i): view_of(layout, "cpu", i) for i, layout in enumerate(layouts)}
    destinations = {
        name: view_of(layout, "cpu", 1000) for (name, layout) in zip(tensors, layouts, strict=True)
    }
    addresses = [t.data_ptr() for t in destinations.values()]
    options = {"buffer_size_bytes": buffer_size, "wire_format": wire_format}
    receive(
        send(tensors.items(), **options),
        Manifest.from_tensors(tensors),
        TensorTarget(destinations),
        **options,
    )
    assert [content(t) for t in destinations.values()] == [content(t) for t in tensors.values()]
    assert [t.data_ptr() for t in destinations.values()] == addresses


def test_native_format_sends_large_tensors_unpacked_and_aligns_small_ones():
    tensors = {
        "small": random_bits((3,), torch.uint8, 1),
        "large": random_bits((1 << 20,), torch.uint8, 2),
        "after": random_bits((5,), torch.float32, 3),
    }
    large, packed = send(tensors.items(), wire_format="native")
    assert large == content(tensors["large"])
    assert packed[:3] == content(tensors["small"])
    assert packed[16:] == content(tensors["after"])


def test_a_lone_contiguous_tensor_is_broadcast_from_its_own_memory():
    addresses = []

    class Group:
        def broadcast(self, tensor, src):
            addresses.append(tensor.data_ptr())

    tensor = torch.ones(64)
    broadcast_producer([("w", tensor)], Group(), buffer_size_bytes=16)
    assert addresses == [tensor.data_ptr()]


def test_what_post_iter_func_returns_is_what_is_sent():
    tensors = {"w": torch.arange(4, dtype=torch.float32), "b": torch.ones(3)}
    sent = send(tensors.items(), post_iter_func=lambda item: item[1].to(torch.bfloat16))
    assert sent == [b"".join(content(t.to(torch.bfloat16)) for t in tensors.values())]


def test_odd_tensors_misalign_each_other_and_arrive():
    tensors = odd_tensors()
    received = {}
    sent = send(tensors.items(), buffer_size_bytes=300)
    receive(sent, Manifest.from_tensors(tensors), received.update, buffer_size_bytes=300)
    assert {n: content(t) for n, t in received.items()} == {
        n: content(t) for n, t in tensors.items()
    }


def test_an_empty_iterator_sends_nothing():
    assert send([]) == []


def test_tensors_that_a_callback_keeps_are_never_overwritten():
    tensors = {str(i): random_bits((50,), torch.float32, i) for i in range(40)}
    sent = send(tensors.items(), buffer_size_bytes=400)
    kept = {}
    group = ReplayingGroup(sent + sent)
    for _ in range(2):
        # The second round must not touch what the first one left behind.
        first = {name: content(t) for name, t in kept.items()}
        local = {}
        broadcast_consumer(Manifest.from_tensors(tensors), group, 0, local.update, 400, 2, "cpu")
        assert {name: content(t) for name, t in kept.items()} == first
        kept = local
    assert {n: content(t) for n, t in kept.items()} == {n: content(t) for n, t in tensors.items()}


def test_a_slot_that_nobody_keeps_is_used_again():
    tensors = {str(i): random_bits((50,), torch.float32, i) for i in range(40)}
    addresses = set()
    receive(
        send(tensors.items(), buffer_size_bytes=400),
        Manifest.from_tensors(tensors),
        lambda items: addresses.add(items[0][1].data_ptr()),
        buffer_size_bytes=400,
    )
    assert len(addresses) == 2


def test_a_slot_grows_when_a_chunk_is_a_little_larger_than_the_last():
    for sizes in ([2 << 20, (2 << 20) + 64], [(2 << 20) + 1, 4 << 20, (4 << 20) + 1]):
        # Two tensors a chunk, so that a slot is needed.
        tensors = {
            f"{i}.{part}": random_bits((size,), torch.uint8, i)
            for i, total in enumerate(sizes)
            for part, size in (("a", 1), ("b", total - 1))
        }
        sent = send(tensors.items(), buffer_size_bytes=1 << 20, num_buffers=1)
        received = {}
        receive(
            sent,
            Manifest.from_tensors(tensors),
            lambda items, received=received: received.update({n: t.clone() for n, t in items}),
            buffer_size_bytes=1 << 20,
            num_buffers=1,
        )
        assert all(torch.equal(received[name], tensor) for name, tensor in tensors.items())


def test_a_second_transfer_over_a_group_allocates_nothing():
    addresses = []

    class Group:
        def broadcast(self, tensor, src):
            addresses.append(tensor.data_ptr())

    group = Group()
    tensors = {str(i): torch.ones(100) for i in range(8)}
    for _ in range(2):
        broadcast_producer(tensors.items(), group, buffer_size_bytes=700)
    assert addresses[:4] == addresses[4:]
    assert len(set(addresses)) == 2
    release_buffers(group)
    kept = torch.ones(1 << 20)  # what was freed may be taken by somebody else
    broadcast_producer(tensors.items(), group, buffer_size_bytes=700)
    assert kept.sum() == 1 << 20


def test_slots_made_in_inference_mode_serve_outside_of_it():
    tensors = {str(i): random_bits((50,), torch.float32, i) for i in range(4)}
    sent = send(tensors.items(), buffer_size_bytes=300)
    group = ReplayingGroup(sent + sent)
    for inference in (True, False):
        received = {}
        with torch.inference_mode(inference):
            broadcast_consumer(
                Manifest.from_tensors(tensors), group, 0, received.update, 300, 2, "cpu"
            )
            assert {n: content(t) for n, t in received.items()} == {
                n: content(t) for n, t in tensors.items()
            }
