"""Methods that the vLLM benchmark adds to the engine's workers (`worker_extension_cls`)."""

from __future__ import annotations

import json
import re
from typing import Any

import torch

from benchmarks.vllm_models import digest

__all__ = ["Extension"]


class Extension:
    """Becomes part of vLLM's worker class."""

    def pc_digests(self) -> str:
        """Digest of every parameter, as JSON."""
        model: Any = self.get_model()  # type: ignore[attr-defined]
        found = {}
        for name, parameter in model.named_parameters():
            plain = re.sub(r"experts\.(?:[a-z_]+\.)*(w13|w2)_weight$", r"experts.\1_weight", name)
            found[plain.replace(".base_layer", "")] = digest(parameter)
        return json.dumps(found)

    def pc_memory(self) -> str:
        """Bytes that are allocated, and their peak since the last call."""
        found = {
            "allocated": torch.cuda.memory_allocated(),
            "peak": torch.cuda.max_memory_allocated(),
        }
        torch.cuda.reset_peak_memory_stats()
        return json.dumps(found)

    def pc_use(self, backend: str) -> str:
        """Replace the weight transfer engine by one of another backend."""
        from vllm.config import WeightTransferConfig
        from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

        import packedcomm.engines.vllm

        packedcomm.engines.vllm.register()
        old: Any = self.weight_transfer_engine  # type: ignore[has-type]
        old.shutdown()
        self.weight_transfer_engine = WeightTransferEngineFactory.create_engine(
            WeightTransferConfig(backend=backend), old.vllm_config, old.device, old.model
        )
        return type(self.weight_transfer_engine).__name__

    def pc_adapter_digests(self, rank: int) -> str:
        """Digest of every matrix in the first slot of the live adapters, as JSON."""
        manager: Any = self.get_model().lora_manager  # type: ignore[attr-defined]
        found = {}
        for name, layer in manager.modules.items():
            if not isinstance(layer.lora_a_stacked, tuple):
                continue  # embeddings and the head, which the adapter leaves alone
            for index, (a, b) in enumerate(
                zip(layer.lora_a_stacked, layer.lora_b_stacked, strict=True)
            ):
                found[f"{name} {index} A"] = digest(a[0, 0, :rank])
                found[f"{name} {index} B"] = digest(b[0, 0, :, :rank])
        return json.dumps(found)

    def pc_status(self) -> str:
        """The engine's status, as JSON."""
        return json.dumps(self.weight_transfer_engine.status())
