"""packedcomm as a weight transfer backend of vLLM: `{"backend": "packedcomm"}`.

`register` is the entry point that vLLM calls in each of its processes. The trainer's side is in
`packedcomm.engines.vllm.client`, which needs no vLLM.
"""

from __future__ import annotations

import logging
from typing import Any

from packedcomm.engines.vllm.requests import BACKEND
from packedcomm.errors import VersionMismatch

__all__ = ["OLDEST", "READ", "TESTED", "register", "release_of"]

logger = logging.getLogger("packedcomm")

OLDEST = (0, 25)
"""The oldest version of vLLM that this backend works with."""

TESTED = ("0.26.0", "0.32.0")
"""The versions that its tests run on."""

READ = (0, 33)
"""The newest version whose sources were read for it."""


def register() -> None:
    """Make the backend known to vLLM in this process. Idempotent; never raises for a version of
    vLLM that isn't supported: choosing the backend there does."""
    import vllm

    version = release_of(vllm.__version__)
    if version is not None and version < OLDEST:
        _register_refusal(
            f"packedcomm needs vLLM {OLDEST[0]}.{OLDEST[1]} or newer (tested: {', '.join(TESTED)}),"
            f" this is {vllm.__version__}"
        )
        return
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            BACKEND, "packedcomm.engines.vllm.worker", "PackedCommEngine"
        )
    from packedcomm.engines.vllm.adapters import install_adapter_hook
    from packedcomm.engines.vllm.worker_hooks import install_worker_hooks

    install_adapter_hook()
    install_worker_hooks()


def _register_refusal(reason: str) -> None:
    try:
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
    except ImportError:
        logger.warning("%s: it has no weight transfer backends", reason)
        return

    def refuse() -> Any:
        raise VersionMismatch(reason)

    WeightTransferEngineFactory._registry.setdefault(BACKEND, refuse)


def release_of(text: str) -> tuple[int, int] | None:
    """Major and minor of a release; None for a development build without one, which calls itself
    0.0 or 0.1."""
    parts = text.split(".")
    try:
        found = int(parts[0]), int(parts[1])
    except (ValueError, IndexError):
        return None
    return None if found <= (0, 1) else found
