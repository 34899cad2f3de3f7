"""Many connections at once: receivers get in, strangers are cut, and descriptors don't run out
unnoticed."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import threading
import time

import pytest
import zmq

from packedcomm import Session
from packedcomm.descriptors import check_descriptors
from packedcomm.errors import PeerLost
from packedcomm.session import sender_channel
from packedcomm.session.authentication import Keys
from packedcomm.session.channel import BATCH
from packedcomm.session.receiver_channel import ReceiverChannel
from packedcomm.session.sender_channel import SenderChannel, _cut
from packedcomm.settings import DEFAULTS, Settings
from tests.helpers.peers import SECRET, eventually, training

RECEIVERS = 40


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


@pytest.mark.fault(1, 29)
def test_receivers_get_in_though_more_come_at_once_than_may_wait():
    settings = Settings(max_pending_connections=4, connect_timeout_s=30)
    with Session.listen(
        "127.0.0.1:0", receivers=RECEIVERS, secret=SECRET, settings=settings, device="cpu"
    ) as session:
        begin = threading.Barrier(RECEIVERS)
        came, raised = [], []

        def connect():
            begin.wait()
            try:
                came.append(Session.connect(session.address, secret=SECRET, device="cpu"))
            except Exception as error:  # noqa: BLE001  (told at the end)
                raised.append(error)

        threads = [threading.Thread(target=connect) for _ in range(RECEIVERS)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        try:
            assert raised == []
            eventually(lambda: len(session.members.present) == RECEIVERS)
        finally:
            for receiver in came:
                receiver.close()


def test_what_is_said_before_the_end_of_a_connection_that_was_cut_is_not_heard(monkeypatch):
    # As long as ZeroMQ doesn't find it an answer would reach the peer.
    monkeypatch.setattr(sender_channel, "_cut", lambda *_: True)
    channel = SenderChannel("127.0.0.1:0", None, Settings(max_pending_connections=1))
    ends = [channel]
    try:
        for cut in (0, 1):
            end = ReceiverChannel(channel.address, None, DEFAULTS, time.monotonic() + 10)
            ends.append(end)
            eventually(lambda cut=cut: (len(channel._cut_off), channel.pending) == (cut, 1))
        for end in ends[1:]:
            end.send(b"Hello")
        came = []
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline:
            channel.wait(0.05, ())
            came += [peer.bytes for peer, _ in channel.received]
            channel.received.clear()
        assert len(came) == 1
        channel.send(came[0], b"Welcome")
        eventually(lambda: ends[2].wait(0.05) or ends[2].received)
        ends[1].close()
        eventually(lambda: not channel._cut_off)
    finally:
        for end in ends:
            end.close()


def test_one_that_was_cut_and_sends_on_and_on_holds_the_channel_for_little(monkeypatch):
    # As a peer that ZeroMQ still reads from, since a cut doesn't stop whoever sends.
    monkeypatch.setattr(sender_channel, "_cut", lambda *_: True)
    channel = SenderChannel("127.0.0.1:0", None, Settings(max_pending_connections=1))
    context = zmq.Context()
    strangers = []
    try:
        for cut in (0, 1):
            stranger = context.socket(zmq.DEALER)
            strangers.append(stranger)
            stranger.setsockopt(zmq.SNDHWM, 0)
            stranger.connect(f"tcp://{channel.address}")
            eventually(lambda cut=cut: (len(channel._cut_off), channel.pending) == (cut, 1))
        for _ in range(20_000):
            strangers[0].send(b"x")
        taken, checked = [0], channel._checked

        def counting():
            taken[-1] += 1
            return checked()

        monkeypatch.setattr(channel, "_checked", counting)
        eventually(lambda: channel.wait(0.05, ()) or taken.append(0) or sum(taken) == 20_000)
        assert max(taken) <= BATCH
        assert not channel.received
    finally:
        for stranger in strangers:
            stranger.close(0)
        context.term()
        channel.close()


# Connects so many times to a port, in a process of its own; ends when its input does.
STRANGERS = """
import contextlib, resource, socket, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (2000, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
held = []
for _ in range(int(sys.argv[2])):
    stranger = socket.socket()
    stranger.setblocking(False)
    with contextlib.suppress(BlockingIOError):
        stranger.connect(("127.0.0.1", int(sys.argv[1])))
    held.append(stranger)
print("connected", flush=True)
sys.stdin.read()
"""


class Strangers:
    """Connections to a port from another process."""

    def __init__(self, address, count):
        port = address.rpartition(":")[2]
        self._process = subprocess.Popen(
            [sys.executable, "-c", STRANGERS, port, str(count)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self):
        assert self._process.stdout.readline() == "connected\n"
        return self

    def __exit__(self, *error):
        self._process.communicate()


@pytest.mark.fault(29)
def test_strangers_are_cut_though_nobody_waits_for_messages():
    channel = SenderChannel("127.0.0.1:0", SECRET, Settings(max_pending_connections=8))
    try:
        # Two are those of the other process.
        before, strangers = descriptors(), Strangers(channel.address, 400)
        with strangers:
            # Long before their handshakes are over time.
            eventually(lambda: channel.pending == 8, 5.0)
            eventually(lambda: descriptors() <= before + 10, 5.0)
    finally:
        channel.close()


@pytest.mark.fault(18, 29)
def test_strangers_leave_descriptors_for_the_next_communicator():
    with training(2) as group:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(256, 2 * descriptors()), hard))
        try:
            with Strangers(group.session.address, 1000):
                for value in (2.0, 3.0, 4.0):
                    group.session.drop_communicator("another one is wanted")
                    new = group.sync(value)
                    assert [peer.outcome().checksum for peer in group.peers] == [new, new]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


# In a process of its own: where ZeroMQ gets no descriptor it may end it.
EXHAUSTED = """
import os, resource, sys, threading, torch
from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver
from packedcomm.errors import TooManyOpenFiles

def spare(count):
    top = max(map(int, os.listdir("/proc/self/fd")))
    while os.dup(0) < top:
        pass
    resource.setrlimit(resource.RLIMIT_NOFILE, (os.dup(0) + 1 + count, hard))

def check(what):
    try:
        what()
    except TooManyOpenFiles as error:
        assert "RLIMIT_NOFILE" in str(error), error
        print("named", flush=True)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))

hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
secret = "x" * 32
with Session.listen("127.0.0.1:0", receivers=1, device="cpu", secret=secret) as session:
    end = Session.connect(session.address, device="cpu", secret=secret)
    receiver = WeightReceiver(TensorTarget({"w": torch.zeros(4)}), end)
    receiver.start()
    sender = FullWeightSender({"w": torch.ones(4)}, session)
    sender.sync()
    for count in (0, 6):
        spare(count)
        check(lambda: Session.listen("127.0.0.1:0", receivers=1, device="cpu", secret=secret))
        spare(count)
        check(lambda: Session.connect(session.address, device="cpu", secret=secret))
        session.drop_communicator("another one is wanted")
        spare(count)
        check(sender.sync)
        print(sender.sync().version is not None)
receiver.close()
"""


@pytest.mark.fault(18)
def test_descriptors_that_run_out_are_an_error_that_names_the_limit():
    command = [sys.executable, "-c", EXHAUSTED]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert ended.stdout.split() == (["named"] * 3 + ["True"]) * 2, ended.stderr[-2000:]


@pytest.mark.fault(30)
def test_a_message_of_endlessly_many_parts_costs_its_sender_the_connection_and_little_memory():
    small = Settings(max_frame_bytes=1 << 20)
    with Session.listen(
        "127.0.0.1:0", receivers=1, secret=SECRET, settings=small, device="cpu"
    ) as session, zmq.Context() as context:  # fmt: skip
        hostile = context.socket(zmq.DEALER)
        hostile.linger = 0
        keys = Keys.of_receivers(SECRET)
        hostile.curve_serverkey = Keys.of_sender(SECRET).public
        hostile.curve_publickey, hostile.curve_secretkey = keys.public, keys.private
        monitor = hostile.get_monitor_socket(zmq.EVENT_DISCONNECTED)
        hostile.connect(f"tcp://{session.address}")
        part = b"x" * 60_000
        for _ in range(5000):
            hostile.send(part, zmq.SNDMORE)
        hostile.send(part)
        assert monitor.poll(20_000), "300 MB in a message were taken"
        hostile.disable_monitor()
        monitor.close(0)
        hostile.close(0)
        with Session.connect(session.address, secret=SECRET, settings=small, device="cpu"):
            eventually(lambda: len(session.members) == 1)


def test_a_connection_that_is_cut_is_not_waited_for_where_nobody_listens_any_more():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"127.0.0.1:{server.getsockname()[1]}"
    assert DEFAULTS.connect_timeout_s > 5
    channel = SenderChannel(address, SECRET, DEFAULTS)
    raised = []

    def connect():
        try:
            Session.connect(address, secret=SECRET, device="cpu")
        except Exception as error:  # noqa: BLE001  (told at the end)
            raised.append(error)

    thread = threading.Thread(target=connect)
    thread.start()
    deadline = time.monotonic() + 10
    while not channel.received and time.monotonic() < deadline:
        channel.wait(0.05, ())
    channel.close()
    thread.join(5)
    assert not thread.is_alive()
    assert "ended the connection before it has answered" in str(raised[0])


def test_a_receiver_that_is_always_cut_comes_again_ever_more_seldom(monkeypatch):
    made = []

    class Counted(ReceiverChannel):
        def __init__(self, *arguments):
            made.append(arguments)
            super().__init__(*arguments)

    monkeypatch.setattr("packedcomm.session.receiver.ReceiverChannel", Counted)
    # ZeroMQ ends a connection over which more comes: a handshake (41 bytes) is through, and what is
    # cut is the first message, or else the end of a handshake may look like a refusal.
    small = Settings(max_frame_bytes=48)
    with (
        Session.listen("127.0.0.1:0", receivers=1, settings=small, device="cpu") as session,
        pytest.raises(PeerLost, match=r"ended the connection \d+ times before"),
    ):
        Session.connect(session.address, settings=Settings(connect_timeout_s=3), device="cpu")
    assert 3 <= len(made) <= 20


def test_what_a_descriptor_has_come_to_mean_is_left_alone(tmp_path):
    path = tmp_path / "file"
    path.write_text("kept")
    with path.open() as file, socket.socket(socket.AF_UNIX) as other, socket.socket() as unbound:
        before = descriptors()
        for found in (file, other, unbound):
            for _ in range(3):
                _cut(found.fileno(), 1)
        assert descriptors() == before
        assert file.read() == "kept"


def test_no_limit_is_enough_descriptors(monkeypatch):
    infinite = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
    monkeypatch.setattr(resource, "getrlimit", lambda _: infinite)
    check_descriptors(1 << 20, "everything")
