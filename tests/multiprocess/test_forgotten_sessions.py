"""Sessions that nobody closes: whatever collects them must not hang, and their threads end."""

from __future__ import annotations

import subprocess
import sys

import pytest

SCRIPT = """
import faulthandler, gc, sys, threading, time, warnings
faulthandler.dump_traceback_later(30, exit=True)
import torch
from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver

way, secret = sys.argv[1], sys.argv[2] or None
warnings.simplefilter("ignore", ResourceWarning)


def use():
    sender = Session.listen("127.0.0.1:0", receivers=1, secret=secret)
    receiver = Session.connect(sender.address, secret=secret)
    if way == "synced":
        live = {"w": torch.zeros(100)}
        thread = threading.Thread(target=WeightReceiver(TensorTarget(live), receiver).receive)
        thread.start()
        FullWeightSender({"w": torch.ones(100)}, sender).sync()
        thread.join()
        assert live["w"].sum() == 100
    # As exceptions do with what their frames have.
    for end in (sender, receiver):
        end.itself = end


# Also by a thread that is not the one that made it.
for collect in (gc.collect, lambda: [thread := threading.Thread(target=gc.collect),
                                     thread.start(), thread.join()]):
    use()
    collect()
end = time.monotonic() + 20
while len(threading.enumerate()) > 1 and time.monotonic() < end:
    time.sleep(0.05)
    gc.collect()
print([thread.name for thread in threading.enumerate()])
"""


@pytest.mark.parametrize("way", ["connected", "synced"])
@pytest.mark.parametrize("secret", ["", "of this job, 32 characters long."])
def test_sessions_in_a_cycle_of_references_are_collected(way, secret):
    ended = subprocess.run(
        [sys.executable, "-c", SCRIPT, way, secret], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.strip() == "['MainThread']", ended.stderr
