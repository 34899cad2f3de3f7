"""A TCPStore whose every call returns by a deadline, also where its server hangs or is stopped."""

from __future__ import annotations

import queue
import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from typing import TypeVar

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from packedcomm.communicators.listener import Address, Listener
from packedcomm.descriptors import naming_the_limit
from packedcomm.errors import TooManyOpenFiles
from packedcomm.threads import Thread

__all__ = ["BoundedStore", "wait_for_server"]

Result = TypeVar("Result")

# How often a server that isn't there yet is tried again.
RETRY_S = 0.05

# An answer takes microseconds; a server that is silent for this long is stopped or gone. Calls
# around the deadline, which say who is missing, get at least the shorter time.
ANSWER_S = 5.0
LAST_ANSWER_S = 0.5

# Between attempts to end what goes on although it was given up.
LET_GO_PAUSE_S = 0.01


class BoundedStore:
    """Runs every call to a TCPStore on one daemon thread and waits for it only to a deadline.

    TCPStore reads its server's answers without a timeout, so that a stopped server would hang the
    caller. Here the caller leaves with `TimeoutError` and the thread stays behind until the
    connection ends.

    May be used from several threads; calls are run one after the other.
    """

    def __init__(
        self,
        open_store: Callable[[], TCPStore],
        deadline: float,
        check: Callable[[], None] | None = None,
        let_go: Callable[[], None] | None = None,
    ) -> None:
        """Open the store.

        Args:
            open_store: makes the TCPStore, on the thread.
            deadline: when to give up, by `time.monotonic`.
            check: called every 50 ms meanwhile; what it raises gives up, too.
            let_go: called, again and again, while `open_store` goes on although it was given up;
                ends it, so that nothing of it is left when this raises.

        Raises:
            TimeoutError: the store wasn't open by the deadline.
            RuntimeError: torch's error.
        """
        self._calls: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._store: TCPStore | None = None
        self._deadline = deadline
        self._hung = False
        let_end = partial(self._calls.put, None)
        self._thread = Thread(self._run, "packedcomm-store", let_end=let_end)
        self._thread.start()

        opened = threading.Event()

        def open_here() -> None:
            try:
                self._store = open_store()
            finally:
                opened.set()

        try:
            self._call(open_here, max(0.0, deadline - time.monotonic()), check)
        except BaseException:
            self.close()
            if let_go is not None:
                end = time.monotonic() + ANSWER_S
                while not opened.wait(LET_GO_PAUSE_S) and time.monotonic() < end:
                    let_go()
                self._thread.join(max(0.0, end - time.monotonic()))
            raise

    @classmethod
    def serve(cls, listener: Listener, deadline: float) -> BoundedStore:
        """Open a store that serves on `listener`, which it takes over.

        Raises:
            TimeoutError, RuntimeError: as the constructor.
        """
        host, port = listener.host, listener.port
        descriptor = listener.detach()
        return cls(
            lambda: TCPStore(
                host,
                port,
                is_master=True,
                timeout=_timedelta(deadline),
                wait_for_workers=False,
                # With neither of these TCPStore would listen on every interface.
                master_listen_fd=descriptor,
                use_libuv=False,
            ),
            deadline,
        )

    @classmethod
    def join(
        cls, address: Address, deadline: float, check: Callable[[], None] | None = None
    ) -> BoundedStore:
        """Open a store whose server listens at `address`.

        Raises:
            TimeoutError, RuntimeError: as the constructor.
        """
        return cls(
            lambda: TCPStore(
                address.host,
                address.port,
                timeout=_timedelta(deadline),
                wait_for_workers=False,
                use_libuv=False,
            ),
            deadline,
            check,
        )

    def set(self, key: str, value: bytes) -> None:
        """Set a key, without an answer, so that the next call is slow (Nagle's algorithm).

        Raises:
            TimeoutError: no answer in time, now or in an earlier call, or closed.
            RuntimeError: torch's error, such as DistNetworkError for a lost connection.
        """
        self.call(lambda store: store.set(key, value))  # type: ignore[arg-type]  # stub says str

    def get(self, key: str) -> bytes | None:
        """A key's value, None while it isn't set. Raises as `set`."""

        def get_if_set(store: TCPStore) -> bytes | None:
            return store.get(key) if store.check([key]) else None

        return self.call(get_if_set)

    def has(self, *keys: str) -> bool:
        """Whether all keys are set. Raises as `set`."""
        return self.call(lambda store: store.check(list(keys)))

    def set_once(self, key: str, value: bytes) -> bytes:
        """Set a key that isn't set; returns the value that it has now. Raises as `set`."""
        return self.call(lambda store: bytes(store.compare_set(key, "", value)))  # type: ignore[arg-type]

    def add(self, key: str, amount: int) -> int:
        """Add to a counter; returns its new value. Raises as `set`."""
        return self.call(lambda store: store.add(key, amount))

    def call(self, function: Callable[[TCPStore], Result]) -> Result:
        """Run `function(store)` on the store's thread. Raises as `set`."""

        def run() -> Result:
            assert self._store is not None
            return function(self._store)

        remaining = self._deadline - time.monotonic()
        return self._call(run, min(ANSWER_S, max(LAST_ANSWER_S, remaining)))

    def _call(
        self,
        function: Callable[[], Result],
        timeout_s: float,
        check: Callable[[], None] | None = None,
    ) -> Result:
        if self._hung:
            raise TimeoutError("the store has stopped answering")
        finished = threading.Event()
        results: list[Result] = []
        errors: list[BaseException] = []

        def run() -> None:
            try:
                results.append(function())
            except BaseException as error:  # noqa: BLE001  (raised again on the caller's thread)
                errors.append(error)
            finished.set()

        self._calls.put(run)
        end = time.monotonic() + timeout_s
        while not finished.wait(max(0.0, min(RETRY_S, end - time.monotonic()))):
            if time.monotonic() >= end:
                self._hung = True
                raise TimeoutError(f"the store has not answered within {timeout_s:.3g} s")
            if check is not None:
                try:
                    check()
                except BaseException:
                    # Its thread is left to end with the connection.
                    self._hung = True
                    raise
        if errors:
            raise errors[0]
        return results[0]

    def close(self) -> None:
        """Drop the store; a server stops listening before this returns. Idempotent."""
        answers = not self._hung
        self._hung = True
        self._calls.put(None)
        # A thread that hangs in torch can't be waited for; it ends with its connection.
        if answers:
            self._thread.join(ANSWER_S)

    def _run(self) -> None:
        while (call := self._calls.get()) is not None:
            call()
            # Not kept alive until the next call: it may hold the store's last reference.
            del call
        # The server is torn down here, on the thread that made it.
        self._store = None


def wait_for_server(
    address: Address, deadline: float, check: Callable[[], None] | None = None
) -> tuple[str, str]:
    """Return once something accepts connections at `address`.

    TCPStore would wait too, but overruns its timeout and prints a stack trace for every attempt.

    Returns:
        The IP addresses of this end and of the other end.

    Args:
        address: where.
        deadline: by `time.monotonic`.
        check: called between attempts; what it raises ends the wait.

    Raises:
        TimeoutError: nothing did by the deadline; the message has the last reason.
        TooManyOpenFiles: this process may open no socket.
    """
    while True:
        if check is not None:
            check()
        remaining = deadline - time.monotonic()
        try:
            target = (address.host, address.port)
            with (
                naming_the_limit(f"connecting to {address}"),
                socket.create_connection(target, max(0.01, remaining)) as connection,
            ):
                return connection.getsockname()[0], connection.getpeername()[0]
        except TooManyOpenFiles:
            raise
        except OSError as error:
            if time.monotonic() + RETRY_S >= deadline:
                raise TimeoutError(f"{type(error).__name__}: {error}") from error
        time.sleep(RETRY_S)


def _timedelta(deadline: float) -> timedelta:
    # TCPStore rounds to whole seconds in places and takes zero for "for ever".
    return timedelta(seconds=max(1.0, deadline - time.monotonic()))
