"""A doctor's report as text for people."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.text import Text

from packedcomm.cli.sizes import format_size

__all__ = ["print_report", "report_lines"]


def print_report(report: dict[str, Any]) -> None:
    """Write the report to stdout, problems last."""
    console = Console(highlight=False, soft_wrap=True)
    for heading, text in report_lines(report):
        console.print(Text.assemble((f"{heading:14}", "bold"), text))
    problems = report["problems"]
    console.print(Text("problems" if problems else "no problems found", style="bold"))
    for problem in problems:
        console.print(Text(f"  - {problem}"))


def report_lines(report: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """(heading, text) of every line but the problems; a line that goes on has no heading."""
    writers: dict[str, Callable[[Any], Iterator[str]]] = {
        "versions": _versions,
        "machine": _machine,
        "torch": _torch,
        "native": _native,
        "nccl": _nccl,
        "nvml": _nvml,
        "addresses": _addresses,
        "settings": _settings,
    }
    for name, section in report.items():
        if name == "problems":
            continue
        if isinstance(section, dict) and "error" in section:
            yield name, f"failed: {section['error']}"
            continue
        heading = name
        for line in writers[name](section):
            yield heading, line
            heading = ""


def _versions(section: dict[str, Any]) -> Iterator[str]:
    yield f"packedcomm {section['packedcomm']}, Python {section['python']}"
    yield ", ".join(f"{name} {section[name]}" for name in ("safetensors", "rich", "psutil"))
    optional = section["optional"].items()
    yield ", ".join(f"{name} {version or 'not installed'}" for name, version in optional)


def _machine(section: dict[str, Any]) -> Iterator[str]:
    yield (
        f"{section['host']}, {section['system']}, {section['architecture']}, "
        f"{section['processors']} processors"
    )


def _torch(section: dict[str, Any]) -> Iterator[str]:
    cuda = f"CUDA {section['cuda']}" if section["cuda"] else "CPU build"
    yield f"{section['version']}, {cuda}, sees {section['gpus']} GPUs"


def _native(section: dict[str, Any]) -> Iterator[str]:
    yield section["file"]
    architectures = ", ".join(section["cuda_architectures"])
    yield f"CUDA code for {architectures}" if architectures else "built without CUDA"


def _nccl(section: dict[str, Any]) -> Iterator[str]:
    if section["path"] is None:
        yield f"none: {section['reason']}"
    else:
        loaded = "loaded" if section["path"] in section["loaded_before"] else "opened on demand"
        yield f"{section['version']}, {section['path']} ({loaded})"


def _nvml(section: dict[str, Any]) -> Iterator[str]:
    if not section["available"]:
        yield section["reason"]
        return
    yield f"driver {section['driver']}, CUDA up to {section['cuda']}"
    for device in section["devices"]:
        memory = device["memory_bytes"]
        yield (
            f"GPU {device['index']}: {device['name']}, "
            f"{'memory unknown' if memory is None else format_size(memory)}, "
            f"compute capability {device['compute_capability']}, {device['uuid']}"
        )
        pcie = device["pcie"]
        yield (
            f"  PCIe generation {pcie['generation']} of {pcie['max_generation']}, "
            f"{pcie['width']} of {pcie['max_width']} lanes, {device['pci_bus_id']}"
        )
        nvlink = device["nvlink"]
        if nvlink["links"]:
            rate = nvlink["gb_per_s"]
            yield (
                f"  NVLink version {nvlink['version']}, {nvlink['links']} links"
                + (f", {rate:g} GB/s in one direction by the driver" if rate else "")
            )
    for pair in section["links"]:
        a, b = pair["devices"]
        through = " through a switch" if pair["through_switch"] else ""
        link = f"{pair['nvlinks']} NVLinks{through}" if pair["nvlinks"] else "no NVLink"
        yield f"GPU {a} - GPU {b}: {link}, p2p read {pair['p2p_read']}, {pair['pcie_path']}"


def _addresses(section: list[dict[str, Any]]) -> Iterator[str]:
    for entry in section:
        kind = "loopback" if entry["loopback"] else "reachable by other machines"
        state = "" if entry["up"] else ", down"
        yield f"{entry['address']} ({entry['interface']}, {kind}{state})"


def _settings(section: dict[str, Any]) -> Iterator[str]:
    for name, value in section["values"].items():
        text = format_size(value) if name.endswith("_bytes") and value > 4096 else repr(value)
        changed = "  from the environment" if name in section["changed"] else ""
        yield f"{name} = {text}{changed}"
