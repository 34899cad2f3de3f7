"""How a worker's failure becomes everybody's, and reaches vLLM's caller once.

vLLM's executor reads its workers' replies in the order of their ranks and stops at the first
failure; replies of later ranks would then be taken for answers to the next call. So the workers
agree on how a call has ended, and only the last one raises.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

from packedcomm.engines.vllm.markers import marked, unmarked
from packedcomm.errors import PackedCommError, RemoteError

__all__ = ["agree_on", "workers"]

logger = logging.getLogger("packedcomm")

# Bytes of an error's text that are shared.
_MOST = 4096


def agree_on(call: Callable[[], object], group: Any) -> bool:
    """Do something on every worker of one engine; returns when all have done it, or one has failed.

    Args:
        call: what this worker does; it must end in bounded time.
        group: vLLM's group of all workers of the engine, or None for a single one.

    Returns:
        Whether all have done it.

    Raises:
        PackedCommError: what has failed, on this worker or on another one; only on the last worker.
            Its text names the class.
    """
    own: Exception | None = None
    try:
        call()
    except Exception as error:  # noqa: BLE001  (raised below, where it may be)
        own = error
    if group is None or group.world_size == 1:
        if own is not None:
            raise _told(own)
        return True
    texts = _shared("" if own is None else marked(own), group)
    failed = [(rank, text) for rank, text in enumerate(texts) if text]
    if not failed:
        return True
    if group.rank_in_group != group.world_size - 1:
        if own is not None:
            logger.warning("the last worker raises this one's error: %s", own, exc_info=own)
        return False
    rank, text = failed[0]
    found = unmarked(text) or RemoteError(text)
    agreed = type(found)(f"worker {rank} of {group.world_size}: {found}")
    raise _told(agreed) from own


def workers() -> Any:
    """vLLM's group of all workers of the engine; None where there is none yet."""
    from vllm.distributed.parallel_state import get_world_group

    try:
        return get_world_group()
    except AssertionError:
        return None


def _told(error: Exception) -> Exception:
    """An error whose text names its class: vLLM passes on nothing else."""
    if isinstance(error, PackedCommError):
        told: Exception = type(error)(marked(error))
    else:
        told = RemoteError(marked(error))
    told.__cause__ = error
    return told


def _shared(text: str, group: Any) -> list[str]:
    mine = torch.zeros(_MOST, dtype=torch.uint8)
    data = text.encode()[:_MOST]
    if data:
        mine[: len(data)] = torch.frombuffer(bytearray(data), dtype=torch.uint8)
    all_texts = [torch.zeros_like(mine) for _ in range(group.world_size)]
    torch.distributed.all_gather(all_texts, mine, group=group.cpu_group)
    return [bytes(each.tolist()).rstrip(b"\0").decode(errors="replace") for each in all_texts]
