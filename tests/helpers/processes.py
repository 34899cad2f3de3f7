"""How the tests start other processes: forked by a server that has imported what they need."""

from __future__ import annotations

import gc
import multiprocessing
from multiprocessing import forkserver

import torch

__all__ = ["context", "leave_alone_what_was_forked", "start_server"]

context = multiprocessing.get_context("forkserver")

_PRELOADED = ["torch", "packedcomm", "tests.helpers.ranks", "tests.helpers.peers"]
# Seconds each. Not where there is a GPU: they may look for it, and CUDA doesn't survive a fork.
_PRELOADED_WITHOUT_GPU = [
    "torch.distributed.fsdp",
    "torch.distributed.tensor",
    "tests.helpers.engine_models",
    "transformers.modeling_utils",
    "peft",
]


def start_server() -> None:
    """Let it begin to import, which takes seconds; it never touches CUDA, so that its forks may."""
    without_gpu = [] if torch.cuda.device_count() else _PRELOADED_WITHOUT_GPU
    context.set_forkserver_preload([*_PRELOADED, *without_gpu])
    forkserver.ensure_running()


def leave_alone_what_was_forked() -> None:
    """For the processes: what the server has imported isn't looked at by every collection."""
    gc.freeze()
