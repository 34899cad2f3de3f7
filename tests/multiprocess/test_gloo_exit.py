"""A process that forgets to close its communicator still ends in order."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import sys
import torch
from packedcomm import GlooCommunicator, Listener

rank = int(sys.argv[1])
if rank == 0:
    address = Listener.bind("127.0.0.1:0")
    print(address.address, flush=True)
else:
    address = sys.argv[2]
group = GlooCommunicator.connect(address, rank, 2, timeout_s=30)
tensor = torch.full((1000,), float(rank == 0))
group.broadcast(tensor, 0)
assert tensor.sum() == 1000
"""


@pytest.mark.parametrize("number", range(4))
def test_a_process_that_never_closes_ends_with_status_zero(number):
    command = [sys.executable, "-c", SCRIPT]
    first = subprocess.Popen(
        [*command, "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    address = first.stdout.readline().strip()
    second = subprocess.run([*command, "1", address], capture_output=True, text=True, timeout=60)
    _, errors = first.communicate(timeout=60)
    assert (first.returncode, second.returncode) == (0, 0), errors + second.stderr
