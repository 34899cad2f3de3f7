"""A recording of an engine's loader: where every box goes, checked, and replayed as a target."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch

from packedcomm.copying import Part, TensorRecord
from packedcomm.engines.vllm.moves import box_in
from packedcomm.engines.vllm.recording import Recorder, Write
from packedcomm.errors import TensorError
from packedcomm.manifest import Manifest, TensorSpec

__all__ = ["Entry", "RecordedTarget", "Recording", "live_tensors"]

logger = logging.getLogger("packedcomm")

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

    def view(self, tensors: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """The live memory."""
        tensor = tensors[self.live].detach()
        return tensor.as_strided(self.shape, self.strides, tensor.storage_offset() + self.at)

    def box(self, received: torch.Tensor) -> torch.Tensor:
        """The box of the tensor as it was received."""
        return received[
            tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))
        ]


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by qualified name, those that share memory too."""
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


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

    proved: bool = False
    """Whether a second update has shown the loader doing the same."""

    _awaited: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)

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
        recording = cls({}, recorder.fed, dict(recorder.reasons))
        for name, writes in written.items():
            layer = name.rpartition(".")[0]
            found: list[tuple[str, Entry]] = []
            try:
                found = _entries(name, live[name], writes, manifest)
            except ValueError as error:
                recording.reasons.setdefault(layer, f"{name}: {error}")
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
        return recording

    def give_up(self, layer: str, reason: str) -> None:
        """A layer turns out not to be replayable."""
        self.reasons.setdefault(layer, reason)
        self._drop_layers()

    def _drop_layers(self) -> None:
        for origin, entries in list(self.entries.items()):
            kept = [e for e in entries if e.live.rpartition(".")[0] not in self.reasons]
            if kept:
                self.entries[origin] = kept
            else:
                del self.entries[origin]

    @property
    def by_loader(self) -> set[str]:
        """Names of the received tensors that the loader must be given."""
        return set().union(*(self.fed.get(layer, set()) for layer in self.reasons))

    @property
    def layers(self) -> dict[str, set[str]]:
        """The layers with entries, and from which received tensors those come."""
        found: dict[str, set[str]] = {}
        for origin, entries in self.entries.items():
            for entry in entries:
                found.setdefault(entry.live.rpartition(".")[0], set()).add(origin)
        return found


def _entries(
    name: str, tensor: torch.Tensor, writes: Sequence[Write], manifest: Manifest
) -> list[tuple[str, Entry]]:
    """What of a live tensor is which box.

    Raises:
        ValueError: some of it isn't known, or is written more than once.
    """
    size = tensor.element_size()
    kind = str(tensor.dtype).removeprefix("torch.")
    first = tensor.data_ptr()
    base = tensor.detach()
    # 1 is a constant, 2 a received element.
    known = torch.zeros(_reach(tensor), dtype=torch.int8, device=tensor.device)
    found: list[tuple[str, Entry]] = []
    for write in writes:
        if write.reason:
            raise ValueError(write.reason)
        move = write.move
        if move.dst_dtype != kind:
            raise ValueError(f"written as {move.dst_dtype}, is {kind}")
        place = known.as_strided(
            [axis.size for axis in move.axes],
            [axis.dst // size for axis in move.axes],
            (move.dst - first) // size,
        )
        if write.origin is None:
            if bool((place == 2).any()):
                raise ValueError("a constant overwrites what was received")
            place.fill_(1)
            continue
        spec: TensorSpec = manifest.by_name[write.origin]
        offset, shape, steps = box_in(move, 0, spec.shape, _itemsize(spec))
        entry = Entry(
            offset, shape, tuple(step // size for step in steps), name, (move.dst - first) // size
        )
        if (write.origin, entry) in found:
            continue
        if bool((place == 2).any()):
            raise ValueError("written twice")
        place.fill_(2)
        found.append((write.origin, entry))
    unknown = int((known.as_strided(base.shape, base.stride()) == 0).sum())
    if unknown:
        raise ValueError(f"{unknown:,} elements come from nowhere that was seen")
    return found


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
        self._layers = recording.layers
        self._received: dict[str, torch.Tensor] = {}
        self._differences: dict[str, torch.Tensor] = {}
        self._layer = ""

    def receive(self, name: str, tensor: torch.Tensor) -> None:
        """A tensor that the loader is about to be given; kept until its layers are complete."""
        if name in self._recording.entries:
            self._received[name] = tensor

    def enter_layer(self, layer: str, loaded: object) -> None:
        """As `Watch.enter_layer`."""
        self._layer = layer

    def leave_layer(self) -> None:
        """As `Watch.leave_layer`: compare what the layer holds now."""
        for name in self._layers.pop(self._layer, set()):
            received = self._received.get(name)
            mine = [
                entry
                for entry in self._recording.entries[name]
                if entry.live.rpartition(".")[0] == self._layer
            ]
            for entry in mine:
                self._note(entry, received)
            if not any(name in names for names in self._layers.values()):
                self._received.pop(name, None)

    def _note(self, entry: Entry, received: torch.Tensor | None) -> None:
        view = entry.view(self._live)
        if received is None:
            differs = torch.ones((), dtype=torch.bool, device=view.device)
        else:
            bits = _BITS[view.element_size()]
            expected = entry.box(received).to(view.dtype)
            differs = (view.view(bits) != expected.view(bits)).any()
        before = self._differences.get(self._layer)
        self._differences[self._layer] = differs if before is None else before | differs

    def end(self) -> None:
        """The update has ended: give up what differs, and what the loader hasn't touched."""
        for layer in list(self._layers):
            # Without a moment at which it was complete: at the end it must be.
            self._layer = layer
            self.leave_layer()
        for layer, differs in self._differences.items():
            if bool(differs):
                self._recording.give_up(layer, "holds other bytes than were recorded for it")
        self._received.clear()
        self._recording.proved = True


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

    @property
    def memory(self) -> Sequence[torch.Tensor]:
        """The live tensors that are written."""
        return self._memory

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

    def commit(self, manifest: Manifest) -> None:
        """Give the loader what it must be given."""
        if self._aside:
            self._load(list(self._aside.items()))
