"""What a process does to its own sessions: it closes them from a signal handler, and forks."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from packedcomm import GlooCommunicator, Listener, TensorTarget, WeightReceiver
from packedcomm.errors import SessionStateError
from packedcomm.session.messages import Proceed, Ready
from tests.helpers.in_process import sessions
from tests.helpers.peers import eventually


@pytest.mark.parametrize("who", ["sender", "receiver"])
@pytest.mark.parametrize("call", ["close", "abort"])
def test_a_signal_handler_may_end_the_session_that_it_interrupts(who, call):
    with sessions(1) as (session, (end,)):
        interrupted = session if who == "sender" else end

        def handle(*_):
            interrupted.close() if call == "close" else interrupted.abort("the handler")

        def wait():
            if who == "sender":
                session.ask(Proceed(1), Ready, 10)
            end.receive(10)

        before = signal.signal(signal.SIGUSR2, handle)
        timer = threading.Timer(0.3, os.kill, [os.getpid(), signal.SIGUSR2])
        timer.start()
        try:
            with pytest.raises(SessionStateError, match="closed|the handler"):
                wait()
        finally:
            timer.join()
            signal.signal(signal.SIGUSR2, before)
        interrupted.close()
        eventually(lambda: interrupted._channel._context.closed)


def test_a_signal_handler_may_close_the_receiver_whose_status_is_asked():
    closed = []
    with sessions(1) as (_, (end,)):
        receiver = WeightReceiver(TensorTarget({"a": torch.zeros(4)}), end)
        receiver.start()

        def handle(*_):
            if not closed:
                closed.append(True)
                receiver.close()

        before = signal.signal(signal.SIGALRM, handle)
        try:
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            deadline = time.monotonic() + 10
            while not closed and time.monotonic() < deadline:
                receiver.status()
            assert receiver.status().state == "closed"
        finally:
            signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("connect", [GlooCommunicator.connect])
def test_a_communicator_may_be_aborted_by_a_handler_in_the_middle_of_its_abort(connect):
    with connect(Listener.bind("127.0.0.1:0"), 0, 1) as alone, alone._ending:
        alone.abort("by the handler")
        assert alone._ended == "by the handler"


# An interrupt that strikes while a set forgets what has just been collected is the interpreter's.
@pytest.mark.filterwarnings(
    "ignore:Exception ignored in. <function WeakSet:pytest.PytestUnraisableExceptionWarning"
)
@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_close_that_is_interrupted_leaves_nothing_behind(who):
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    interrupted = 0
    try:
        for number in range(20):
            with sessions(1) as (session, (end,)):
                closing = session if who == "sender" else end
                try:
                    # Anywhere in it, from its beginning to some time after its end.
                    signal.setitimer(signal.ITIMER_REAL, 1e-5 + number * 1e-4)
                    closing.close()
                    signal.setitimer(signal.ITIMER_REAL, 0)
                except KeyboardInterrupt:
                    interrupted += 1
                closing.close()
                eventually(lambda: closing._channel._context.closed)  # noqa: B023
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert interrupted


# In a process of its own, which may fork and hang.
FORKING = """
import faulthandler, os, sys, time, warnings
import torch
from packedcomm import FullWeightSender, StagedTarget, TensorTarget, WeightReceiver
from packedcomm.errors import SessionStateError
from tests.helpers.in_process import sessions

warnings.simplefilter("ignore", DeprecationWarning)


def child(session, end, sender):
    faulthandler.dump_traceback_later(5, exit=True)
    for call in (sender.sync, lambda: session.wait(), lambda: end.receive(1)):
        try:
            call()
        except SessionStateError as error:
            assert "forked" in str(error)
        else:
            os._exit(1)
    try:
        with session:
            raise ZeroDivisionError
    except ZeroDivisionError:
        end.close()
    os._exit(7)


with sessions(1) as (session, (end,)):
    receiver = WeightReceiver(StagedTarget(TensorTarget({"w": torch.zeros(4)})), end)
    receiver.start()
    sent = torch.ones(4)
    sender = FullWeightSender({"w": sent}, session)
    sender.sync()
    codes = []
    for _ in range(6):
        time.sleep(0.03)
        pid = os.fork()
        if pid == 0:
            child(session, end, sender)
        codes.append(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    sent += 1
    print(codes, sender.sync().version, receiver.status().connected, flush=True)
    receiver.close()
"""


# Interrupted while it waits for the thread that is in Gloo.
INTERRUPTED_END = """
import contextlib, signal, sys
from datetime import timedelta
import torch
from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver

weights = {"w": torch.ones(1000)}
if sys.argv[1] == "sender":
    session = Session.listen("127.0.0.1:0", receivers=1)
    print(session.address, flush=True)
    FullWeightSender(weights, session).sync()
else:
    session = Session.connect(sys.stdin.readline().strip())
    WeightReceiver(TensorTarget(weights), session).receive()
print("synced", flush=True)
sys.stdin.readline()


class Receive:
    # In Gloo for a while: nothing is sent.

    error = None

    def run(self, group):
        with contextlib.suppress(RuntimeError):
            group.recv([torch.ones(1)], 1 - group.rank(), 7).wait(timedelta(seconds=0.6))


if sys.argv[2] == "here":
    session._communicator._thread._batches.put(Receive())
    signal.signal(signal.SIGALRM, signal.default_int_handler)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
session.close()
"""


@pytest.mark.parametrize("who", ["sender", "receiver"])
def test_a_process_that_is_interrupted_while_it_closes_ends_in_order(who):
    ends = {
        role: subprocess.Popen(
            [sys.executable, "-c", INTERRUPTED_END, role, "here" if role == who else "not"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for role in ("sender", "receiver")
    }
    try:
        address = ends["sender"].stdout.readline()
        ends["receiver"].stdin.write(address)
        ends["receiver"].stdin.flush()
        assert [end.stdout.readline() for end in ends.values()] == ["synced\n"] * 2
        found = {}
        for role in (who, *({"sender", "receiver"} - {who})):
            _, errors = ends[role].communicate("end\n", timeout=60)
            found[role] = (ends[role].returncode, errors)
        assert found[who][0] == -signal.SIGINT, found[who][1]
        assert "KeyboardInterrupt" in found[who][1]
        assert [code for role, (code, _) in found.items() if role != who] == [0], found
    finally:
        for end in ends.values():
            end.kill()
            end.wait()


def test_a_forked_process_leaves_its_parents_sessions_alone():
    ended = subprocess.run(
        [sys.executable, "-c", FORKING], capture_output=True, text=True, timeout=60
    )
    assert ended.stdout.strip() == f"{[7] * 6} 1 True", ended.stderr
