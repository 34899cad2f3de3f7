"""A process that forgets to close its communicators still ends in order."""

from __future__ import annotations

import contextlib
import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from packedcomm import (
    FullWeightSender, GlooCommunicator, Listener, Session, TensorTarget, WeightReceiver
)

rank = int(sys.argv[1])
weights = {"w": torch.full((1000,), float(rank == 0))}


def communicator():
    place = sys.stdin.readline().strip()
    if rank == 0:
        place = Listener.bind("127.0.0.1:0")
        print(place.address, flush=True)
    group = GlooCommunicator.connect(place, rank, 2, timeout_s=30)
    group.broadcast(weights["w"], 0)
    return group


def session():
    address = sys.stdin.readline().strip()
    if rank == 0:
        session = Session.listen("127.0.0.1:0", receivers=1)
        print(session.address, flush=True)
        FullWeightSender(weights, session).sync()
    else:
        session = Session.connect(address)
        WeightReceiver(TensorTarget(weights), session).receive()
    return session


def use():
    used = [communicator(), session()]
    assert weights["w"].sum() == 1000
    if rank == 0:
        # Until the other process has ended.
        sys.stdin.readline()
    return used


if sys.argv[2] == "keep":
    kept = use()
else:
    # Their threads are on their way to the end when the interpreter gets there.
    use()
"""


@pytest.mark.parametrize("when", ["keep", "forget"])
def test_processes_that_never_close_end_with_status_zero(when):
    # Two pairs at once, each with moments of its own.
    with contextlib.ExitStack() as stack:
        pairs = []
        for _ in range(2):
            pair = [stack.enter_context(_start(rank, when)) for rank in range(2)]
            for process in pair:
                stack.callback(process.kill)
            pairs.append(pair)
        for _ in ("communicator", "session"):
            for first, second in pairs:
                _say(first, "\n")
                _say(second, first.stdout.readline())
        for first, second in pairs:
            # The first one waits for the end of the other.
            for process in (second, first):
                _, errors = process.communicate("\n", timeout=60)
                assert process.returncode == 0, errors


def _start(rank, when):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT, str(rank), when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _say(process, line):
    # One that has failed has closed it; its errors say why.
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write(line)
        process.stdin.flush()
