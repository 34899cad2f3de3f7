"""Makes a Gloo process group through a rendezvous, without torch.distributed's global state."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from typing import Any

from torch.distributed import ProcessGroupGloo, Store  # type: ignore[attr-defined]

from packedcomm.communicators.gloo_transfers import GLOO_SLACK_S
from packedcomm.communicators.listener import Listener
from packedcomm.communicators.peer_sockets import (
    Endpoint,
    PeerSockets,
    listening_since,
    socket_inodes,
)
from packedcomm.communicators.rendezvous import Rendezvous
from packedcomm.descriptors import naming_the_limit
from packedcomm.errors import ArgumentError, PackedCommError, PeerLost
from packedcomm.threads import Thread

__all__ = ["connect_gloo"]

# How often the rendezvous is looked at while Gloo connects, and the store while Gloo waits on it.
SLICE_S = 0.05
STORE_POLL_S = 0.002

# Held while Gloo begins to listen, never while it connects: ranks of several groups may connect
# them in different orders.
_LISTENING = threading.Lock()


def connect_gloo(
    address: str | Listener,
    rank: int,
    world_size: int,
    timeout_s: float,
    operation_timeout_s: float,
    check: Callable[[], None] | None = None,
) -> tuple[Any, PeerSockets]:
    """Meet the other ranks and connect to all of them.

    Args:
        address: as `Rendezvous` takes it.
        rank: this process's rank.
        world_size: number of ranks.
        timeout_s: deadline for the whole, in seconds.
        operation_timeout_s: deadline of later operations, in seconds.
        check: called at least every 100 ms; what it raises ends the meeting.

    Returns:
        A `ProcessGroupGloo` that needs no store any more, and its connections.

    Raises:
        PeerLost: Gloo can't connect although all ranks are there.
        PackedCommError: what `Rendezvous` raises.
    """
    with (
        naming_the_limit(f"connecting rank {rank} of {world_size}"),
        Rendezvous(address, rank, world_size, timeout_s, check) as rendezvous,
    ):
        rendezvous.agree("gloo", "cpu")
        before = socket_inodes()
        device, listening = _listen(rendezvous)
        group = _connect(rendezvous, device)
        sockets = PeerSockets.find(
            before,
            listening,
            rank,
            world_size,
            publish=lambda name, data: rendezvous.publish(f"{name}/{rank}", data),
            published=lambda name, other: rendezvous.wait_for(f"{name}/{other}"),
        )
        rendezvous.finish()
    group._set_default_timeout(timedelta(seconds=operation_timeout_s + GLOO_SLACK_S))
    return group, sockets


def _listen(rendezvous: Rendezvous) -> tuple[Any, Endpoint]:
    """Let Gloo listen; returns its device, and where that is, which Gloo doesn't tell."""
    host = rendezvous.local_host
    while True:
        with _LISTENING:
            before = socket_inodes()
            try:
                # Gloo listens on this address only. It must be the one by which the others come.
                device = ProcessGroupGloo.create_device(hostname=host, lazy_init=False)
            except RuntimeError as error:
                raise ArgumentError(f"Gloo can't listen on {host}: {error}") from error
            opened = listening_since(before)
        if len(opened) == 1:
            return device, opened[0]
        # Something else in the process has begun to listen at the same moment.
        rendezvous.check()


def _connect(rendezvous: Rendezvous, device: Any) -> Any:
    """Run Gloo's constructor on a thread, so that the deadline and the other ranks are watched."""
    store = _GlooStore(rendezvous)
    groups: list[Any] = []
    errors: list[BaseException] = []

    def construct() -> None:
        try:
            options = ProcessGroupGloo._Options()  # type: ignore[attr-defined]
            options._devices = [device]
            # Broadcasts, sends and receives run on the device's thread; this one is for reductions.
            options._threads = 1
            options._timeout = timedelta(seconds=max(1.0, rendezvous.deadline - time.monotonic()))
            groups.append(ProcessGroupGloo(store, rendezvous.rank, rendezvous.world_size, options))
        except BaseException as error:  # noqa: BLE001  (raised again on the caller's thread)
            errors.append(error)

    thread = Thread(construct, "packedcomm-gloo-connect", let_end=store.detach)
    thread.start()
    try:
        while thread.is_alive():
            rendezvous.check()
            thread.join(SLICE_S)
    finally:
        store.detach()
    if not errors:
        return groups[0]
    if isinstance(errors[0], PackedCommError):
        raise errors[0]
    rendezvous.raise_if_ranks_are_silent(errors[0])
    reason = str(errors[0]).partition("\n")[0]
    raise PeerLost(f"Gloo on rank {rendezvous.rank} can't connect: {reason}") from errors[0]


class _GlooStore(Store):
    """What Gloo sees of the rendezvous' store while it connects.

    Gloo keeps its store for as long as the group lives. Detaching this one lets rank 0's port go
    all the same; Gloo doesn't read it again.
    """

    def __init__(self, rendezvous: Rendezvous) -> None:
        super().__init__()
        self._rendezvous: Rendezvous | None = rendezvous

    def detach(self) -> None:
        """Refuse everything from now on; what is waiting ends with an error."""
        self._rendezvous = None

    def _attached(self) -> Rendezvous:
        if self._rendezvous is None:
            raise TimeoutError("the rendezvous is over")
        return self._rendezvous

    def set(self, key: str, value: bytes | str) -> None:
        data = value.encode() if isinstance(value, str) else bytes(value)
        self._attached().store.set_once(f"gloo/{key}", data)

    def get(self, key: str) -> bytes:
        while (value := self._attached().store.get(f"gloo/{key}")) is None:
            time.sleep(STORE_POLL_S)
        return value

    def wait(self, keys: Sequence[str], timeout: timedelta | None = None) -> None:  # noqa: ARG002
        # The rendezvous' deadline counts, not Gloo's default of half an hour.
        names = [f"gloo/{key}" for key in keys]
        while not self._attached().store.has(*names):
            time.sleep(STORE_POLL_S)
