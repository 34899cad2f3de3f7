"""An update may begin on every worker whatever has become of the one before.

Only the last worker raises (see `outcome`), so only there vLLM notes that an update that failed is
not under way any more, and it notes nothing where a trainer has died between its calls. It would
refuse the next update, on some workers and not on others.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

from packedcomm.engines.vllm.hooks import wrap

__all__ = ["install_failed_update_hook"]


def install_failed_update_hook() -> None:
    """Have `start_weight_update` of vLLM's workers forget the update before, where the engine is
    this backend's. Idempotent."""
    worker = importlib.import_module("vllm.v1.worker.gpu_worker")
    wrap(worker.Worker, "start_weight_update", _start)


def _start(original: Callable[..., Any], worker: Any, *arguments: Any, **options: Any) -> Any:
    if getattr(worker.weight_transfer_engine, "starts_anew", False):
        worker._weight_update_active = False
    return original(*arguments, **options)
