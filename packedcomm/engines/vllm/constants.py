"""What a loader sets to the same in every update: padding, and scales that aren't received."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch

__all__ = ["Constants", "Ranges"]

Ranges = Sequence[tuple[int, int]]
"""Begins and ends in a tensor's memory, in elements from its first one."""


class Constants:
    """Elements of live memory that a loader sets to what isn't received, and their values.

    Args:
        ranges: where they are, by live tensor; None for a tensor in which they are in no ranges,
            and aren't compared.
        live: the model's tensors, as the loader has left them.
    """

    def __init__(
        self, ranges: Mapping[str, Ranges | None], live: Mapping[str, torch.Tensor]
    ) -> None:
        self._ranges = {
            name: found
            for name, found in ranges.items()
            if found is not None and _is_there(live[name])
        }
        self._layouts = {name: _layout(live[name]) for name in self._ranges}
        self._compared = len(self._ranges) == len(ranges)
        self._values = self._read(live) if self._compared else {}
        self.names: Collection[str] = frozenset(ranges)
        """The live tensors that have any."""

    def held_in(self, live: Mapping[str, torch.Tensor]) -> bool:
        """Whether they are known to have the same values still, bit by bit. Waits for the device.

        Args:
            live: the model's tensors as they are now.
        """
        if not self._compared or any(
            name not in live or _layout(live[name]) != layout
            for name, layout in self._layouts.items()
        ):
            return False
        found = self._read(live)
        return found.keys() == self._values.keys() and all(
            torch.equal(values, self._values[device]) for device, values in found.items()
        )

    def _read(self, live: Mapping[str, torch.Tensor]) -> dict[torch.device, torch.Tensor]:
        """Their bytes on the host, by the device that they are on."""
        pieces: dict[torch.device, list[torch.Tensor]] = {}
        for name, ranges in self._ranges.items():
            tensor = live[name].detach()
            first = int(tensor.storage_offset())
            for begin, end in ranges:
                piece = tensor.as_strided((end - begin,), (1,), first + begin)
                pieces.setdefault(tensor.device, []).append(piece.view(torch.uint8))
        return {device: torch.cat(found).cpu() for device, found in pieces.items()}


def _layout(tensor: torch.Tensor) -> tuple[object, ...]:
    return (tensor.shape, tensor.stride(), tensor.dtype, _is_there(tensor))


def _is_there(tensor: torch.Tensor) -> bool:
    """Whether a tensor has memory: some builds empty it, and leave the tensor."""
    return tensor.untyped_storage().nbytes() > 0 or not tensor.numel()
