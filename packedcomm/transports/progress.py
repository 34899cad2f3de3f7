"""Counting what a transfer moved and timing its stages, for whoever asked by `on_event`."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Self

from packedcomm.events import ChunkMoved, OnEvent, TransferFinished
from packedcomm.planning.chunks import Chunk
from packedcomm.transports.lanes import Lane

__all__ = ["Progress"]


class Progress:
    """A context around one transfer: times the stages' lanes and emits its events.

    Args:
        stages: lanes by the name of their stage.
        on_event: who asked; None for nobody.
        wait: waits until everything is done, in a way that can be given up. Without it reading the
            times of a GPU's lanes waits in the driver.
    """

    def __init__(
        self,
        stages: Mapping[str, Lane],
        on_event: OnEvent | None,
        wait: Callable[[], None] | None = None,
    ) -> None:
        self._stages = stages
        self._on_event = on_event
        self._wait = wait
        self._begin = 0.0
        self._chunks = self._tensors = self._nbytes = 0

    def __enter__(self) -> Self:
        if self._on_event is not None:
            for lane in self._stages.values():
                lane.start_timing()
            self._begin = time.perf_counter()
        return self

    def moved(self, chunk: Chunk) -> None:
        """A chunk was handed to its lanes."""
        if self._on_event is None:
            return
        self._chunks += 1
        self._tensors += len(chunk.sizes)
        self._nbytes += chunk.nbytes
        self._on_event(ChunkMoved(len(chunk.sizes), chunk.nbytes))

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if error is not None:
            return
        if self._wait is not None:
            self._wait()
        if self._on_event is None:
            return
        seconds = {stage: lane.seconds() for stage, lane in self._stages.items()}
        seconds["total"] = time.perf_counter() - self._begin
        self._on_event(TransferFinished(self._chunks, self._tensors, self._nbytes, seconds))
