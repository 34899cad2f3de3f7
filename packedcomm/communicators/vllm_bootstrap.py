"""How stock vLLM's ranks meet: a torch TCPStore that rank 0 serves, with one key for the unique id.

vLLM pickles the id. It is written here as the same bytes, and read by comparing everything around
the id's 128 bytes: nothing is ever unpickled. The form is the same in vLLM 0.16 to 0.33.
"""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from functools import partial

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from packedcomm.communicators.bounded_store import BoundedStore, wait_for_server
from packedcomm.communicators.listener import Address, Listener
from packedcomm.communicators.peer_sockets import cut_connections_to
from packedcomm.errors import (
    ArgumentError,
    PackedCommError,
    ProtocolError,
    RendezvousTimeout,
)

__all__ = ["decode_unique_id", "encode_unique_id", "exchange_unique_id"]

KEY = "broadcast_from/0/0"

UNIQUE_ID_BYTES = 128

# A pickle of vllm.distributed.device_communicators.pynccl_wrapper.ncclUniqueId up to the id, in
# protocol 4 with a frame of 236 bytes, and after it.
PREFIX = bytes.fromhex(
    "800495ec000000000000008c075f637479706573948c095f756e7069636b6c659493948c34"
    "766c6c6d2e64697374726962757465642e6465766963655f636f6d6d756e696361746f7273"
    "2e70796e63636c5f77726170706572948c0c6e63636c556e6971756549649493947d944380"
)
SUFFIX = bytes.fromhex("948694869452942e")

# The pickle protocol is the second byte. Protocol 5 writes these objects in the same way.
PROTOCOLS = (4, 5)

POLL_S = 0.01


def encode_unique_id(unique_id: bytes) -> bytes:
    """The bytes under which vLLM's ranks expect a unique id.

    Raises:
        ArgumentError: the id hasn't 128 bytes.
    """
    if len(unique_id) != UNIQUE_ID_BYTES:
        raise ArgumentError(f"a unique id has {UNIQUE_ID_BYTES} bytes, got {len(unique_id)}")
    return PREFIX + unique_id + SUFFIX


def decode_unique_id(data: bytes) -> bytes:
    """The 128 bytes of the id in what vLLM's rank 0 publishes.

    Raises:
        ProtocolError: length, prefix or suffix aren't those of a unique id; the message says which.
    """
    expected = len(PREFIX) + UNIQUE_ID_BYTES + len(SUFFIX)
    start = len(data) - len(SUFFIX) - UNIQUE_ID_BYTES
    if len(data) != expected:
        problem = f"it has {len(data)} bytes, not {expected}"
    elif data[:1] != PREFIX[:1] or data[1] not in PROTOCOLS or data[2:start] != PREFIX[2:]:
        problem = "its beginning is another"
    elif not data.endswith(SUFFIX):
        problem = "its end is another"
    else:
        return data[start : -len(SUFFIX)]
    raise ProtocolError(f"what rank 0 published isn't vLLM's form of a unique id: {problem}")


@contextlib.contextmanager
def exchange_unique_id(
    address: Address,
    rank: int,
    world_size: int,
    deadline: float,
    make_unique_id: Callable[[], bytes],
    listener: Listener | None = None,
    check: Callable[[], None] | None = None,
) -> Iterator[bytes]:
    """Meet the other ranks as vLLM does; yields the unique id.

    Rank 0 serves until the context ends, so the other ranks must have read the id by then: leave it
    once NCCL is connected.

    Args:
        address: where rank 0 listens.
        rank: this process's rank.
        world_size: number of ranks.
        deadline: by `time.monotonic`.
        make_unique_id: called on rank 0 once all ranks are there.
        listener: on rank 0, used and taken over instead of binding `address`.
        check: called now and then meanwhile; what it raises gives the meeting up. Rank 0's port is
            free then.

    Raises:
        RendezvousTimeout: rank 0 can't be reached or published nothing, or not all ranks arrived.
        ProtocolError: rank 0 published something else.
        AddressInUse, ArgumentError: rank 0 can't listen.
    """
    group = f"vLLM's rendezvous of rank {rank} of {world_size} at {address}"
    started = time.monotonic()
    with contextlib.ExitStack() as stack:
        try:
            if rank == 0:
                bound = listener or Listener.bind(str(address))
                # The server's wait for workers has no other end than its timeout; but it asks
                # itself how many have come, as one of its clients.
                let_go = partial(cut_connections_to, bound.port)
                store = BoundedStore(_server(bound, world_size, deadline), deadline, check, let_go)
                stack.callback(store.close)
                unique_id = make_unique_id()
                store.set(KEY, encode_unique_id(unique_id))
            else:
                wait_for_server(address, deadline, check)
                store = BoundedStore(_client(address, world_size, deadline), deadline, check)
                stack.callback(store.close)
                unique_id = decode_unique_id(_wait_for_key(store, deadline, check))
        except PackedCommError:
            raise
        except (TimeoutError, RuntimeError) as error:
            seconds = time.monotonic() - started
            reason = _reason(str(error), rank, world_size)
            raise RendezvousTimeout(f"{group}: {reason} after {seconds:.1f} s") from error
        yield unique_id


def _server(listener: Listener, world_size: int, deadline: float) -> Callable[[], TCPStore]:
    host, port, descriptor = listener.host, listener.port, listener.detach()
    # It counts whole seconds and stops one late; only its own message tells how many ranks came.
    timeout = timedelta(seconds=max(0.5, deadline - time.monotonic() - 1.5))
    return lambda: TCPStore(
        host,
        port,
        world_size,
        is_master=True,
        timeout=timeout,
        wait_for_workers=True,
        # With neither of these TCPStore would listen on every interface.
        master_listen_fd=descriptor,
        use_libuv=False,
    )


def _client(address: Address, world_size: int, deadline: float) -> Callable[[], TCPStore]:
    timeout = timedelta(seconds=max(1.0, deadline - time.monotonic()))
    # Waiting for workers is how a rank says that it has arrived; only rank 0 really waits.
    return lambda: TCPStore(
        address.host,
        address.port,
        world_size,
        timeout=timeout,
        wait_for_workers=True,
        use_libuv=False,
    )


def _wait_for_key(store: BoundedStore, deadline: float, check: Callable[[], None] | None) -> bytes:
    while (value := store.get(KEY)) is None:
        if check is not None:
            check()
        if time.monotonic() >= deadline:
            raise TimeoutError("rank 0 has published no unique id")
        time.sleep(POLL_S)
    return value


def _reason(text: str, rank: int, world_size: int) -> str:
    if counted := re.search(r"(\d+)/\d+ clients joined", text):
        return f"only {counted[1]} of {world_size} ranks are there"
    who = "not every rank is there" if rank == 0 else "rank 0 is missing"
    return f"{who} ({text.partition(chr(10))[0]})"
