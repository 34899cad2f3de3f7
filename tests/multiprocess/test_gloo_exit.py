"""A process that forgets to close its communicator still ends in order."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from packedcomm import (
    FullWeightSender, GlooCommunicator, Listener, Session, TensorTarget, WeightReceiver
)

rank, way = int(sys.argv[1]), sys.argv[2]
weights = {"w": torch.full((1000,), float(rank == 0))}


def communicator():
    address = sys.argv[-1]
    if rank == 0:
        address = Listener.bind("127.0.0.1:0")
        print(address.address, flush=True)
    group = GlooCommunicator.connect(address, rank, 2, timeout_s=30)
    group.broadcast(weights["w"], 0)
    return group


def session():
    if rank == 0:
        session = Session.listen("127.0.0.1:0", receivers=1)
        print(session.address, flush=True)
        FullWeightSender(weights, session).sync()
    else:
        session = Session.connect(sys.argv[-1])
        WeightReceiver(TensorTarget(weights), session).receive()
    return session


def use():
    used = {"communicator": communicator, "session": session}[way]()
    assert weights["w"].sum() == 1000
    if rank == 0:
        # Until the other process has ended.
        sys.stdin.readline()
    return used


if sys.argv[3] == "keep":
    kept = use()
else:
    # Its thread is on its way to the end when the interpreter gets there.
    use()
"""


@pytest.mark.parametrize("way", ["communicator", "session"])
@pytest.mark.parametrize("when", ["keep", "forget"])
@pytest.mark.parametrize("number", range(2))
def test_a_process_that_never_closes_ends_with_status_zero(number, when, way):
    command = [sys.executable, "-c", SCRIPT]
    first = subprocess.Popen(
        [*command, "0", way, when],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    address = first.stdout.readline().strip()
    second = subprocess.run(
        [*command, "1", way, when, address], capture_output=True, text=True, timeout=60
    )
    _, errors = first.communicate("\n", timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), errors + second.stderr
