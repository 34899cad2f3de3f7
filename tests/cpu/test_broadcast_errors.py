"""Bad arguments and bad input of the broadcast functions: typed, named, and before the bytes."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

from packedcomm import Manifest, TensorSpec, TensorTarget, broadcast_consumer, broadcast_producer
from packedcomm.communicators.base import Communicator, contiguous_bytes
from packedcomm.copying import Part
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    CudaError,
    ManifestError,
    TensorError,
)
from tests.helpers.groups import RecordingGroup, ReplayingGroup


class AbortableGroup(RecordingGroup, Communicator):
    """A communicator that only notes that it was aborted."""

    def __init__(self, rank: int = 0, world_size: int = 2) -> None:
        super().__init__()
        self.rank, self.world_size, self.device = rank, world_size, torch.device("cpu")
        self.aborted: list[str] = []

    def broadcast(self, tensor, src):
        super().broadcast(contiguous_bytes(tensor, "broadcast"), src)

    def send(self, tensor, dst): ...
    def recv(self, tensor, src): ...
    def all_reduce(self, tensor): ...
    def group(self):
        return contextlib.nullcontext()

    def close(self): ...

    def abort(self, reason):
        self.aborted.append(reason)


GOOD = ("good", torch.ones(4))


@pytest.mark.parametrize("name", ["", None, 7])
def test_a_name_that_is_no_name_is_refused(name):
    with pytest.raises(ManifestError, match="non-empty string"):
        broadcast_producer([(name, torch.ones(1))], RecordingGroup())
    with pytest.raises(ManifestError, match="non-empty string"):
        broadcast_consumer([(name, ((1,), torch.float32))], RecordingGroup(), device="cpu")


@pytest.mark.fault(10)
def test_a_name_that_occurs_twice_is_refused_before_its_chunk():
    group = RecordingGroup()
    with pytest.raises(ManifestError, match="duplicate tensor name 'good'"):
        broadcast_producer([GOOD, GOOD], group)
    assert group.sent == []
    with pytest.raises(ManifestError, match="duplicate tensor name 'a'"):
        broadcast_consumer([("a", ((1,), "int8")), ("a", ((1,), "int8"))], group, device="cpu")


@pytest.mark.parametrize("dtype", ["float7", "quint8", torch.qint8, None, 3])
def test_an_unknown_dtype_is_refused_with_the_tensor(dtype):
    with pytest.raises(ManifestError, match="'w': unknown or unsupported dtype"):
        broadcast_consumer([("w", ((2,), dtype))], RecordingGroup(), device="cpu")


@pytest.mark.parametrize("shape", [(-1,), (2, -3), (1 << 62, 4), (0, 1 << 63), (1.5,), ("2",), 3])
def test_a_shape_that_is_none_is_refused_with_the_tensor(shape):
    with pytest.raises(ManifestError, match="'w'"):
        broadcast_consumer([("w", (shape, "float32"))], RecordingGroup(), device="cpu")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.eye(3).to_sparse(),
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        lambda: torch.empty(3, device="meta"),
    ],
    ids=["sparse", "quantised", "wrong device"],
)
@pytest.mark.parametrize("wire_format", ["vllm", "native"])
@pytest.mark.parametrize("buffer_size", [1, 1 << 20])
def test_a_tensor_that_is_no_plain_memory_is_refused_before_its_chunk(
    make, wire_format, buffer_size
):
    group = AbortableGroup()
    with pytest.raises(TensorError, match="culprit"):
        broadcast_producer(
            [GOOD, ("culprit", make())],
            group,
            buffer_size_bytes=buffer_size,
            wire_format=wire_format,
        )
    assert all(len(chunk) == GOOD[1].nbytes for chunk in group.sent)
    assert len(group.aborted) == 1


@pytest.mark.parametrize("value", [0, -1, 1.5, None])
def test_buffers_out_of_range_are_refused(value):
    for call in (broadcast_producer, broadcast_consumer):
        with pytest.raises(ArgumentError, match="num_buffers"):
            call([GOOD], RecordingGroup(), num_buffers=value)
        with pytest.raises(ArgumentError, match="buffer_size_bytes"):
            call([GOOD], RecordingGroup(), buffer_size_bytes=value)


@pytest.mark.parametrize("src", [-1, 2, "0", None])
def test_a_source_rank_out_of_range_is_refused(src):
    for call in (broadcast_producer, broadcast_consumer):
        with pytest.raises(ArgumentError, match="src"):
            call([GOOD], AbortableGroup(), src=src)


def test_each_side_must_be_on_its_side_of_the_source():
    with pytest.raises(ArgumentError, match="called on rank 0, but src is 1"):
        broadcast_producer([GOOD], AbortableGroup(rank=0), src=1)
    with pytest.raises(ArgumentError, match="called on rank 0, which is src"):
        broadcast_consumer([], AbortableGroup(rank=0), src=0, device="cpu")


def test_a_device_that_is_not_the_groups_is_refused():
    class OnGpu(AbortableGroup):
        def __init__(self):
            super().__init__(rank=1)
            self.device = torch.device("cuda", 0)

    with pytest.raises(ConfigMismatch, match="device is cpu, the group is on cuda:0"):
        broadcast_consumer([], OnGpu(), device="cpu")


@pytest.mark.fault(32)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_gpu_that_is_not_there_is_a_typed_error():
    with pytest.raises(CudaError, match="0 GPUs"):
        broadcast_consumer([], AbortableGroup(rank=1))


@pytest.mark.parametrize("device", ["mps", "tpu", object()])
def test_an_unknown_device_is_refused(device):
    with pytest.raises(ArgumentError, match="device"):
        broadcast_consumer([], RecordingGroup(), device=device)


def test_an_object_that_is_no_tensor_is_refused_by_name():
    with pytest.raises(TensorError, match="'w': expected a tensor"):
        broadcast_producer([("w", [1, 2, 3])], RecordingGroup())


def test_an_iterator_that_raises_aborts_a_communicator_and_is_raised():
    def tensors():
        yield GOOD
        raise RuntimeError("the trainer ran out of luck")

    group = AbortableGroup()
    with pytest.raises(RuntimeError, match="out of luck"):
        broadcast_producer(tensors(), group)
    assert "out of luck" in group.aborted[0]


def test_a_callback_that_raises_aborts_a_communicator_and_is_raised():
    class Receiver(AbortableGroup):
        def broadcast(self, tensor, src):
            tensor.zero_()

    group = Receiver(rank=1)
    with pytest.raises(ZeroDivisionError):
        broadcast_consumer([("w", ((2,), "float32"))], group, 0, lambda items: 1 / 0, device="cpu")
    assert "ZeroDivisionError" in group.aborted[0]


@pytest.mark.fault(10, 11)
def test_a_target_lists_every_disagreement_before_any_byte():
    target = TensorTarget({"a": torch.ones(2), "b": torch.ones(3), "c": torch.ones(4)})
    manifest = Manifest(
        [
            TensorSpec("a", "float16", (2,)),
            TensorSpec("b", "float32", (4,)),
            TensorSpec("d", "float32", (1,)),
        ]
    )
    group = ReplayingGroup([])
    with pytest.raises(ManifestError) as caught:
        broadcast_consumer(manifest, group, 0, target, device="cpu")
    text = str(caught.value)
    for expected in (
        "'a' is received as float16 (2,), its destination is float32 (2,)",
        "'b' is received as float32 (4,), its destination is float32 (3,)",
        "no destination for tensor 'd'",
        "'c' is not sent",
    ):
        assert expected in text


def test_the_list_of_disagreements_is_capped():
    target = TensorTarget({})
    manifest = Manifest(TensorSpec(f"t{i}", "int8", (1,)) for i in range(100))
    with pytest.raises(ManifestError, match="and 90 more"):
        target.place(manifest)


def test_destinations_left_without_data_are_an_error_unless_partial():
    sent = RecordingGroup()
    broadcast_producer([GOOD], sent)
    metadata = [("good", ((4,), "float32"))]
    tensors = {"good": torch.zeros(4), "forgotten": torch.zeros(2)}
    with pytest.raises(ManifestError, match="'forgotten' is not sent"):
        broadcast_consumer(
            metadata, ReplayingGroup(sent.sent), 0, TensorTarget(tensors), device="cpu"
        )
    target = TensorTarget(tensors, partial=True)
    broadcast_consumer(metadata, ReplayingGroup(sent.sent), 0, target, device="cpu")
    assert torch.equal(tensors["good"], GOOD[1])


@pytest.mark.fault(25)
def test_a_destination_that_requires_grad_is_refused_by_name():
    with pytest.raises(TensorError, match=r"'w' requires grad.*detach"):
        TensorTarget({"w": torch.nn.Parameter(torch.ones(2))})


def test_a_destination_given_twice_or_without_a_name_is_refused():
    with pytest.raises(ManifestError, match="duplicate"):
        TensorTarget([GOOD, GOOD])
    with pytest.raises(ManifestError, match="non-empty"):
        TensorTarget([("", torch.ones(1))])


def test_two_names_of_one_tensor_are_two_destinations():
    tied = torch.zeros(4)
    sent = RecordingGroup()
    broadcast_producer([GOOD, ("tied", GOOD[1])], sent)
    broadcast_consumer(
        [("good", ((4,), "float32")), ("tied", ((4,), "float32"))],
        ReplayingGroup(sent.sent),
        0,
        TensorTarget({"good": tied, "tied": tied}),
        device="cpu",
    )
    assert torch.equal(tied, GOOD[1])


@pytest.mark.parametrize("item", [5, None, ("w",), ("w", 1, 2)])
def test_an_item_of_another_form_is_refused_by_position(item):
    with pytest.raises(ManifestError, match=r"item 0 .*expected \(name, tensor\)"):
        broadcast_producer([item], RecordingGroup())
    with pytest.raises(ManifestError, match=r"item 0 .*expected \(name, \(shape, dtype\)\)"):
        broadcast_consumer([item], RecordingGroup(), device="cpu")


def test_a_numpy_array_with_negative_strides_is_refused_not_fatal():
    with pytest.raises(TensorError, match="'w'.*negative strides"):
        broadcast_producer([("w", np.arange(4.0)[::-1])], RecordingGroup())


def test_a_read_only_destination_is_refused_by_name():
    with pytest.raises(TensorError, match="'w'.*read-only"):
        TensorTarget({"w": np.frombuffer(b"12345678", dtype=np.float32)})


def test_a_destination_that_overlaps_itself_is_refused_by_name():
    with pytest.raises(TensorError, match="'w'.*share memory"):
        TensorTarget({"w": torch.zeros(3, 1).expand(3, 4)})


@pytest.mark.fault(25)
def test_destinations_on_another_device_are_refused_before_any_byte():
    class MetaTarget:
        def place(self, manifest):
            return [[Part(torch.empty(spec.shape, device="meta"))] for spec in manifest.specs]

        def commit(self, manifest): ...

    group = RecordingGroup()
    manifest = Manifest.from_tensors({"a": torch.ones(2), "b": torch.ones(2)})
    with pytest.raises(TensorError, match="'a'"):
        broadcast_consumer(manifest, group, 0, MetaTarget(), device="cpu")
    assert group.sent == []


def test_a_group_that_vllm_has_disabled_is_refused():
    class Disabled(RecordingGroup):
        disabled = True

    with pytest.raises(ArgumentError, match="disabled"):
        broadcast_producer([GOOD], Disabled())


def test_a_group_attribute_of_a_foreign_group_means_nothing():
    class Foreign(RecordingGroup):
        group = object()
        start_broadcast = None

    group = Foreign()
    large = [(str(i), torch.full((1 << 18,), float(i))) for i in range(3)]
    broadcast_producer(large, group, wire_format="native")
    assert [len(chunk) for chunk in group.sent] == [1 << 20] * 3


def test_a_target_whose_destinations_move_is_asked_every_time():
    class DoubleBuffered:
        def __init__(self):
            self.live, self.next = torch.zeros(4), torch.zeros(4)

        def place(self, manifest):
            return [[Part(self.next)]]

        def commit(self, manifest):
            assert list(manifest.by_name) == ["good"]
            self.live, self.next = self.next, self.live

    sent = RecordingGroup()
    for value in (1.0, 2.0, 3.0):
        broadcast_producer([("good", torch.full((4,), value))], sent)
    target = DoubleBuffered()
    group = ReplayingGroup(sent.sent)
    manifest = Manifest.from_tensors({"good": target.live})
    for value in (1.0, 2.0, 3.0):
        broadcast_consumer(manifest, group, 0, target, device="cpu")
        assert target.live.tolist() == [value] * 4


def test_a_kept_plan_still_reports_what_was_not_sent():
    tensors = {"good": torch.zeros(4), "forgotten": torch.zeros(2)}
    manifest = Manifest.from_tensors({"good": torch.zeros(4)})
    target = TensorTarget(tensors)
    group = RecordingGroup()
    for _ in range(2):
        with pytest.raises(ManifestError, match="'forgotten' is not sent"):
            broadcast_consumer(manifest, group, 0, target, device="cpu")


def test_a_destination_that_was_replaced_is_never_written_at_its_old_place():
    parameter = torch.nn.Parameter(torch.zeros(4), requires_grad=False)
    before = parameter.data
    sent = RecordingGroup()
    for value in (1.0, 2.0):
        broadcast_producer([("good", torch.full((4,), value))], sent)
    target = TensorTarget({"good": parameter})
    group = ReplayingGroup(sent.sent)
    manifest = Manifest.from_tensors({"good": parameter})
    broadcast_consumer(manifest, group, 0, target, device="cpu")
    parameter.data = torch.zeros(4)
    broadcast_consumer(manifest, group, 0, target, device="cpu")
    assert before.tolist() == [1.0] * 4
    assert parameter.tolist() == [2.0] * 4


def test_a_target_that_places_too_few_tensors_is_an_error():
    class Forgetful:
        def place(self, manifest):
            return []

        def commit(self, manifest): ...

    manifest = Manifest.from_tensors({"a": torch.ones(2)})
    with pytest.raises(ManifestError, match="placed 0 tensors, the manifest has 1"):
        broadcast_consumer(manifest, RecordingGroup(), 0, Forgetful(), device="cpu")
