"""How ranks meet: who is there, whether they fit together, and one message from rank 0 to all.

The meeting point is a torch TCPStore that rank 0 serves only while the ranks connect. Its keys:

    arrival/<rank>  the rank's record; whoever claims a rank second sees the first one's record
    agreed          rank 0's message, set once every rank has arrived
    failure         the first error of any rank; every other rank stops with it
    alive/<rank>    a counter that the rank raises while it waits
    done/<rank>     the rank is connected and needs the store no more
    came            how many processes have arrived, those that claim a rank second included
    left            how many of them have failed and need the store no more
"""

from __future__ import annotations

import contextlib
import json
import time
import traceback as traceback_module
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Self

from packedcomm.communicators.base import check_rank, check_timeout
from packedcomm.communicators.bounded_store import BoundedStore, wait_for_server
from packedcomm.communicators.listener import Address, Listener, closing_on_error
from packedcomm.communicators.rank_record import RankRecord
from packedcomm.descriptors import check_descriptors
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    PackedCommError,
    ProtocolError,
    RemoteError,
    RendezvousTimeout,
    VersionMismatch,
)

__all__ = ["Listener", "Rendezvous"]

# Between two looks at the store: short at first, since ranks usually arrive together.
POLL_S = (0.001, 0.05)

# How often a rank shows that it is alive, and how long a silence means that it isn't.
HEARTBEAT_S = 0.25
SILENCE_S = 1.0

# How long before the deadline the heartbeats are first compared.
WATCH_S = 2.0

# How long rank 0 keeps serving after a failure, so that the others learn of it.
LINGER_S = 1.0

# Of sockets, epolls and pipes of the store and of Gloo, apart from those to each rank.
DESCRIPTORS = 12

MAX_MESSAGE_BYTES = 4096
MAX_FAILURE_BYTES = 16384

_SHARED_KINDS: dict[str, type[PackedCommError]] = {
    kind.__name__: kind
    for kind in (ConfigMismatch, ProtocolError, RemoteError, RendezvousTimeout, VersionMismatch)
}


class Rendezvous:
    """One meeting of all ranks, up to a deadline; a context manager.

    Use: `agree` once, then connect while calling `check` at least every 100 ms, then `finish`. An
    error that leaves the context is passed on to the other ranks, and rank 0's port is free
    afterwards either way.

    Belongs to one thread at a time; `store` may be used from others.
    """

    def __init__(
        self,
        address: str | Listener,
        rank: int,
        world_size: int,
        timeout_s: float,
        also_check: Callable[[], None] | None = None,
    ) -> None:
        """Serve (rank 0) or connect to rank 0.

        Args:
            address: where rank 0 listens, "host:port"; on rank 0 a `Listener` too, which is taken
                over.
            rank: this process's rank.
            world_size: number of ranks.
            timeout_s: everything up to the end of `finish` happens within this time, in seconds.
            also_check: called by `check`; what it raises ends the meeting.

        Raises:
            ArgumentError: an argument is malformed or out of range.
            AddressInUse: rank 0 can't listen because another socket does.
            RendezvousTimeout: rank 0 can't be reached.
            TooManyOpenFiles: fewer descriptors are free than the ranks' connections need.
        """
        with closing_on_error(address):
            check_rank(rank, world_size)
            check_timeout(timeout_s)
            # Rank 0 also serves the store.
            per_rank = 1 if rank else 2
            check_descriptors(
                DESCRIPTORS + per_rank * world_size, f"connecting rank {rank} of {world_size}"
            )
            self._also_check = also_check
            self._begin(address, rank, world_size, timeout_s)

    def _begin(self, address: str | Listener, rank: int, world_size: int, timeout_s: float) -> None:
        self.rank = rank
        self.world_size = world_size
        self._started = time.monotonic()
        self.deadline = self._started + timeout_s
        self._watch_s = min(WATCH_S, timeout_s / 2)
        self._agreed = False
        self._received_failure = False
        self._next_beat = 0.0
        self._watched: dict[int, bytes | None] | None = None
        self._reached = ""
        if rank == 0:
            listener = self._listener(address)
            self.address = Address.parse(listener.address)
            self.local_host = listener.host
            self.store = self._open(lambda: BoundedStore.serve(listener, self.deadline))
        else:
            if isinstance(address, Listener):
                raise ArgumentError(f"rank {rank}: only rank 0 takes a Listener, pass its .address")
            self.address = Address.parse(address)
            if self.address.port == 0:
                raise ArgumentError(f"rank {rank}: address {address!r} has no port to connect to")
            self.store = self._open(self._join)

    def agree(
        self,
        backend: str,
        device: str,
        *,
        nccl_version: str = "",
        nccl_path: str = "",
        message: Callable[[], bytes] = bytes,
    ) -> bytes:
        """Wait until every rank has arrived and fits the others.

        Args:
            backend: must be equal on every rank.
            device: for messages.
            nccl_version: must be equal on every rank.
            nccl_path: for messages.
            message: called on rank 0 once all have arrived; what it returns is given to every rank.

        Returns:
            Rank 0's message.

        Raises:
            RendezvousTimeout: the message names the ranks that are missing.
            ConfigMismatch: world sizes or backends differ, or two processes claim one rank.
            VersionMismatch: NCCL's versions differ.
            ProtocolError: something else than a rank's record was found.
            RemoteError: another rank failed; the message has its traceback.
        """
        record = RankRecord(
            rank=self.rank,
            world_size=self.world_size,
            backend=backend,
            device=device,
            nccl_version=nccl_version,
            nccl_path=nccl_path,
            reached=self._reached,
        )
        with self._rank0_may_be_lost():
            published = record.to_json()
            self.store.add("came", 1)
            first = self.store.set_once(f"arrival/{self.rank}", published)
            if first != published:
                claimed = RankRecord.from_json(first, self.rank)
                raise ConfigMismatch(
                    f"rank {self.rank} is claimed twice, by {claimed.place} and by {record.place}"
                )
            if self.rank == 0:
                return self._agree_as_rank0(record, message)
            record.check_against(RankRecord.from_json(self.wait_for("arrival/0"), 0))
            received = self.wait_for("agreed")
            if len(received) > MAX_MESSAGE_BYTES:
                raise ProtocolError(f"rank 0's message has {len(received)} bytes")
            self._agreed = True
            return received[1:]

    def _agree_as_rank0(self, record: RankRecord, message: Callable[[], bytes]) -> bytes:
        others = [
            RankRecord.from_json(self.wait_for(f"arrival/{rank}"), rank)
            for rank in range(1, self.world_size)
        ]
        for other in others:
            record.check_against(other)
        if self.address.all_interfaces and others:
            # Only the others know by which of this machine's addresses they reach it.
            self.local_host = others[0].reached
        sent = message()
        # With a byte in front: the store takes 0.2 s over an empty value.
        self.store.set_once("agreed", b"+" + sent)
        self._agreed = True
        return sent

    def check(self) -> None:
        """Tell the others that this rank is alive, and raise if the meeting has failed.

        Raises:
            RendezvousTimeout: the deadline has passed; the message names the ranks that are
                missing.
            ConfigMismatch, VersionMismatch, ProtocolError, RemoteError: another rank failed.
        """
        if self._also_check is not None:
            self._also_check()
        with self._rank0_may_be_lost():
            now = time.monotonic()
            if now >= self._next_beat:
                self._next_beat = now + HEARTBEAT_S
                self.store.add(f"alive/{self.rank}", 1)
            failure = self.store.get("failure")
            if failure is not None:
                self._raise_failure(failure)
            if self._watched is None and self.deadline - now < self._watch_s:
                self._watched = self._heartbeats()
            if now >= self.deadline:
                raise RendezvousTimeout(self._describe(self._missing()))

    def raise_if_ranks_are_silent(self, cause: BaseException) -> None:
        """Find out, within a second, whether `cause` comes from a rank that died meanwhile.

        Raises:
            RendezvousTimeout: one did; the message names it.
            PackedCommError: what `check` raises.
        """
        with self._rank0_may_be_lost():
            before = self._heartbeats()
            end = time.monotonic() + SILENCE_S
            while time.monotonic() < end:
                self.check()
                time.sleep(POLL_S[1])
            if silent := self._silent_since(before):
                reason = str(cause).partition("\n")[0]
                raise RendezvousTimeout(self._describe(silent, reason)) from cause

    def finish(self) -> None:
        """Say that this rank is connected; rank 0 waits until all are. Raises as `check`."""
        with self._rank0_may_be_lost():
            self.store.add(f"done/{self.rank}", 1)
            if self.rank == 0:
                for rank in range(1, self.world_size):
                    self.wait_for(f"done/{rank}")

    def wait_for(self, key: str) -> bytes:
        """A key's value, once a rank has set it. Raises as `check`."""
        pause = POLL_S[0]
        with self._rank0_may_be_lost():
            while (value := self.store.get(key)) is None:
                self.check()
                time.sleep(pause)
                pause = min(pause * 1.5, POLL_S[1])
        return value

    def publish(self, key: str, value: bytes) -> None:
        """Set a key that nobody else sets. Raises as `check`."""
        with self._rank0_may_be_lost():
            self.store.set_once(key, value)

    def _missing(self) -> list[int]:
        ranks = range(self.world_size)
        if not self._agreed:
            absent = [rank for rank in ranks if not self.store.has(f"arrival/{rank}")]
            # All are there, but rank 0 has not said so.
            return absent or [0]
        return self._silent_since(self._watched or {})

    def _silent_since(self, before: dict[int, bytes | None]) -> list[int]:
        now = self._heartbeats()
        return [r for r in now if r != self.rank and r in before and before[r] == now[r]]

    def _heartbeats(self) -> dict[int, bytes | None]:
        """The counters of all ranks that aren't done yet."""
        ranks = range(self.world_size)
        return {r: self.store.get(f"alive/{r}") for r in ranks if not self.store.has(f"done/{r}")}

    def _describe(self, missing: list[int], reason: str = "") -> str:
        who = f"ranks {missing} are missing" if missing else "every rank is there, some still busy"
        return (
            f"rendezvous of rank {self.rank} of {self.world_size} at {self.address}: {who} after "
            f"{time.monotonic() - self._started:.1f} s{reason and f' ({reason})'}"
        )

    def _join(self) -> BoundedStore:
        self.local_host, self._reached = wait_for_server(
            self.address, self.deadline, self._also_check
        )
        return BoundedStore.join(
            Address(self._reached, self.address.port), self.deadline, self._also_check
        )

    def _listener(self, address: str | Listener) -> Listener:
        if isinstance(address, Listener):
            return address
        if Address.parse(address).port == 0 and self.world_size > 1:
            raise ArgumentError(
                f"address {address!r}: with port 0 the other ranks can't know the port; "
                "use Listener.bind and hand them its .address"
            )
        return Listener.bind(address)

    def _open(self, open_store: Callable[[], BoundedStore]) -> BoundedStore:
        with self._rank0_may_be_lost():
            return open_store()

    @contextlib.contextmanager
    def _rank0_may_be_lost(self) -> Iterator[None]:
        try:
            yield
        except PackedCommError:
            raise
        except (TimeoutError, RuntimeError) as error:
            # A store that stops answering is all that can be seen of rank 0's death.
            reason = str(error).partition("\n")[0]
            raise RendezvousTimeout(self._describe([0], reason)) from error

    def _raise_failure(self, data: bytes) -> None:
        self._received_failure = True
        try:
            if len(data) > MAX_FAILURE_BYTES:
                raise ValueError(f"{len(data)} bytes")
            kind, text = json.loads(data)
            raised = _SHARED_KINDS[kind](str(text))
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ProtocolError(
                f"rendezvous at {self.address}: malformed failure: {error}"
            ) from None
        raise raised

    def _share_failure(self, error: BaseException) -> None:
        kind = type(error).__name__
        text = str(error)
        if kind not in _SHARED_KINDS:
            kind = RemoteError.__name__
            lines = "".join(traceback_module.format_exception(error))
            text = f"rank {self.rank} failed while connecting:\n{lines}"
        data = json.dumps([kind, text[: MAX_FAILURE_BYTES // 8]]).encode("ascii")
        self.store.set_once("failure", data)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        # A store that is gone can't be told anything; the error that is raised matters more.
        with contextlib.suppress(TimeoutError, RuntimeError):
            if error is not None:
                if not self._received_failure:
                    self._share_failure(error)
                self.store.add("left", 1)
                if self.rank == 0:
                    self._linger()
        self.store.close()

    def _linger(self) -> None:
        end = time.monotonic() + LINGER_S
        everyone = [f"arrival/{rank}" for rank in range(self.world_size)]
        while (now := time.monotonic()) < end:
            # Those that may still come are worth the wait only as long as they are waited for.
            all_came = now >= self.deadline or self.store.has(*everyone)
            if all_came and self.store.add("left", 0) >= self.store.add("came", 0):
                return
            time.sleep(POLL_S[1])
