"""Sessions between processes when something fails: who learns what, and how soon."""

from __future__ import annotations

import os
import signal
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from packedcomm import FullWeightSender, TensorTarget, WeightReceiver
from packedcomm.errors import (
    ArgumentError,
    CapacityError,
    DeadlineExceeded,
    ManifestError,
    PeerLost,
    ProtocolError,
    RemoteError,
    SessionStateError,
)
from packedcomm.session.frames import encode
from packedcomm.session.messages import (
    Cancel,
    Close,
    Commit,
    Committed,
    NeedManifest,
    Offer,
    Proceed,
    Ready,
)
from tests.helpers.in_process import Round, sessions
from tests.helpers.operations import raised
from tests.helpers.ranks import run_ranks
from tests.helpers.sessions import (
    DIGEST,
    QUICK,
    SessionBox,
    caught,
    join,
    open_session,
    serve,
)


def _failures(rank, world_size, box):
    with join(box, rank, world_size) as session:
        if rank:
            error = ManifestError("unknown name 'w'") if session.rank == 1 else Ready()
            came = serve(session, {Offer: error, Commit: Committed(1)})
            return session.rank, came
        first = caught(lambda: session.ask(Offer(1, DIGEST), Ready))
        session.cancel(ManifestError("receiver rank 1 can't take it"))
        # The session goes on, and what was given up is forgotten.
        assert session.failure() is None
        committed = session.ask(Commit(1), Committed)
    return first, committed


def test_a_receivers_failure_is_raised_at_the_sender_and_the_session_goes_on():
    (first, committed), *receivers = run_ranks(_failures, 3, SessionBox(3))
    kind, message, cause = first
    assert kind is ManifestError
    assert message == "receiver rank 1: unknown name 'w'"
    assert "traceback of receiver rank 1" in cause
    assert "unknown name 'w'" in cause
    assert committed == [Committed(1)] * 2
    for _, came in receivers:
        cancel = came[1]
        assert (type(cancel), cancel.kind) == (Cancel, "ManifestError")
        assert "can't take it" in cancel.traceback


def _odd_failures(rank, world_size, box):
    with join(box, rank, world_size) as session:
        if rank:
            answers = {1: KeyError("layer"), 2: ZeroDivisionError("division by zero")}
            wrong = {1: NeedManifest(), 2: Committed(1)}
            serve(session, {Offer: answers[session.rank], Commit: wrong[session.rank]})
            return None
        return (
            caught(lambda: session.ask(Offer(1, DIGEST), Ready)),
            caught(lambda: session.ask(Commit(1), Committed)),
            caught(lambda: session.ask([Commit(1)], Committed)),
        )


def test_failures_of_several_receivers_are_listed_and_wrong_answers_are_named():
    (both, wrong, count), *_ = run_ranks(_odd_failures, 3, SessionBox(3))
    assert both[0] is RemoteError
    assert "receiver rank 1: KeyError: 'layer'; receiver rank 2: ZeroDivisionError" in both[1]
    assert "traceback of receiver rank 1" in both[2]
    assert "traceback of receiver rank 2" in both[2]
    assert wrong[0] is ProtocolError
    assert "receiver rank 1 has answered Commit with NeedManifest" in wrong[1]
    assert count[0] is ArgumentError
    assert "1 messages for 2 receivers" in count[1]


def _failures_on_the_way(rank, world_size, box):
    with join(box, rank, world_size) as session:
        if rank:
            session.receive(20)
            session.reply(Ready())
            session.fail(IndexError("in the middle"))
            while session.failure() is None:
                time.sleep(0.01)
            seen = session.failure()
            cancel = session.receive(20)
            after = session.failure()
            # From before the Cancel was taken note of: of no interest any more.
            session.reply(Ready())
            return type(seen), str(seen), type(cancel), after, len(serve(session, {}))
        session.ask(Offer(1, DIGEST), Ready)
        while session.failure() is None:
            time.sleep(0.01)
        seen = session.failure()
        session.cancel(seen)
        forgotten = session.failure()
        late = caught(lambda: session.ask(Commit(1), Committed, timeout_s=0.5))
    return type(seen), str(seen), forgotten, late


def test_failures_are_seen_while_data_moves_and_forgotten_once_cancelled():
    sender, receiver = run_ranks(_failures_on_the_way, 2, SessionBox(2))
    kind, message, forgotten, late = sender
    assert kind is RemoteError
    assert message == "receiver rank 1: IndexError: in the middle"
    assert forgotten is None
    assert late[0] is DeadlineExceeded
    assert late[1] == "receiver rank 1: no answer to Commit within 0.5 s"
    assert receiver[0] is RemoteError
    assert receiver[1] == "cancelled by the sender: receiver rank 1: IndexError: in the middle"
    assert receiver[2:4] == (Cancel, None)
    assert receiver[4] == 2


def _garbage(rank, world_size, box):
    with join(box, rank, world_size) as session:
        if rank:
            session.receive(20)
            session._channel.send(b"\xc1 is not a frame")
            session.receive(20)
            session._channel.send(encode(Offer(1, DIGEST), session._number))
            session.receive(20)
            # An answer to a question of long ago, before the one that counts.
            session._channel.send(encode(Committed(9), session._number - 1))
            session.reply(Committed(3))
            return serve(session, {})
        return (
            caught(lambda: session.ask(Commit(1), Committed)),
            caught(lambda: session.ask(Commit(2), Committed)),
            session.ask(Commit(3), Committed),
        )


def test_malformed_and_late_answers_do_not_stop_the_session():
    (malformed, reversed_, right), _ = run_ranks(_garbage, 2, SessionBox(2))
    assert malformed[0] is ProtocolError
    assert "receiver rank 1: malformed frame" in malformed[1]
    assert reversed_[0] is ProtocolError
    assert "Offer is not for receivers to say" in reversed_[1]
    assert right == [Committed(3)]


def _end_of_a_receiver(rank, world_size, box, how):
    session = open_session(box, rank, world_size)
    if rank:
        session.receive(20)
        if session.rank == 1:
            if how == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if how == "closed":
                session.close()
                return None
        session.reply(Ready())
        last = serve(session, {})[-1]
        session.close()
        return last
    with session:
        begin = time.monotonic()
        first = caught(lambda: session.ask(Offer(1, DIGEST), Ready))
        spent = time.monotonic() - begin
        seen = str(session.failure())
        again = caught(lambda: session.ask(Offer(1, DIGEST), Ready))
    return first, spent, seen, again


@pytest.mark.parametrize("how", ["killed", "closed"])
def test_a_receiver_that_goes_is_lost_within_a_second(how):
    # Ranks go by order of arrival, so either process may be the one that goes.
    results = run_ranks(_end_of_a_receiver, 3, SessionBox(3), how, lost=(1, 2))
    first, spent, seen, again = results[0]
    assert first[0] is PeerLost
    assert first[1].startswith("receiver rank 1: ")
    assert "rank 2" not in first[1]
    assert spent < 2
    assert seen == first[1] == again[1]


def _stopped_receiver(rank, world_size, box):
    with join(box, rank, world_size) as session:
        if rank:
            session.receive(20)
            os.kill(os.getpid(), signal.SIGSTOP)
        return caught(lambda: session.ask(Offer(1, DIGEST), Ready, timeout_s=1.5))


def test_a_receiver_that_is_stopped_is_late_and_not_lost():
    (kind, message, _), _ = run_ranks(_stopped_receiver, 2, SessionBox(2), lost=(1,))
    assert kind is DeadlineExceeded
    assert message == "receiver rank 1: no answer to Offer within 1.5 s"


def _end_of_the_sender(rank, world_size, box, how):
    session = open_session(box, rank, world_size)
    if rank == 0:
        session.wait()
        time.sleep(0.2)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        session.abort("no more memory")
        time.sleep(1)
        session.close()
        return None
    begin = time.monotonic()
    first = raised(session.receive) if how == "killed" else session.receive()
    spent = time.monotonic() - begin
    failure = session.failure()
    later = raised(session.receive)[:2]
    answer = raised(lambda: [session.reply(Ready()), time.sleep(0.1)] * 20)[0]
    session.fail(ValueError("nobody hears it"))
    session.close()
    return first, spent, type(failure), later, answer


def test_a_sender_that_is_killed_is_lost_within_a_second():
    _, (first, spent, failure, later, _) = run_ranks(
        _end_of_the_sender, 2, SessionBox(2), "killed", lost=(0,)
    )
    assert first[0] is PeerLost
    assert "has ended the connection" in first[1]
    assert spent < 2
    assert failure is PeerLost
    assert later[0] is PeerLost


def test_a_sender_that_aborts_says_why():
    _, (first, _, _, later, _) = run_ranks(_end_of_the_sender, 2, SessionBox(2), "aborted")
    assert first == Close("aborted: no more memory", in_order=False)
    assert later[0] is SessionStateError
    assert "no more memory" in later[1]


def _abort_from_another_thread(rank, world_size, box):
    session = open_session(box, rank, world_size)
    if rank == 0:
        session.tell(Proceed(1))
        while session.failure() is None:
            time.sleep(0.01)
        stopped = session.failure()
        return type(stopped), str(stopped), session.close()
    session.receive(20)
    timer = threading.Timer(0.2, session.abort, ["enough"])
    timer.start()
    outcome = raised(session.receive)
    timer.join()
    use = raised(lambda: session.reply(Ready()))[:2]
    seen = str(session.failure())
    for _ in range(2):
        session.abort("again")
        session.close()
    return outcome, use, seen, repr(session)


def test_abort_from_another_thread_ends_what_is_under_way():
    sender, (outcome, use, seen, text) = run_ranks(_abort_from_another_thread, 2, SessionBox(2))
    assert sender[0] is PeerLost
    assert "aborted: enough" in sender[1]
    assert outcome[0] is SessionStateError
    assert "aborted: enough" in outcome[1]
    assert outcome[2] < 1
    assert use[0] is SessionStateError
    assert "aborted: enough" in seen
    assert "ended: aborted: enough" in text


def _exception_in_the_context(rank, world_size, box):
    try:
        with join(box, rank, world_size) as session:
            if rank == 0:
                raise ZeroDivisionError("division by zero")
            return session.receive(20)
    except ZeroDivisionError:
        return None


def test_an_exception_in_the_senders_context_reaches_the_receivers():
    _, came = run_ranks(_exception_in_the_context, 2, SessionBox(2))
    assert came == Close("aborted: ZeroDivisionError: division by zero", in_order=False)


def _no_memory_at_first(rank, world_size, box):
    with open_session(box, rank, world_size) as session:
        if rank:
            connect = session._connect

            def failing(*arguments):
                session._connect = connect
                raise CapacityError("no memory for buffers")

            if session.rank == 1:
                session._connect = failing
            first = caught(lambda: session.receive(20))
            came = serve(session, {Offer: Ready()})
            return session.rank, first, [type(m) for m in came if not isinstance(m, Cancel)]
        first = caught(session.wait)
        assert session.communicator.world_size == 3
        return first, session.ask(Offer(1, DIGEST), Ready)


def test_a_first_communicator_that_cannot_be_connected_is_tried_again():
    (first, ready), *receivers = run_ranks(_no_memory_at_first, 3, SessionBox(3))
    assert first[:2] == (CapacityError, "receiver rank 1: no memory for buffers")
    assert ready == [Ready()] * 2
    for _, failed, came in receivers:
        # By the sender's word, or over the connection that was being made.
        assert failed[0] in (CapacityError, RemoteError)
        assert "no memory for buffers" in failed[1]
        assert came == [Offer, Close]


def test_what_a_receiver_cannot_read_is_not_taken_for_lost(monkeypatch):
    beating = replace(QUICK, heartbeat_interval_s=0.1)
    with sessions(1, beating) as (session, (end,)):
        thread = threading.Thread(target=end.poll, args=(0.5,))
        thread.start()
        session.wait()
        thread.join()

        def garbled(message, number, settings):
            frame = encode(message, number, settings)
            return b"\xc1" + frame if isinstance(message, Offer) else frame

        monkeypatch.setattr("packedcomm.session.dialogue.encode", garbled)

        def busy():
            # For several beats, which its supervisor hears.
            time.sleep(0.5)
            error = raised(end.receive)[0]
            end.fail(ProtocolError("what came is no frame"))
            seen.append(error)

        seen = []
        thread = threading.Thread(target=busy)
        thread.start()
        kind, message, _ = caught(lambda: session.ask(Offer(1, DIGEST), Ready))
        thread.join()
        assert seen == [ProtocolError]
        assert (kind, message) == (ProtocolError, "receiver rank 1: what came is no frame")


def test_two_threads_cannot_use_one_session():
    weights = {"w": torch.ones(1000)}
    with sessions(1) as (session, (end,)):
        sender = FullWeightSender(weights, session)
        receiver = WeightReceiver(TensorTarget({"w": torch.zeros(1000)}), end)
        # Nobody receives yet, so this one waits.
        thread = threading.Thread(target=sender.sync, name="the first")
        thread.start()
        time.sleep(0.3)
        for use in (sender.sync, sender.no_change):
            kind, message, _ = caught(use)
            assert kind is SessionStateError
            assert "thread 'the first' is in the middle of sync" in message
        assert receiver.receive(20).version == 0
        thread.join()
        # And the same on the other side.
        thread = threading.Thread(target=lambda: raised(lambda: receiver.receive(1.0)))
        thread.start()
        time.sleep(0.3)
        assert "is in the middle of receive" in caught(receiver.receive)[1]
        thread.join()
        assert Round(sender.sync, [receiver]).received[0].version == 1


def test_a_session_is_a_threads_until_the_outermost_operation_ends():
    def elsewhere():
        with session.exclusive("another"):
            pass

    def refused(pool):
        error = pool.submit(elsewhere).exception(20)
        return isinstance(error, SessionStateError) and "in the middle of outer" in str(error)

    with sessions(1) as (session, _), ThreadPoolExecutor(1) as pool:
        with session.exclusive("outer"):
            assert refused(pool)
            with session.exclusive("inner"):
                assert refused(pool)
            assert refused(pool)
        assert not refused(pool)
        # A thread that has ended, or whose interrupt has left nothing, has it no more.
        left = session.exclusive("outer")
        thread = threading.Thread(target=left.__enter__)
        thread.start()
        thread.join(20)
        assert not refused(pool)
        left = session.exclusive("outer")
        left.__enter__()
        assert refused(pool)
        del left
        assert not refused(pool)
