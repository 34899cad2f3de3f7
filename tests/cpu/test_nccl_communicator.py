"""The NCCL communicator's waiting, failing and ending, over a library that does as it is told."""

from __future__ import annotations

import contextlib
import ctypes
import threading
import time
from types import SimpleNamespace

import pytest
import torch

from packedcomm import NcclCommunicator, Settings, _native
from packedcomm.communicators.nccl import abort_all
from packedcomm.errors import (
    ArgumentError,
    ContextLost,
    CudaError,
    DeadlineExceeded,
    NcclError,
    PackedCommError,
    PeerLost,
    SessionStateError,
    TensorError,
)
from tests.helpers.fake_nccl import FakeNccl, build_fake_nccl

STREAM = 0x5EA
FOR_EVER = -1
REMOTE_ERROR = 6
CUDA_ERROR = 1
INTERNAL_ERROR = 3

SETTINGS = Settings(operation_timeout_s=0.3, close_timeout_s=0.3)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    # A fresh file for each test: its variables start at their first values. The name isn't NCCL's,
    # so that other tests don't find it loaded.
    path = build_fake_nccl(tmp_path, name="fake.so")
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(
        torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=STREAM)
    )
    fake = FakeNccl(path)
    object.__setattr__(fake, "library", _native.nccl_library([], str(path)))
    yield fake
    fake.abort_hangs = 0


def _handle(fake, rank=0, world_size=2):
    return _native.NcclHandle.create(fake.library, bytes([42]) * 128, rank, world_size)


def _connected(fake, rank=0, world_size=2):
    handle = _handle(fake, rank, world_size)
    assert handle.wait_ready(1.0)
    device = torch.device("cpu")
    return NcclCommunicator(handle, fake.library, rank, world_size, device, SETTINGS)


def test_the_communicator_is_non_blocking_and_described_as_of_2_18(fake):
    with _connected(fake):
        assert fake.config_blocking == 0
        assert fake.config_version == 21800
        assert fake.config_traffic_class == -(1 << 31)


def test_connecting_is_polled_to_its_end(fake):
    fake.init_polls = 20
    handle = _handle(fake)
    assert not handle.wait_ready(0.0005)
    assert handle.wait_ready(5.0)
    handle.destroy(1.0)


@pytest.mark.parametrize(
    ("result", "kind"), [(REMOTE_ERROR, PeerLost), (CUDA_ERROR, CudaError), (2, NcclError)]
)
def test_a_failed_connection_raises_nccls_text_with_version_and_path(fake, result, kind):
    fake.result = result
    handle = _handle(fake)
    with pytest.raises(
        kind, match=r"ncclCommInitRankConfig.*last words.*NCCL 2\.28\.9 from .*fake"
    ):
        handle.wait_ready(1.0)
    handle.abort(1.0)
    assert fake.aborts == 1


def test_an_operation_returns_only_once_it_is_launched(fake):
    with _connected(fake) as communicator:
        fake.launch_polls = 200
        started = time.monotonic()
        communicator.broadcast(torch.zeros(5), 1)
        assert time.monotonic() - started > 200 * 100e-6
        assert (fake.last_peer, fake.last_count, fake.calls) == (1, 20, 1)


def test_every_operation_reaches_nccl_with_bytes_peer_and_stream(fake):
    with _connected(fake) as communicator:
        communicator.send(torch.zeros(3, dtype=torch.bfloat16), 1)
        assert (fake.last_count, fake.last_peer) == (6, 1)
        communicator.recv(torch.zeros((), dtype=torch.complex128), 1)
        assert fake.last_count == 16
        communicator.all_reduce(torch.zeros(4, dtype=torch.complex64))
        assert (fake.last_count, fake.last_peer) == (8, 7)


def test_an_empty_tensor_moves_nothing(fake):
    with _connected(fake) as communicator:
        communicator.broadcast(torch.zeros(0, 4), 0)
        communicator.all_reduce(torch.zeros(0))
        assert fake.calls == 0


def test_a_launch_that_does_not_end_is_a_deadline_error_and_ends_the_communicator(fake):
    communicator = _connected(fake, world_size=3)
    fake.launch_polls = FOR_EVER
    started = time.monotonic()
    with pytest.raises(DeadlineExceeded, match=r"broadcast from rank 2 on rank 0 of 3.*0\.3 s"):
        communicator.broadcast(torch.zeros(5), 2)
    assert 0.2 < time.monotonic() - started < 2.0
    with pytest.raises(SessionStateError, match="not launched within"):
        communicator.send(torch.zeros(5), 1)
    communicator.close()
    assert (fake.aborts, fake.destroys, fake.aborted_under_a_thread) == (1, 0, 0)


@pytest.mark.parametrize(
    ("result", "kind"),
    [(REMOTE_ERROR, PeerLost), (CUDA_ERROR, CudaError), (INTERNAL_ERROR, NcclError)],
)
def test_a_failed_operation_is_typed_and_ends_the_communicator(fake, result, kind):
    communicator = _connected(fake)
    fake.result = result
    with pytest.raises(kind, match=r"recv from rank 1 on rank 0 of 2.*last words"):
        communicator.recv(torch.zeros(5), 1)
    with pytest.raises(SessionStateError):
        communicator.recv(torch.zeros(5), 1)
    communicator.close()
    assert (fake.aborts, fake.destroys) == (1, 0)


def test_an_error_that_nccl_meets_by_itself_shows_in_check(fake):
    communicator = _connected(fake)
    communicator.check()
    fake.result = REMOTE_ERROR
    with pytest.raises(PeerLost, match="asynchronous error"):
        communicator.check()
    communicator.close()


def _send_in_group(communicator, error=None):
    with communicator.group():
        communicator.send(torch.zeros(5), 1)
        communicator.send(torch.zeros(5), 1)
        if error is not None:
            raise error


def test_a_group_is_issued_at_its_end(fake):
    with _connected(fake) as communicator:
        with communicator.group():
            communicator.send(torch.zeros(5), 1)
            communicator.recv(torch.zeros(5), 1)
            assert fake.calls == 0
        assert (fake.calls, fake.groups, fake.depth) == (2, 1, 0)
        with communicator.group():
            pass
        assert fake.groups == 1


def test_a_group_is_dropped_when_an_exception_leaves_it(fake):
    with _connected(fake) as communicator:
        with pytest.raises(KeyError):
            _send_in_group(communicator, error=KeyError)
        assert (fake.calls, fake.groups) == (0, 0)
        communicator.send(torch.zeros(5), 1)
        assert fake.calls == 1


def test_a_failed_group_leaves_no_group_open_in_nccl(fake):
    communicator = _connected(fake)
    fake.broadcast_result = INTERNAL_ERROR
    with pytest.raises(NcclError, match="group of 2 operations"):
        _send_in_group(communicator)
    assert (fake.calls, fake.depth) == (1, 0)
    communicator.close()


def test_groups_do_not_nest(fake):
    with (
        _connected(fake) as communicator,
        communicator.group(),
        pytest.raises(SessionStateError, match="nest"),
        communicator.group(),
    ):
        pass


def test_close_finalises_and_destroys_once(fake):
    communicator = _connected(fake)
    fake.finalize_polls = 20
    communicator.close()
    communicator.close()
    assert (fake.finalizes, fake.destroys, fake.aborts) == (1, 1, 0)
    with pytest.raises(SessionStateError, match="closed"):
        communicator.broadcast(torch.zeros(5), 0)


def test_a_close_that_does_not_end_becomes_an_abort(fake):
    communicator = _connected(fake)
    fake.finalize_polls = FOR_EVER
    communicator.close()
    assert (fake.finalizes, fake.destroys, fake.aborts) == (1, 0, 1)


def test_an_error_inside_the_context_aborts(fake):
    with pytest.raises(KeyError), _connected(fake):
        raise KeyError
    assert (fake.finalizes, fake.aborts) == (0, 1)


def test_abort_from_another_thread_ends_a_waiting_operation_with_its_reason(fake):
    communicator = _connected(fake)
    fake.launch_polls = FOR_EVER
    threading.Timer(0.1, communicator.abort, ["the supervisor says so"]).start()
    with pytest.raises(SessionStateError, match="the supervisor says so"):
        communicator.broadcast(torch.zeros(5), 0)
    communicator.abort("again")
    communicator.close()
    assert (fake.aborts, fake.aborted_under_a_thread) == (1, 0)


@pytest.mark.fault(4)
def test_an_abort_that_hangs_is_a_lost_context_within_its_time(fake):
    communicator = _connected(fake)
    fake.abort_hangs = 1
    started = time.monotonic()
    with pytest.raises(ContextLost, match=r"0\.3 s.*restart"):
        communicator.abort("it hangs")
    assert time.monotonic() - started < 2.0
    with pytest.raises(SessionStateError, match="it hangs"):
        communicator.broadcast(torch.zeros(5), 0)
    fake.abort_hangs = 0
    communicator.close()


@pytest.mark.fault(4)
def test_an_abort_that_fails_is_a_lost_context(fake):
    communicator = _connected(fake)
    fake.abort_result = CUDA_ERROR
    with pytest.raises(ContextLost, match="restart"):
        communicator.abort("the GPU is gone")
    with pytest.raises(ContextLost):
        communicator.close()
    communicator.close()


@pytest.mark.fault(5)
def test_several_are_all_marked_before_one_is_freed(fake):
    communicators = [_connected(fake) for _ in range(3)]
    fake.abort_hangs = 1
    # Each abort waits for the others to have begun, as kernels that wait for each other would.
    threading.Timer(0.1, lambda: setattr(fake, "abort_hangs", 0)).start()
    abort_all(communicators, "all at once")
    assert fake.aborts == 3
    for communicator in communicators:
        communicator.close()


def test_an_adopted_communicator_is_used_but_never_ended(fake):
    owner = _handle(fake, rank=1, world_size=4)
    assert owner.wait_ready(1.0)
    comm = _comm_of(fake, rank=1, world_size=4)
    fake.blocking = 1
    handle = _native.NcclHandle.adopt(fake.library, comm, 1, 4)
    device = torch.device("cpu")
    communicator = NcclCommunicator(handle, fake.library, 1, 4, device, SETTINGS, adopted=True)
    communicator.broadcast(torch.zeros(5), 0)
    communicator.abort("not ours")
    communicator.close()
    assert (fake.calls, fake.aborts, fake.destroys, fake.finalizes) == (1, 0, 0, 0)
    with pytest.raises(ArgumentError, match="rank 1 of 4, not rank 0 of 4"):
        _native.NcclHandle.adopt(fake.library, comm, 0, 4)
    with pytest.raises(ArgumentError, match="null"):
        _native.NcclHandle.adopt(fake.library, 0, 0, 4)
    owner.destroy(1.0)


def _comm_of(fake, rank, world_size):
    comm = (ctypes.c_int * 3)(world_size, rank, 0)
    object.__setattr__(fake, "comm", comm)
    return ctypes.addressof(comm)


@pytest.mark.parametrize(
    ("tensor", "match"),
    [
        (torch.zeros(4, 4).t(), "contiguous"),
        (torch.zeros(4, 4).to_sparse(), "dense"),
        (torch.zeros(4, device="meta"), "on meta"),
    ],
)
def test_a_tensor_that_cannot_be_sent_is_refused_by_name(fake, tensor, match):
    with _connected(fake) as communicator:
        for operation in ("broadcast", "send", "recv"):
            with pytest.raises(TensorError, match=rf"{operation}.*{match}"):
                getattr(communicator, operation)(tensor, 1)
        assert fake.calls == 0


def test_arguments_out_of_range_are_refused(fake):
    with _connected(fake) as communicator:
        for call in (
            lambda: communicator.broadcast(torch.zeros(1), 2),
            lambda: communicator.send(torch.zeros(1), 0),
            lambda: communicator.recv(torch.zeros(1), -1),
        ):
            with pytest.raises(ArgumentError):
                call()
        for dtype in (torch.bool, torch.float8_e4m3fn, torch.int16):
            with pytest.raises(TensorError, match=str(dtype)):
                communicator.all_reduce(torch.zeros(2).to(dtype))


def test_a_second_thread_inside_is_refused(fake):
    communicator = _connected(fake)
    fake.launch_polls = FOR_EVER
    errors: list[PackedCommError] = []

    def first() -> None:
        try:
            communicator.broadcast(torch.zeros(5), 0)
        except PackedCommError as error:
            errors.append(error)

    thread = threading.Thread(target=first)
    thread.start()
    time.sleep(0.1)
    with pytest.raises(SessionStateError, match="another thread"):
        communicator._handle.broadcast(0, 1, 0, STREAM, 1.0)
    communicator.check()
    communicator.close()
    thread.join()
    assert isinstance(errors[0], (SessionStateError, DeadlineExceeded))


def test_forgetting_to_close_is_a_warning(fake):
    communicator = _connected(fake)
    with pytest.warns(ResourceWarning, match="never closed"):
        communicator.__del__()
    communicator.close()


def test_the_representation_tells_rank_device_version_and_state(fake):
    communicator = _connected(fake)
    assert "rank=0, world_size=2, device='cpu', nccl=2.28.9" in repr(communicator)
    communicator.close()
    assert "closed" in repr(communicator)
