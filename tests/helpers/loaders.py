"""Small loaders in the manner of inference engines: layers materialised anew, filled by loaders of
their parameters, processed, and copied into the memory that the engine runs on."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from packedcomm.engines.vllm.recorded import Proof, RecordedTarget, Recording
from packedcomm.engines.vllm.recording import Recorder
from packedcomm.manifest import Manifest, TensorSpec
from tests.helpers.tensors import content, random_bits

Tensors = dict[str, torch.Tensor]
Fill = Callable[[Tensors, Tensors], object]


@dataclass
class Layer:
    """One layer: its live memory, what it is loaded from, and how.

    `fill` is given the layer's fresh parameters by their short names and what was received for it;
    it may put others in their place. Without `given` the layer takes part in no loading, and `fill`
    happens when all others are done, outside of any layer.
    """

    name: str
    live: Tensors
    given: list[str]
    fill: Fill
    direct: bool = False
    """Whether live memory itself is filled."""


@dataclass
class Engine:
    """Layers, and what the engine holds beside their parameters."""

    layers: list[Layer]
    prepare: Callable[[Tensors], Tensors] = dict
    """What the model makes of received tensors before layers get them."""

    aside: dict[str, object] = field(default_factory=dict)

    @property
    def live(self) -> Tensors:
        return {f"{layer.name}.{n}": t for layer in self.layers for n, t in layer.live.items()}

    def load(self, received: Mapping[str, torch.Tensor], watch: object) -> None:
        """One whole update through the loaders."""
        with torch.no_grad():
            prepared = self.prepare(dict(received))
            for layer in self.layers:
                if layer.given:
                    given = {name: prepared[name] for name in layer.given}
                    watch.enter_layer(layer.name, given.values())
                    self._fill(layer, given)
                    watch.leave_layer()
            del prepared
            for layer in self.layers:
                if not layer.given:
                    self._fill(layer, {})

    def _fill(self, layer: Layer, given: Tensors) -> None:
        if layer.direct:
            layer.fill(layer.live, given)
            return
        fresh = {name: torch.empty_strided(t.shape, t.stride(), dtype=t.dtype)
                 for name, t in layer.live.items()}  # fmt: skip
        layer.fill(fresh, given)
        for name, tensor in layer.live.items():
            tensor.copy_(fresh[name])


class Reloading:
    """As `Reload`, of an engine whose layers are complete when everything was given."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.given: Tensors = {}

    def begin(self) -> None: ...

    def load(self, items: Iterable[tuple[str, torch.Tensor]], watch: object = None) -> None:
        self.given.update(items)

    def end(self, watch: object = None) -> None:
        given, self.given = self.given, {}
        self.engine.load(given, watch or Unwatched())


class Unwatched:
    """Nobody looks."""

    def enter_layer(self, layer: str, loaded: object) -> None: ...

    def leave_layer(self) -> None: ...


def payload(manifest: Manifest, seed: int) -> Tensors:
    """Random bytes for every tensor."""
    return {
        spec.name: random_bits(spec.shape, getattr(torch, spec.dtype), seed * 1000 + i)
        for i, spec in enumerate(manifest.specs)
    }


def record(
    engine: Engine,
    manifest: Manifest,
    received: Tensors | None = None,
    *,
    collect: bool = True,
) -> Recording:
    """What is recorded of one update."""
    live = engine.live
    recorder = Recorder(live)
    # In memory of their own, which the engine alone may keep.
    given = {n: t.clone() for n, t in (received or payload(manifest, 1)).items()}
    for name in given:
        recorder.receive(name, given[name])
    with recorder:
        engine.load(given, recorder)
    given.clear()
    if collect:
        gc.collect()
    return Recording.of(recorder, manifest, live)


def prove(engine: Engine, recording: Recording, manifest: Manifest, seed: int = 2) -> None:
    """A second update through the loader, compared with what was recorded."""
    proof = Proof(recording, engine.live)
    received = payload(manifest, seed)
    for name, tensor in received.items():
        proof.receive(name, tensor)
    engine.load(received, proof)
    proof.end()


def replay(engine: Engine, recording: Recording, manifest: Manifest, received: Tensors) -> None:
    """An update by the recording alone."""
    target = RecordedTarget(recording, engine.live, torch.device("cpu"), lambda items: None)
    fill(target, manifest, received)


def fill(target: RecordedTarget, manifest: Manifest, received: Tensors) -> None:
    """What a transfer does."""
    for spec, parts in zip(manifest.specs, target.place(manifest), strict=True):
        for part in parts:
            offset = part.offset or (0,) * len(spec.shape)
            box = tuple(slice(o, o + n) for o, n in zip(offset, part.tensor.shape, strict=True))
            part.tensor.copy_(received[spec.name][box])


def sent(**shapes: Any) -> Manifest:
    """A manifest of float32 tensors, or of others where a shape comes with a dtype."""
    specs = []
    for name, shape in shapes.items():
        dtype = "float32"
        if shape and isinstance(shape[-1], str):
            *shape, dtype = shape
        specs.append(TensorSpec(name.replace("_in_", "."), dtype, tuple(shape)))
    return Manifest(specs)


def memory(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Live memory."""
    return torch.zeros(shape, dtype=dtype)


def one(fill: Fill, live: Tensors, names: list[str], **options: Any) -> Engine:
    """An engine with one layer."""
    return Engine([Layer("m.layer", live, names, fill, **options)])


def assert_replayed(engine: Engine, manifest: Manifest, parts: int | None = None) -> Recording:
    """A third update, replayed, does what the loader does of it, bit by bit."""
    recording = record(engine, manifest)
    assert recording.reasons == {}
    prove(engine, recording, manifest)
    assert recording.proved
    assert recording.reasons == {}
    received = payload(manifest, 3)
    replay(engine, recording, manifest, received)
    replayed = {name: content(tensor) for name, tensor in engine.live.items()}
    for tensor in engine.live.values():
        if tensor.is_floating_point() and tensor.dim() and tensor.is_contiguous():
            tensor.view(torch.uint8).fill_(1)
    engine.load(received, Unwatched())
    assert replayed == {name: content(tensor) for name, tensor in engine.live.items()}
    if parts is not None:
        assert sum(len(entries) for entries in recording.entries.values()) == parts
    return recording


def assert_refused(
    engine: Engine, manifest: Manifest, reason: str, layer: str = "m.layer"
) -> Recording:
    """The layer is left to the loader; "" is the whole model."""
    recording = record(engine, manifest)
    assert reason in recording.reasons.get(layer, ""), recording.reasons
    assert not any(e.layer == layer for es in recording.entries.values() for e in es)
    if layer and "" not in recording.reasons:
        assert recording.by_loader >= recording.fed[layer]
    return recording


# What layers are filled with.


def columns_in_rows(rank: int, ranks: int, parts: dict[str, int]) -> Fill:
    """Merged column-parallel: this rank's rows of every part, one part under another."""

    def fill(fresh: Tensors, given: Tensors) -> None:
        at = 0
        for (_, rows), tensor in zip(parts.items(), given.values(), strict=True):
            mine = rows // ranks
            fresh["weight"].narrow(0, at, mine).copy_(tensor.narrow(0, rank * mine, mine))
            at += mine

    return fill


def slice_of_columns(rank: int, ranks: int) -> Fill:
    """Row-parallel: this rank's columns."""

    def fill(fresh: Tensors, given: Tensors) -> None:
        (tensor,) = given.values()
        mine = tensor.shape[1] // ranks
        fresh["weight"].data.copy_(tensor.narrow(1, rank * mine, mine))

    return fill


def padded(rows: int, first: int) -> Fill:
    """A shard of a vocabulary, zeros after it."""

    def fill(fresh: Tensors, given: Tensors) -> None:
        (tensor,) = given.values()
        part = tensor.narrow(0, first, min(rows, tensor.shape[0] - first))
        fresh["weight"][: part.shape[0]].data.copy_(part)
        fresh["weight"][part.shape[0] :].data.fill_(0)

    return fill


def experts(first: int, count: int) -> Fill:
    """Experts one by one, gate and up in the halves of one parameter; others' are left out."""

    def fill(fresh: Tensors, given: Tensors) -> None:
        for name, tensor in given.items():
            _, number, kind = name.split(".")
            local = int(number) - first
            if not 0 <= local < count:
                continue
            if kind == "down":
                fresh["w2"].data[local].copy_(tensor)
                continue
            half = fresh["w13"].shape[1] // 2
            fresh["w13"].data[local].narrow(0, half if kind == "up" else 0, half).copy_(tensor)

    return fill


def fused_experts(first: int, count: int) -> Fill:
    """All experts in one tensor, [experts, in, out], turned on the way."""

    def fill(fresh: Tensors, given: Tensors) -> None:
        w13, w2 = given.values()
        gate, up = w13[first : first + count].transpose(1, 2).contiguous().chunk(2, dim=1)
        fresh["w13"][:, : gate.shape[1]].copy_(gate)
        fresh["w13"][:, gate.shape[1] :].copy_(up)
        fresh["w2"] = torch.stack([w.t() for w in w2[first : first + count]])

    return fill


def plainly(fresh: Tensors, given: Tensors) -> None:
    """Each parameter from the tensor at its place."""
    for parameter, tensor in zip(fresh.values(), given.values(), strict=True):
        parameter.data.copy_(tensor)
