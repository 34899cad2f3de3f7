"""A model's live tensors, and where in it they are."""

from __future__ import annotations

from collections.abc import Iterable

import torch

__all__ = ["Links", "live_tensors"]


def live_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """A model's parameters and buffers by qualified name, those that share memory too."""
    tensors: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
    tensors.update(model.named_buffers(remove_duplicate=False))
    return tensors


class Links:
    """The way from a model to some of its tensors, through the modules between, as it is now.

    Args:
        model: the model.
        names: qualified names of parameters and buffers.
    """

    def __init__(self, model: torch.nn.Module, names: Iterable[str]) -> None:
        found: dict[tuple[int, str], tuple[dict[str, object], str, object]] = {}
        for name in names:
            *path, leaf = name.split(".")
            module = model
            for step in path:
                modules: dict[str, object] = module._modules  # type: ignore[assignment]
                found[id(modules), step] = (modules, step, modules[step])
                module = getattr(module, step)
            held: dict[str, object] = module._parameters  # type: ignore[assignment]
            if leaf not in held:
                held = module._buffers  # type: ignore[assignment]
            found[id(held), leaf] = (held, leaf, held[leaf])
        self._links = list(found.values())

    @property
    def changed(self) -> bool:
        """Whether another module or another tensor is anywhere on it."""
        return any(where.get(name) is not what for where, name, what in self._links)
