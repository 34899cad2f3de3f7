"""Whether ranks fit together, and errors that cross from one process to another."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver, errors
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    ContextLost,
    CudaError,
    ManifestError,
    PackedCommError,
    PeerLost,
    RemoteError,
    SessionStateError,
    VersionMismatch,
)
from packedcomm.session.agreement import agreed_transport, choose_device, own_hello
from packedcomm.session.messages import Failure, Hello, Refused
from packedcomm.session.remote_errors import combined, described, remote_error
from packedcomm.settings import DEFAULTS, Settings
from tests.helpers.in_process import Round
from tests.helpers.sessions import QUICK

CPU = Hello("0.1.0", 11, "here", "cpu")
GPU = Hello("0.1.0", 12, "there", "cuda", "2.28.9", "/lib/one/libnccl.so.2")


def test_cpus_use_gloo_and_gpus_nccl():
    assert agreed_transport(CPU, CPU, 1) == "gloo"
    assert agreed_transport(GPU, dataclasses.replace(GPU, nccl_path="/other"), 1) == "nccl"


def test_cpus_and_gpus_do_not_mix():
    with pytest.raises(ConfigMismatch) as raised:
        agreed_transport(GPU, CPU, 3)
    assert str(raised.value) == (
        "the sender (process 12 on there) is on cuda, receiver rank 3 (process 11 on here) on cpu"
    )


def test_other_nccl_versions_are_named_with_their_files():
    other = dataclasses.replace(GPU, nccl_version="2.27.3", nccl_path="/lib/two/libnccl.so.2")
    with pytest.raises(VersionMismatch) as raised:
        agreed_transport(GPU, other, 2)
    for part in ("2.28.9 from /lib/one/libnccl", "receiver rank 2", "2.27.3 from /lib/two/libnccl"):
        assert part in str(raised.value)


def test_other_package_and_format_versions_are_named():
    with pytest.raises(VersionMismatch, match=r"runs packedcomm 0\.1\.0.*packedcomm 0\.2\.0"):
        agreed_transport(CPU, dataclasses.replace(CPU, package="0.2.0"), 1)
    with pytest.raises(VersionMismatch, match=r"versions \[1\] .*versions \[2, 3\]"):
        agreed_transport(CPU, dataclasses.replace(CPU, wire_versions=(2, 3)), 1)


@pytest.mark.fault(12)
@pytest.mark.parametrize(
    ("sender", "receiver", "parts"),
    [
        (
            {"heartbeat_timeout_s": 4.0},
            {"heartbeat_interval_s": 10.0},
            ["heartbeat_timeout_s of the sender", "is 4,", "interval_s of receiver rank 1", " 10"],
        ),
        (
            {"heartbeat_interval_s": 4.5, "heartbeat_timeout_s": 30.0},
            {"heartbeat_timeout_s": 4.0},
            ["heartbeat_timeout_s of receiver rank 1", "is 4,", "interval_s of the sender", " 4.5"],
        ),
    ],
)
def test_settings_that_do_not_go_together_are_named_with_both_values(sender, receiver, parts):
    hellos = [own_hello(torch.device("cpu"), Settings(**given)) for given in (sender, receiver)]
    with pytest.raises(ConfigMismatch) as raised:
        agreed_transport(*hellos, 1)
    for part in parts:
        assert part in str(raised.value)
    with (
        Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=Settings(**sender)) as s,
        pytest.raises(ConfigMismatch, match="receiver rank 1"),
    ):
        Session.connect(s.address, device="cpu", settings=Settings(**receiver))


def test_settings_may_differ_where_they_go_together():
    slow = dataclasses.replace(CPU, heartbeat_interval_s=3.0, heartbeat_timeout_s=4.0)
    small = dataclasses.replace(slow, max_frame_bytes=1000)
    for one, other in ((CPU, slow), (slow, CPU), (CPU, small), (small, CPU)):
        assert agreed_transport(one, other, 1) == "gloo"


@pytest.mark.fault(12)
def test_a_manifest_that_a_receiver_would_not_take_is_refused_before_it_is_sent():
    tensors = {f"{number}.weight": torch.ones(2) for number in range(200)}
    small = dataclasses.replace(QUICK, max_frame_bytes=4000)
    with (
        Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session,
        Session.connect(session.address, device="cpu", settings=small) as end,
    ):
        received = {name: torch.zeros(2) for name in tensors}
        receiver = WeightReceiver(TensorTarget(received, partial=True), end)
        some = dict(list(tensors.items())[:5])

        def both():
            with pytest.raises(
                ConfigMismatch, match="receiver rank 1 is 4,000, of the sender 67,108,864"
            ):
                FullWeightSender(tensors, session).sync()
            return FullWeightSender(some, session).sync()

        # Nothing of the first one has reached it.
        done = Round(both, [receiver])
        assert done.sent.tensors == done.received[0].tensors == 5


def test_a_process_says_what_it_is():
    hello = own_hello(torch.device("cpu"), DEFAULTS)
    assert (hello.device, hello.nccl_version, hello.nccl_path) == ("cpu", "", "")
    assert hello.pid > 0


def test_the_device_is_the_cpu_where_there_is_no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for given in (None, "cpu", "cpu:0", torch.device("cpu")):
        assert choose_device(given) == torch.device("cpu")
    for wanted in ("cuda", "cuda:1", 0):
        with pytest.raises(CudaError, match="this process sees 0 GPUs"):
            choose_device(wanted)


def test_the_device_is_the_current_gpu_where_there_is_one(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 2)
    for given in (None, "cuda", "cuda:2", 2):
        assert choose_device(given) == torch.device("cuda", 2)
    with pytest.raises(CudaError, match="'cuda:4' is asked for, but this process sees 4 GPUs"):
        choose_device(4)


@pytest.mark.parametrize("device", ["meta", "gpu", "", 3.5])
def test_another_device_is_refused(device):
    with pytest.raises(ArgumentError, match="device"):
        choose_device(device)


def _raised(error):
    try:
        raise error
    except BaseException as caught:  # noqa: BLE001  (given back)
        return caught


def _crossed(error, who="receiver rank 3"):
    return remote_error(Failure(*described(_raised(error), DEFAULTS.max_frame_bytes)), who)


ALL_CLASSES = [
    kind
    for kind in (getattr(errors, name) for name in errors.__all__)
    if isinstance(kind, type) and issubclass(kind, PackedCommError)
]

# They mean the end of whoever raises them.
OF_ONE_PROCESS = (ContextLost, SessionStateError)


@pytest.mark.parametrize(
    "kind",
    [kind for kind in ALL_CLASSES if kind not in OF_ONE_PROCESS],
    ids=lambda kind: kind.__name__,
)
def test_every_other_error_class_crosses_as_itself(kind):
    error = _crossed(kind("tensor 'w' is missing"))
    assert type(error) is kind
    assert str(error) == "receiver rank 3: tensor 'w' is missing"
    assert type(error.__cause__) is RemoteError
    assert "in _raised" in str(error.__cause__)


def test_an_error_of_another_library_crosses_as_a_remote_error():
    error = _crossed(ZeroDivisionError("division by zero"))
    assert type(error) is RemoteError
    assert str(error) == "receiver rank 3: ZeroDivisionError: division by zero"
    assert "raise error" in str(error.__cause__)


@pytest.mark.parametrize("kind", ["listed", "__all__", "Sequence", "ValueError", "", "annotations"])
def test_a_kind_that_is_no_error_class_of_ours_is_a_remote_error(kind):
    assert type(remote_error(Failure(kind, "x"), "rank 1")) is RemoteError
    assert type(remote_error(Refused(kind, "x"), "rank 1")) is RemoteError


def test_long_and_undecodable_texts_are_cut_and_cleaned():
    error = _crossed(ManifestError("\udcff" + "x" * 1_000_000))
    assert type(error) is ManifestError
    assert str(error).startswith("receiver rank 3: \\udcffxxx")
    assert len(str(error)) < 100_000
    assert len(str(error.__cause__)) < 100_000


def test_failures_of_several_ranks_are_one_error_with_the_cause_first():
    lost, bad = PeerLost("receiver rank 1: gone"), _crossed(ManifestError("bad"), "receiver rank 2")
    error = combined({2: bad, 1: lost})
    assert type(error) is ManifestError
    assert str(error) == "receiver rank 2: bad; receiver rank 1: gone"
    assert "in _raised" in str(error.__cause__)
    assert combined({1: lost}) is lost
