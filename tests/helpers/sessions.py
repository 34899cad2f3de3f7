"""Sessions between the processes of `run_ranks`: how they meet, and a receiver that answers."""

from __future__ import annotations

import dataclasses

from packedcomm.errors import PackedCommError
from packedcomm.session import Session
from packedcomm.session.messages import Close
from packedcomm.settings import Settings
from tests.helpers.ranks import AddressBox

SECRET = "correct horse battery staple"
QUICK = Settings(
    connect_timeout_s=20.0,
    operation_timeout_s=10.0,
    agree_timeout_s=10.0,
    move_timeout_s=10.0,
    commit_timeout_s=10.0,
)
DIGEST = "0" * 64


class SessionBox(AddressBox):
    """Hands the address of the sender's session to the receivers."""

    def publish(self, address: str) -> None:
        for _, writer in self._pipes[1:]:
            writer.send(address)


def open_session(box, rank, world_size, *, secret=SECRET, settings=QUICK, host="127.0.0.1"):
    if rank:
        return Session.connect(box.endpoint(rank), secret=secret, settings=settings)
    session = Session.listen(
        f"{host}:0",
        receivers=world_size - 1,
        secret=secret,
        settings=dataclasses.replace(settings, buffer_size_bytes=1 << 20),
        wire_format="vllm",
    )
    box.publish(session.address.replace("0.0.0.0", "127.0.0.1"))
    return session


def join(*arguments, **options):
    """As `open_session`, and the sender waits for all receivers."""
    session = open_session(*arguments, **options)
    if session.rank == 0:
        try:
            session.wait()
        except BaseException:
            session.close()
            raise
    return session


def serve(session, answers):
    """Answer by the kind of the message until the sender closes; returns all that came."""
    came = []
    while not came or not isinstance(came[-1], Close):
        came.append(session.receive(20))
        answer = answers.get(type(came[-1]))
        if isinstance(answer, BaseException):
            session.fail(answer)
        elif answer is not None:
            session.reply(answer)
    return came


def caught(function):
    """Class, text and cause of what it raises."""
    try:
        function()
    except PackedCommError as error:
        return type(error), str(error), str(error.__cause__)
    return None, "", ""
