"""A recording of an engine's loader: where every box goes, checked, and replayed as a target."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from packedcomm.copying import CASTABLE, Part, TensorRecord
from packedcomm.engines.vllm.constants import Constants, Ranges
from packedcomm.engines.vllm.coverage import holds
from packedcomm.engines.vllm.memories import Memory
from packedcomm.engines.vllm.moves import box_in
from packedcomm.engines.vllm.recording import Recorder
from packedcomm.errors import TensorError
from packedcomm.manifest import Manifest, TensorSpec

__all__ = ["Entry", "RecordedTarget", "Recording"]

# Integers by which elements are compared bit by bit.
_BITS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True, slots=True)
class Entry:
    """A box of a received tensor, and the view of live memory that holds it."""

    offset: tuple[int, ...]
    """Index of the box's first element in the tensor."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    """Of the view, in elements, by the tensor's dimensions."""

    live: str
    """Qualified name of the live tensor."""

    at: int
    """Of the view's first element, in elements from the live tensor's first one."""

    @property
    def layer(self) -> str:
        """Qualified name of the layer that the live tensor belongs to."""
        return self.live.rpartition(".")[0]

    def view(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The live memory."""
        tensor = tensors[self.live].detach()
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.at)

    def box(self, received: torch.Tensor) -> torch.Tensor:
        """The box of the tensor as it was received."""
        if self.shape == received.shape:
            return received
        return received[
            tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))
        ]


@dataclass
class Recording:
    """Which box of each received tensor is held where, and what isn't known of.

    Made by `Recording.of` from what a `Recorder` has seen of one whole update.
    """

    entries: dict[str, list[Entry]]
    """By received tensor; of one that isn't here nothing is needed on this rank, unless its layer
    is in `reasons`."""

    fed: dict[str, set[str]]
    """From which received tensors each layer was loaded."""

    reasons: dict[str, str]
    """Layers that can't be replayed, and why; "" is the whole model."""

    outside: set[str] = field(default_factory=set)
    """Received tensors that are loaded before or after their layers are: biases, for example."""

    constants: Constants = field(default_factory=lambda: Constants({}, {}))
    """What the loader sets to the same in every update. Replays leave it as it is."""

    proved: bool = False
    """Whether a second update has shown the loader doing the same."""

    @classmethod
    def of(
        cls,
        recorder: Recorder,
        manifest: Manifest,
        live: Mapping[str, torch.Tensor],
    ) -> Recording:
        """Read what was recorded.

        Args:
            recorder: of a whole update, which has ended.
            manifest: of the update.
            live: as for the recorder.
        """
        written = recorder.close()
        recording = cls({}, recorder.fed, dict(recorder.reasons), recorder.outside)
        constants: dict[str, Ranges | None] = {}
        for memory in written:
            tensors = {name: live[name] for name in memory.live}
            try:
                found, fixed = _entries(memory, tensors, recorder.fed, manifest)
            except ValueError as error:
                # Another layer that shares the memory has nothing to do for it.
                for layer in (memory.layers & recorder.fed.keys()) or memory.layers:
                    recording.reasons.setdefault(layer, f"{memory.live[0]}: {error}")
                continue
            constants.update(fixed)
            for origin, entry in found:
                recording.entries.setdefault(origin, []).append(entry)
        held = recording.layers
        for layer, names in recorder.fed.items():
            mine = held.get(layer, set())
            lost = recorder.read.get(layer, set()) - mine
            if lost or (names and not mine):
                recording.reasons.setdefault(
                    layer, f"{min(lost or names)} doesn't end up in parameters"
                )
        recording._drop_layers()
        recording.constants = Constants(constants, live)
        return recording

    def give_up(self, reasons: Mapping[str, str]) -> None:
        """Layers turn out not to be replayable.

        Args:
            reasons: by layer.
        """
        self.reasons = {**reasons, **self.reasons}
        self._drop_layers()

    def _drop_layers(self) -> None:
        for layer in list(self.reasons):
            if layer and not self.fed.get(layer):
                # Reloading that layer alone would do nothing.
                reason = f"{layer} isn't loaded from tensors of its own: {self.reasons[layer]}"
                self.reasons.setdefault("", reason)
        for origin, entries in list(self.entries.items()):
            kept = [entry for entry in entries if entry.layer not in self.reasons]
            if kept:
                self.entries[origin] = kept
            else:
                del self.entries[origin]

    @property
    def by_loader(self) -> set[str]:
        """Names of the received tensors that the loader must be given."""
        return set().union(*(self.fed.get(layer, set()) for layer in self.reasons))

    def leaves_to_loader(self, names: Collection[str]) -> bool:
        """Whether any of these live tensors is in a layer that stays with the loader, or below
        one."""
        return any(
            not layer or name.startswith(f"{layer}.") for layer in self.reasons for name in names
        )

    @property
    def layers(self) -> dict[str, set[str]]:
        """The layers with entries, and from which received tensors those come."""
        found: dict[str, set[str]] = {}
        for origin, entries in self.entries.items():
            for entry in entries:
                found.setdefault(entry.layer, set()).add(origin)
        return found


def _entries(
    memory: Memory,
    tensors: Mapping[str, torch.Tensor],
    fed: Mapping[str, set[str]],
    manifest: Manifest,
) -> tuple[list[tuple[str, Entry]], dict[str, Ranges | None]]:
    """What of live memory is which box, and where it is constant, as `holds` says.

    Args:
        memory: as it was recorded.
        tensors: those that are in it.
        fed: from what layers were loaded.
        manifest: of the update.

    Raises:
        ValueError: some of it isn't known, or is no box.
    """
    writes, constants = holds(memory, tensors)
    # Of tensors that are the same, the one whose layer was loaded stands for all.
    names = sorted(tensors, key=lambda name: name.rpartition(".")[0] not in fed)
    size = tensors[names[0]].element_size()
    if size not in _BITS:
        raise ValueError(f"elements of {size} bytes aren't compared")
    places = [(name, tensors[name].data_ptr(), _reach(tensors[name]) * size) for name in names]
    found: list[tuple[str, Entry]] = []
    for write in writes:
        low, high = write.move.written
        inside = ((name, start) for name, start, n in places if start <= low and high < start + n)
        name, first = next(inside, ("", 0))
        if not name or write.origin is None:
            raise ValueError("written together with other memory")
        kinds = (write.move.src_dtype, write.move.dst_dtype)
        if kinds[0] != kinds[1] and not set(kinds) <= set(CASTABLE):
            raise ValueError(f"cast from {kinds[0]} to {kinds[1]}")
        spec: TensorSpec = manifest.by_name[write.origin]
        offset, shape, steps = box_in(write.move, 0, spec.shape, _itemsize(spec))
        at = (write.move.dst - first) // size
        strides = tuple(step // size for step in steps)
        found.append((write.origin, Entry(offset, shape, strides, name, at)))
    return found, constants


def _reach(tensor: torch.Tensor) -> int:
    """Elements from a tensor's first one to its last."""
    return 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True) if n > 1)


def _itemsize(spec: TensorSpec) -> int:
    dtype: torch.dtype = getattr(torch, spec.dtype)
    return dtype.itemsize


class Proof:
    """Compares, layer by layer, what a loader has made of an update with what a recording says.

    Args:
        recording: what is to be proved; layers that differ are given up.
        live: the model's tensors.
    """

    def __init__(self, recording: Recording, live: Mapping[str, torch.Tensor]) -> None:
        self._recording = recording
        self._live = live
        # By layer, and by the received tensor that its boxes come from.
        self._layers: dict[str, dict[str, list[Entry]]] = {}
        for name, entries in recording.entries.items():
            for entry in entries:
                self._layers.setdefault(entry.layer, {}).setdefault(name, []).append(entry)
        # How many layers are still to be compared with each received tensor.
        self._waiting = Counter(name for names in self._layers.values() for name in names)
        self._received: dict[str, torch.Tensor] = {}
        self._differences: dict[str, list[torch.Tensor]] = {}
        self._layer = ""

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that the loader is about to be given; kept until its layers are complete."""
        if self._waiting[name]:
            self._received[name] = tensor

    def enter_layer(self, layer: str, loaded: object) -> None:  # noqa: ARG002
        """As `Watch.enter_layer`."""
        self._layer = layer

    def leave_layer(self) -> None:
        """As `Watch.leave_layer`: compare what the layer holds now."""
        boxes = self._layers.pop(self._layer, {})
        later = {n: entries for n, entries in boxes.items() if n in self._recording.outside}
        if later:
            self._layers[self._layer] = later
        self._compare(self._layer, {n: boxes[n] for n in boxes.keys() - later.keys()})

    def _compare(self, layer: str, boxes: Mapping[str, list[Entry]]) -> None:
        for name, entries in boxes.items():
            received = self._received.get(name)
            for entry in entries:
                self._differences.setdefault(layer, []).append(
                    _differs(entry.view(self._live), entry, received)
                )
            self._waiting[name] -= 1
            if not self._waiting[name]:
                self._received.pop(name, None)

    def end(self) -> None:
        """The update has ended: give up what differs, and what the loader hasn't touched."""
        for layer, boxes in self._layers.items():
            # Without a moment at which it was complete: at the end it must be.
            self._compare(layer, boxes)
        self._layers.clear()
        reason = "holds other bytes than were recorded for it"
        self._recording.give_up(
            {
                layer: reason
                for layer, differ in self._differences.items()
                if bool(torch.stack(differ).any())
            }
        )
        self._received.clear()
        self._recording.proved = True


def _differs(view: torch.Tensor, entry: Entry, received: torch.Tensor | None) -> torch.Tensor:
    """Whether live memory holds anything else than its box of what was received."""
    if received is None:
        return torch.ones((), dtype=torch.bool, device=view.device)
    bits = _BITS[view.element_size()]
    expected = entry.box(received).to(view.dtype)
    return (view.view(bits) != expected.view(bits)).any()


class RecordedTarget:
    """In-place destinations in an engine's live parameters, as its own loader fills them.

    What can't be replayed is received aside, and given to the loader at the commit.

    Args:
        recording: proved.
        live: the model's tensors; their memory must stay.
        device: of the tensors.
        load: gives named tensors to the loader of the layers in `recording.reasons`.
    """

    fixed_destinations = True

    def __init__(
        self,
        recording: Recording,
        live: Mapping[str, torch.Tensor],
        device: torch.device,
        load: Callable[[list[tuple[str, torch.Tensor]]], None],
    ) -> None:
        self._recording = recording
        used = {entry.live for entries in recording.entries.values() for entry in entries}
        self._live = {name: live[name] for name in used}
        self._memory = list(self._live.values())
        self._record = TensorRecord(self._memory)
        self._device = device
        self._load = load
        self._aside: dict[str, torch.Tensor] = {}
        self.whole = False
        """Whether the present update leaves nothing as it was."""

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """The live tensors that are written."""
        return self._memory

    @property
    def names(self) -> Collection[str]:
        """Theirs."""
        return self._live.keys()

    @property
    def moved(self) -> bool:
        """Whether live memory is elsewhere than when it was recorded."""
        return self._record.first_change(self._memory) >= 0

    def place(self, manifest: Manifest) -> Sequence[Sequence[Part]]:
        """The live view of each box, and memory aside for what the loader must be given.

        Raises:
            TensorError: a live tensor has been given other memory.
        """
        if self.moved:
            raise TensorError("the engine's parameters have been given other memory")
        loader: Collection[str] = self._recording.by_loader
        placed = []
        for spec in manifest.specs:
            parts = []
            for entry in self._recording.entries.get(spec.name, []):
                whole = entry.shape == spec.shape
                parts.append(Part(entry.view(self._live), None if whole else entry.offset))
            if spec.name in loader:
                if spec.name not in self._aside:
                    dtype: torch.dtype = getattr(torch, spec.dtype)
                    self._aside[spec.name] = torch.empty(
                        spec.shape, dtype=dtype, device=self._device
                    )
                parts.append(Part(self._aside[spec.name]))
            placed.append(parts)
        return placed

    def commit(self, manifest: Manifest) -> None:  # noqa: ARG002
        """Give the loader what it must be given."""
        if self._aside:
            self._load(list(self._aside.items()))
