"""What surrounds the calls of vLLM's workers, where their engine is this backend's."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from typing import Any

from packedcomm.engines.vllm.hooks import wrap
from packedcomm.engines.vllm.outcome import agree_on, workers

__all__ = ["install_worker_hooks"]

_STARTS = ("start_weight_update", "start_draft_weight_update")
_SHUTDOWN = ("shutdown_weight_transfer_engine",)
_FINISH = ("finish_weight_update",)
# Of these nobody's succeeds before everybody is called, whatever server they belong to.
_JOINT = ("init_weight_transfer_engine", "update_weights")

# Of a worker: that its update has failed, here or elsewhere.
_OVER = "_packedcomm_update_over"

# From this level on a sleeping engine's weights are lost, and not kept on the host.
_LOST = 2


def install_worker_hooks() -> None:
    """Have the workers of an engine agree on how each call of an update has ended, also where vLLM
    itself refuses it; and tell their engines, before an update begins, `begin_anew`, and when the
    contents of the weights are lost, `lose_contents`. Idempotent."""
    worker = importlib.import_module("vllm.v1.worker.gpu_worker").Worker
    around_names = (
        (_STARTS, _start),
        (_JOINT, _call),
        (_FINISH, _finish),
        (_SHUTDOWN, _call_here),
    )
    for names, around in around_names:
        for name in names:
            if hasattr(worker, name):
                wrap(worker, name, around)
    wrap(worker, "sleep", _sleep)


def _start(original: Callable[..., Any], worker: Any, *arguments: Any, **options: Any) -> Any:
    """An update may begin on every worker whatever has become of the one before: vLLM notes nothing
    where a trainer has died between its calls. It would refuse the next update, or take it for the
    draft model."""
    if _is_ours(worker):
        worker._weight_update_active = False
        vars(worker).pop(_OVER, None)
        worker.weight_transfer_engine.begin_anew()
    return _call_here(original, worker, *arguments, **options)


def _finish(original: Callable[..., Any], worker: Any, *arguments: Any, **options: Any) -> Any:
    """An update that has failed on another server's workers is over here too, though this server's
    caller hasn't heard of it: only the last worker of all has raised."""
    if vars(worker).pop(_OVER, False) and _spans_servers(worker):
        return None
    return _call_here(original, worker, *arguments, **options)


def _call_here(original: Callable[..., Any], worker: Any, *arguments: Any, **options: Any) -> Any:
    """As `_call`, but where vLLM's group has the workers of other servers too, which may be called
    at another time or not at all, nobody waits for them."""
    if _spans_servers(worker):
        return original(*arguments, **options)
    return _call(original, worker, *arguments, **options)


def _call(original: Callable[..., Any], worker: Any, *arguments: Any, **options: Any) -> Any:
    """Only the last worker raises (see `outcome`), so vLLM would note only there that an update has
    failed and isn't under way any more."""
    if not _is_ours(worker):
        return original(*arguments, **options)
    done = False
    try:
        done = agree_on(partial(original, *arguments, **options), workers())
    finally:
        if not done:
            worker._weight_update_active = False
            setattr(worker, _OVER, True)
    return None


def _spans_servers(worker: Any) -> bool:
    """Whether vLLM's group has the workers of other servers of one deployment, too."""
    group = workers()
    return group is not None and bool(group.world_size > worker.parallel_config.world_size)


def _sleep(original: Callable[..., Any], worker: Any, level: int = 1, **options: Any) -> Any:
    if _is_ours(worker) and level >= _LOST:
        worker.weight_transfer_engine.lose_contents()
    return original(level, **options)


def _is_ours(worker: Any) -> bool:
    return hasattr(getattr(worker, "weight_transfer_engine", None), "begin_anew")
