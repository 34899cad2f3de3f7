"""Slots: the persistent buffers that packed chunks rotate through, and the lanes beside them."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from packedcomm.communicators.base import Communicator, Operands
from packedcomm.errors import CapacityError
from packedcomm.transports.lanes import (
    Caller,
    CallerStream,
    CallerThread,
    InlineLane,
    Lane,
    Mark,
    StreamLane,
    synchronize,
)

__all__ = [
    "COPY_BLOCKS",
    "DIGEST_BLOCKS",
    "PIPELINES",
    "Pipeline",
    "Slot",
    "bytes_on",
    "group_device",
    "indexed",
    "release_buffers",
]

# Thread blocks of the copy kernels that run beside NCCL's: enough to keep ahead of the wire, few
# enough to leave multiprocessors to the broadcast, whose blocks otherwise wait for theirs.
COPY_BLOCKS = 64

# The same for digests that don't come with a copy.
DIGEST_BLOCKS = 64

# torch's allocators round to this anyway; it keeps chunks of nearly equal sizes from reallocating.
_GRAIN_BYTES = 2 << 20


def group_device(group: Any) -> torch.device | None:
    """The device of a group that tells it, with an index."""
    device = getattr(group, "device", None)
    return None if device is None else indexed(torch.device(device))


def indexed(device: torch.device) -> torch.device:
    """The device with its index: `cuda` is the current GPU."""
    index: int | None = device.index
    if device.type == "cuda" and index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu") if device.type == "cpu" else device


class Slot:
    """One buffer of a pipeline. `free` is the end of the last work that touches it."""

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.free: Mark = None
        # Pinned memory beside the buffer, where host memory is sent by a GPU, and the end of the
        # last copy out of it.
        self.staging: torch.Tensor | None = None
        self.staged: Mark = None
        # What chunk plans broadcast from or into this very buffer.
        self.operands: weakref.WeakKeyDictionary[Any, Operands] = weakref.WeakKeyDictionary()

    def drop_buffer(self) -> None:
        """Refer to the buffer no more."""
        self.buffer = None
        self.operands.clear()


def bytes_on(device: torch.device, nbytes: int) -> torch.Tensor:
    """Memory that outlives the caller's inference mode, whose tensors can't be written outside.

    Raises:
        CapacityError: no memory.
    """
    try:
        with torch.inference_mode(False):
            return torch.empty(nbytes, dtype=torch.uint8, device=device)
    except RuntimeError as error:  # torch.OutOfMemoryError on a GPU, RuntimeError on a CPU
        raise CapacityError(
            f"no memory for a buffer of {nbytes:,} bytes on {device}: "
            f"{str(error).splitlines()[0]}; try a smaller buffer_size_bytes"
        ) from error


class Pipeline:
    """Lanes and slots of one group in one direction, kept from one transfer to the next.

    Taken out of the cache while a transfer uses it, so that two transfers never share a slot.
    """

    def __init__(self, device: torch.device) -> None:
        self.spoiled = False
        """Whether a transfer has failed in it."""
        self.device = device
        self.caller: Caller
        self.wire: Lane
        self.copy: Lane
        self.digest: Lane
        if device.type == "cuda":
            self.wire = StreamLane(device)
            # Packing, unpacking and callbacks: one direction at a time, so one stream.
            self.copy = StreamLane(device)
            # Digests that don't come with a copy. No slot, copy or broadcast waits for them.
            self.digest = StreamLane(device)
        else:
            self.wire = InlineLane()
            self.copy = InlineLane()
            self.digest = InlineLane()
        self.slots: list[Slot] = []
        # Chunk plans that are kept with a target or with a source's snapshot.
        self.plans: weakref.WeakKeyDictionary[Any, Any] = weakref.WeakKeyDictionary()
        self._next = 0

    def __del__(self) -> None:
        # Later pipelines take the lanes. Those of a transfer that failed may wait for ever.
        if self.spoiled:
            return
        try:
            for lane in (self.wire, self.copy, self.digest):
                lane.retire()
        except Exception:  # noqa: BLE001, S110 - an interpreter that ends has taken names away
            pass

    def begin(self, num_buffers: int) -> None:
        """Adopt the caller's present stream or thread and have `num_buffers` slots."""
        self.caller = CallerStream(self.device) if self.device.type == "cuda" else CallerThread()
        del self.slots[num_buffers:]
        self.slots += [Slot() for _ in range(num_buffers - len(self.slots))]
        self._next = 0

    def next_slot(self) -> Slot:
        """The slots in rotation."""
        slot = self.slots[self._next]
        self._next = (self._next + 1) % len(self.slots)
        return slot

    def reserve(self, slot: Slot, nbytes: int) -> torch.Tensor:
        """The first `nbytes` bytes of a slot, which grows to the largest chunk it is asked for.

        Raises:
            CapacityError: no memory.
        """
        if slot.buffer is None or slot.buffer.nbytes < nbytes:
            # The old buffer goes before the new one comes, so that both needn't fit. Work that is
            # still under way on it keeps it, through its reference or the allocator's streams.
            slot.drop_buffer()
            slot.buffer = self.allocate(-(-nbytes // _GRAIN_BYTES) * _GRAIN_BYTES)
        return slot.buffer[:nbytes]

    def staging(self, slot: Slot, nbytes: int) -> torch.Tensor:
        """Pinned host memory of a slot, once the last copy out of it has ended.

        Raises:
            CapacityError: no memory that could be pinned.
        """
        synchronize(slot.staged)
        if slot.staging is None or slot.staging.nbytes < nbytes:
            slot.staging = None
            try:
                slot.staging = torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)
            except RuntimeError as error:
                raise CapacityError(
                    f"no pinned memory of {nbytes:,} bytes to stage tensors of the host: "
                    f"{str(error).splitlines()[0]}"
                ) from error
        return slot.staging[:nbytes]

    def lend(
        self, slot: Slot, nbytes: int
    ) -> tuple[torch.Tensor, weakref.ref[torch.UntypedStorage]]:
        """A tensor over a slot with a storage of its own, and a reference that dies with the last
        view of that storage, whoever holds it."""
        assert slot.buffer is not None
        alias = from_dlpack(slot.buffer[:nbytes])
        return alias, weakref.ref(alias.untyped_storage())

    def give_away(self, slot: Slot) -> None:
        """Leave a slot's buffer to whoever still refers to it; the next chunk gets a new one."""
        if slot.buffer is not None and isinstance(self.caller, CallerStream):
            # It may have been allocated while another stream of the caller's was current.
            slot.buffer.record_stream(self.caller.stream)
        slot.drop_buffer()

    def settle(self) -> None:
        """After a failure: let the caller's later work come after whatever is still under way."""
        for lane in (self.wire, self.copy, self.digest):
            self.caller.wait_for(lane.tail())

    def end(self) -> None:
        """After a transfer: what was started is waited for, and nothing of the group is kept."""
        for slot in self.slots:
            if not isinstance(slot.free, torch.cuda.Event):
                self.caller.wait_for(slot.free)
                slot.free = None

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Bytes that every lane and the caller may use in any order that marks establish.

        Raises:
            CapacityError: no memory.
        """
        buffer = bytes_on(self.device, nbytes)
        for lane in (self.wire, self.copy, self.digest):
            # The block belongs to the caller's stream; freed, it must not be handed out again
            # before these streams are done with it.
            if isinstance(lane, StreamLane):
                buffer.record_stream(lane.stream)
        return buffer


class _PipelineCache:
    """Pipelines by group, for as long as the group lives."""

    def __init__(self) -> None:
        self._by_group: weakref.WeakKeyDictionary[Any, dict[torch.device, Pipeline]] = (
            weakref.WeakKeyDictionary()
        )

    @contextmanager
    def borrow(self, group: Any, device: torch.device, num_buffers: int) -> Iterator[Pipeline]:
        """The group's pipeline, or a new one; kept for the next time unless the body raises."""
        try:
            kept = self._by_group.setdefault(group, {})
        except TypeError:  # a group that can't be referred to weakly gets new buffers every time
            kept = {}
        pipeline = kept.pop(device, None) or Pipeline(device)
        pipeline.begin(num_buffers)
        try:
            yield pipeline
        except BaseException:
            pipeline.spoiled = True
            # A foreign group can't be aborted, and waiting for its peers could last for ever.
            if isinstance(group, Communicator):
                pipeline.settle()
            raise
        pipeline.end()
        kept[device] = pipeline

    def drop(self, group: Any) -> None:
        with suppress(TypeError):
            self._by_group.pop(group, None)


PIPELINES = _PipelineCache()


def release_buffers(group: Any) -> None:
    """Free the buffers that transfers over this group have left for the next one.

    They otherwise live as long as the group: `num_buffers` slots, each of the largest chunk it
        held.
    Must not be called while a transfer over the group runs.
    """
    PIPELINES.drop(group)
