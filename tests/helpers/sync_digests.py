"""Verified syncs from sources of every kind into destinations of every kind.

Functions here run in processes of their own (`run_ranks`) or in threads; rank 0 sends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from packedcomm import (
    FullWeightSender,
    ModuleSource,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.copying import Part
from packedcomm.errors import IntegrityError
from packedcomm.manifest import Manifest
from packedcomm.sources.transforms import Cast
from tests.helpers.corruption import flipped_on_arrival
from tests.helpers.scenarios import device_of
from tests.helpers.syncs import SETTINGS, Meeting

__all__ = ["FORMATS", "SOURCES", "TARGETS", "flipped_byte", "verified_syncs"]

FORMATS: dict[str, dict[str, Any]] = {
    "native": {"wire_format": "native"},
    "packed": {"wire_format": "vllm"},
    # Two packed chunks through one slot, which is used again while digests are made.
    "one slot": {
        "wire_format": "vllm",
        "settings": replace(SETTINGS, buffer_size_bytes=1_700_000, num_buffers=1),
    },
}

# More than a megabyte, so that the native format sends it unpacked; and one that is packed.
ROWS, COLUMNS = 1200, 700
# A byte of the large tensor that every target holds, in either dtype: row 500, column 100.
BYTE = (500 * COLUMNS + 100) * 2


class Placing:
    """A target with the parts that it is told to have."""

    fixed_destinations = True

    def __init__(self, parts: dict[str, Sequence[Part]]) -> None:
        self.parts = parts

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        return [self.parts[name] for name in manifest.by_name]

    def commit(self, manifest: Manifest) -> None:
        """Everything is where it belongs."""


def _memory(device: torch.device, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    return {
        "large": torch.zeros(ROWS, COLUMNS, dtype=dtype, device=device),
        "middle": torch.zeros(301, 700, dtype=dtype, device=device),
        "small": torch.zeros(77, 13, dtype=dtype, device=device),
        "last": torch.zeros(5, 9, dtype=dtype, device=device),
    }


def _in_place(device: torch.device) -> Any:
    return TensorTarget(_memory(device))


def _staged(device: torch.device) -> Any:
    return StagedTarget(TensorTarget(_memory(device)))


def _strided(device: torch.device) -> Any:
    room = torch.zeros(ROWS, COLUMNS + 3, dtype=torch.bfloat16, device=device)
    return TensorTarget(_memory(device) | {"large": room[:, 2:-1]})


def _transposed(device: torch.device) -> Any:
    room = torch.zeros(COLUMNS, ROWS, dtype=torch.bfloat16, device=device)
    return TensorTarget(_memory(device) | {"large": room.t()})


def _cast(device: torch.device) -> Any:
    return Placing({n: [Part(t)] for n, t in _memory(device, torch.float32).items()})


def _scaled(device: torch.device) -> Any:
    return Placing({n: [Part(t, None, 0.25)] for n, t in _memory(device).items()})


def _sliced(device: torch.device) -> Any:
    memory = _memory(device)
    rows = torch.zeros(601, COLUMNS, dtype=torch.bfloat16, device=device)
    columns = torch.zeros(ROWS, 333, dtype=torch.float32, device=device)
    large = [Part(rows, (301, 0)), Part(columns, (0, 5), -3.0)]
    small = [Part(memory["small"][7:], (7, 0))]
    rest = {name: [Part(memory[name])] for name in ("middle", "last")}
    return Placing({"large": large, "small": small} | rest)


def _callback(device: torch.device) -> Any:
    return lambda version, items: None


TARGETS: dict[str, Callable[[torch.device], Any]] = {
    "in place": _in_place,
    "staged": _staged,
    "strided": _strided,
    "transposed": _transposed,
    "cast": _cast,
    "scaled": _scaled,
    "sliced": _sliced,
    "callback": _callback,
}


def _plain(device: torch.device) -> tuple[dict[str, torch.Tensor], Any]:
    tensors = _memory(device)
    return tensors, tensors


def _turned(device: torch.device) -> tuple[dict[str, torch.Tensor], Any]:
    tensors = _memory(device)
    tensors["large"] = torch.zeros(COLUMNS, ROWS, dtype=torch.bfloat16, device=device).t()
    return tensors, tensors


def _masters(device: torch.device) -> tuple[dict[str, torch.Tensor], Any]:
    tensors = _memory(device, torch.float32)
    return tensors, ModuleSource(tensors, transforms=[Cast("bfloat16")])


def _on_host(device: torch.device) -> tuple[dict[str, torch.Tensor], Any]:
    return _plain(torch.device("cpu"))


def _gathered(device: torch.device) -> tuple[dict[str, torch.Tensor], Any]:
    tensors = _memory(device, torch.float32)
    # Made anew at every sync, so nothing is kept.
    return tensors, ModuleSource(lambda: {n: t.bfloat16() for n, t in tensors.items()})


SOURCES: dict[str, Callable[[torch.device], tuple[dict[str, torch.Tensor], Any]]] = {
    "plain": _plain,
    "transposed": _turned,
    "float32 masters": _masters,
    "host memory": _on_host,
    "made anew": _gathered,
}


def _fill(tensors: dict[str, torch.Tensor], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for tensor in tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator))


def verified_syncs(
    rank: int, world_size: int, backend: str, meeting: Meeting, options: dict[str, Any]
) -> None:
    """From every source into every target, three times each; the values are changed by the next
    work right after each sync."""
    device = device_of(backend, rank)
    with meeting.session(backend, rank, world_size, **options) as session:
        for make_source in SOURCES.values():
            for make_target in TARGETS.values():
                if rank == 0:
                    tensors, source = make_source(device)
                    sender = FullWeightSender(source, session, verify=True)
                    for step in range(3):
                        _fill(tensors, step)
                        result = sender.sync()
                        _fill(tensors, 100 + step)
                        assert result.verified
                        assert result.changed_tensors == (None if step == 0 else 4)
                else:
                    receiver = WeightReceiver(make_target(device), session)
                    for _ in range(3):
                        result = receiver.receive()
                        assert result is not None
                        assert result.verified


def flipped_byte(
    rank: int, world_size: int, backend: str, meeting: Meeting, options: dict[str, Any]
) -> None:
    """Into every target: a byte changes on its way at the second sync, which is noticed there and
    in no other."""
    device = device_of(backend, rank)
    with meeting.session(backend, rank, world_size, **options) as session:
        for make_target in TARGETS.values():
            if rank == 0:
                tensors, source = _plain(device)
                sender = FullWeightSender(source, session, verify=True)
                _fill(tensors, 1)
                assert sender.sync(0).verified
                with pytest.raises(IntegrityError, match="'large'") as caught:
                    sender.sync(1)
                assert "small" not in str(caught.value)
                assert sender.sync(2).verified
            else:
                receiver = WeightReceiver(make_target(device), session)
                assert receiver.receive() is not None
                with flipped_on_arrival(backend, 0, BYTE) as met:
                    with pytest.raises(IntegrityError, match="'large'"):
                        receiver.receive()
                    assert met == [1]
                assert receiver.receive() is not None
