"""What both sides must agree on, or be told that they don't; and what arrives, bit for bit."""

from __future__ import annotations

import socket
from dataclasses import replace

import pytest
import torch

from packedcomm import (
    FullWeightSender,
    Session,
    StagedTarget,
    TensorTarget,
    UnchangedWeightsWarning,
    WeightReceiver,
)
from packedcomm.errors import (
    AddressInUse,
    ConfigMismatch,
    CudaError,
    ManifestError,
    TensorError,
    VersionMismatch,
)
from packedcomm.session import agreement
from tests.helpers.in_process import Round, sessions
from tests.helpers.peers import PATIENT, Receiving, training
from tests.helpers.tensors import DTYPES, content, random_bits


def received(sent, target, live):
    """Send to one receiver; the bytes on both sides and the sender's outcome."""
    with sessions(1) as (session, (end,)):
        outcome = Round(FullWeightSender(sent, session).sync, [WeightReceiver(target, end)])
    return outcome.sent, [content(t) for t in sent.values()], [content(t) for t in live.values()]


@pytest.mark.fault(12)
def test_buffer_sizes_that_differ_are_the_senders_and_may_change_between_syncs():
    # 16 MiB and three buffers here, 1 MiB and two there.
    other = replace(PATIENT, buffer_size_bytes=16 << 20, num_buffers=3)
    with training(2, Receiving(settings=other)) as group:
        assert group.session.buffer_size_bytes == 1 << 20
        for value, size in enumerate((3 << 20, 1 << 12, 1 << 30), 2):
            group.session.buffer_size_bytes = size
            new = group.sync(float(value))
            assert [peer.outcome().checksum for peer in group.peers] == [new, new]


@pytest.mark.fault(10)
@pytest.mark.parametrize("staging", [False, True])
def test_names_that_differ_are_listed_before_any_data(staging):
    sent = {f"layer{i}": torch.ones(4) for i in range(20)}
    live = {f"layer{i}": torch.zeros(4) for i in range(10, 30)}
    target = TensorTarget(live)
    error, _, bytes_ = received(sent, StagedTarget(target) if staging else target, live)
    assert isinstance(error, ManifestError)
    assert "'layer0'" in str(error)
    assert "'layer1'" in str(error)
    assert "more" in str(error)
    assert bytes_ == [bytes(16)] * 20


@pytest.mark.fault(11)
def test_shapes_and_dtypes_that_differ_are_listed_before_any_data():
    sent = {"shape": torch.ones(4), "dtype": torch.ones(4), "right": torch.ones(4)}
    live = {
        "shape": torch.zeros(5),
        "dtype": torch.zeros(4, dtype=torch.int32),
        "right": torch.zeros(4),
    }
    error, _, bytes_ = received(sent, TensorTarget(live), live)
    assert isinstance(error, ManifestError)
    assert "'shape'" in str(error)
    assert "'dtype'" in str(error)
    assert "'right'" not in str(error)
    assert not any(any(data) for data in bytes_)


SPECIAL = {
    # Quiet and signalling NaNs with payloads, both signs; -0.0; the smallest and largest denormal.
    torch.float32: (torch.int32, [0x7FC12345, 0x7F812345, -0x7EDCBB, -(1 << 31), 1, 0x7FFFFF]),
    torch.float64: (torch.int64, [0x7FF8DEADBEEF0001, 0x7FF0000000000001, -(1 << 63), 1]),
    torch.bfloat16: (torch.int16, [0x7FC5, 0x7F85, -0x7B, -(1 << 15), 1, 0x7F]),
    torch.float16: (torch.int16, [0x7E15, 0x7C15, -(1 << 15), 1, 0x3FF]),
}


@pytest.mark.fault(31)
@pytest.mark.parametrize("staging", [False, True])
def test_payloads_of_nans_zeros_with_signs_and_denormals_arrive_bit_for_bit(staging):
    sent = {
        str(dtype): torch.tensor(bits, dtype=integer).view(dtype)
        for dtype, (integer, bits) in SPECIAL.items()
    }
    sent |= {f"random {dtype}": random_bits((257,), dtype, 3) for dtype in DTYPES}
    live = {name: torch.zeros_like(tensor) for name, tensor in sent.items()}
    target = TensorTarget(live)
    _, there, here = received(sent, StagedTarget(target) if staging else target, live)
    assert here == there


@pytest.mark.fault(24)
def test_a_sync_of_the_same_bytes_says_so_every_time():
    live = {"w": torch.zeros(100)}
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(TensorTarget(live)), end)
        sender = FullWeightSender({"w": torch.ones(100)}, session)
        Round(sender.sync, [receiver])
        for _ in range(2):
            with pytest.warns(UnchangedWeightsWarning, match="0 of 1 tensors changed"):
                outcome = Round(sender.sync, [receiver])
            assert outcome.sent.changed_tensors == 0
            assert outcome.received[0].changed_tensors == 0


@pytest.mark.fault(25)
@pytest.mark.parametrize("staging", [False, True])
def test_a_destination_whose_memory_was_freed_is_refused_by_name(staging):
    live = {"kept": torch.zeros(4), "freed": torch.zeros(4)}
    target = TensorTarget(live)
    live["freed"].untyped_storage().resize_(0)
    with sessions(1) as (session, (end,)):
        receiver = WeightReceiver(StagedTarget(target) if staging else target, end)
        sender = FullWeightSender({name: torch.ones(4) for name in live}, session)
        first = Round(sender.sync, [receiver])
        assert isinstance(first.sent, TensorError)
        assert "'freed'" in str(first.sent)
        assert live["kept"].tolist() == [0.0] * 4
        live["freed"].untyped_storage().resize_(16)
        assert Round(sender.sync, [receiver]).sent.version == 0
        assert live["freed"].tolist() == [1.0] * 4


@pytest.mark.fault(25)
def test_a_destination_that_needs_grad_in_place_or_is_elsewhere_is_refused_by_name():
    with pytest.raises(TensorError, match="'trained'"):
        TensorTarget({"trained": torch.zeros(4, requires_grad=True)})
    live = {"elsewhere": torch.zeros(4, device="meta")}
    with sessions(1) as (session, (end,)):
        try:
            receiver = WeightReceiver(TensorTarget(live), end)
        except TensorError as error:
            assert "'elsewhere'" in str(error)  # noqa: PT017
            return
        first = Round(FullWeightSender({"elsewhere": torch.ones(4)}, session).sync, [receiver])
        assert isinstance(first.sent, TensorError)
        assert "'elsewhere'" in str(first.sent)


@pytest.mark.fault(26)
@pytest.mark.parametrize("staging", [False, True])
def test_addresses_of_destinations_never_change_whatever_fails(staging):
    live = {f"t{i}": torch.zeros(1000) for i in range(5)}
    addresses = {name: tensor.data_ptr() for name, tensor in live.items()}
    sent = {name: torch.ones(1000) for name in live}
    with sessions(1) as (session, (end,)):
        target = TensorTarget(live)
        receiver = WeightReceiver(StagedTarget(target) if staging else target, end)
        for value in range(3):
            for tensor in sent.values():
                tensor.fill_(value)
            Round(FullWeightSender(sent, session).sync, [receiver])
            wrong = FullWeightSender({"t0": torch.ones(3)}, session)
            assert isinstance(Round(wrong.sync, [receiver]).sent, ManifestError)
            assert {name: tensor.data_ptr() for name, tensor in live.items()} == addresses
            assert live["t4"].tolist() == [float(value)] * 1000


@pytest.mark.fault(27)
def test_a_taken_port_is_named_and_a_chosen_one_is_held():
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(AddressInUse, match=str(port)):
            Session.listen(f"127.0.0.1:{port}", receivers=1, device="cpu")
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu") as session:
        assert not session.address.endswith(":0")
        with pytest.raises(AddressInUse, match=session.address):
            Session.listen(session.address, receivers=1, device="cpu")


@pytest.mark.fault(32)
def test_a_receiver_on_a_gpu_and_a_sender_on_a_cpu_are_told_at_connect(monkeypatch):
    own = agreement.own_hello
    said = []

    def first_on_a_gpu(device, settings):
        said.append(own(device, settings))
        return replace(said[0], device="cuda") if len(said) == 1 else said[-1]

    monkeypatch.setattr(agreement, "own_hello", first_on_a_gpu)
    with (
        Session.listen("127.0.0.1:0", receivers=1, device="cpu") as session,
        pytest.raises(ConfigMismatch, match="is on cpu, receiver rank 1 .* on cuda"),
    ):
        Session.connect(session.address, device="cpu")


@pytest.mark.fault(28)
def test_libraries_that_differ_are_told_at_connect_with_both_versions_and_paths(monkeypatch):
    own = agreement.own_hello
    said = []

    def with_nccl(device, settings):
        said.append(own(device, settings))
        minor = 27 + len(said)
        return replace(said[0], nccl_version=f"2.{minor}.1", nccl_path=f"lib{minor}/libnccl.so.2")

    monkeypatch.setattr(agreement, "own_hello", with_nccl)
    with (
        Session.listen("127.0.0.1:0", receivers=1, device="cpu") as session,
        pytest.raises(VersionMismatch) as caught,
    ):
        Session.connect(session.address, device="cpu")
    for text in ("2.28.1", "2.29.1", "lib28/libnccl.so.2", "lib29/libnccl.so.2"):
        assert text in str(caught.value)


@pytest.mark.fault(32)
@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
@pytest.mark.parametrize("device", ["cuda", "cuda:7", 3])
def test_a_gpu_that_is_not_there_is_an_error_that_says_so_on_either_side(device):
    with pytest.raises(CudaError, match="sees 0 GPUs"):
        Session.listen("127.0.0.1:0", receivers=1, device=device)
    with (
        Session.listen("127.0.0.1:0", receivers=1, device="cpu") as session,
        pytest.raises(CudaError, match="sees 0 GPUs"),
    ):
        Session.connect(session.address, device=device)
