"""A sender and its receivers in one process, each receiver in a thread of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from packedcomm import Session, Settings, WeightReceiver
from packedcomm.session import ReceiverSession, SenderSession
from tests.helpers.sessions import QUICK


@contextmanager
def sessions(
    receivers: int, settings: Settings = QUICK, devices: tuple[Any, Any] = ("cpu", "cpu")
) -> Iterator[tuple[SenderSession, list[ReceiverSession]]]:
    """A session: the sender's end and all receivers' ends, in the order of ranks; `devices` are the
    sender's and all receivers'."""
    with ExitStack() as stack:
        sender = stack.enter_context(
            Session.listen("127.0.0.1:0", receivers=receivers, device=devices[0], settings=settings)
        )
        yield sender, [stack.enter_context(join(sender, devices[1])) for _ in range(receivers)]


def join(sender: SenderSession, device: Any = "cpu") -> ReceiverSession:
    """One more receiver's end."""
    return Session.connect(sender.address, device=device, settings=sender.settings)


class Round:
    """What one call of the sender and one `receive` of each receiver gave: results or errors."""

    def __init__(self, send: Callable[[], Any], receivers: list[WeightReceiver]) -> None:
        self.received: list[Any] = [None] * len(receivers)
        threads = [
            threading.Thread(target=self._receive, args=(i, receiver))
            for i, receiver in enumerate(receivers)
        ]
        for thread in threads:
            thread.start()
        self.sent = _outcome(send)
        for thread in threads:
            thread.join(30)
        assert not any(thread.is_alive() for thread in threads), "a receiver hangs"

    def _receive(self, index: int, receiver: WeightReceiver) -> None:
        self.received[index] = _outcome(receiver.receive)


def _outcome(call: Callable[[], Any]) -> Any:
    try:
        return call()
    except Exception as error:  # noqa: BLE001 - it is what the test looks at
        return error
