"""Updates that are interrupted, as by Ctrl-C: engines come back, and the next update works."""

from __future__ import annotations

import signal
import threading
import time

import pytest
import torch

from packedcomm import FullWeightSender, Session
from packedcomm.engines.vllm import steps
from packedcomm.engines.vllm.client import EngineUpdater, HttpEngine
from tests.helpers.interrupted import Interrupted
from tests.helpers.sessions import QUICK
from tests.helpers.vllm_server import VllmServer


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((33, 7), value), "b.bias": torch.full((5,), -value)}


@pytest.fixture(autouse=True)
def interruptible():
    """A shell may have started the tests with Ctrl-C ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture
def server():
    with VllmServer(weights()) as started:
        yield started


@pytest.fixture
def updater(server):
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(HttpEngine(server.url, timeout_s=20), session, timeout_s=10)
        updater.connect()
        yield updater


class Stopping(Interrupted):
    """Is interrupted once: before anything is offered, or at a tensor."""

    def __init__(self, tensors: dict[str, torch.Tensor], at: int | None, error: BaseException):
        super().__init__(tensors)
        self._error: BaseException | None = error
        if at is not None:
            self.when(at, self.stop)

    def stop(self):
        error, self._error = self._error, None
        if error is not None:
            raise error

    def snapshot(self):
        if self.at is None:
            self.stop()
        return super().snapshot()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("at", [None, 1], ids=["before the offer", "in the middle"])
@pytest.mark.parametrize("connected", [True, False], ids=["later", "the first"])
def test_engines_come_back_and_the_next_update_works_at_once(server, updater, connected, at, error):
    if connected:
        updater.update(FullWeightSender(weights(), updater.session))
    server.came.clear()
    sender = FullWeightSender(Stopping(weights(2.0), at, error("enough")), updater.session)

    begin = time.monotonic()
    with pytest.raises(error, match="enough") as caught:
        updater.update(sender)
    assert not server.receiving
    assert server.came[-2:] == ["update_weights", "wake_up"]
    assert not any("come back" in note for note in getattr(caught.value, "__notes__", ()))

    server.came.clear()
    updater.update(sender)
    assert time.monotonic() - begin < 5
    assert server.came.count("finish_weight_update") == 1
    assert torch.equal(server.workers[0]["a.weight"], weights(2.0)["a.weight"])


def test_an_engine_that_hangs_is_waited_for_a_while(server, updater, monkeypatch):
    monkeypatch.setattr(steps, "_INTERRUPTED_S", 0.5)
    go_on = threading.Event()
    server.refuse["update_weights"] = server.refuse["wake_up"] = lambda body: go_on.wait(20)
    source = Stopping(weights(2.0), None, KeyboardInterrupt())
    begin = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            updater.update(FullWeightSender(source, updater.session))
        assert time.monotonic() - begin < 5
    finally:
        go_on.set()
    back, resumed = caught.value.__notes__
    assert "hasn't come back: update_weights" in back
    assert "could not be resumed" in resumed


def test_an_interruption_after_the_commit_says_that_it_was_committed(server, updater):
    waiting = threading.main_thread().ident
    receive, go_on = server._update_weights, threading.Event()

    def linger(body):
        receive(body)
        time.sleep(0.5)  # the trainer only waits for this answer now
        signal.pthread_kill(waiting, signal.SIGINT)
        go_on.wait(20)

    server._update_weights = linger
    try:
        with pytest.raises(KeyboardInterrupt) as caught:
            updater.update(FullWeightSender(weights(2.0), updater.session))
    finally:
        go_on.set()
    assert any("committed" in note for note in caught.value.__notes__)
    assert torch.equal(server.workers[0]["a.weight"], weights(2.0)["a.weight"])


def test_a_second_interruption_ends_the_waiting(server, updater):
    go_on = threading.Event()
    server.refuse["update_weights"] = lambda body: go_on.wait(20)
    source = Stopping(weights(2.0), None, KeyboardInterrupt("first"))
    # As Ctrl-C: the main thread is interrupted while it waits for the engine.
    waiting = threading.main_thread().ident
    again = threading.Timer(0.5, signal.pthread_kill, (waiting, signal.SIGINT))
    begin = time.monotonic()
    again.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            updater.update(FullWeightSender(source, updater.session))
        assert 0.5 <= time.monotonic() - begin < 5
    finally:
        again.cancel()
        go_on.set()
    assert server.came[-1] == "wake_up"
