"""The figures that packedcomm must reach, computed from the rows of one run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.cases import EXPERTS, TINY_EXPERTS
from benchmarks.measure import Row

__all__ = ["compute_bars"]

LARGE = "llama-3-8b"
LORA = "llama-3-8b-lora-r16"
MINILM = "minilm"

_BROADCAST = ("packedcomm native", "packedcomm vLLM format")
_PLAN = ("packedcomm CopyPlan",)
_ONE_SHOT = ("packedcomm pack",)
_MEMCPY = ("memcpy",)
# With chunks of the default size a set of up to 1 GiB is one chunk, which is what the CPU's bars
# call the vLLM way: one `cat` into a fresh tensor, one broadcast, one `copy_` per tensor.
_VLLM = ("vLLM packed",)
_VLLM_TUNED = ("vLLM packed", "vLLM packed, tuned")
_RAW = ("raw broadcast",)
_CAST = ("packedcomm BufferPlan", "packedcomm CopyPlan")
_LOOP = ("copy_ per tensor",)


@dataclass(frozen=True, slots=True)
class _Bar:
    """Speed of the fastest way of `ours` over that of the fastest way of `theirs`.

    With `host` the time that counts ends when the call returns.
    """

    text: str
    required: float
    suite: str
    case: str
    world: int
    ours: tuple[str, ...]
    theirs: tuple[str, ...]
    host: bool = False


def compute_bars(device_type: str, worlds: Sequence[int], rows: Sequence[Row]) -> list[Row]:
    """Every bar of a device with the required and the measured ratio and whether it is met.

    `measured` and `met` are None where the run lacks one of the two sides.
    """
    bars = _cpu_bars(worlds) if device_type == "cpu" else _cuda_bars(worlds)
    return [_judge(bar, rows) for bar in bars]


def _cpu_bars(worlds: Sequence[int]) -> Iterator[_Bar]:
    yield _Bar("packing large tensors / memcpy", 0.8, "pack", LARGE, 1, _PLAN, _MEMCPY)
    yield _Bar(
        "packing LoRA in one shot / torch.cat, fresh output",
        3.0, "pack", LORA, 1, _ONE_SHOT, ("torch.cat",),
    )  # fmt: skip
    yield _experts(TINY_EXPERTS)
    for world in worlds:
        for case in (MINILM, LORA):
            text = f"broadcast of {case} into parameters 1 to {world - 1} / "
            required = 3.0 if world == 2 else 2.0
            arguments = ("broadcast", case, world, _BROADCAST)
            yield _Bar(text + "the vLLM way", required, *arguments, _VLLM)
            yield _Bar(text + "one raw broadcast", 0.5, *arguments, _RAW)


def _cuda_bars(worlds: Sequence[int]) -> Iterator[_Bar]:
    yield _Bar("packing large tensors / memcpy", 0.9, "pack", LARGE, 1, _PLAN, _MEMCPY)
    yield _Bar(
        "packing LoRA / torch.cat",
        10.0, "pack", LORA, 1, _PLAN, ("torch.cat", "torch.cat(out=)"),
    )  # fmt: skip
    yield _Bar(
        "casting float32 to bfloat16 while packing / memcpy of as many bytes read and written",
        0.8, "cast", LARGE, 1, _CAST, _MEMCPY,
    )  # fmt: skip
    yield _experts(EXPERTS)
    for world in worlds:
        for case, required in ((LARGE, 1.0), (LORA, 2.0)):
            text = f"broadcast of {case} into parameters 1 to {world - 1} / vLLM packed"
            yield _Bar(text, required, "broadcast", case, world, _BROADCAST, _VLLM_TUNED)
        # A verified sync may take this much longer.
        for way, cost in (("sync packed", 0.03), ("sync staged", 0.03), ("sync in place", 0.1)):
            text = f"{way} of {LARGE} 1 to {world - 1}, verified / not verified"
            yield _Bar(text, 1 / (1 + cost), "sync", LARGE, world, (f"{way}, verified",), (way,))


def _experts(case: str) -> _Bar:
    text = "applying expert tensors to fused weights, host time / a loop of copy_"
    return _Bar(text, 20.0, "experts", case, 1, _BROADCAST, _LOOP, host=True)


def _judge(bar: _Bar, rows: Sequence[Row]) -> Row:
    ours, theirs = _fastest(bar, bar.ours, rows), _fastest(bar, bar.theirs, rows)
    result: Row = {"bar": bar.text, "required": bar.required, "measured": None, "met": None}
    if ours is not None and theirs is not None:
        time = _time_column(bar)
        ratio = ours["nbytes"] / ours[time] / (theirs["nbytes"] / theirs[time])
        result |= {"measured": round(ratio, 3), "met": ratio >= bar.required}
        result |= {"ours": ours["way"], "theirs": theirs["way"]}
    return result


def _fastest(bar: _Bar, families: tuple[str, ...], rows: Sequence[Row]) -> Row | None:
    place: Any = (bar.suite, bar.case, bar.world)
    candidates = [
        row
        for row in rows
        if (row["suite"], row["case"], row["world"]) == place
        and row["family"] in families
        and not row["wrong"]
    ]
    time = _time_column(bar)
    return max(candidates, key=lambda row: row["nbytes"] / row[time], default=None)


def _time_column(bar: _Bar) -> str:
    return "host_us" if bar.host else "median_us"
