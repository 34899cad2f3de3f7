"""What every rank of a broadcast test does: one set of scenarios for Gloo and for NCCL.

Functions here run in processes of their own (`run_ranks`). They return values for the test to
compare and assert only what one rank can know.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

import psutil
import torch

from packedcomm import (
    GlooCommunicator,
    Manifest,
    NcclCommunicator,
    TensorTarget,
    broadcast_consumer,
    broadcast_producer,
)
from packedcomm.communicators.base import Communicator
from packedcomm.errors import PackedCommError
from tests.helpers.ranks import AddressBox
from tests.helpers.tensors import digest, digests, odd_tensors, random_bits
from tests.helpers.usage import files_and_threads

TIMEOUT_S = 30.0


def device_of(backend: str, rank: int) -> torch.device:
    """The device on which a rank works."""
    return torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")


def connect(backend: str, box: AddressBox, rank: int, world_size: int) -> Communicator:
    """A communicator over all ranks."""
    endpoint = box.endpoint(rank)
    if backend == "nccl":
        device = device_of(backend, rank)
        torch.cuda.set_device(device)
        return NcclCommunicator.connect(
            endpoint, rank, world_size, device=device, timeout_s=TIMEOUT_S
        )
    return GlooCommunicator.connect(endpoint, rank, world_size, timeout_s=TIMEOUT_S)


def empty_like(tensors: dict[str, torch.Tensor], device: torch.device) -> dict[str, torch.Tensor]:
    """Contiguous destinations of other content."""
    return {
        name: torch.full((t.nbytes,), 0xA5, dtype=torch.uint8, device=device)
        .view(t.dtype)
        .view(t.shape)
        for name, t in tensors.items()
    }


def layer_like(count: int, seed: int, device: torch.device) -> dict[str, torch.Tensor]:
    """Tensors of mixed sizes from 4 bytes to 3 MB."""
    sizes = [4, 400, 40_000, 3_000_000]
    return {
        f"layer.{i}": random_bits((sizes[i % 4] // 4,), torch.float32, seed + i).to(device)
        for i in range(count)
    }


def send_and_receive(
    rank: int,
    world_size: int,
    backend: str,
    box: AddressBox,
    src: int,
    in_place: bool,
    options: dict[str, Any],
) -> dict[str, str]:
    """Odd and ordinary tensors from `src` to the others, twice over one communicator."""
    device = device_of(backend, rank)
    with connect(backend, box, rank, world_size) as group:
        received: dict[str, torch.Tensor] = {}
        tensors = odd_tensors(device) | layer_like(12, 100, device)
        expected = digests(tensors)
        for _ in range(2):
            if rank == src:
                broadcast_producer(tensors.items(), group, src, **options)
                received = tensors
            else:
                received = empty_like(tensors, device)
                receiver: Any = TensorTarget(received) if in_place else received.update
                manifest = Manifest.from_tensors(tensors)
                broadcast_consumer(manifest, group, src, receiver, device=device, **options)
            assert digests(received) == expected
        return digests(received)


def one_by_one(rank: int, world_size: int, backend: str, box: AddressBox) -> dict[str, str]:
    """The reference path: each tensor in a broadcast of its own, on the current stream."""
    device = device_of(backend, rank)
    with connect(backend, box, rank, world_size) as group:
        tensors = {name: t.contiguous() for name, t in odd_tensors(device).items()}
        received = tensors if rank == 0 else empty_like(tensors, device)
        for tensor in received.values():
            group.broadcast(tensor, src=0)
        return digests(received)


def keep_callback_tensors(
    rank: int, world_size: int, backend: str, box: AddressBox, options: dict[str, Any]
) -> dict[str, str]:
    """Receivers keep every third tensor of three syncs and look at them at the very end."""
    device = device_of(backend, rank)
    kept: dict[str, torch.Tensor] = {}
    expected: dict[str, str] = {}
    with connect(backend, box, rank, world_size) as group:
        for sync in range(3):
            tensors = layer_like(24, 1000 * sync, device)
            wanted = list(tensors)[sync::3]
            expected |= {f"{sync}.{n}": digest(tensors[n]) for n in wanted}
            if rank == 0:
                broadcast_producer(tensors.items(), group, **options)
                kept |= {f"{sync}.{n}": tensors[n] for n in wanted}
                continue

            def keep(items: list, sync: int = sync, wanted: list[str] = wanted) -> None:
                kept.update({f"{sync}.{n}": t for n, t in items if n in wanted})  # noqa: B023

            broadcast_consumer(
                Manifest.from_tensors(tensors), group, 0, keep, device=device, **options
            )
        assert digests(kept) == expected
        return digests(kept)


def slow_sides(rank: int, world_size: int, backend: str, box: AddressBox) -> dict[str, str]:
    """A producer that fills its tensors late, a consumer that reads them late, by host and device
    delays; sources change right after the call returns."""
    device = device_of(backend, rank)
    options: dict[str, Any] = {"buffer_size_bytes": 1 << 20, "num_buffers": 2}
    final = layer_like(16, 7, device)
    expected = digests(final)
    received: dict[str, torch.Tensor] = {}

    def filled_late() -> Iterator[tuple[str, torch.Tensor]]:
        for name, value in final.items():
            tensor = torch.zeros_like(value)
            delay(device)
            tensor.copy_(value)
            yield name, tensor
            del tensor

    def read_late(items: list[tuple[str, torch.Tensor]]) -> None:
        delay(device)
        received.update({name: tensor.clone() for name, tensor in items})

    with connect(backend, box, rank, world_size) as group:
        if rank == 0:
            broadcast_producer(filled_late(), group, **options)
            sources = {name: value.clone() for name, value in final.items()}
            broadcast_producer(sources.items(), group, **options)
            for tensor in sources.values():
                tensor.fill_(-1.0)
            return expected
        manifest = Manifest.from_tensors(final)
        broadcast_consumer(manifest, group, 0, read_late, device=device, **options)
        assert digests(received) == expected
        target = empty_like(final, device)
        delay(device)
        for tensor in target.values():
            # Earlier work of the caller on the destinations must not come after the new data.
            tensor.fill_(3.0)
        broadcast_consumer(manifest, group, 0, TensorTarget(target), device=device, **options)
        return digests(target)


def late_and_reused(
    rank: int, world_size: int, backend: str, box: AddressBox, options: dict[str, Any]
) -> list[float]:
    """Tensors that go out from their own memory: the last one comes late, and each is overwritten
    with the next one's values as soon as the iterator is resumed."""
    device = device_of(backend, rank)
    count, size = 5, 1 << 20
    metadata = [(str(i), ((size,), "float32")) for i in range(count)]
    with connect(backend, box, rank, world_size) as group:
        if rank == 0:
            buffer = torch.empty(size, device=device)

            def reusing() -> Iterator[tuple[str, torch.Tensor]]:
                for i in range(count):
                    if i == count - 1:
                        time.sleep(0.3)
                    yield str(i), buffer.fill_(float(i))

            broadcast_producer(reusing(), group, **options)
            return [float(i) for i in range(count)]
        received = {name: torch.full((size,), -1.0, device=device) for name, _ in metadata}
        broadcast_consumer(metadata, group, 0, TensorTarget(received), device=device, **options)
        for tensor in received.values():
            assert tensor.min() == tensor.max()
        return [tensor[0].item() for tensor in received.values()]


def delay(device: torch.device) -> None:
    """Hold up the current stream, or the thread on a CPU."""
    if device.type == "cuda":
        torch.cuda._sleep(20_000_000)
    else:
        time.sleep(0.005)


def two_groups_at_once(
    rank: int, world_size: int, backend: str, boxes: tuple[AddressBox, AddressBox]
) -> list[dict[str, str]]:
    """Two threads, each with a group of its own, one of them sending in the other direction."""
    device = device_of(backend, rank)
    groups = [connect(backend, box, rank, world_size) for box in boxes]
    results: list[Any] = [None, None]

    def work(number: int) -> None:
        try:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            stream = torch.cuda.Stream(device) if device.type == "cuda" else None
            with torch.cuda.stream(stream):
                results[number] = exchange(groups[number], number, number, device)
        except BaseException as error:
            results[number] = error
            raise

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for group in groups:
        group.close()
    return results


def exchange(
    group: Communicator, src: int, seed: int, device: torch.device, count: int = 8
) -> dict[str, str]:
    """One sync from `src`; returns what this rank holds afterwards."""
    tensors = layer_like(count, 50 * seed, device)
    if group.rank == src:
        broadcast_producer(tensors.items(), group, src, buffer_size_bytes=1 << 20)
        return digests(tensors)
    target = empty_like(tensors, device)
    broadcast_consumer(
        Manifest.from_tensors(tensors), group, src, TensorTarget(target), 1 << 20, 2, device
    )
    return digests(target)


def create_and_destroy(
    rank: int, world_size: int, backend: str, box: AddressBox, rounds: int
) -> dict[str, int]:
    """Growth of this process over `rounds` connects, syncs and closes, after a warm-up."""
    device = device_of(backend, rank)
    process = psutil.Process()
    before: dict[str, int] = {}
    for number in range(rounds):
        with connect(backend, box, rank, world_size) as group:
            exchange(group, 0, 1, device, count=4)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
        if number == rounds // 5:
            before = _usage(process, device)
    files_and_threads((before["descriptors"], before["threads"]))
    after = _usage(process, device)
    return {key: after[key] - before[key] for key in after}


def _usage(process: psutil.Process, device: torch.device) -> dict[str, int]:
    descriptors, threads = files_and_threads()
    usage = {
        "descriptors": descriptors,
        "threads": threads,
        "resident_bytes": process.memory_info().rss,
    }
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        usage["device_bytes"] = -free
        usage["allocated_bytes"] = torch.cuda.memory_allocated(device)
    return usage


def failing_iterator(rank: int, world_size: int, backend: str, box: AddressBox) -> str:
    """The sender's iterator raises half-way; everyone must learn of it."""
    device = device_of(backend, rank)
    tensors = layer_like(12, 3, device)

    def broken() -> Iterable[tuple[str, torch.Tensor]]:
        yield from list(tensors.items())[:6]
        raise RuntimeError("out of luck")

    group = connect(backend, box, rank, world_size)
    try:
        if rank == 0:
            broadcast_producer(broken(), group, buffer_size_bytes=1 << 20)
        else:
            manifest = Manifest.from_tensors(tensors)
            broadcast_consumer(manifest, group, 0, None, 1 << 20, 2, device)
    except (PackedCommError, RuntimeError) as error:
        return type(error).__name__
    finally:
        group.close()
    return "nothing raised"


def tensor_on_the_wrong_device(
    rank: int, world_size: int, backend: str, box: AddressBox
) -> tuple[str, str]:
    """The sender's second chunk has a tensor on another device than the group's."""
    device = device_of(backend, rank)
    elsewhere = torch.device("cpu") if device.type == "cuda" else torch.device("meta")
    group = connect(backend, box, rank, world_size)
    metadata = [("first", ((1 << 20,), "uint8")), ("culprit", ((64,), "uint8"))]
    try:
        if rank == 0:
            tensors = [
                ("first", torch.zeros(1 << 20, dtype=torch.uint8, device=device)),
                ("culprit", torch.zeros(64, dtype=torch.uint8, device=elsewhere)),
            ]
            broadcast_producer(tensors, group, buffer_size_bytes=1000)
        else:
            broadcast_consumer(metadata, group, 0, None, 1000, 2, device)
    except PackedCommError as error:
        return type(error).__name__, str(error)
    finally:
        group.close()
    return "nothing raised", ""
