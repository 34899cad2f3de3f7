"""What NVML says of the driver, the GPUs and the links between them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__all__ = ["nvml_report"]

_MAX_NVLINKS = 36

# nvidia-ml-py 13 defines NVML_P2P_CAPS_INDEX_READ as a tuple by mistake, hence the number.
_P2P_READ = 0

_P2P_STATUS = {
    0: "ok",
    1: "chipset not supported",
    2: "GPU not supported",
    3: "topology not supported",
    4: "disabled by a registry key",
    5: "not supported",
}

_PATHS = {
    0: "same board",
    10: "one PCIe switch",
    20: "several PCIe switches",
    30: "PCIe host bridge",
    40: "same NUMA node",
    50: "across NUMA nodes",
}


def nvml_report() -> dict[str, Any]:
    """Driver, devices and links, ready for JSON.

    What a GPU doesn't report is None; nothing is reset or changed.

    Raises:
        ImportError: nvidia-ml-py isn't installed.
        pynvml.NVMLError: there is no driver, or it doesn't answer.
    """
    import pynvml

    pynvml.nvmlInit()
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        devices = [_device(pynvml, index, handle) for index, handle in enumerate(handles)]
        cuda = _known(pynvml, pynvml.nvmlSystemGetCudaDriverVersion)
        return {
            "driver": pynvml.nvmlSystemGetDriverVersion(),
            "cuda": None if cuda is None else f"{cuda // 1000}.{cuda % 1000 // 10}",
            "devices": devices,
            "links": [
                _pair(pynvml, devices, handles, a, b)
                for a in range(len(handles))
                for b in range(a + 1, len(handles))
            ],
        }
    finally:
        pynvml.nvmlShutdown()


def _known(nvml: Any, call: Callable[..., Any], *arguments: Any) -> Any:
    """The call's result, or None where this GPU or driver doesn't support the question."""
    try:
        return call(*arguments)
    except nvml.NVMLError:
        return None


def _device(nvml: Any, index: int, handle: Any) -> dict[str, Any]:
    memory = _known(nvml, nvml.nvmlDeviceGetMemoryInfo, handle)
    capability = _known(nvml, nvml.nvmlDeviceGetCudaComputeCapability, handle)
    pci = _known(nvml, nvml.nvmlDeviceGetPciInfo, handle)
    return {
        "index": index,
        "name": _known(nvml, nvml.nvmlDeviceGetName, handle),
        "uuid": _known(nvml, nvml.nvmlDeviceGetUUID, handle),
        "memory_bytes": None if memory is None else memory.total,
        "compute_capability": None if capability is None else f"{capability[0]}.{capability[1]}",
        "pci_bus_id": None if pci is None else _text(pci.busId),
        "pcie": {
            "generation": _known(nvml, nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            "max_generation": _known(nvml, nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            "width": _known(nvml, nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            "max_width": _known(nvml, nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
        },
        "nvlink": _nvlink(nvml, handle),
    }


def _nvlink(nvml: Any, handle: Any) -> dict[str, Any]:
    """Active links of a GPU, where they lead, and their rate in one direction."""
    active = [
        link
        for link in range(_MAX_NVLINKS)
        if _known(nvml, nvml.nvmlDeviceGetNvLinkState, handle, link) == nvml.NVML_FEATURE_ENABLED
    ]
    peers: dict[str, int] = {}
    for link in active:
        pci = _known(nvml, nvml.nvmlDeviceGetNvLinkRemotePciInfo, handle, link)
        kind = _known(nvml, nvml.nvmlDeviceGetNvLinkRemoteDeviceType, handle, link)
        if kind == nvml.NVML_NVLINK_DEVICE_TYPE_SWITCH:
            peer = "switch"
        else:
            peer = "unknown" if pci is None else _text(pci.busId)
        peers[peer] = peers.get(peer, 0) + 1
    rate = _nvlink_rate(nvml, handle) if active else None
    return {
        "links": len(active),
        "version": _known(nvml, nvml.nvmlDeviceGetNvLinkVersion, handle, active[0])
        if active
        else None,
        "peers": peers,
        "gb_per_s_per_link": rate,
        "gb_per_s": None if rate is None else round(rate * len(active), 1),
    }


def _nvlink_rate(nvml: Any, handle: Any) -> float | None:
    """GB/s of one link in one direction, as the driver states it: a limit, not a measurement."""
    fields = _known(
        nvml, nvml.nvmlDeviceGetFieldValues, handle, [nvml.NVML_FI_DEV_NVLINK_SPEED_MBPS_COMMON]
    )
    if not fields or fields[0].nvmlReturn != nvml.NVML_SUCCESS:
        return None
    megabytes = int(fields[0].value.uiVal)
    return megabytes / 1000 if megabytes else None


def _pair(
    nvml: Any, devices: list[dict[str, Any]], handles: list[Any], a: int, b: int
) -> dict[str, Any]:
    """How two GPUs reach each other."""
    peers = devices[a]["nvlink"]["peers"]
    direct = peers.get(devices[b]["pci_bus_id"], 0)
    through_switch = min(peers.get("switch", 0), devices[b]["nvlink"]["peers"].get("switch", 0))
    status = {
        key: _known(nvml, nvml.nvmlDeviceGetP2PStatus, handles[a], handles[b], capability)
        for key, capability in (
            ("p2p_read", _P2P_READ),
            ("p2p_nvlink", nvml.NVML_P2P_CAPS_INDEX_NVLINK),
        )
    }
    path = _known(nvml, nvml.nvmlDeviceGetTopologyCommonAncestor, handles[a], handles[b])
    return {
        "devices": [a, b],
        "nvlinks": direct or through_switch,
        "through_switch": not direct and through_switch > 0,
        "pcie_path": None if path is None else _PATHS.get(path, str(path)),
        **{
            key: None if value is None else _P2P_STATUS.get(value, f"status {value}")
            for key, value in status.items()
        },
    }


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value
