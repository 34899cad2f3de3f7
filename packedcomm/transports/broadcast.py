"""`broadcast_producer` and `broadcast_consumer`: a stream of named tensors from one rank to the
others.

The byte streams are defined in `docs/wire.md`. There is no header on the wire: every rank must be
called with the same `src`, `buffer_size_bytes` and `wire_format`, and consumers with the metadata
of exactly the tensors that the producer sends, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from packedcomm.communicators.base import Communicator
from packedcomm.endpoints import Target, is_target
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    ContextLost,
    CudaError,
    ManifestError,
    summary,
)
from packedcomm.events import OnEvent
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.planning.chunks import Cut, WireFormat, chunk_rule
from packedcomm.settings import DEFAULTS
from packedcomm.transports.receiving import Receiving
from packedcomm.transports.sending import PostIter, Sending
from packedcomm.transports.slots import PIPELINES, group_device, indexed

__all__ = ["abort_on_failure", "broadcast_consumer", "broadcast_producer"]

PostUnpack = Callable[[list[tuple[str, torch.Tensor]]], Any]


def broadcast_producer(
    iterator: Iterable[tuple[str, Any]],
    group: Any,
    src: int = 0,
    post_iter_func: PostIter | None = None,
    buffer_size_bytes: int = DEFAULTS.buffer_size_bytes,
    num_buffers: int = DEFAULTS.num_buffers,
    *,
    wire_format: WireFormat = "vllm",
    on_event: OnEvent | None = None,
) -> None:
    """Send named tensors to every other rank of a group.

    On a GPU this returns once everything is enqueued. Packing waits for the work on the stream that
    is current at the call, and that stream's later work waits for the broadcasts, so tensors may be
    changed or freed right after the return, by work on that stream. On a CPU it returns when
    everything is sent. May be called from any thread, by one thread at a time per group.

    Buffers are kept for the next call until the group dies or `release_buffers(group)`.

    Args:
        iterator: `(name, tensor)` pairs: dense tensors of any dtype, shape and strides, all on the
            group's device; cupy and NumPy arrays count as tensors. It is read lazily, no further
            than the chunk being packed. An empty iterator sends nothing.
        group: a `Communicator`, or any object with `broadcast(tensor, src=...)` that works on the
            current stream, such as vLLM's PyNcclCommunicator.
        src: this rank, from which the group broadcasts.
        post_iter_func: maps each `(name, tensor)` to the tensor to send, for example to cast or to
            gather it; None sends the tensor itself. What it returns is what is described and sent.
        buffer_size_bytes: bytes at which a packed chunk is cut.
        num_buffers: buffers that chunks rotate through; 2 overlap packing with the wire.
        wire_format: `"vllm"` for vLLM's packed byte stream, `"native"` for packedcomm's own, which
            moves large tensors without packing them.
        on_event: hook for progress and times, see `packedcomm.events`.

    Raises:
        ArgumentError: an argument is out of range, or `src` isn't this rank.
        ManifestError: a name is empty or occurs twice; raised before the tensor's chunk is sent.
        TensorError: a tensor is on another device, sparse, quantised or otherwise not plain bytes;
            raised before its chunk is sent.
        CapacityError: no memory for the buffers.
        DeadlineExceeded, PeerLost, NcclError, SessionStateError: from the group.

    When the transfer fails after it began, or the iterator raises, a `Communicator` is aborted so
    that no peer waits for the rest; another kind of group can't be, and its peers wait by its
    rules.
    """
    cut = _checked_arguments(group, src, buffer_size_bytes, num_buffers, wire_format)
    rank = getattr(group, "rank", src)
    if isinstance(rank, int) and rank != src:
        raise ArgumentError(f"broadcast_producer: called on rank {rank}, but src is {src}")
    with abort_on_failure(group, "broadcast_producer"):
        Sending(group, src, cut).run(iterator, post_iter_func, num_buffers, on_event)


def broadcast_consumer(
    iterator: Iterable[tuple[str, tuple[Any, Any]]],
    group: Any,
    src: int = 0,
    post_unpack_func: PostUnpack | Target | None = None,
    buffer_size_bytes: int = DEFAULTS.buffer_size_bytes,
    num_buffers: int = DEFAULTS.num_buffers,
    device: torch.device | str | int = "cuda",
    *,
    wire_format: WireFormat = "vllm",
    on_event: OnEvent | None = None,
) -> None:
    """Receive named tensors that rank `src` of a group sends.

    On a GPU this returns once everything is enqueued, and the work that the current stream gets
    later comes after the last delivery. A delivery comes after the work that the current stream had
    at the call. On a CPU it returns when everything is delivered. May be called from any thread, by
    one thread at a time per group.

    Args:
        iterator: `(name, (shape, dtype))` of every tensor, in the sender's order; dtypes are
            torch's or their names. A `Manifest` is such an iterable, and is checked as a whole
            first.
        group: as for `broadcast_producer`.
        src: the sending rank.
        post_unpack_func: a callback, called once per chunk with `[(name, tensor), ...]`, or a
            target such as `packedcomm.targets.TensorTarget`, which names the memory to write in
            place. None drops the data. A callback runs on the calling thread, on a GPU with a
            stream current on which the tensors are ready; it may keep tensors for as long as it
            likes, their memory is not reused before.
        buffer_size_bytes, wire_format: as the sender's, exactly.
        num_buffers: buffers that chunks rotate through; needn't be the sender's.
        device: where tensors are received; must be the group's.
        on_event: hook for progress and times, see `packedcomm.events`.

    Raises:
        ArgumentError: an argument is out of range, or `src` is this rank.
        ConfigMismatch: `device` isn't the group's device.
        CudaError: `device` is a GPU that this process doesn't have.
        ManifestError: a name is empty or occurs twice, a dtype is unknown, a shape is negative or
            overflows, or the target refuses a tensor: before any data when `iterator` is a
            Manifest or there is a target, before the tensor's chunk otherwise.
        TensorError: a destination can't be written.
        CapacityError: no memory for the buffers.
        DeadlineExceeded, PeerLost, NcclError, SessionStateError: from the group.

    What the callback raises is raised. A failure aborts a `Communicator`, also when it is known
    before any data, as the sender may have begun; only malformed arguments leave it as it is. The
    content of a target's tensors is then undefined: old, new, or part of each. On a GPU that is
    also so when the communicator is aborted after the return, before the work was done.

    A tensor that a callback gets is a view of memory that torch's allocator doesn't know as the
    tensor's own, so `record_stream` does nothing for it: before dropping one that another stream
    still reads, let the current stream wait for that stream.
    """
    cut = _checked_arguments(group, src, buffer_size_bytes, num_buffers, wire_format)
    if getattr(group, "rank", None) == src:
        raise ArgumentError(f"broadcast_consumer: called on rank {src}, which is src itself")
    where = _receiving_device(device, group)
    with abort_on_failure(group, "broadcast_consumer"):
        metadata = iterator
        if is_target(post_unpack_func) and not isinstance(metadata, Manifest):
            metadata = _manifest(metadata)
        with PIPELINES.borrow(group, where, num_buffers) as pipeline:
            Receiving(pipeline, group, src, cut, post_unpack_func, on_event).run(metadata)
        if is_target(post_unpack_func) and isinstance(metadata, Manifest):
            post_unpack_func.commit(metadata)


def _manifest(metadata: Iterable[tuple[str, tuple[Any, Any]]]) -> Manifest:
    specs = []
    for index, item in enumerate(metadata):
        try:
            name, (shape, dtype) = item
        except (TypeError, ValueError):
            raise ManifestError(
                f"item {index} is {item!r}, expected (name, (shape, dtype))"
            ) from None
        specs.append(TensorSpec(name, dtype, shape))
    return Manifest(specs)


def _checked_arguments(
    group: Any, src: int, buffer_size_bytes: int, num_buffers: int, wire_format: WireFormat
) -> Cut:
    world_size = getattr(group, "world_size", None)
    if type(src) is not int or src < 0 or (isinstance(world_size, int) and src >= world_size):
        limit = f"0..{world_size - 1}" if isinstance(world_size, int) else ">= 0"
        raise ArgumentError(f"src must be a rank in {limit}, got {src!r}")
    if getattr(group, "disabled", False) is True:  # vLLM's, where its NCCL was of no use
        raise ArgumentError("the group is disabled: its broadcasts would silently do nothing")
    if type(num_buffers) is not int or num_buffers < 1:
        raise ArgumentError(f"num_buffers must be an integer >= 1, got {num_buffers!r}")
    return chunk_rule(wire_format, buffer_size_bytes)


def _receiving_device(device: torch.device | str | int, group: Any) -> torch.device:
    try:
        wanted = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ArgumentError(f"device: {str(error).splitlines()[0]}") from None
    if wanted.type not in ("cpu", "cuda"):
        raise ArgumentError(f"device must be a cpu or cuda device, got {wanted}")
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        raise CudaError(
            f"broadcast_consumer: device is {wanted}, but this process has "
            f"{torch.cuda.device_count()} GPUs"
        )
    wanted = indexed(wanted)
    actual = group_device(group)
    if actual not in (None, wanted):
        raise ConfigMismatch(f"broadcast_consumer: device is {wanted}, the group is on {actual}")
    return wanted


@contextmanager
def abort_on_failure(group: Any, operation: str) -> Iterator[None]:
    """What fails inside ends the group, if it is a `Communicator`, and is raised."""
    try:
        yield
    except BaseException as error:
        if isinstance(group, Communicator):
            # Peers are in the middle of the same transfer; this is what tells them.
            try:
                group.abort(f"{operation} failed: {summary(error)}")
            except ContextLost as lost:
                error.add_note(f"and the communicator could not be aborted: {lost}")
        raise
