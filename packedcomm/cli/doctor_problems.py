"""What a doctor's report says is wrong, in plain language."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

__all__ = ["find_problems"]


def find_problems(report: dict[str, Any]) -> list[str]:
    """Sentences about what keeps packedcomm from working, or from showing all it could.

    Args:
        report: sections by name as `doctor.collect` makes them; any may be absent or hold an
            "error" alone.
    """
    sections = {
        name: section if isinstance(section, dict) and "error" not in section else {}
        for name, section in report.items()
    }
    return [
        *_failed_probes(report),
        *_build_problems(sections),
        *_driver_problems(sections),
        *_nccl_problems(sections),
        *_link_problems(sections),
    ]


def _failed_probes(report: dict[str, Any]) -> Iterator[str]:
    hints = {
        "native": " (build it with `make`, or reinstall packedcomm)",
        "settings": " (packedcomm commands will refuse to start)",
    }
    for name, section in report.items():
        if isinstance(section, dict) and "error" in section:
            yield f"{name}: {section['error']}{hints.get(name, '')}"


def _devices(sections: dict[str, Any]) -> list[dict[str, Any]]:
    devices: list[dict[str, Any]] = sections.get("nvml", {}).get("devices", [])
    return devices


def _build_problems(sections: dict[str, Any]) -> Iterator[str]:
    devices = _devices(sections)
    native = sections.get("native", {})
    architectures = native.get("cuda_architectures")
    if devices and architectures == []:
        yield (
            f"packedcomm was built without CUDA although {len(devices)} GPUs are present: install "
            f"nvcc of the driver's CUDA version and build again"
        )
    if devices and architectures:
        for device in devices:
            capability = device.get("compute_capability")
            if capability and not _covered(capability, architectures):
                yield (
                    f"GPU {device['index']} has compute capability {capability}, packedcomm was "
                    f"built for {', '.join(architectures)}"
                )
    build = sections.get("torch", {})
    if devices and build and build.get("cuda") is None:
        yield f"torch {build['version']} is a CPU build although {len(devices)} GPUs are present"
    elif devices and build and build.get("gpus") == 0:
        yield (
            f"torch {build['version']} (CUDA {build['cuda']}) sees none of the {len(devices)} "
            f"GPUs: CUDA_VISIBLE_DEVICES may hide them, or the driver may be too old"
        )


def _covered(capability: str, architectures: list[str]) -> bool:
    """Whether machine code of the same major version or older PTX is among the architectures."""
    major, minor = (int(part) for part in capability.split("."))
    for name in architectures:
        match = re.fullmatch(r"(sm|compute)_(\d+)(\d)", name)
        if match is None:
            continue
        built = int(match[2]), int(match[3])
        if match[1] == "sm" and built[0] == major and built[1] <= minor:
            return True
        if match[1] == "compute" and built <= (major, minor):
            return True
    return False


def _driver_problems(sections: dict[str, Any]) -> Iterator[str]:
    nvml = sections.get("nvml", {})
    on_bus = sections.get("machine", {}).get("nvidia_gpus_on_pci_bus", 0)
    if nvml.get("available") is False:
        if "not installed" in nvml["reason"]:
            yield "nvidia-ml-py is missing: devices and links are not shown (install the extra gpu)"
        elif on_bus:
            yield (
                f"{on_bus} NVIDIA GPUs are on the PCI bus, but there is {nvml['reason']}; a "
                f"container may have been started without GPUs"
            )
    driver, built = nvml.get("cuda"), sections.get("torch", {}).get("cuda")
    if driver and built and int(driver.split(".")[0]) < int(built.split(".")[0]):
        yield (
            f"the driver {nvml['driver']} supports CUDA {driver}, torch was built with CUDA {built}"
        )


def _nccl_problems(sections: dict[str, Any]) -> Iterator[str]:
    nccl = sections.get("nccl", {})
    loaded = nccl.get("loaded_before", [])
    if len(loaded) > 1:
        yield (
            f"{len(loaded)} NCCL libraries are loaded in one process: {', '.join(loaded)}; name "
            f"the one to use in PACKEDCOMM_NCCL_LIBRARY"
        )
    if _devices(sections) and nccl and nccl.get("path") is None:
        yield f"no NCCL library was found although GPUs are present: {nccl['reason']}"


def _link_problems(sections: dict[str, Any]) -> Iterator[str]:
    for pair in sections.get("nvml", {}).get("links", []):
        if pair["p2p_read"] not in ("ok", None):
            a, b = pair["devices"]
            yield f"GPUs {a} and {b} can't read each other's memory: {pair['p2p_read']}"
