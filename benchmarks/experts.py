"""The experts suite: what it costs the host to apply thousands of expert tensors to fused weights.

The group that they come through does nothing while time is taken, so what is left is the
receiver's own work. In the checks it brings the true bytes.
"""

from __future__ import annotations

import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, Literal

import torch

import packedcomm
from benchmarks.cases import Case
from benchmarks.content import Content, as_bytes
from benchmarks.measure import Transfer, measure, row
from benchmarks.world import World
from packedcomm import FusedTarget, Manifest, ModelGeometry
from packedcomm.communicators.base import Communicator, Operands

__all__ = ["experts_suite"]

_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight")
_SRC = 0


class QuietGroup(Communicator):
    """A receiver's group whose broadcasts return at once, or bring the sender's bytes if told to.

    Bytes come in the order of the manifest, without padding: both wire formats are that for tensors
    that are all of one size, a multiple of 16 bytes.
    """

    def __init__(self, device: torch.device, content: Content, sizes: Sequence[int]) -> None:
        self.rank, self.world_size, self.device = 1, 2, device
        self.delivers = False
        self.position = 0
        self._content = content
        self._sizes = sizes

    def start_broadcast(self, operands: Operands, src: int) -> None:
        if self.delivers:
            super().start_broadcast(operands, src)

    def broadcast(self, tensor: torch.Tensor, src: int) -> None:  # noqa: ARG002 - the interface's
        if not self.delivers:
            return
        end, nbytes = self.position, 0
        while nbytes < tensor.nbytes:
            nbytes += self._sizes[end]
            end += 1
        pieces = as_bytes(tensor).split(list(self._sizes[self.position : end]))
        self._content.write(pieces, self.position)
        self.position = end

    def send(self, tensor: torch.Tensor, dst: int) -> None:
        raise NotImplementedError

    def recv(self, tensor: torch.Tensor, src: int) -> None:
        raise NotImplementedError

    def all_reduce(self, tensor: torch.Tensor) -> None:
        raise NotImplementedError

    def group(self) -> AbstractContextManager[None]:
        return nullcontext()

    def abort(self, reason: str) -> None:
        """There is nobody to tell."""

    def close(self) -> None:
        """There is nothing to release."""


def experts_suite(
    world: World,
    cases: Sequence[Case],
    excluded: Mapping[str, frozenset[str]],
    repeats: int,
    threads: int,
    corrupt: str | None,
) -> None:
    """Measure cases that have nothing but experts, and report `(case name, rows)` after each.

    Arguments are those of `packing_suite`; the figures that count are `host_us`.
    """
    torch.set_num_threads(threads)
    content = Content(world.device)
    for case in cases:
        parameters = _fused_parameters(case.manifest, world.device)
        skipped = excluded.get(case.name, frozenset())
        transfers = {}
        first_us: dict[str, dict[str, float]] = {}
        for name, make in _ways(case.manifest, parameters, content).items():
            if name not in skipped:
                world.progress(name)
                transfers[name] = make()
                begin = time.perf_counter()
                transfers[name].run()
                spent = time.perf_counter() - begin
                # Ours plans where everything goes at the first time, and keeps that.
                first_us[name] = {"first_host_us": round(spent * 1e6, 2)}
        world.progress(None)
        results = measure(world, transfers, content, repeats=repeats, corrupt=corrupt)
        tensors, nbytes = len(case.manifest), case.manifest.nbytes
        rows = [
            row("experts", case.name, 1, tensors, nbytes, way, result, **first_us[way])
            for way, result in results.items()
        ]
        world.result((case.name, rows))
        del parameters, transfers
        if world.device.type == "cuda":
            torch.cuda.empty_cache()


def _fused_parameters(manifest: Manifest, device: torch.device) -> dict[str, torch.Tensor]:
    """An engine's weights: `[experts, gate rows then up rows, H]` and `[experts, H, I]`."""
    counts: Counter[str] = Counter()
    shapes: dict[str, Sequence[int]] = {}
    for spec in manifest.specs:
        module, _, part = _parsed(spec.name)
        if part != "up":
            name = f"{module}.{'w2' if part == 'down' else 'w13'}_weight"
            counts[name] += 1
            rows, columns = spec.shape
            shapes[name] = (rows, columns) if part == "down" else (2 * rows, columns)
    return {
        name: torch.empty((counts[name], *shape), dtype=torch.bfloat16, device=device)
        for name, shape in shapes.items()
    }


def _parsed(name: str) -> tuple[str, int, str]:
    match = _EXPERT.fullmatch(name)
    assert match is not None, name
    return match[1], int(match[2]), match[3]


def _places(manifest: Manifest) -> Iterator[tuple[str, tuple[str, int, int, int]]]:
    """For each tensor its name, and the parameter, expert, first row and rows there."""
    for spec in manifest.specs:
        module, expert, part = _parsed(spec.name)
        rows = spec.shape[0]
        weight = f"{module}.{'w2' if part == 'down' else 'w13'}_weight"
        yield spec.name, (weight, expert, rows if part == "up" else 0, rows)


def _ways(
    manifest: Manifest, parameters: Mapping[str, torch.Tensor], content: Content
) -> dict[str, Callable[[], Transfer]]:
    places = dict(_places(manifest))
    slices = [parameters[w][e].narrow(0, first, rows) for w, e, first, rows in places.values()]
    device = slices[0].device

    def delivered() -> Sequence[torch.Tensor]:
        return slices

    def ours(wire_format: Literal["vllm", "native"]) -> Transfer:
        # Heads don't matter to experts; their number is the parameters'.
        target = FusedTarget(parameters, ModelGeometry(32, 4, 128))
        group = QuietGroup(device, content, [spec.nbytes for spec in manifest.specs])

        def run() -> None:
            packedcomm.broadcast_consumer(
                manifest, group, _SRC, target, device=device, wire_format=wire_format
            )

        def checked_run() -> None:
            group.delivers, group.position = True, 0
            run()
            group.delivers = False

        family = "packedcomm native" if wire_format == "native" else "packedcomm vLLM format"
        return Transfer(run, delivered, family, checked_run=checked_run)

    def received() -> list[tuple[str, torch.Tensor]]:
        """What a loader is called with: views of received memory."""
        buffer = torch.empty(manifest.nbytes, dtype=torch.uint8, device=device)
        pieces = buffer.split([spec.nbytes for spec in manifest.specs])
        content.write(pieces)
        return [
            (spec.name, piece.view(torch.bfloat16).view(spec.shape))
            for spec, piece in zip(manifest.specs, pieces, strict=True)
        ]

    tensors: list[tuple[str, torch.Tensor]] = []

    def loop() -> Transfer:
        tensors[:] = tensors or received()

        def run() -> None:
            for name, tensor in tensors:
                weight, expert, first, rows = places[name]
                parameters[weight][expert].narrow(0, first, rows).copy_(tensor)

        return Transfer(run, delivered, "copy_ per tensor")

    def foreach() -> Transfer:
        tensors[:] = tensors or received()
        # As integers, in which torch keeps every bit.
        sources = [tensor.view(torch.int16) for _, tensor in tensors]
        destinations = [piece.view(torch.int16) for piece in slices]

        def run() -> None:
            torch._foreach_copy_(destinations, sources)

        return Transfer(run, delivered, "foreach, views made before")

    ways: dict[str, Callable[[], Any]] = {
        "packedcomm native": partial(ours, "native"),
        "packedcomm vLLM format": partial(ours, "vllm"),
        "copy_ per tensor": loop,
        "torch._foreach_copy_": foreach,
    }
    return ways
