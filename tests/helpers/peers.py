"""Senders and receivers in processes of their own, which can be killed, stopped and woken.

The test's own process is mostly the sender; each receiver is a `Peer` that goes on receiving and
reports how each sync went.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from packedcomm import (
    FullWeightSender,
    Session,
    Settings,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.errors import PackedCommError
from packedcomm.planning.chunks import WireFormat
from packedcomm.session import SenderSession
from tests.helpers.interrupted import Interrupted
from tests.helpers.processes import context, leave_alone_what_was_forked

SECRET = "sixteen and more characters"

# Of tests where nothing waits for a deadline: they are long, for machines that are busy.
PATIENT = Settings(
    connect_timeout_s=60.0,
    agree_timeout_s=60.0,
    move_timeout_s=60.0,
    commit_timeout_s=60.0,
    buffer_size_bytes=1 << 20,
)

# How long an outcome may take at most.
OUTCOME_S = 60.0

Tensors = dict[str, torch.Tensor]


def weights(value: float, count: int = 24, elements: int = 1 << 19) -> Tensors:
    """Tensors of `elements` float32 each, all different; together 48 MiB unless told otherwise."""
    return {f"t{i}": torch.full((elements,), value + i / 100) for i in range(count)}


def checksum(tensors: Tensors) -> int:
    """CRC of all bytes, without any of packedcomm's code."""
    found = 0
    for tensor in tensors.values():
        found = zlib.crc32(tensor.detach().view(torch.uint8).numpy(), found)
    return found


def eventually(holds: Callable[[], Any], timeout_s: float = 20.0) -> None:
    """Wait until something holds."""
    deadline = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < deadline, "it never came to hold"
        time.sleep(0.01)


@dataclass(frozen=True)
class Outcome:
    """What one call in another process came to."""

    kind: str
    """"joined", "received", "closed", "failed", "reconnected", or what a sender was told to do."""
    at: float = field(default_factory=time.monotonic)
    """When, on the clock that all processes of the machine share."""
    version: int | None = None
    """What the call returned."""
    shown: int | None = None
    """What the receiver's status says then."""
    state: str = ""
    ready: bool = False
    """Whether its status says that there is something to serve."""
    checksum: int = 0
    """Of the weights."""
    error: str = ""
    """Class of the error; empty if there was none."""
    text: str = ""
    cause: str = ""
    notes: tuple[str, ...] = ()
    lasts: bool = True
    """Whether the session goes on."""
    chunk: int = 0
    """How many chunks of the last transfer it had."""
    detail: Any = None


def failure(error: BaseException, kind: str = "failed", **more: Any) -> Outcome:
    """The outcome of a call that raised."""
    return Outcome(
        kind,
        error=type(error).__name__,
        text=str(error),
        cause=str(error.__cause__),
        notes=tuple(getattr(error, "__notes__", ())),
        **more,
    )


class Peer:
    """Another process: `main(connection, *arguments)`, which reports outcomes."""

    def __init__(self, main: Callable[..., Any], *arguments: Any) -> None:
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_run, args=(main, theirs, arguments), daemon=True)
        self._process.start()
        theirs.close()
        self.pid: int = self._process.pid or 0
        self.rank = 0

    def outcome(self, timeout_s: float = OUTCOME_S) -> Outcome:
        """What its next call came to."""
        if not self._connection.poll(timeout_s):
            os.kill(self.pid, signal.SIGUSR1)
            time.sleep(0.5)
            raise AssertionError(f"process {self.pid} has reported nothing in {timeout_s} s")
        try:
            found: Outcome = self._connection.recv()
        except EOFError:
            raise AssertionError(f"process {self.pid} has ended: {self.exit_code}") from None
        if found.kind == "broken":
            raise AssertionError(found.detail)
        return found

    def received(self) -> Outcome:
        """What its next sync that works comes to."""
        while (outcome := self.outcome()).kind == "failed":
            pass
        return outcome

    @property
    def exit_code(self) -> int | None:
        """How the process has ended."""
        self._process.join(10)
        return self._process.exitcode

    def tell(self, *command: Any) -> None:
        """Give it something to do, where it waits for that."""
        self._connection.send(command)

    def kill(self) -> None:
        """End it now, as `kill -9` does."""
        os.kill(self.pid, signal.SIGKILL)

    def stop(self) -> None:
        """Let it not run any more, as Ctrl-Z does; returns when it doesn't."""
        os.kill(self.pid, signal.SIGSTOP)
        self.await_stop()

    def await_stop(self) -> None:
        """Return when it doesn't run any more: somebody has stopped it."""
        eventually(lambda: _state_of(self.pid) in "Tt")

    def wake(self) -> None:
        """Let it run again."""
        os.kill(self.pid, signal.SIGCONT)

    def end(self) -> None:
        """End it and release everything."""
        self._process.kill()
        self._process.join()
        self._process.close()
        self._connection.close()


def _state_of(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


def _run(main: Callable[..., Any], connection: Connection, arguments: tuple[Any, ...]) -> None:
    leave_alone_what_was_forked()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    try:
        main(connection, *arguments)
    except (EOFError, BrokenPipeError):
        pass
    except BaseException:  # noqa: BLE001  (reported, whatever it is)
        import traceback

        with contextlib.suppress(OSError):
            connection.send(Outcome("broken", detail=traceback.format_exc()))
    sys.stdout.flush()
    sys.stderr.flush()
    # Not sys.exit: threads that hang in a library must not keep the process.
    os._exit(0)


def in_place(tensors: Tensors) -> Any:
    """A target that writes at once."""
    return TensorTarget(tensors)


def staged(tensors: Tensors) -> Any:
    """A target that keeps the old weights until the commit."""
    return StagedTarget(TensorTarget(tensors))


@dataclass(frozen=True)
class Receiving:
    """How a receiver's process receives."""

    target: Callable[[Tensors], Any] = staged
    prepare: Callable[[WeightReceiver], Any] | None = None
    """Called with the receiver before the first sync: to inject a fault there."""
    settings: Settings = PATIENT
    make: Callable[[], Tensors] | None = None
    """Makes its weights; None is `weights(0.0)`."""
    secret: str = SECRET


def receive_on(connection: Connection, address: str, how: Receiving) -> None:
    """The main function of a receiver's process."""
    live = weights(0.0) if how.make is None else how.make()
    session = Session.connect(address, secret=how.secret, settings=how.settings, device="cpu")
    receiver = WeightReceiver(how.target(live), session)
    connection.send(Outcome("joined", version=session.rank))
    if how.prepare is not None:
        how.prepare(receiver)
    while True:
        outcome = _received(receiver, live)
        connection.send(outcome)
        if outcome.error == "DeadlineExceeded":
            time.sleep(0.2)  # a silent sender would be said to be so again and again
        while not receiver.session.lasts:
            command, *arguments = connection.recv()
            assert command == "reconnect"
            again = Session.connect(
                arguments[0], secret=how.secret, settings=how.settings, device="cpu"
            )
            decided = receiver.reconnect(again)
            connection.send(Outcome("reconnected", version=decided, **_now(receiver, live)))


def _received(receiver: WeightReceiver, live: Tensors) -> Outcome:
    try:
        result = receiver.receive()
    except Exception as error:  # noqa: BLE001  (reported)
        return failure(error, **{"at": time.monotonic(), **_now(receiver, live)})
    version = None if result is None else result.version
    kind = "closed" if result is None else "received"
    return Outcome(kind, time.monotonic(), version, **_now(receiver, live))


def _now(receiver: WeightReceiver, live: Tensors) -> dict[str, Any]:
    status = receiver.status()
    return {
        "shown": status.version,
        "state": status.state,
        "ready": status.ready,
        "checksum": checksum(live),
        "lasts": receiver.session.lasts,
        "chunk": receiver.session.chunk,
        "detail": receiver.session.rank,
    }


def send_on(
    connection: Connection,
    receivers: int,
    prepare: Callable[[FullWeightSender], Any] | None = None,
    settings: Settings = PATIENT,
    address: str = "127.0.0.1:0",
) -> None:
    """The main function of a sender's process. Each command ("sync", version, value) is a sync."""
    sent = weights(0.0)
    with Session.listen(
        address,
        receivers=receivers,
        secret=SECRET,
        settings=settings,
        device="cpu",
        wire_format="vllm",
    ) as session:
        sender = FullWeightSender(Interrupted(sent), session)
        connection.send(Outcome("listening", detail=(session.address, session.epoch)))
        while True:
            _, version, value = connection.recv()
            if prepare is not None and value:
                prepare(sender)
            for index, tensor in enumerate(sent.values()):
                tensor.fill_(value + index / 100)
            try:
                result = sender.sync(version)
            except Exception as error:  # noqa: BLE001  (reported)
                connection.send(failure(error, at=time.monotonic(), shown=sender.version))
            else:
                connection.send(Outcome("sent", version=result.version, checksum=checksum(sent)))


class Training:
    """A sender in this process, and receivers in processes of their own."""

    def __init__(self, session: SenderSession, sent: Tensors, **options: Any) -> None:
        self.session = session
        self.sent = sent
        self.source = Interrupted(sent)
        self.sender = FullWeightSender(self.source, session, **options)
        self.peers: list[Peer] = []

    def remove(self, peer: Peer) -> None:
        """End a receiver's process."""
        self.peers.remove(peer)
        peer.end()

    def add(self, how: Receiving | None = None, address: str = "") -> Peer:
        """One more receiver; returns when it has been taken in."""
        peer = Peer(receive_on, address or self.session.address, how or Receiving())
        self.peers.append(peer)
        joined = peer.outcome()
        assert joined.kind == "joined"
        peer.rank = joined.version or 0
        return peer

    def sync(self, value: float, version: int | None = None) -> int:
        """Send other weights to all; returns their checksum."""
        for index, tensor in enumerate(self.sent.values()):
            tensor.fill_(value + index / 100)
        self.sender.sync(version)
        return checksum(self.sent)

    def sync_at_last(self, value: float) -> tuple[int, list[PackedCommError]]:
        """As `sync`, again and again until it works; also what was raised before."""
        told: list[PackedCommError] = []
        while True:
            try:
                return self.sync(value), told
            except PackedCommError as error:
                told.append(error)
                assert len(told) < 5, told


@contextlib.contextmanager
def training(
    receivers: int,
    how: Receiving | None = None,
    *,
    settings: Settings = PATIENT,
    sent: Tensors | None = None,
    wire_format: WireFormat = "vllm",
    **options: Any,
) -> Iterator[Training]:
    """A sender with so many receivers that have all received version 0."""
    sent = weights(1.0) if sent is None else sent
    with Session.listen(
        "127.0.0.1:0",
        receivers=receivers,
        secret=SECRET,
        settings=settings,
        device="cpu",
        # In vLLM's format each tensor of `weights` is a chunk.
        wire_format=wire_format,
    ) as session:
        found = Training(session, sent, **options)
        try:
            for _ in range(receivers):
                found.add(how)
            found.sender.sync()
            for peer in found.peers:
                outcome = peer.outcome()
                assert (outcome.kind, outcome.version) == ("received", 0), outcome
                peer.rank = outcome.detail
            yield found
        finally:
            for peer in found.peers:
                peer.end()
