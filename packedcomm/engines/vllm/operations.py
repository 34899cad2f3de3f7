"""What an operation that was dispatched reads and writes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

__all__ = ["leaves", "tensors_in", "written_by"]


def written_by(func: Any, args: Any, kwargs: Any) -> Iterator[Any]:
    """The arguments that an operation writes to."""
    for index, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            yield args[index] if index < len(args) else kwargs.get(argument.name)


def leaves(value: Any) -> Iterator[Any]:
    """What is in dictionaries, lists and tuples."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from leaves(inner)
    else:
        yield value


def tensors_in(values: Any) -> Iterator[torch.Tensor]:
    """The tensors among what is in dictionaries, lists, tuples and iterators."""
    for value in values if isinstance(values, Iterator) else (values,):
        yield from (leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor))
