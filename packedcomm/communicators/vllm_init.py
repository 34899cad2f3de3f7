"""What vLLM tells both sides to connect: its weight-transfer init info, and a worker's rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Self

from packedcomm.communicators.base import check_rank
from packedcomm.errors import ArgumentError

__all__ = ["VllmInitInfo"]


@dataclass(frozen=True, slots=True)
class VllmInitInfo:
    """The rendezvous part of vLLM's `NCCLWeightTransferInitInfo`, validated.

    Raises:
        ArgumentError: a field is missing, of another type or out of range; the message names it.
    """

    master_address: str
    """Host on which rank 0, the trainer, listens."""

    master_port: int
    rank_offset: int
    """Rank of the first worker; vLLM uses 1, since rank 0 is the trainer."""

    world_size: int
    """Ranks in all: the trainer and every worker."""

    def __post_init__(self) -> None:
        if not isinstance(self.master_address, str) or not self.master_address:
            raise ArgumentError(
                f"master_address must be a non-empty string, got {self.master_address!r}"
            )
        for name, least in (("master_port", 1), ("rank_offset", 0), ("world_size", 1)):
            value = getattr(self, name)
            if type(value) is not int or value < least:
                raise ArgumentError(f"{name} must be an integer >= {least}, got {value!r}")
        if self.master_port > 65535:
            raise ArgumentError(f"master_port must be at most 65535, got {self.master_port}")

    @classmethod
    def parse(cls, info: Any) -> Self:
        """Read a mapping, such as the JSON of vLLM's init request, or an object with these
        attributes, such as vLLM's own init info. Other fields are left to the engine."""
        values = {}
        for field in fields(cls):
            missing = ArgumentError(f"init info has no {field.name}")
            if isinstance(info, Mapping):
                if field.name not in info:
                    raise missing
                values[field.name] = info[field.name]
            elif hasattr(info, field.name):
                values[field.name] = getattr(info, field.name)
            else:
                raise missing
        return cls(**values)

    def worker_rank(
        self,
        rank: int,
        *,
        data_parallel_index: int = 0,
        tensor_parallel_size: int = 1,
        pipeline_parallel_size: int = 1,
    ) -> int:
        """A worker's rank in the group: `rank_offset + data_parallel_index · (TP · PP) + rank`, as
        vLLM's `init_transfer_engine` computes it.

        Args:
            rank: the worker's rank inside its own engine.

        Raises:
            ArgumentError: the result isn't a rank of the group.
        """
        engine_size = tensor_parallel_size * pipeline_parallel_size
        group_rank = self.rank_offset + data_parallel_index * engine_size + rank
        check_rank(group_rank, self.world_size)
        return group_rank
