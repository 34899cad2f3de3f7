"""What vLLM's workers do that this backend's engine has to hear of."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from packedcomm.engines.vllm.hooks import wrap
from packedcomm.engines.vllm.outcome import agree_on, workers

__all__ = ["install_worker_hooks"]

# From this level on a sleeping engine's weights are lost, and not kept on the host.
_LOST = 2


def install_worker_hooks() -> None:
    """Have vLLM's workers tell their engines, where these are this backend's: before an update
    begins, `begin_anew`, and when the contents of the weights are lost, `lose_contents`.
    Idempotent."""
    worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    wrap(worker, "start_weight_update", _start)
    if hasattr(worker, "start_draft_weight_update"):
        wrap(worker, "start_draft_weight_update", _start_draft)
    wrap(worker, "sleep", _sleep)


def _start(original: Callable[..., Any], worker: Any, *arguments: Any, **options: Any) -> Any:
    """An update may begin on every worker whatever has become of the one before.

    Only the last worker raises (see `outcome`), so only there vLLM notes that an update that failed
    is not under way any more, and it notes nothing where a trainer has died between its calls. It
    would refuse the next update, on some workers and not on others, or take it for the draft model.
    """
    begin_anew = getattr(worker.weight_transfer_engine, "begin_anew", None)
    if begin_anew is not None:
        worker._weight_update_active = False
        begin_anew()
    return original(*arguments, **options)


def _start_draft(original: Callable[..., Any], worker: Any) -> None:
    """As `_start`. Where there is no draft model, vLLM refuses it on every worker at once."""
    start = partial(_start, original, worker)
    if hasattr(worker.weight_transfer_engine, "begin_anew"):
        agree_on(start, workers())
    else:
        start()


def _sleep(original: Callable[..., Any], worker: Any, level: int = 1, **options: Any) -> Any:
    lose_contents = getattr(worker.weight_transfer_engine, "lose_contents", None)
    if lose_contents is not None and level >= _LOST:
        lose_contents()
    return original(level, **options)
