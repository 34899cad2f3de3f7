"""A worker's end of a transfer whose trainer is stock vLLM's; needs no vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from packedcomm.communicators import Communicator, NcclCommunicator
from packedcomm.communicators.vllm_init import VllmInitInfo
from packedcomm.completion import wait_for_device
from packedcomm.endpoints import Target, is_target
from packedcomm.engines.vllm.stock_wire import StockWire
from packedcomm.errors import ArgumentError
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.settings import DEFAULTS, Settings
from packedcomm.transports.broadcast import PostUnpack, abort_on_failure
from packedcomm.transports.receiving import Receiving
from packedcomm.transports.slots import PIPELINES

__all__ = ["StockReceiver"]


class StockReceiver:
    """A worker's end of a transfer from a stock vLLM trainer.

    Belongs to one thread at a time. Make one with `connect`.

    Args:
        group: with the trainer as rank 0.
        init_info: what vLLM's trainer has told every worker.
    """

    def __init__(self, group: Communicator, init_info: Mapping[str, Any]) -> None:
        self.group = group
        self._init_info = dict(init_info)
        self._last: list[tuple[str, tuple[Any, Any]]] = []

    @classmethod
    def connect(
        cls,
        init_info: Mapping[str, Any],
        rank: int,
        *,
        device: torch.device | str | int,
        settings: Settings = DEFAULTS,
    ) -> StockReceiver:
        """Join the trainer's group.

        Args:
            init_info: vLLM's, with `master_address` and `master_port`, or with `nccl_unique_id_b64`
                (from vLLM 0.30 on).
            rank: in that group; `VllmInitInfo.worker_rank` computes it as vLLM does.
            device: this worker's GPU.
            settings: `connect_timeout_s`, `nccl_library` and so on.

        Raises:
            As `NcclCommunicator.from_vllm`. A trainer whose vLLM has switched its communicator off,
            or that runs another NCCL, is a `RendezvousTimeout` or an `NcclError`.
        """
        timeout_s = settings.connect_timeout_s
        unique_id = init_info.get("nccl_unique_id_b64")
        if unique_id:
            group = NcclCommunicator.from_unique_id(
                unique_id,
                rank,
                init_info["world_size"],
                device=device,
                timeout_s=timeout_s,
                settings=settings,
            )
            # vLLM's first operation, in which every rank must take part.
            group.all_reduce(torch.zeros(1, device=group.device))
            wait_for_device(group.device, timeout_s, lambda: None, "NCCL's first all-reduce")
            return cls(group, init_info)
        info = VllmInitInfo.parse(init_info)
        group = NcclCommunicator.from_vllm(
            info.master_address,
            info.master_port,
            rank,
            info.world_size,
            device=device,
            timeout_s=timeout_s,
            settings=settings,
        )
        return cls(group, init_info)

    def receive(self, update_info: Mapping[str, Any], target: Target | PostUnpack | None) -> None:
        """Receive what one update info describes; as `broadcast_consumer`, also unpacked.

        Args:
            update_info: vLLM's; with empty lists the same tensors as before (vLLM 0.33).
            target: a target, or a callback that is given lists of named tensors.

        Raises:
            ArgumentError: the update info is malformed.
            As `broadcast_consumer`, which also says what a failure leaves: a group that has ended.
            `connect` again.
        """
        described = _described(update_info) or self._last
        wire = StockWire.parse(self._init_info, update_info)
        metadata: Any = described
        if is_target(target):
            metadata = Manifest([TensorSpec(n, dtype, shape) for n, (shape, dtype) in described])
        group = self.group
        with abort_on_failure(group, "receive"):
            with PIPELINES.borrow(group, group.device, wire.num_buffers) as pipeline:
                Receiving(pipeline, group, 0, wire.cut, target, None).run(metadata)
            if is_target(target):
                target.commit(metadata)
        self._last = described

    def close(self) -> None:
        """Leave the group. Idempotent."""
        self.group.close()


def _described(update_info: Mapping[str, Any]) -> list[tuple[str, tuple[Any, Any]]]:
    names, dtypes, shapes = (update_info.get(k, ()) for k in ("names", "dtype_names", "shapes"))
    if not len(names) == len(dtypes) == len(shapes):
        raise ArgumentError(
            f"update info has {len(names)} names, {len(dtypes)} dtypes and {len(shapes)} shapes"
        )
    return [
        (name, (tuple(shape), dtype))
        for name, dtype, shape in zip(names, dtypes, shapes, strict=True)
    ]
