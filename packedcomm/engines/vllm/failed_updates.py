"""After an update that has failed, the next one may begin on every worker.

Only the last worker raises (see `outcome`), so only there vLLM notes that no update is under way
any more. The others would refuse the next one.
"""

from __future__ import annotations

from functools import wraps
from typing import Any

__all__ = ["install_failed_update_hook"]


def install_failed_update_hook() -> None:
    """Have `start_weight_update` of vLLM's workers forget an update that has failed. Idempotent."""
    from vllm.v1.worker.gpu_worker import Worker

    original: Any = Worker.start_weight_update
    if hasattr(original, "__wrapped__") and getattr(original, "_by_packedcomm", False):
        return

    @wraps(original)
    def start_weight_update(self: Any, *arguments: Any, **options: Any) -> Any:
        # A trainer may also have died between its calls.
        if getattr(self.weight_transfer_engine, "starts_anew", False):
            self._weight_update_active = False
        return original(self, *arguments, **options)

    start_weight_update._by_packedcomm = True  # type: ignore[attr-defined]
    Worker.start_weight_update = start_weight_update
