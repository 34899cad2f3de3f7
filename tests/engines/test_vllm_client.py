"""The client for vLLM engines against real HTTP servers whose workers are real receivers."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from packedcomm import FullWeightSender, Session
from packedcomm.engines.vllm.client import EngineUpdater, HttpEngine
from packedcomm.engines.vllm.markers import marked
from packedcomm.errors import (
    ArgumentError,
    CapacityError,
    ConfigMismatch,
    DeadlineExceeded,
    ManifestError,
    PeerLost,
    RemoteError,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session import SenderSession
from tests.helpers.peers import eventually
from tests.helpers.sessions import QUICK
from tests.helpers.vllm_server import VllmServer

CYCLE = ["pause", "start_weight_update", "update_weights", "finish_weight_update", "wake_up"]
STAGES = ["start", "update", "finish"]
IMPATIENT = replace(QUICK, connect_timeout_s=1.0)


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((33, 7), value), "b.bias": torch.full((5,), -value)}


@pytest.fixture
def server() -> Iterator[VllmServer]:
    with VllmServer(weights()) as started:
        yield started


@pytest.fixture
def session() -> Iterator[SenderSession]:
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as listening:
        yield listening


def updater_of(server: VllmServer, session: SenderSession, **options) -> EngineUpdater:
    options = {"timeout_s": 10, **options}
    return EngineUpdater(HttpEngine(server.url, timeout_s=20), session, **options)


def connected(server: VllmServer, session: SenderSession, **options) -> EngineUpdater:
    """Connected, with a first update done."""
    updater = updater_of(server, session, **options)
    updater.connect()
    updater.update(FullWeightSender(weights(), session))
    server.came.clear()
    return updater


def says_committed(error: BaseException) -> bool:
    return any("committed" in note for note in getattr(error, "__notes__", ()))


def assert_holds(server: VllmServer, value: float) -> None:
    for worker in server.workers:
        for name, expected in weights(value).items():
            assert torch.equal(worker[name], expected)


def test_an_update_pauses_syncs_finishes_and_resumes(server, session):
    updater = updater_of(server, session)

    assert updater.connect() == 1
    server.came.clear()
    update = updater.update(FullWeightSender(weights(2.0), session), 7)

    assert server.came == CYCLE
    assert server.queries["pause"] == {"mode": "wait", "clear_cache": "true"}
    assert server.version == "7"
    assert update.result.version == 7
    assert update.result.receivers == 1
    assert list(update.seconds) == ["pause", "flush", *STAGES, "resume", "total"]
    assert_holds(server, 2.0)


def test_ten_updates_in_a_row_of_several_servers_with_several_workers(session):
    with VllmServer(weights(), 2) as one, VllmServer(weights()) as other:
        updater = EngineUpdater([HttpEngine(s.url) for s in (one, other)], session)
        source = weights()
        sender = FullWeightSender(source, session)
        assert updater.connect() == 3
        for step in range(10):
            for name, tensor in weights(step + 1.0).items():
                source[name].copy_(tensor)
            assert updater.update(sender).result.receivers == 3
        assert_holds(one, 10.0)
        assert_holds(other, 10.0)
        assert one.version == other.version == "9"


def test_kept_requests_have_the_caches_reset_apart(server, session):
    updater = connected(server, session, pause_mode="keep")

    updater.update(FullWeightSender(weights(3.0), session))

    assert server.came == [CYCLE[0], "reset_prefix_cache", "reset_encoder_cache", *CYCLE[1:]]
    assert server.queries["reset_prefix_cache"] == {
        "reset_running_requests": "true",
        "reset_external": "true",
    }


def test_an_update_of_another_thread_meanwhile_is_refused_before_anything_is_called(
    server, session
):
    updater = connected(server, session)
    inside, go_on = threading.Event(), threading.Event()

    def start(body):
        inside.set()
        assert go_on.wait(20)

    server.refuse["start_weight_update"] = start
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(updater.update, FullWeightSender(weights(2.0), session))
        assert inside.wait(20)
        came = list(server.came)
        with pytest.raises(SessionStateError, match="one thread at a time"):
            updater.update(FullWeightSender(weights(3.0), session))
        assert server.came == came
        go_on.set()
        assert first.result(20).result.receivers == 1
    assert server.came == CYCLE
    assert_holds(server, 2.0)


def test_without_receivers_nothing_is_called_and_a_loss_is_told_once(server, session):
    updater = connected(server, session)
    for receiver in server.receivers:
        receiver.session.abort("killed")
    eventually(lambda: not session.members.present)
    sender = FullWeightSender(weights(2.0), session)
    with pytest.raises(PeerLost, match="receiver rank 1"):
        updater.update(sender)
    with pytest.raises(SessionStateError, match="no receiver is connected"):
        updater.update(sender)
    assert server.came == []
    updater.connect()
    updater.update(sender)
    assert_holds(server, 2.0)


def test_an_engine_of_which_a_part_is_asleep_stays_paused(server, session):
    updater = connected(server, session)
    server.paused = server.asleep = True
    updater.update(FullWeightSender(weights(2.0), session))
    assert_holds(server, 2.0)
    assert server.paused
    server.refuse["update_weights"] = (500, "[packedcomm:SessionStateError] asleep")
    with pytest.raises(SessionStateError, match="asleep"):
        updater.update(FullWeightSender(weights(3.0), session))
    assert server.paused
    server.refuse.clear()
    server.asleep = False
    updater.update(FullWeightSender(weights(3.0), session))
    assert not server.paused


def test_an_engine_that_pauses_too_late_goes_on_by_itself(server, session):
    updater = connected(server, session, timeout_s=1.0)
    idle, late = threading.Event(), threading.Event()

    def pause(body):
        assert idle.wait(20)

    def wake_up(body):
        if not idle.is_set():
            raise RuntimeError("resume_scheduler called while pause is still in flight")
        late.set()

    server.refuse |= {"pause": pause, "wake_up": wake_up}
    with pytest.raises(DeadlineExceeded, match="pause") as caught:
        updater.update(FullWeightSender(weights(2.0), session))
    assert any("could not be resumed" in note for note in caught.value.__notes__)
    idle.set()
    assert late.wait(10)
    server.refuse.clear()
    updater.update(FullWeightSender(weights(2.0), session))
    assert_holds(server, 2.0)
    assert not server.paused


def test_a_pause_that_comes_late_disturbs_no_later_update(server, session):
    updater = connected(server, session, timeout_s=1.0)
    idle = threading.Event()
    server.refuse["pause"] = lambda body: idle.wait(20)
    with pytest.raises(DeadlineExceeded, match="pause"):
        updater.update(FullWeightSender(weights(2.0), session))

    def start(body):
        assert server.paused
        time.sleep(0.3)  # for whoever would resume it
        assert server.paused

    server.refuse["start_weight_update"] = start
    threading.Timer(0.3, idle.set).start()
    updater.update(FullWeightSender(weights(3.0), session))
    assert_holds(server, 3.0)
    assert not server.paused


def test_a_pause_that_comes_when_a_later_update_has_ended_is_undone(server, session):
    updater = connected(server, session, timeout_s=1.0)
    first, ended = threading.Event(), threading.Event()

    def pause(body):
        if not first.is_set():
            first.set()
            ended.wait(20)

    server.refuse["pause"] = pause
    with pytest.raises(DeadlineExceeded, match="pause"):
        updater.update(FullWeightSender(weights(2.0), session))
    updater.update(FullWeightSender(weights(3.0), session))
    assert_holds(server, 3.0)
    resumed = server.came.count("wake_up")
    ended.set()
    eventually(lambda: server.came.count("wake_up") > resumed and not server.paused)


def test_an_engine_that_hangs_while_a_late_pause_is_undone_meets_the_deadline(server, session):
    updater = connected(server, session, timeout_s=1.5)
    idle, go_on = threading.Event(), threading.Event()
    server.refuse |= {"pause": lambda body: idle.wait(20), "wake_up": lambda body: go_on.wait(20)}
    with pytest.raises(DeadlineExceeded, match="pause"):
        updater.update(FullWeightSender(weights(2.0), session))
    resuming = server.came.count("wake_up")
    idle.set()
    eventually(lambda: server.came.count("wake_up") > resuming)
    begin = time.monotonic()
    with pytest.raises(DeadlineExceeded, match="hasn't answered after"):
        updater.update(FullWeightSender(weights(2.0), session))
    assert time.monotonic() - begin < 5
    go_on.set()
    server.refuse.clear()
    eventually(lambda: not updater._pauses.lock.locked())
    updater.update(FullWeightSender(weights(2.0), session))
    assert_holds(server, 2.0)
    assert not server.paused


@pytest.mark.parametrize("cut", ["by its own deadline", "by a proxy"])
def test_an_engine_that_refuses_to_go_on_while_it_pauses_does_so_later(server, session, cut):
    connected(server, session)
    engine = HttpEngine(server.url, timeout_s=0.5 if "own" in cut else 20)
    updater = EngineUpdater(engine, session, timeout_s=20)
    pausing, idle = threading.Event(), threading.Event()

    def pause(body):
        pausing.set()
        if cut == "by a proxy":
            threading.Timer(1.0, paused).start()
            raise RuntimeError("504 Gateway Timeout")
        idle.wait(1.5)
        paused()

    def paused():
        server.paused = True
        pausing.clear()

    def resume(body):
        if pausing.is_set():
            raise RuntimeError("called while pause is still in flight")

    server.refuse |= {"pause": pause, "wake_up": resume}
    with pytest.raises((DeadlineExceeded, RemoteError), match="pause"):
        updater.update(FullWeightSender(weights(2.0), session))
    eventually(lambda: not pausing.is_set() and not server.paused)
    server.refuse.clear()
    updater.update(FullWeightSender(weights(3.0), session))
    assert_holds(server, 3.0)
    assert not server.paused


def test_an_update_waits_for_an_engine_that_goes_on_late(server, session):
    updater = connected(server, session, timeout_s=2.0)
    go_on = threading.Event()
    server.refuse |= {"start_weight_update": (500, "no"), "wake_up": lambda body: go_on.wait(20)}
    with pytest.raises(RemoteError, match="no") as caught:
        updater.update(FullWeightSender(weights(2.0), session))
    assert any("could not be resumed" in note for note in caught.value.__notes__)
    del server.refuse["start_weight_update"]
    gone_on = []
    server.refuse["pause"] = lambda body: gone_on.append(go_on.is_set())
    threading.Timer(1.0, go_on.set).start()
    updater.update(FullWeightSender(weights(3.0), session))
    assert gone_on == [True]
    assert_holds(server, 3.0)


def test_no_update_begins_while_an_engine_may_still_be_told_to_go_on(server, session):
    connected(server, session)
    updater = EngineUpdater(HttpEngine(server.url, timeout_s=6.0), session, timeout_s=1.0)
    never = threading.Event()

    def lost(body):
        never.wait(20)

    server.refuse["wake_up"] = lost
    with pytest.raises(DeadlineExceeded, match="resume"):
        updater.update(FullWeightSender(weights(2.0), session))
    told = server.came.count("wake_up")
    for _ in range(2):
        updater.connect()
        with pytest.raises(
            DeadlineExceeded, match="hasn't answered after 1 s.*timeout ends that, if it has one"
        ):
            updater.update(FullWeightSender(weights(3.0), session))
    assert server.came.count("wake_up") == told
    server.refuse.clear()
    # When the handle has given the answer up.
    eventually(lambda: updater._pauses.resuming[0].done)
    updater.update(FullWeightSender(weights(3.0), session))
    assert_holds(server, 3.0)
    assert not server.paused
    never.set()


def test_an_engine_that_pauses_late_goes_on_though_an_early_answer_is_late(server, session):
    updater = connected(server, session, timeout_s=1.0)
    idle, answered = threading.Event(), threading.Event()

    def wake_up(body):
        # Carried out at once, and the answer is late, and is none.
        server.paused = False
        if not idle.is_set():
            answered.wait(20)
            raise RuntimeError("the connection was lost")

    server.refuse |= {"pause": lambda body: idle.wait(20), "wake_up": wake_up}
    with pytest.raises(DeadlineExceeded, match="pause"):
        updater.update(FullWeightSender(weights(2.0), session))
    threading.Timer(0.3, idle.set).start()
    with pytest.raises(DeadlineExceeded, match="hasn't answered"):
        updater.update(FullWeightSender(weights(2.0), session))
    eventually(lambda: idle.is_set() and not server.paused)
    answered.set()
    eventually(lambda: all(calls.done for calls in updater._pauses.resuming))
    updater.update(FullWeightSender(weights(3.0), session))
    assert_holds(server, 3.0)
    assert not server.paused


@pytest.mark.parametrize("refuses", [False, True], ids=["answers", "refuses while it pauses"])
def test_an_update_that_waits_in_vain_for_one_engine_leaves_no_other_paused(refuses):
    with (
        Session.listen("127.0.0.1:0", receivers=2, device="cpu", settings=QUICK) as session,
        VllmServer(weights()) as hanging,
        VllmServer(weights()) as slow,
    ):
        engines = [HttpEngine(server.url, timeout_s=30) for server in (hanging, slow)]
        updater = EngineUpdater(engines, session, timeout_s=1.5)
        updater.connect()
        updater.update(FullWeightSender(weights(), session))
        pausing, idle, go_on = threading.Event(), threading.Event(), threading.Event()

        def pause(body):
            pausing.set()
            slow.paused = True
            idle.wait(20)
            slow.paused = True
            pausing.clear()

        def resume(body):
            if refuses and pausing.is_set():
                raise RuntimeError("called while pause is still in flight")

        slow.refuse |= {"pause": pause, "wake_up": resume}
        hanging.refuse["wake_up"] = lambda body: go_on.wait(20)
        with pytest.raises(DeadlineExceeded, match="pause"):
            updater.update(FullWeightSender(weights(2.0), session))
        threading.Timer(0.7, idle.set).start()
        with pytest.raises(DeadlineExceeded, match="hasn't answered"):
            updater.update(FullWeightSender(weights(2.0), session))
        eventually(lambda: idle.is_set() and not slow.paused)
        go_on.set()
        hanging.refuse.clear()
        slow.refuse.clear()
        updater.update(FullWeightSender(weights(3.0), session))
        for server in (hanging, slow):
            assert_holds(server, 3.0)
            assert not server.paused


def test_an_engine_that_is_given_twice_is_refused_at_once(server, session):
    with pytest.raises(ArgumentError, match="engines 0 and 1 are the same one"):
        EngineUpdater([HttpEngine(server.url), HttpEngine(server.url + "/")], session)


def test_without_flush_and_pause_the_caller_decides(server, session):
    connected(server, session)
    updater = updater_of(server, session, pause_mode=None, flush=False)
    sender = FullWeightSender(weights(3.0), session)
    with pytest.raises(SessionStateError, match="isn't paused"):
        updater.update(sender)
    assert server.came == ["is_paused"]
    HttpEngine(server.url).pause("keep", clear_cache=False)
    server.came.clear()

    updater.update(sender, adapter="tuned")

    assert server.came == ["is_paused", *CYCLE[1:-1]]
    info = server.bodies["update_weights"]["update_info"]
    assert (info["kind"], info["adapter"], info["timeout_s"]) == ("adapter", "tuned", 10)


def test_the_init_info_has_no_secret_and_the_key_travels_in_the_header(server):
    secret = "correct horse battery staple"
    with Session.listen("127.0.0.1:0", receivers=1, secret=secret, device="cpu") as session:
        engine = HttpEngine(server.url + "/", api_key="k3y")
        with pytest.raises(ArgumentError, match=r"listens on 0\.0\.0\.0"):
            EngineUpdater(engine, session, address="0.0.0.0:1").connect()
        server.refuse["init_weight_transfer_engine"] = (500, "enough")
        with pytest.raises(RemoteError, match="HTTP 500: enough"):
            EngineUpdater(engine, session).connect()
    assert secret not in str(server.bodies)
    assert server.bodies["init_weight_transfer_engine"]["init_info"]["address"] == session.address
    assert server.headers["Authorization"] == "Bearer k3y"


def test_a_failing_init_ends_connect_at_once_and_leaves_the_session_usable(server, session):
    updater = updater_of(server, session)
    server.refuse["init_weight_transfer_engine"] = (
        500,
        "Worker failed with error '[packedcomm:AuthenticationError] another secret', please check "
        "the stack trace above for the root cause",
    )
    begin = time.monotonic()
    with pytest.raises(PermissionError, match="^another secret"):
        updater.connect()
    assert time.monotonic() - begin < 5

    server.refuse.clear()
    updater.connect()
    updater.update(FullWeightSender(weights(4.0), session))
    assert_holds(server, 4.0)


def test_an_engine_that_is_connected_again_is_updated_again(server, session):
    updater = connected(server, session)
    updater.connect()
    sender = FullWeightSender(weights(5.0), session)
    updater.update(sender)
    assert_holds(server, 5.0)


def test_an_engine_that_was_started_again_is_updated_at_once(server, session):
    updater = connected(server, session)
    # As when its process is killed, and another one takes its place.
    with server.receivers.pop().session as session_of_worker:
        session_of_worker.abort("killed")
    updater.connect()
    begin = time.monotonic()
    updater.update(FullWeightSender(weights(5.0), session))
    assert time.monotonic() - begin < 5
    assert_holds(server, 5.0)


def test_an_engine_that_another_trainer_has_taken_says_so(server, session):
    first = connected(server, session)
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as taking:
        second = updater_of(server, taking)
        # While the first one's update begins, and before.
        server.refuse["start_weight_update"] = lambda body: second.connect()
        for text in ("another trainer", "no receiver is connected"):
            begin = time.monotonic()
            with pytest.raises(SessionStateError, match=text):
                first.update(FullWeightSender(weights(2.0), session))
            assert time.monotonic() - begin < 5
            server.refuse.clear()
        assert server.came[-1] == "wake_up"
        second.update(FullWeightSender(weights(3.0), taking))
        assert_holds(server, 3.0)
        # And back.
        assert first.connect() == 1
        first.update(FullWeightSender(weights(4.0), session))
        assert_holds(server, 4.0)


def test_fewer_workers_than_promised(server):
    server.world_size = 2
    with Session.listen("127.0.0.1:0", receivers=2, device="cpu", settings=IMPATIENT) as session:
        with pytest.raises(RendezvousTimeout, match="1 of 2 receivers came .* 1 of 1 engines"):
            updater_of(server, session).connect()
        assert session.state == "idle"


def test_a_session_that_waits_for_more_than_there_are(server):
    with (
        Session.listen("127.0.0.1:0", receivers=4, device="cpu", settings=QUICK) as session,
        pytest.raises(ConfigMismatch, match="4 receivers, .* 1 workers"),
    ):
        updater_of(server, session).connect()
    assert server.came == ["get_world_size"]


@pytest.mark.parametrize("route", ["pause", "start_weight_update"])
def test_what_fails_before_the_sync_sends_nothing_and_resumes(server, session, route):
    updater = connected(server, session)
    server.refuse[route] = (500, "[packedcomm:CapacityError] no memory")

    with pytest.raises(CapacityError, match="^no memory"):
        updater.update(FullWeightSender(weights(6.0), session))

    assert server.came[-1] == "wake_up"
    assert "update_weights" not in server.came
    server.refuse.clear()
    updater.update(FullWeightSender(weights(6.0), session))
    assert_holds(server, 6.0)


@pytest.mark.parametrize(
    ("text", "error"),
    [("internal server error", RemoteError), (marked(CapacityError("full")), CapacityError)],
)
def test_an_update_that_the_server_refuses_ends_the_sync_soon(server, session, text, error):
    updater = connected(server, session)

    def refuse(body):
        server.active = False
        raise Exception(text)

    server.refuse["update_weights"] = refuse
    begin = time.monotonic()
    with pytest.raises(error, match="internal server error|^full"):
        updater.update(FullWeightSender(weights(8.0), session))
    assert time.monotonic() - begin < 3
    assert server.came == [*CYCLE[:3], "wake_up"]

    server.refuse.clear()
    for value in (8.0, 9.0):
        updater.update(FullWeightSender(weights(value), session))
        assert_holds(server, value)


def test_the_first_update_refused_ends_the_sync_soon(server, session):
    updater = updater_of(server, session)
    updater.connect()
    server.refuse["update_weights"] = (400, "Missing 'update_info' in request body")
    begin = time.monotonic()
    with pytest.raises(RemoteError, match="HTTP 400: Missing"):
        updater.update(FullWeightSender(weights(), session))
    assert time.monotonic() - begin < 3
    assert server.came[-1] == "wake_up"


def test_a_manifest_that_does_not_fit_is_the_same_error_on_both_sides(server, session):
    updater = connected(server, session)
    with pytest.raises(ManifestError, match="receiver rank 1: .*'c'"):
        updater.update(FullWeightSender({**weights(), "c": torch.ones(1)}, session))
    assert server.came == [*CYCLE[:3], "wake_up"]
    updater.update(FullWeightSender(weights(2.0), session))
    assert_holds(server, 2.0)


def test_a_worker_that_dies_in_the_middle(server, session):
    updater = connected(server, session)

    def die(manifest):
        server.receivers[0].session.abort("killed")
        raise PeerLost("killed")

    server.receivers[0]._following._target.commit = die
    with pytest.raises(PeerLost, match="receiver rank 1"):
        updater.update(FullWeightSender(weights(2.0), session))
    assert server.came[-1] == "wake_up"
    updater.connect()
    updater.update(FullWeightSender(weights(2.0), session))
    assert_holds(server, 2.0)


def test_a_finish_that_fails_says_that_it_was_committed_and_is_made_up_for(server, session):
    updater = connected(server, session)
    server.refuse["finish_weight_update"] = (500, "no kernel")
    with pytest.raises(RemoteError, match="no kernel") as caught:
        updater.update(FullWeightSender(weights(2.0), session))
    assert says_committed(caught.value)
    assert_holds(server, 2.0)
    assert server.came == CYCLE

    server.refuse.clear()
    server.came.clear()
    updater.update(FullWeightSender(weights(3.0), session))
    assert server.came[1:4] == ["start_weight_update", "finish_weight_update", CYCLE[1]]
    assert_holds(server, 3.0)


def test_a_resume_that_fails_is_raised_and_a_note_of_an_earlier_failure(server, session):
    updater = connected(server, session)
    server.refuse["wake_up"] = (500, "stuck")
    with pytest.raises(RemoteError, match="stuck") as caught:
        updater.update(FullWeightSender(weights(2.0), session))
    assert says_committed(caught.value)
    server.refuse["start_weight_update"] = (500, "first")
    with pytest.raises(RemoteError, match="first") as caught:
        updater.update(FullWeightSender(weights(2.0), session))
    assert any("stuck" in note for note in caught.value.__notes__)
    assert not says_committed(caught.value)


def test_one_engine_of_two_fails(server, session):
    with VllmServer(weights()) as other:
        updater = EngineUpdater([HttpEngine(s.url) for s in (server, other)], session)
        updater.connect()
        updater.update(FullWeightSender(weights(1.0), session))
        other.refuse["start_weight_update"] = (500, "not me")
        with pytest.raises(RemoteError, match=f"{other.url}.*not me"):
            updater.update(FullWeightSender(weights(2.0), session))
        assert not server.active
        other.refuse.clear()
        updater.update(FullWeightSender(weights(2.0), session))
        assert_holds(server, 2.0)
        assert_holds(other, 2.0)


def test_a_server_that_is_gone(server, session):
    updater = connected(server, session)
    server.stop()
    with pytest.raises(PeerLost, match=f"POST {server.url}/pause"):
        updater.update(FullWeightSender(weights(2.0), session))


def test_a_server_that_hangs_meets_the_deadline(server, session):
    updater = EngineUpdater(HttpEngine(server.url, timeout_s=1), session)
    updater.connect()
    updater.update(FullWeightSender(weights(), session))
    go_on = threading.Event()
    server.refuse["update_weights"] = lambda body: go_on.wait(20)
    try:
        with pytest.raises(DeadlineExceeded, match="no answer within 1 s"):
            updater.update(FullWeightSender(weights(2.0), session))
    finally:
        server._leave()
        go_on.set()
    assert server.came[-1] == "wake_up"


def test_nothing_connected_a_foreign_sender_and_objects_that_are_no_engines(server, session):
    updater = updater_of(server, session)
    with pytest.raises(SessionStateError, match="call connect"):
        updater.update(FullWeightSender(weights(), session))
    with (
        Session.listen("127.0.0.1:0", receivers=1, device="cpu") as other,
        pytest.raises(ArgumentError, match="another session"),
    ):
        updater.update(FullWeightSender(weights(), other))
    for engines in ([], object(), "http://127.0.0.1"):
        with pytest.raises(ArgumentError):
            EngineUpdater(engines, session)
    with pytest.raises(ArgumentError, match="pause_mode"):
        updater_of(server, session, pause_mode="stop")
    with pytest.raises(ArgumentError, match="base_url"):
        HttpEngine("127.0.0.1:8000")


def test_the_client_imports_where_vllm_can_not_be():
    code = (
        "import sys; sys.modules['vllm'] = sys.modules['ray'] = sys.modules['requests'] = None; "
        "import packedcomm.engines.vllm.client as c; print(c.HttpEngine('http://h:1'))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True
    )
    assert "HttpEngine" in run.stdout
