"""`packedcomm doctor`: its JSON, machines with and without GPUs, and every probe failing."""

import ctypes
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from packedcomm.cli import doctor_probes
from packedcomm.cli.doctor import collect
from packedcomm.cli.doctor_text import report_lines
from packedcomm.cli.main import main

SECTIONS = [*doctor_probes.PROBES, "problems"]


class FakeNvmlError(Exception):
    pass


class FakeLibraryNotFoundError(FakeNvmlError):
    pass


def unsupported(*arguments: object) -> None:
    raise FakeNvmlError("Not Supported")


def fake_nvml(**changes: Any) -> SimpleNamespace:
    """Two GPUs of which each has four links to a switch, as pynvml shows them."""

    def fields(handle: int, ids: list[int]) -> list[SimpleNamespace]:
        assert ids == [90]
        return [SimpleNamespace(nvmlReturn=0, value=SimpleNamespace(uiVal=26_562))]

    def p2p_status(a: int, b: int, capability: int) -> int:
        ctypes.c_int(capability)  # pynvml hands it to a C function: only a number will do
        return 0

    functions: dict[str, Any] = {
        "NVMLError": FakeNvmlError,
        "NVMLError_LibraryNotFound": FakeLibraryNotFoundError,
        "NVMLError_DriverNotLoaded": FakeLibraryNotFoundError,
        "NVML_SUCCESS": 0,
        "NVML_FEATURE_ENABLED": 1,
        "NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON": 90,
        "NVML_NVLINK_DEVICE_TYPE_SWITCH": 2,
        "NVML_P2P_CAPS_INDEX_NVLINK": 2,
        "nvmlInit": lambda: None,
        "nvmlShutdown": lambda: None,
        "nvmlSystemGetDriverVersion": lambda: "580.65.06",
        "nvmlSystemGetCudaDriverVersion": lambda: 13000,
        "nvmlDeviceGetCount": lambda: 2,
        "nvmlDeviceGetHandleByIndex": lambda index: index,
        "nvmlDeviceGetName": lambda handle: "NVIDIA H200",
        "nvmlDeviceGetUUID": lambda handle: f"GPU-{handle}",
        "nvmlDeviceGetMemoryInfo": lambda handle: SimpleNamespace(total=150 << 30),
        "nvmlDeviceGetCudaComputeCapability": lambda handle: (9, 0),
        "nvmlDeviceGetPciInfo": lambda handle: SimpleNamespace(busId=f"00000000:0{handle}:00.0"),
        "nvmlDeviceGetCurrPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetMaxPcieLinkGeneration": lambda handle: 5,
        "nvmlDeviceGetCurrPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetMaxPcieLinkWidth": lambda handle: 16,
        "nvmlDeviceGetNvLinkState": lambda handle, link: int(link < 4),
        "nvmlDeviceGetNvLinkVersion": lambda handle, link: 6,
        "nvmlDeviceGetNvLinkRemotePciInfo": lambda handle, link: SimpleNamespace(busId=b"sw"),
        "nvmlDeviceGetNvLinkRemoteDeviceType": lambda handle, link: 2,
        "nvmlDeviceGetFieldValues": fields,
        "nvmlDeviceGetP2PStatus": p2p_status,
        "nvmlDeviceGetTopologyCommonAncestor": lambda a, b: 40,
    }
    return SimpleNamespace(**functions | changes)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    nvml = fake_nvml()
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


def test_json_has_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--json"]) == 0

    report = json.loads(capsys.readouterr().out)
    assert list(report) == SECTIONS
    assert report["versions"]["python"] == sys.version.split()[0]
    assert set(report["versions"]["optional"]) == {"cupy", "nvidia-ml-py", "transformers", "vllm"}
    assert report["torch"]["version"] == torch.__version__
    assert Path(report["native"]["file"]).name.startswith("_native.")
    assert isinstance(report["native"]["cuda_architectures"], list)
    assert set(report["settings"]) == {"values", "changed"}
    assert set(report["nccl"]) >= {"path", "version", "loaded_before"}
    assert all(isinstance(problem, str) for problem in report["problems"])


def test_machine_without_gpu_has_no_problem_for_lack_of_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def no_driver() -> None:
        raise FakeLibraryNotFoundError("NVML Shared Library Not Found")

    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlInit=no_driver))
    report = collect({"nvml": doctor_probes.nvml})

    assert report["nvml"] == {
        "available": False,
        "reason": "no NVIDIA driver: NVML Shared Library Not Found",
    }
    assert report["problems"] == []


def test_text_shows_every_section(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0

    out = capsys.readouterr().out
    assert all(f"\n{name}" in f"\n{out}" for name in doctor_probes.PROBES)
    assert "buffer_size_bytes = 1.00 GiB" in out
    assert "problems" in out


def test_runs_when_neither_torch_nor_the_extension_can_be_imported() -> None:
    program = (
        "import sys\n"
        "sys.modules['torch'] = sys.modules['packedcomm._native'] = None\n"
        "from packedcomm.cli.main import main\n"
        "sys.exit(main(['doctor', '--json']))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)

    assert (done.returncode, done.stderr) == (0, "")
    report = json.loads(done.stdout)
    for section in ("torch", "native"):
        assert set(report[section]) == {"error"}
        assert any(problem.startswith(f"{section}: ") for problem in report["problems"])


def test_devices_and_links(two_gpus: SimpleNamespace) -> None:
    report = doctor_probes.nvml()

    assert (report["driver"], report["cuda"]) == ("580.65.06", "13.0")
    assert [device["uuid"] for device in report["devices"]] == ["GPU-0", "GPU-1"]
    assert report["devices"][0]["memory_bytes"] == 150 << 30
    assert report["devices"][0]["compute_capability"] == "9.0"
    assert report["devices"][0]["pcie"] == {
        "generation": 5,
        "max_generation": 5,
        "width": 16,
        "max_width": 16,
    }
    assert report["devices"][0]["nvlink"] == {
        "links": 4,
        "version": 6,
        "peers": {"switch": 4},
        "gb_per_s_per_link": 26.562,
        "gb_per_s": 106.2,
    }
    assert report["links"] == [
        {
            "devices": [0, 1],
            "nvlinks": 4,
            "through_switch": True,
            "pcie_path": "same NUMA node",
            "p2p_read": "ok",
            "p2p_nvlink": "ok",
        }
    ]


def test_links_between_two_gpus_without_a_switch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two links lead from each GPU to the other, two more to GPUs that aren't there."""

    def remote(handle: int, link: int) -> SimpleNamespace:
        peer = 1 - handle if link < 2 else 7
        return SimpleNamespace(busId=f"00000000:0{peer}:00.0")

    nvml = fake_nvml(
        nvmlDeviceGetNvLinkRemoteDeviceType=lambda handle, link: 0,
        nvmlDeviceGetNvLinkRemotePciInfo=remote,
    )
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    pair = doctor_probes.nvml()["links"][0]

    assert (pair["nvlinks"], pair["through_switch"]) == (2, False)


def test_what_a_gpu_does_not_report_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [name for name in vars(fake_nvml()) if name.startswith("nvmlDeviceGet")]
    kept = ("nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex")
    nvml = fake_nvml(**{name: unsupported for name in questions if name not in kept})
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

    report = collect({"nvml": doctor_probes.nvml})

    device = report["nvml"]["devices"][0]
    assert (device["name"], device["memory_bytes"], device["nvlink"]["links"]) == (None, None, 0)
    assert report["nvml"]["links"][0]["p2p_read"] is None
    assert report["problems"] == []
    text = "\n".join(line for _, line in report_lines(report))
    assert "GPU 0: None, memory unknown" in text
    assert "GPU 0 - GPU 1: no NVLink" in text


def test_text_of_devices_and_links(two_gpus: SimpleNamespace) -> None:
    text = "\n".join(line for _, line in report_lines({"nvml": doctor_probes.nvml()}))

    assert "GPU 1: NVIDIA H200, 150.00 GiB, compute capability 9.0, GPU-1" in text
    assert "NVLink version 6, 4 links, 106.2 GB/s in one direction by the driver" in text
    assert "GPU 0 - GPU 1: 4 NVLinks through a switch, p2p read ok, same NUMA node" in text


def test_a_driver_that_fails_half_way_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", fake_nvml(nvmlDeviceGetCount=unsupported))

    report = collect({"nvml": doctor_probes.nvml})

    assert report["nvml"] == {"error": "FakeNvmlError: Not Supported"}
    assert report["problems"] == ["nvml: FakeNvmlError: Not Supported"]


def test_missing_nvidia_ml_py(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", None)

    report = collect({"nvml": doctor_probes.nvml})

    assert report["problems"] == [
        "nvidia-ml-py is missing: devices and links are not shown (install the extra gpu)"
    ]


@pytest.mark.parametrize("name", doctor_probes.PROBES)
def test_each_probe_fails_alone(name: str) -> None:
    def broken() -> None:
        raise OSError(5, "device on fire")

    report = collect({**doctor_probes.PROBES, name: broken})

    assert report[name] == {"error": "OSError: [Errno 5] device on fire"}
    assert any(p.startswith(f"{name}: OSError: [Errno 5]") for p in report["problems"])
    others = [other for other in doctor_probes.PROBES if other != name]
    assert all("error" not in report[other] for other in others)
    assert (name, "failed: OSError: [Errno 5] device on fire") in list(report_lines(report))


def test_bind_addresses_tell_loopback_from_the_rest() -> None:
    addresses = doctor_probes.bind_addresses()

    loopback = [entry for entry in addresses if entry["address"] == "127.0.0.1"]
    assert loopback
    assert loopback[0]["loopback"] is True
    assert all(entry["family"] in ("IPv4", "IPv6") for entry in addresses)
    assert all(
        entry["loopback"] is False
        for entry in addresses
        if not entry["address"].startswith(("127.", "::1"))
    )


def test_settings_from_the_environment_are_marked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKEDCOMM_NUM_BUFFERS", "5")

    section = doctor_probes.settings_in_force()

    assert section["values"]["num_buffers"] == 5
    assert section["changed"] == ["num_buffers"]
    assert ("", "num_buffers = 5  from the environment") in list(
        report_lines({"settings": section})
    )


def test_bad_setting_is_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKEDCOMM_NUM_BUFFERS", "many")

    report = collect({"settings": doctor_probes.settings_in_force})

    assert len(report["problems"]) == 1
    assert "PACKEDCOMM_NUM_BUFFERS='many' is not a valid int" in report["problems"][0]


def test_missing_nccl_is_told_without_being_a_problem(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PACKEDCOMM_NCCL_LIBRARY", "/nothing/libnccl.so.2")

    report = collect({"nccl": doctor_probes.nccl_library})

    assert report["nccl"]["path"] is None
    assert "/nothing/libnccl.so.2" in report["nccl"]["reason"]
    assert report["problems"] == []


def test_gpus_are_counted_on_the_pci_bus(tmp_path: Path) -> None:
    for name, vendor, kind in (
        ("0000:01:00.0", "0x10de", "0x030200"),
        ("0000:01:00.1", "0x10de", "0x040300"),  # its audio function
        ("0000:02:00.0", "0x1af4", "0x030000"),
    ):
        device = tmp_path / name
        device.mkdir()
        (device / "vendor").write_text(f"{vendor}\n")
        (device / "class").write_text(f"{kind}\n")
    (tmp_path / "unreadable").mkdir()

    assert doctor_probes._gpus_on_pci_bus(tmp_path) == 1
