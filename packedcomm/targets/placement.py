"""`Placement`: a rank's layout on its real memory, as the targets with layouts use it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from packedcomm.copying import CASTABLE, CopyPlan, Part, TensorRecord
from packedcomm.errors import ManifestError, TensorError, listed
from packedcomm.layout import Layout
from packedcomm.manifest import Manifest, dtype_name
from packedcomm.pieces import box_view, part_of

__all__ = [
    "Placement",
    "Placements",
    "check_apart",
    "check_one_device",
    "renaming",
    "tied_names",
]

# Manifests whose placement is kept, as many as a receiver keeps plans.
_KEPT = 8


@dataclass(frozen=True, slots=True)
class Placement:
    """What one manifest fills: the parts of each of its tensors, and zeros."""

    layout: Layout
    parts: tuple[tuple[Part, ...], ...]
    zeroed: tuple[torch.Tensor, ...]
    zeroing: CopyPlan | None

    @classmethod
    def of(
        cls,
        manifest: Manifest,
        layout: Layout,
        memory: Mapping[str, torch.Tensor],
        *,
        cast: bool,
    ) -> Placement:
        """A layout of a manifest's tensors on the memory of its parameters.

        Args:
            manifest: names the layout's tensors.
            layout: pieces and padding.
            memory: the parameters by name.
            cast: whether floating-point dtypes may differ.

        Raises:
            ManifestError: dtypes differ; all such tensors are listed, up to ten.
        """
        placed: dict[str, list[Part]] = {name: [] for name in layout.tensors}
        problems: dict[str, None] = {}
        for piece in layout.pieces:
            spec, tensor = manifest.by_name[piece.tensor], memory[piece.parameter]
            problem = _dtype_problem(spec.dtype, dtype_name(tensor.dtype), cast, piece.scale)
            if problem:
                problems[f"tensor {spec.name!r} for {piece.parameter!r}: {problem}"] = None
            placed[spec.name].append(part_of(piece, tensor, spec.shape))
        if problems:
            raise ManifestError(listed(list(problems)))
        parts = tuple(tuple(placed[spec.name]) for spec in manifest.specs)
        # One row of zeros serves all: rows are contiguous runs, which single zeros wouldn't be.
        longest = max((box.shape[-1] for _, box in layout.padding if box.shape), default=1)
        zeros: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        pairs = []
        for parameter, box in layout.padding:
            tensor = memory[parameter]
            kind = (tensor.dtype, tensor.device)
            if kind not in zeros:
                zeros[kind] = torch.zeros(longest, dtype=kind[0], device=kind[1])
            row = zeros[kind][: box.shape[-1]] if box.shape else zeros[kind][0]
            pairs.append((row.expand(box.shape), box_view(box, tensor)))
        zeroed = tuple(view for _, view in pairs)
        return cls(layout, parts, zeroed, CopyPlan(pairs) if pairs else None)

    def zero(self) -> None:
        """Write the zeros; on a GPU enqueued on the current stream."""
        if self.zeroing is not None:
            self.zeroing.run()


class Placements:
    """The placements of the last few manifests, for memory that must stay where it is.

    Args:
        memory: parameters by name.
    """

    def __init__(self, memory: Mapping[str, torch.Tensor]) -> None:
        self._names = list(memory)
        self._tensors = list(memory.values())
        self._record = TensorRecord(self._tensors)
        self._kept: dict[str, Placement] = {}

    @property
    def tensors(self) -> list[torch.Tensor]:
        """The memory."""
        return self._tensors

    def get(self, manifest: Manifest, make: Callable[[Manifest], Placement]) -> Placement:
        """The placement of a manifest, made if it isn't kept.

        Raises:
            TensorError: memory has been replaced since the beginning.
        """
        changed = self._record.first_change(self._tensors)
        if changed >= 0:
            raise TensorError(
                f"{self._names[changed]!r} has been given other memory: make a new target"
            )
        placement = self._kept.get(manifest.digest)
        if placement is None:
            placement = make(manifest)
            while len(self._kept) >= _KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[manifest.digest] = placement
        return placement


def check_one_device(memory: Mapping[str, torch.Tensor]) -> None:
    """Check that all memory is on the device of the first tensor.

    Raises:
        TensorError: a tensor is elsewhere; the message names both tensors and devices.
    """
    first = next(iter(memory.items()), None)
    for name, tensor in memory.items():
        if first is not None and tensor.device != first[1].device:
            raise TensorError(
                f"{name!r} is on {tensor.device}, {first[0]!r} on {first[1].device}: "
                f"a target has one device"
            )


def check_apart(memory: Mapping[str, torch.Tensor]) -> None:
    """Check that no two tensors share memory, as far as addresses tell.

    Strided views that lie between each other's elements, such as columns of one matrix, can be
    told apart only where one of the two is dense.

    Raises:
        TensorError: two tensors share memory; the message names both.
    """
    spans = []
    for name, tensor in memory.items():
        if tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start, size = tensor.data_ptr(), tensor.element_size()
            dense = last + 1 == tensor.numel()
            same = (tensor.dtype, tuple(tensor.shape), tensor.stride())
            spans.append((start, start + last * size, start + (last + 1) * size, dense, same, name))
    before: list[tuple[int, int, int, bool, object, str]] = []
    for span in sorted(spans, key=lambda span: span[:3]):
        start, last, _, dense, same, name = span
        before = [earlier for earlier in before if earlier[2] > start]
        for earlier in before:
            first, _, _, earlier_dense, earlier_same, owner = earlier
            identical = start == first and (same == earlier_same or dense or earlier_dense)
            if identical or earlier_dense or (dense and last >= earlier[1]):
                raise TensorError(
                    f"{owner!r} and {name!r} share memory, so one would spoil the other"
                )
        before.append(span)


def tied_names(manifest: Manifest) -> dict[str, str]:
    """Names that share the values of a tensor of the manifest, and its name.

    Raises:
        ManifestError: the attribute `tied` isn't an object of names.
    """
    tied = manifest.attributes.get("tied", {})
    if not isinstance(tied, dict) or not all(isinstance(name, str) for name in tied.values()):
        raise ManifestError('manifest attribute "tied" must be an object of names')
    return tied


def renaming(
    rename: Callable[[str], str] | Mapping[str, str] | None,
) -> Callable[[str], str] | None:
    """What changes names on arrival, as a function; names that a mapping lacks stay."""
    if not isinstance(rename, Mapping):
        return rename
    names = dict(rename)
    return lambda name: names.get(name, name)


def _dtype_problem(sent: str, held: str, cast: bool, scale: float) -> str | None:
    if sent != held and not {sent, held} <= set(CASTABLE):
        return f"{sent} can't become {held}"
    if sent != held and not cast:
        return f"received as {sent}, held as {held}, and cast isn't set"
    if scale != 1.0 and held not in CASTABLE:
        return f"{held} can't be scaled"
    return None
