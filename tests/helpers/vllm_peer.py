"""Loads vLLM's real files from `.peers/`, with empty stand-ins for the rest of vLLM.

`make peers` puts them there. Meant for processes of their own (`run_ranks`): the stand-ins stay in
`sys.modules`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

__all__ = ["VllmPeer", "load_packed_tensor", "load_vllm_peer", "needs_vllm_files"]

FILES = Path(__file__).resolve().parents[2] / ".peers" / "vllm-0.29.0"
PACKED_TENSOR = FILES / "vllm" / "distributed" / "weight_transfer" / "packed_tensor.py"
PYNCCL = FILES / "vllm" / "distributed" / "device_communicators" / "pynccl.py"

needs_vllm_files = pytest.mark.skipif(
    not (PACKED_TENSOR.is_file() and PYNCCL.is_file()),
    reason=f"needs vLLM's files in {FILES} (make peers)",
)


@dataclass(frozen=True, slots=True)
class VllmPeer:
    """vLLM's own classes."""

    PyNcclCommunicator: Any
    StatelessProcessGroup: Any
    ncclUniqueId: Any  # noqa: N815  (its name in vLLM)
    NCCLLibrary: Any

    def connect(self, host: str, port: int, rank: int, world_size: int, device: int) -> Any:
        """The group that vLLM's weight transfer makes, on either side."""
        group = self.StatelessProcessGroup.create(
            host=host, port=port, rank=rank, world_size=world_size
        )
        return self.PyNcclCommunicator(group, device=device)


@functools.cache
def load_packed_tensor() -> ModuleType:
    """vLLM's packed_tensor.py, which needs torch alone; skips the test where it is absent."""
    if not PACKED_TENSOR.is_file():
        pytest.skip(f"needs {PACKED_TENSOR} (make peers)")
    spec = importlib.util.spec_from_file_location("vllm_packed_tensor", PACKED_TENSOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Its dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def load_vllm_peer() -> VllmPeer:
    """vLLM's communicator and process group, from the real files."""
    _install_stand_ins()
    from vllm.distributed.device_communicators import pynccl, pynccl_wrapper
    from vllm.distributed.utils import StatelessProcessGroup

    return VllmPeer(
        pynccl.PyNcclCommunicator,
        StatelessProcessGroup,
        pynccl_wrapper.ncclUniqueId,
        pynccl_wrapper.NCCLLibrary,
    )


class _Logger(logging.Logger):
    """A logger with the two methods that vLLM adds."""

    def info_once(self, message: str, *args: Any) -> None:
        self.info(message, *args)

    def warning_once(self, message: str, *args: Any) -> None:
        self.warning(message, *args)


class _Platform:
    """What vLLM asks of `current_platform` on an NVIDIA GPU."""

    def fp8_dtype(self) -> torch.dtype:
        return torch.float8_e4m3fn

    def is_rocm(self) -> bool:
        return False


def _find_nccl_library() -> str:
    from packedcomm.communicators.nccl import find_nccl

    return find_nccl().path


def _install_stand_ins() -> None:
    packages = ("vllm", "vllm.distributed", "vllm.distributed.device_communicators")
    for name in packages:
        # The real folders, without their __init__.py, which would import all of vLLM.
        _install(name, __path__=[str(FILES.joinpath(*name.split(".")))])
    _install(
        "vllm.envs",
        VLLM_DISABLE_PYNCCL=False,
        VLLM_USE_NCCL_SYMM_MEM=False,
        VLLM_PP_LAYER_PARTITION=None,
    )
    _install("vllm.logger", init_logger=_Logger)
    _install("vllm.platforms", current_platform=_Platform())
    _install("vllm.utils", __path__=[])
    _install("vllm.utils.nccl", find_nccl_library=_find_nccl_library)
    _install("vllm.utils.network_utils", get_tcp_uri=lambda host, port: f"tcp://{host}:{port}")
    _install("vllm.utils.system_utils", suppress_stdout=contextlib.nullcontext)
    _install("vllm.utils.torch_utils", current_stream=torch.cuda.current_stream)


def _install(name: str, **attributes: Any) -> None:
    if name in sys.modules:
        return
    module = ModuleType(name)
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module
    parent, _, child = name.rpartition(".")
    if parent:
        setattr(sys.modules[parent], child, module)
