"""Threads that are waited for whatever comes in between."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from packedcomm.threads import Thread

# Whether the interpreter waits for what is in torch; what a fork of it does isn't waited for.
SCRIPT = """
import os, sys, threading, time
from packedcomm.threads import Thread

leave = threading.Event()


def work():
    leave.wait()
    time.sleep(0.3)
    os.write(1, b"ended")


Thread(work, "work", let_end=leave.set).start()
child = os.fork()
if child == 0:
    begin = time.monotonic()
    import atexit
    atexit.register(lambda: time.monotonic() - begin < 0.5 or os.write(1, b"late"))
    sys.exit()
os.waitpid(child, 0)
"""


class StopError(Exception):
    """What the handler raises."""


def test_a_thread_is_waited_for_also_after_the_wait_was_interrupted():
    end = threading.Event()
    thread = Thread(end.wait, "waiting")
    thread.start()

    def handle(*_):
        raise StopError

    before = signal.signal(signal.SIGALRM, handle)
    try:
        for _ in range(2):
            signal.setitimer(signal.ITIMER_REAL, 0.1)
            with pytest.raises(StopError):
                thread.join()
    finally:
        signal.signal(signal.SIGALRM, before)
    begin = time.monotonic()
    thread.join(0.1)
    assert time.monotonic() - begin >= 0.1
    assert thread.is_alive()
    end.set()
    thread.join()
    thread.join()
    assert not thread.is_alive()


def test_the_interpreter_waits_for_threads_in_torch_and_forks_do_not():
    found = subprocess.run(
        [sys.executable, "-c", SCRIPT], capture_output=True, timeout=60, check=True, text=True
    )
    assert found.stdout == "ended"
