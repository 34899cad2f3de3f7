"""What a result's JSON says of the machine: processors, GPUs and versions, never names or paths."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import psutil
import torch
from torch.cuda import nccl

import packedcomm

__all__ = ["available_bytes", "describe_machine", "processor_count", "without_paths"]

_PATH = re.compile(r"(?:/[^\s/:'\"]+)+/([^\s/:'\"]+)")


def describe_machine(device_type: str) -> dict[str, Any]:
    """Facts that a figure depends on."""
    facts: dict[str, Any] = {
        "cpu": _cpu_model(),
        "cores": processor_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "packedcomm": packedcomm.__version__,
    }
    if device_type == "cuda":
        facts |= {
            "gpus": [
                torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())
            ],
            "driver": _driver_version(),
            "cuda": torch.version.cuda,
            "nccl": ".".join(str(part) for part in nccl.version()),
            "cupy": _package_version("cupy-cuda13x"),
        }
    return facts


def processor_count() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0))


def available_bytes(device_type: str) -> int:
    """Free memory of the host, or of GPU 0."""
    if device_type == "cuda":
        return int(torch.cuda.mem_get_info(0)[0])
    return int(psutil.virtual_memory().available)


def without_paths(text: str) -> str:
    """Text with every absolute path cut to its last part, since results are published."""
    return _PATH.sub(r"\1", text)


def _cpu_model() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _package_version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _driver_version() -> str | None:
    try:
        import pynvml
    except ImportError:
        return None
    pynvml.nvmlInit()
    try:
        return str(pynvml.nvmlSystemGetDriverVersion())
    finally:
        pynvml.nvmlShutdown()
