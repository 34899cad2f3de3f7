"""The doctor's rules: each problem is found, and a healthy machine has none."""

from typing import Any

import pytest

from packedcomm.cli.doctor_problems import find_problems


def healthy_report() -> dict[str, Any]:
    """A report of a machine on which all is well, for the rules to find changes in."""
    device = {"index": 0, "compute_capability": "9.0"}
    return {
        "machine": {"nvidia_gpus_on_pci_bus": 1},
        "torch": {"version": "2.13.0", "cuda": "13.0", "gpus": 1},
        "native": {"cuda_architectures": ["sm_80", "sm_90", "compute_90"]},
        "nccl": {"path": "/lib/libnccl.so.2", "loaded_before": ["/lib/libnccl.so.2"]},
        "nvml": {
            "available": True,
            "driver": "580.65.06",
            "cuda": "13.0",
            "devices": [device],
            "links": [],
        },
        "addresses": [],
        "settings": {"values": {}, "changed": []},
    }


def test_a_healthy_machine_has_no_problems() -> None:
    assert find_problems(healthy_report()) == []


@pytest.mark.parametrize(
    ("section", "changes", "expected"),
    [
        ("native", {"cuda_architectures": []}, "packedcomm was built without CUDA although 1 GPUs"),
        (
            "native",
            {"cuda_architectures": ["sm_100", "compute_100"]},
            "GPU 0 has compute capability 9.0, packedcomm was built for sm_100, compute_100",
        ),
        ("torch", {"cuda": None}, "torch 2.13.0 is a CPU build although 1 GPUs"),
        ("torch", {"gpus": 0}, "torch 2.13.0 (CUDA 13.0) sees none of the 1 GPUs"),
        ("nvml", {"cuda": "12.8"}, "the driver 580.65.06 supports CUDA 12.8, torch was built with"),
        (
            "nvml",
            {"available": False, "reason": "no NVIDIA driver: gone", "devices": []},
            "1 NVIDIA GPUs are on the PCI bus, but there is no NVIDIA driver: gone",
        ),
        ("nccl", {"loaded_before": ["/a/libnccl.so", "/b/libnccl.so"]}, "2 NCCL libraries are"),
        ("nccl", {"path": None, "reason": "not here"}, "no NCCL library was found although GPUs"),
        (
            "nvml",
            {"links": [{"devices": [0, 1], "p2p_read": "chipset not supported"}]},
            "GPUs 0 and 1 can't read each other's memory: chipset not supported",
        ),
    ],
)
def test_each_problem_is_found(section: str, changes: dict[str, Any], expected: str) -> None:
    report = healthy_report()
    report[section] |= changes

    problems = find_problems(report)

    assert len(problems) == 1
    assert problems[0].startswith(expected)


@pytest.mark.parametrize(
    ("capability", "architectures", "covered"),
    [
        ("8.6", ["sm_80"], True),
        ("8.0", ["sm_86"], False),
        ("12.0", ["sm_90", "compute_90"], True),
        ("12.0", ["sm_90", "sm_100"], False),
        ("10.0", ["sm_100"], True),
    ],
)
def test_coverage_by_machine_code_and_ptx(
    capability: str, architectures: list[str], covered: bool
) -> None:
    report = healthy_report()
    report["nvml"]["devices"][0]["compute_capability"] = capability
    report["native"]["cuda_architectures"] = architectures

    assert (find_problems(report) == []) is covered
