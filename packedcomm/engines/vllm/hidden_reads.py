"""Ways to a tensor's values that the dispatcher doesn't show."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

__all__ = ["HiddenReads"]

_METHODS = frozenset(
    getattr(torch.Tensor, name)
    for name in ("numpy", "tolist", "__array__", "data_ptr", "__dlpack__", "__reduce_ex__")
)
_OPERATIONS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class HiddenReads(TorchFunctionMode):
    """While it is entered, tells of values that are got at without an operation that a
    `TorchDispatchMode` would be shown.

    Args:
        look: called with the tensor and by what it is read, before that happens.
    """

    def __init__(self, look: Callable[[torch.Tensor, str], None]) -> None:
        super().__init__()
        self._look = look

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _METHODS and args:
            self._look(args[0], func.__name__)
        elif isinstance(func, _OPERATIONS) and _is_opaque(func):
            for value in tree_leaves((args, kwargs or {})):
                if isinstance(value, torch.Tensor):
                    self._look(value, str(func))
        return func(*args, **kwargs) if kwargs else func(*args)


@cache
def _is_opaque(operation: Any) -> bool:
    """Whether an operation is registered as made of others, so that only these are dispatched, but
    isn't torch's: compiled extensions register functions so that read memory by themselves."""
    if isinstance(operation, torch._ops.OpOverloadPacket):
        overloads: Any = operation.overloads()  # type: ignore[no-untyped-call]
        return any(_is_opaque(getattr(operation, name)) for name in overloads)
    name = operation._schema.name
    overload = operation._schema.overload_name
    return not name.startswith(
        ("aten::", "prim")
    ) and torch._C._dispatch_has_kernel_for_dispatch_key(
        f"{name}.{overload}" if overload else name, "CompositeImplicitAutograd"
    )
