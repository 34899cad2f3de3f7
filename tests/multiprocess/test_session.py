"""Sessions between processes: who comes together, what they agree on, and the end."""

from __future__ import annotations

import dataclasses
import json
import os
import time

import pytest
import torch

from packedcomm.communicators import Listener
from packedcomm.errors import (
    AddressInUse,
    ArgumentError,
    AuthenticationError,
    ConfigMismatch,
    DeadlineExceeded,
    PackedCommError,
    PeerLost,
    RendezvousTimeout,
    SessionStateError,
    VersionMismatch,
)
from packedcomm.session import Session, agreement
from packedcomm.session.messages import (
    Close,
    Commit,
    Committed,
    NeedManifest,
    NoChange,
    Offer,
    Proceed,
    Ready,
    Staged,
)
from packedcomm.settings import DEFAULTS, Settings
from tests.helpers.operations import raised
from tests.helpers.ranks import run_ranks
from tests.helpers.sessions import (
    DIGEST,
    QUICK,
    SECRET,
    SessionBox,
    join,
    open_session,
    serve,
)
from tests.helpers.usage import files_and_threads


def _round_trips(rank, world_size, box, secret):
    with join(box, rank, world_size, secret=secret) as session:
        facts = (
            session.epoch,
            session.world_size,
            session.transport,
            str(session.device),
            session.wire_format,
            session.buffer_size_bytes,
        )
        if rank:
            session.reply(Ready()) if session.receive(20) == Proceed(1) else None
        assert session.rank == session.communicator.rank
        assert session.communicator.world_size == world_size
        if rank == 0:
            session.ask(Proceed(1), Ready)
        tensor = torch.full((5,), float(rank))
        session.communicator.broadcast(tensor, 0)
        assert tensor.tolist() == [0.0] * 5
        if rank:
            answers = {Offer: Ready(), Proceed: Staged(float(session.rank))}
            came = serve(session, answers | {Commit: Committed(7)})
            return facts, session.rank, came
        ready = session.ask(Offer(7, DIGEST, "{}"), (Ready, NeedManifest))
        session.tell([Proceed(r) for r in range(1, world_size)])
        staged = session.answers(Staged, "the data")
        session.tell(NoChange(8, 7))
        committed = session.ask(Commit(7), Committed)
    return facts, ready, [s.unpack_s for s in staged], committed


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("world_size", [2, 3])
def test_questions_reach_every_receiver_and_answers_come_by_rank(world_size, secret):
    sender, *receivers = run_ranks(_round_trips, world_size, SessionBox(world_size), secret)
    facts, ready, staged, committed = sender
    assert facts[1:] == (world_size, "gloo", "cpu", "vllm", 1 << 20)
    assert ready == [Ready()] * (world_size - 1)
    assert staged == [float(r) for r in range(1, world_size)]
    assert committed == [Committed(7)] * (world_size - 1)
    assert sorted(rank for _, rank, _ in receivers) == list(range(1, world_size))
    for theirs, rank, came in receivers:
        assert theirs == facts
        assert came[0] == Offer(7, DIGEST, "{}")
        assert came[1:4] == [Proceed(rank), NoChange(8, 7), Commit(7)]
        assert [type(message) for message in came[4:]] == [Close]


def _broadcast_once(session):
    """One broadcast, for which a receiver has to be where it connects."""
    tensor = torch.full((3,), float(session.rank))
    if session.rank:
        assert session.receive(20) == Proceed(1)
        session.reply(Ready())
    else:
        session.ask(Proceed(1), Ready)
    session.communicator.broadcast(tensor, 0)
    return tensor.tolist()


def _on_every_interface(rank, world_size, box):
    with join(box, rank, world_size, host="0.0.0.0") as session:
        values = _broadcast_once(session)
        if rank:
            serve(session, {})
    return values


def test_a_sender_may_listen_on_every_interface_if_asked_by_name():
    assert run_ranks(_on_every_interface, 3, SessionBox(3)) == [[0.0] * 3] * 3


def _close_without_waiting(rank, world_size, box):
    with open_session(box, rank, world_size) as session:
        if rank:
            return session.receive(20), raised(session.receive)[:2]
        time.sleep(0.5)
    return None


def test_a_sender_may_close_before_it_waited():
    _, (message, (kind, text)) = run_ranks(_close_without_waiting, 2, SessionBox(2))
    assert message == Close("closed")
    assert kind is SessionStateError
    assert "has ended the session here: closed" in text


HOSTILE = {
    "RANK": "7",
    "LOCAL_RANK": "7",
    "WORLD_SIZE": "99",
    "MASTER_ADDR": "192.0.2.1",
    "MASTER_PORT": "1",
    "PACKEDCOMM_CONNECT_TIMEOUT_S": "nonsense",
}


def _hostile_environment(rank, world_size, box):
    os.environ.update(HOSTILE)
    before = dict(os.environ)
    with join(box, rank, world_size) as session:
        facts = session.rank, session.world_size, _broadcast_once(session)
        if rank:
            session.receive(20)
    assert dict(os.environ) == before
    return facts


def test_the_environment_changes_nothing_and_is_not_changed():
    results = run_ranks(_hostile_environment, 2, SessionBox(2))
    assert results == [(0, 2, [0.0] * 3), (1, 2, [0.0] * 3)]


def _wrong_secret(rank, world_size, box):
    if rank == 1:
        return raised(lambda: open_session(box, rank, world_size, secret=SECRET + "!"))
    session = open_session(box, rank, world_size, settings=Settings(connect_timeout_s=2.0))
    failure = raised(session.wait)
    later = raised(session.wait)
    session.close()
    return failure, later


def test_a_wrong_secret_is_refused_and_the_receiver_counts_as_missing():
    (failure, later), (kind, message, _) = run_ranks(_wrong_secret, 2, SessionBox(2))
    assert kind is AuthenticationError
    assert SECRET not in message
    assert failure[0] is RendezvousTimeout
    assert "0 of 1 receivers" in failure[1]
    assert "others were refused, which have another secret" in failure[1]
    assert later[0] is SessionStateError
    assert "0 of 1 receivers" in later[1]


def _missing_receiver(rank, world_size, box):
    if rank == 2:
        return box.endpoint(rank)
    settings = Settings(connect_timeout_s=1.5 if rank == 0 else 20.0)
    if rank == 0:
        return raised(lambda: join(box, rank, world_size, settings=settings))
    with join(box, rank, world_size, settings=settings) as session:
        return session.receive(20)


def test_a_missing_receiver_is_counted_and_those_that_came_are_told():
    sender, receiver, _ = run_ranks(_missing_receiver, 3, SessionBox(3))
    assert sender[0] is RendezvousTimeout
    assert "1 of 2 receivers" in sender[1]
    assert sender[2] < 4
    assert not receiver.in_order
    assert "RendezvousTimeout: 1 of 2 receivers came" in receiver.reason


def test_a_sender_that_never_comes_is_a_rendezvous_timeout():
    with Listener.bind("127.0.0.1:0") as listener:
        address = listener.address
    with pytest.raises(RendezvousTimeout, match=address):
        Session.connect(address, device="cpu", settings=Settings(connect_timeout_s=0.4))


def test_a_taken_port_is_named_when_the_sender_begins_to_listen():
    listener = Listener.bind("127.0.0.1:0")
    with pytest.raises(AddressInUse, match=listener.address):
        Session.listen(listener.address, receivers=1, device="cpu")
    listener.close()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"receivers": 0}, "receivers must be"),
        ({"receivers": True}, "receivers must be"),
        ({"receivers": 1, "wire_format": "zip"}, "wire_format must be"),
        ({"receivers": 1, "device": "meta"}, "device must be"),
        ({"receivers": 1, "secret": "short"}, "secret has 5 characters"),
    ],
)
def test_bad_arguments_of_the_sender_are_refused(options, named):
    with pytest.raises(ArgumentError, match=named):
        Session.listen("127.0.0.1:0", **options)


def _claim(rank, world_size, box, claims):
    own = agreement.own_hello(torch.device("cpu"), DEFAULTS)
    hello = dataclasses.replace(own, **claims[rank])
    agreement.own_hello = lambda device, settings: hello

    # Whoever fits may come when the session has ended already.
    settings = dataclasses.replace(QUICK, connect_timeout_s=4.0)

    def come():
        with join(box, rank, world_size, settings=settings) as session:
            message = session.receive(20)
            return session.receive(20) if not isinstance(message, Close) else message

    began = time.monotonic()
    try:
        came = come()
    except PackedCommError as error:
        return type(error), str(error), time.monotonic() - began
    return type(came), came.reason, time.monotonic() - began


GPU = {"device": "cuda", "nccl_version": "2.28.9", "nccl_path": "/one/libnccl.so.2"}


@pytest.mark.parametrize(
    ("claims", "kind", "parts"),
    [
        ([{}, GPU, {}], ConfigMismatch, ["is on cpu", "on cuda"]),
        ([{}, {"package": "9.9"}, {}], VersionMismatch, ["runs packedcomm", "packedcomm 9.9"]),
        ([{}, {}, {"wire_versions": (5,)}], VersionMismatch, ["versions [1]", "versions [5]"]),
        (
            [GPU, GPU, {**GPU, "nccl_version": "2.27.3", "nccl_path": "/two/libnccl.so.2"}],
            VersionMismatch,
            ["2.28.9 from /one/libnccl.so.2", "2.27.3 from /two/libnccl.so.2"],
        ),
    ],
)
def test_ranks_that_do_not_fit_are_an_error_everywhere(claims, kind, parts):
    sender, *receivers = run_ranks(_claim, 3, SessionBox(3), claims)
    fits, misfit = sorted(receivers, key=lambda outcome: outcome[0] is kind)
    for found, message, seconds in (sender, misfit):
        assert found is kind
        assert all(part in message for part in parts)
        assert seconds < 10
    assert "refused by the sender at 127.0.0.1:" in misfit[1]
    # It either came before and is told why the session ends, or comes when it has ended.
    assert fits[0] in (Close, PeerLost, RendezvousTimeout)


def _one_more_receiver(rank, world_size, box):
    if rank == 2:
        time.sleep(1)
    with join(box, rank, 2) as session:
        if rank:
            return session.rank, len(serve(session, {Commit: Committed(1)})), session.world_size
        sizes = []
        for _ in range(30):
            session.assemble()
            sizes.append(len(session.ask(Commit(1), Committed)))
            time.sleep(0.1)
    return sizes


def test_a_receiver_may_come_later_and_takes_part_from_then_on():
    sizes, first, late = run_ranks(_one_more_receiver, 3, SessionBox(3))
    assert sizes == sorted(sizes)
    assert (sizes[0], sizes[-1]) == (1, 2)
    assert first == (1, 31, 3)
    assert late == (2, sizes.count(2) + 1, 3)


def _close_twice(rank, world_size, box):
    session = open_session(box, rank, world_size)
    _broadcast_once(session)
    communicator = session.communicator
    for _ in range(3):
        session.close()
    closed = [
        raised(session.receive if rank else session.wait)[:2],
        raised(lambda: session.reply(Ready()) if rank else session.ask(Commit(1), Committed))[:2],
        raised(lambda: session.communicator)[:2],
        raised(lambda: communicator.broadcast(torch.zeros(1), 0))[:2],
    ]
    return closed, repr(session)


def test_closing_is_idempotent_and_ends_the_communicator_too():
    for closed, text in run_ranks(_close_twice, 2, SessionBox(2)):
        assert [kind for kind, _ in closed] == [SessionStateError] * 4
        assert all("closed" in message for _, message in closed)
        assert "closed, ended: the session is closed" in text


def _deadlines(rank, world_size, box):
    with join(box, rank, world_size) as session:
        if rank:
            nothing = raised(lambda: session.receive(0.3))
            session.receive(20)
            time.sleep(1)
            return nothing, len(serve(session, {}))
        time.sleep(0.6)
        return raised(lambda: session.ask(Offer(1, DIGEST), Ready, timeout_s=0.3))


def test_waits_end_at_their_deadline():
    sender, (nothing, _) = run_ranks(_deadlines, 2, SessionBox(2))
    assert sender[0] is DeadlineExceeded
    assert "receiver rank 1: no answer to Offer within 0.3 s" in sender[1]
    assert 0.25 < sender[2] < 1
    assert nothing[0] is DeadlineExceeded
    assert 0.25 < nothing[2] < 1


def test_a_session_describes_itself_without_its_secret(tmp_path):
    path = tmp_path / "session.json"
    path.write_text("old")
    session = Session.listen("127.0.0.1:0", receivers=3, secret=SECRET, device="cpu")
    session.write_description(path)
    written = json.loads(path.read_text())
    assert written == session.describe()
    session.close()
    assert written["schema_version"] == 2
    assert written["address"] == session.address
    assert written["epoch"] == session.epoch
    assert (written["world_size"], written["wire_format"]) == (4, "native")
    assert written["transport"] is None
    assert SECRET not in path.read_text() + repr(session)
    assert [entry.name for entry in tmp_path.iterdir()] == ["session.json"]
    with pytest.raises(FileNotFoundError):
        session.write_description(tmp_path / "missing" / "session.json")


def test_every_session_has_an_epoch_of_its_own_and_none_is_forgotten_silently():
    sessions = [Session.listen("127.0.0.1:0", receivers=1, device="cpu") for _ in range(2)]
    assert sessions[0].epoch != sessions[1].epoch
    assert sessions[0].address != sessions[1].address
    sessions[0].close()
    kept = sessions[1]._channel
    with pytest.warns(ResourceWarning, match="was never closed"):
        # Its supervisor may be holding it for the length of a look.
        sessions.clear() or time.sleep(0.3)
    kept.close()


def _come_and_go(rank, world_size, box, rounds):
    for number in range(rounds):
        with join(box, rank, world_size) as session:
            if rank:
                serve(session, {Commit: Committed(1)})
            else:
                session.ask(Commit(1), Committed)
        if number == 2:
            early = files_and_threads()
    return early, files_and_threads(early)


def test_sessions_that_come_and_go_leave_nothing_behind():
    for early, late in run_ranks(_come_and_go, 2, SessionBox(2), 15):
        assert late[0] <= early[0], "file descriptors"
        assert late[1] <= early[1], "threads"


def _two_at_once(rank, world_size, boxes):
    with open_session(boxes[0], rank, 2) as first, open_session(boxes[1], rank, 2) as second:
        if rank:
            second.receive(20)
            second.reply(Committed(2))
            first.receive(20)
            first.reply(Committed(1))
            return None
        return second.ask(Commit(2), Committed), first.ask(Commit(1), Committed)


def test_two_sessions_in_one_process_do_not_see_each_other():
    results = run_ranks(_two_at_once, 2, [SessionBox(2), SessionBox(2)])
    assert results[0] == ([Committed(2)], [Committed(1)])
