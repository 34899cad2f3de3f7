"""`TensorTarget`: received tensors are written in place into tensors of the same names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from packedcomm.copying import as_destination, describe_tensors
from packedcomm.errors import ManifestError, TensorError
from packedcomm.manifest import Manifest, dtype_name

__all__ = ["TensorTarget"]

_LISTED = 10


class TensorTarget:
    """In-place destinations by name. Their addresses never change.

    A failed transfer leaves tensors of which some are new and some are old.

    Args:
        tensors: mapping or `(name, tensor)` pairs; cupy and NumPy arrays count as tensors. Strided
            views are fine. Two names may have one tensor (tied weights).
        partial: whether a transfer may leave out some of the names; otherwise that is an error.

    Raises:
        ManifestError: a name is empty or occurs twice.
        TensorError: a tensor requires grad (writing it in place would corrupt a graph: pass
            `tensor.detach()`), is read-only, overlaps itself or can't be written as bytes; the
            message names it.
    """

    fixed_destinations = True

    def __init__(
        self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], *, partial: bool = False
    ) -> None:
        self._tensors: dict[str, torch.Tensor] = {}
        self._partial = partial
        for name, array in tensors.items() if isinstance(tensors, Mapping) else tensors:
            if type(name) is not str or not name:
                raise ManifestError(f"tensor name must be a non-empty string, got {name!r}")
            if name in self._tensors:
                raise ManifestError(f"duplicate tensor name {name!r}")
            try:
                tensor = as_destination(array)
                describe_tensors([tensor], tensor.device)
            except TensorError as error:
                raise TensorError(f"tensor {name!r}: {error}") from error
            if tensor.requires_grad:
                raise TensorError(
                    f"tensor {name!r} requires grad and can't be written in place: "
                    "pass its detach()"
                )
            self._tensors[name] = tensor

    def check(self, manifest: Manifest) -> None:
        """Compare with everything that will be received, before any data.

        Raises:
            ManifestError: lists unknown, missing and mismatched tensors, up to ten of them.
        """
        problems = []
        for spec in manifest.specs:
            try:
                self.destination(spec.name, getattr(torch, spec.dtype), spec.shape)
            except ManifestError as error:
                problems.append(str(error))
        problems += self._missing({spec.name for spec in manifest.specs})
        self._raise(problems)

    def destination(self, name: str, dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        """The tensor of this name.

        Raises:
            ManifestError: there is none, or its dtype or shape differs.
        """
        tensor = self._tensors.get(name)
        if tensor is None:
            raise ManifestError(f"no destination for tensor {name!r}")
        if tensor.dtype != dtype or tensor.shape != shape:
            raise ManifestError(
                f"tensor {name!r} is received as {dtype_name(dtype)} {tuple(shape)}, "
                f"its destination is {dtype_name(tensor.dtype)} {tuple(tensor.shape)}"
            )
        return tensor

    def finish(self, received: set[str]) -> None:
        """Compare with what was received.

        Raises:
            ManifestError: some destinations got nothing; lists them, up to ten.
        """
        self._raise(self._missing(received))

    def _missing(self, received: set[str]) -> list[str]:
        if self._partial or self._tensors.keys() <= received:
            return []
        return [f"tensor {name!r} is not sent" for name in self._tensors if name not in received]

    def _raise(self, problems: list[str]) -> None:
        if not problems:
            return
        more = f"; and {len(problems) - _LISTED} more" if len(problems) > _LISTED else ""
        raise ManifestError("; ".join(problems[:_LISTED]) + more)

    def __len__(self) -> int:
        return len(self._tensors)
