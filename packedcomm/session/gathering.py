"""Waiting for receivers: who has said Hello, who has gone again, and who has no place."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from packedcomm.errors import (
    PackedCommError,
    ProtocolError,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session.control import SenderChannel
from packedcomm.session.frames import decode, encode
from packedcomm.session.messages import Close, Failure, Hello, Refused
from packedcomm.session.remote_errors import described

__all__ = ["gather", "no_place", "refuse"]


def gather(
    channel: SenderChannel,
    came: dict[bytes, Hello],
    wanted: int,
    deadline: float,
    check: Callable[[], None],
) -> None:
    """Wait until as many receivers are there as are wanted.

    Args:
        channel: the sender's channel.
        came: filled with what each peer said, in the order in which they came; what is in it after
            a failure is who has to be told.
        wanted: number of receivers.
        deadline: on the monotonic clock, in seconds.
        check: called every 50 ms; raises to give up.

    Raises:
        RendezvousTimeout: not all came; the message says how many did.
    """
    begin = time.monotonic()
    while len(came) < wanted:
        check()
        now = time.monotonic()
        if now >= deadline:
            raise RendezvousTimeout(
                f"{len(came)} of {wanted} receivers came to {channel.address} within "
                f"{now - begin:.3g} s"
            )
        frames, gone = channel.wait(deadline - now, came)
        for peer, frame in frames:
            try:
                _, message = decode(frame, channel.settings)
                if isinstance(message, Close | Failure):
                    gone.add(peer)
                elif not isinstance(message, Hello) or peer in came:
                    raise ProtocolError(f"Hello was expected, not {type(message).__name__}")
                elif len(came) < wanted:
                    came[peer] = message
                else:
                    refuse(channel, peer, no_place(wanted))
            except ProtocolError as error:
                refuse(channel, peer, error)
                gone.add(peer)
        for peer in gone:
            # It isn't missed yet: it may come again, or another in its place.
            came.pop(peer, None)


def refuse(channel: SenderChannel, peer: bytes, error: BaseException) -> None:
    """Tell a peer why the session has no place for it. Never raises."""
    kind, text, _ = described(error)
    with contextlib.suppress(PackedCommError):
        channel.send(peer, encode(Refused(kind, text), 0, channel.settings))


def no_place(wanted: int) -> SessionStateError:
    """What a receiver too many is refused with."""
    return SessionStateError(f"the session has its {wanted} receivers already")
