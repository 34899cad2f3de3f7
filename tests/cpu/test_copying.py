"""The copy engine on the CPU, against a reference that knows nothing of it."""

from __future__ import annotations

import ctypes
import os
import signal
import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm.copying import CopyPlan, as_tensor, contiguous_copy, pack, pack_into, unpack_from
from packedcomm.errors import ArgumentError, CudaError, TensorError
from tests.helpers.copy_checks import check_pack, check_plan_between_views, check_unpack
from tests.helpers.tensors import DTYPES, content, odd_tensors, random_bits, strided_layouts

LAYOUTS = st.lists(strided_layouts(), min_size=0, max_size=5)


@settings(max_examples=300, deadline=None)
@given(LAYOUTS, st.integers(0, 17))
def test_pack_gives_row_major_bytes_of_any_views(layouts, lead):
    check_pack(layouts, "cpu", lead)


@settings(max_examples=300, deadline=None)
@given(LAYOUTS, st.integers(0, 17))
def test_unpack_writes_exactly_the_elements_of_any_views(layouts, lead):
    check_unpack(layouts, "cpu", lead)


@settings(max_examples=200, deadline=None)
@given(strided_layouts(), st.integers(0, 1000))
def test_a_plan_copies_between_different_memory_orders(layout, seed):
    check_plan_between_views(layout, "cpu", seed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_keeps_its_bits(dtype):
    source = random_bits((67, 129), dtype)
    destination = torch.empty_like(source)
    CopyPlan([(source, destination)]).run()
    assert content(destination) == content(source)


def test_signalling_nan_negative_zero_and_denormals_survive():
    bits = torch.tensor([0x7F800001, -0x80000000, 0x00000001, -0x00400001], dtype=torch.int32)
    source = bits.view(torch.float32)
    assert content(contiguous_copy(source.expand(3, 4).t())) == content(source.expand(3, 4).t())


@pytest.mark.parametrize("nbytes", [1, 255, 256 << 10, (256 << 10) + 1, (64 << 20) + 4097])
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_large_copies_are_exact_with_any_number_of_threads(nbytes, threads):
    source = random_bits((nbytes + 3,), torch.uint8)[3:]
    destination = torch.zeros(nbytes + 1, dtype=torch.uint8)[1:]
    CopyPlan([(source, destination)], threads=threads).run()
    assert torch.equal(source, destination)


def test_more_dimensions_than_a_segment_holds():
    source = random_bits((2, 3, 2, 3, 2, 3, 2), torch.int16).permute(6, 4, 2, 0, 5, 3, 1)
    assert content(contiguous_copy(source)) == content(source)


def test_two_threads_may_copy_at_the_same_time():
    sources = [random_bits((8 << 20,), torch.uint8, seed) for seed in range(4)]
    copies = [torch.empty_like(source) for source in sources]

    def copy(i: int) -> None:
        for _ in range(5):
            CopyPlan([(sources[i], copies[i])], threads=2).run()

    workers = [threading.Thread(target=copy, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert all(torch.equal(a, b) for a, b in zip(sources, copies, strict=True))


def test_many_short_parallel_copies_leave_no_worker_behind():
    source = random_bits((600 << 10,), torch.uint8)
    copies = [torch.empty_like(source) for _ in range(8)]
    plans = [CopyPlan([(source, copy)], threads=4) for copy in copies]
    for number in range(300):
        copy = copies[number % 8]
        copy.zero_()
        plans[number % 8].run()
        assert torch.equal(source, copy)


def test_a_forked_child_copies_with_threads_of_its_own():
    source = random_bits((8 << 20,), torch.uint8)
    copy = torch.zeros_like(source)
    plan = CopyPlan([(source, copy)], threads=2)
    other = CopyPlan([(copy, torch.empty_like(source))], threads=2)
    other.run()  # the parent's pool has threads now
    child = os.fork()
    if child == 0:
        # No torch operation here: its own threads don't survive a fork.
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(20)
        plan.run()
        same = ctypes.string_at(source.data_ptr(), 8 << 20) == ctypes.string_at(
            copy.data_ptr(), 8 << 20
        )
        os._exit(0 if same else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_odd_tensors_round_trip_through_a_buffer():
    tensors = list(odd_tensors().values())
    sizes = [tensor.nbytes for tensor in tensors]
    offsets = [sum(sizes[:i]) for i in range(len(sizes))]
    buffer = torch.empty(sum(sizes), dtype=torch.uint8)
    pack_into(buffer, tensors, offsets, sizes)
    back = [torch.empty(t.shape, dtype=t.dtype) for t in tensors]
    unpack_from(buffer, back, offsets, sizes)
    assert [content(t) for t in back] == [content(t) for t in tensors]


def test_numpy_arrays_count_as_tensors():
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    target = np.zeros((3, 4), dtype=np.float32)
    CopyPlan([(array, target)]).run()
    assert (target == array).all()


def test_an_object_without_memory_is_refused():
    with pytest.raises(TensorError, match="got str"):
        as_tensor("weights")


REFUSED = {
    "sparse": (lambda: torch.eye(3).to_sparse(), "dense memory"),
    "quantised": (
        lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
        "dense memory|dlpack",
    ),
    "meta": (lambda: torch.empty(3, device="meta"), "meta"),
    "lazy conjugate": (lambda: torch.ones(3, dtype=torch.complex64).conj(), "resolve_conj"),
    "lazy negation": (lambda: torch.ones(3, dtype=torch.complex64).conj().imag, "resolve_neg"),
    "nested": (lambda: torch.nested.nested_tensor([torch.ones(2)]), "dense memory"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_a_tensor_that_is_not_plain_bytes_is_refused_by_name(kind):
    make, reason = REFUSED[kind]
    out = torch.empty(64, dtype=torch.uint8)
    with pytest.raises(TensorError, match=rf"(?s)'culprit'.*({reason})"):
        pack_into(out, [torch.ones(1), make()], [0, 4], [4, 12], ["fine", "culprit"])


def test_a_wrapper_subclass_is_refused():
    class Wrapper(torch.Tensor):
        @staticmethod
        def __new__(cls, inner):
            wrapper = torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype)
            wrapper.inner = inner
            return wrapper

        def __tensor_flatten__(self):
            return ["inner"], None

        @staticmethod
        def __tensor_unflatten__(inner, metadata, size, stride):
            return Wrapper(inner["inner"])

        @classmethod
        def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
            raise AssertionError("reading an address must not dispatch")

    with pytest.raises(TensorError, match="wraps other tensors"):
        CopyPlan([(Wrapper(torch.ones(3)), torch.empty(3))])


def test_a_parameter_that_requires_grad_can_be_read():
    parameter = torch.nn.Parameter(torch.ones(5))
    assert content(contiguous_copy(parameter)) == content(parameter)


def test_a_destination_that_overlaps_itself_is_refused():
    with pytest.raises(TensorError, match="share memory"):
        CopyPlan([(torch.ones(3, 4), torch.empty(3, 1).expand(3, 4))])


def test_shapes_that_differ_are_refused_with_the_position():
    with pytest.raises(TensorError, match="'#1'.*differ in shape"):
        CopyPlan([(torch.ones(2), torch.ones(2)), (torch.ones(2), torch.ones(3))])


def test_a_size_that_is_not_the_tensors_is_refused():
    with pytest.raises(TensorError, match="'w': has 8 bytes, expected 12"):
        pack_into(torch.empty(64, dtype=torch.uint8), [torch.ones(2)], [0], [12], ["w"])


@pytest.mark.parametrize("offset", [-1, 57, 1 << 62])
def test_an_offset_outside_the_buffer_is_refused(offset):
    with pytest.raises(ArgumentError, match="leaves its buffer"):
        pack_into(torch.empty(64, dtype=torch.uint8), [torch.ones(2)], [offset], [8])


def test_a_pack_into_too_little_room_is_refused():
    with pytest.raises(ArgumentError, match="leaves its buffer"):
        pack([torch.ones(4)], torch.empty(15, dtype=torch.uint8))


def test_negative_threads_are_refused():
    with pytest.raises(ArgumentError, match="threads"):
        CopyPlan([], threads=-1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_a_launch_without_cuda_is_a_typed_error():
    from packedcomm import _native

    table = _native.CopyTable("cuda", 0, 1024)
    if _native.cuda_architectures:
        pytest.skip("needs an extension built without CUDA")
    with pytest.raises(CudaError, match="built without CUDA"):
        table.launch(0, 0, 1)
