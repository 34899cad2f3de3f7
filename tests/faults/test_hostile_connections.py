"""Strangers at the session's address: rejected, while a sync goes on undisturbed."""

from __future__ import annotations

import contextlib
import os
import random
import socket
import struct
import subprocess
import sys
import threading
import time
from dataclasses import replace
from functools import partial

import pytest
import torch
import zmq

from packedcomm import FullWeightSender, Session, TensorTarget, WeightReceiver
from packedcomm.errors import AuthenticationError
from packedcomm.session.channel import HANDSHAKE_MS
from packedcomm.session.frames import encode
from packedcomm.session.messages import Commit, Offer, Staged
from packedcomm.settings import Settings
from tests.helpers.in_process import Round, sessions
from tests.helpers.peers import PATIENT, Receiving, in_place, training
from tests.helpers.proxies import Proxy
from tests.helpers.sessions import DIGEST

STRANGERS = 1000


def connection(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection((host, int(port)), timeout=20)


def descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


# What strangers say to a ZeroMQ socket: a greeting of version 3 follows some of it.
GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00"
SAYINGS = [
    b"",
    b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n",
    GREETING,
    GREETING + b"NULL".ljust(20, b"\0") + bytes(32),
    GREETING + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x04\xc8\x05HELLO" + bytes(194),
    # A frame that is announced with 2^63 bytes.
    GREETING + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x02" + struct.pack(">Q", 1 << 63),
    GREETING + b"CURVE".ljust(20, b"\0") + bytes(32) + b"\x02" + b"\xff" * 8,
    random.Random(0).randbytes(3000),
]


@pytest.mark.fault(29, 30)
def test_a_thousand_strangers_during_a_sync_change_nothing_and_keep_no_descriptors():
    with training(2, settings=replace(PATIENT, max_pending_connections=64)) as group:
        channel = group.session._channel
        before = descriptors()
        held: list[socket.socket] = []
        seen: list[tuple[int, int]] = []
        done = threading.Event()

        def watch():
            while not done.wait(0.02):
                with channel._lock:  # not while they are being counted
                    seen.append((channel.pending, descriptors()))

        def crowd():
            for number in range(STRANGERS):
                stranger = connection(group.session.address)
                with contextlib.suppress(OSError):
                    stranger.sendall(SAYINGS[number % len(SAYINGS)])
                held.append(stranger)

        crowding = threading.Thread(target=crowd)
        watching = threading.Thread(target=watch)
        watching.start()
        group.source.when(4, crowding.start)
        # Syncs go on for as long as they come.
        value, outcomes = 2.0, []
        new = group.sync(value)
        outcomes.append([peer.outcome().checksum for peer in group.peers] == [new, new])
        while crowding.is_alive():
            value += 1
            new = group.sync(value)
            outcomes.append([peer.outcome().checksum for peer in group.peers] == [new, new])
        crowding.join()
        new = group.sync(value + 1)
        outcomes.append([peer.outcome().checksum for peer in group.peers] == [new, new])
        done.set()
        watching.join()
        assert len(held) == STRANGERS
        assert all(outcomes)
        limit = group.session.settings.max_pending_connections
        assert max(pending for pending, _ in seen) <= limit
        # Both ends of a stranger's connection are in this process; those of ours are few.
        ours = max(count - before for _, count in seen) - STRANGERS
        assert ours < 2 * limit + 300
        for stranger in held:
            stranger.close()
        late = group.add()
        new = group.sync(value + 2)
        assert [peer.outcome().checksum for peer in group.peers] == [new] * 3
        assert late in group.peers


# In a process of its own: what hangs in ZeroMQ holds the interpreter.
FLOODED = """
import socket, sys
from packedcomm import Session

way = sys.argv[1]
session = Session.listen("127.0.0.1:0", receivers=1, device="cpu", secret="x" * 32)
host, _, port = session.address.rpartition(":")

def flood(*_, **__):
    for number in range(3000):
        try:
            socket.create_connection((host, int(port)), timeout=20).close()
        except ConnectionRefusedError:
            return print("refused", end=" ")
        except ConnectionResetError:
            pass  # in the middle of the end

if way == "before":
    session._supervisor.stop(5)
    flood()
elif way == "during":
    session.drop_communicator = flood
else:
    session.abort("enough")
    flood()
session.close()
print("closed", flush=True)
"""


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("way", "said"),
    [("before", "closed"), ("during", "refused closed"), ("after abort", "refused closed")],
)
def test_strangers_do_not_keep_a_session_from_closing(way, said):
    command = [sys.executable, "-c", FLOODED, way]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=20)
    assert ended.stdout.strip() == said, ended.stderr


@pytest.mark.fault(29)
def test_a_wrong_secret_is_refused_during_a_sync_which_goes_on():
    refused = []
    with training(2) as group:

        def intrude():
            for secret in ("another secret of sixteen", None):
                try:
                    Session.connect(group.session.address, secret=secret, device="cpu")
                except AuthenticationError as error:
                    refused.append(str(error))

        group.source.when(12, intrude)
        new = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [new, new]
        assert len(refused) == 2
        assert all("the sender has another secret" in text for text in refused)


@pytest.mark.fault(29)
def test_what_was_recorded_from_a_receiver_can_be_said_again_without_any_effect():
    with training(1) as group:
        proxy = Proxy(group.session.address)
        group.add(Receiving(), proxy.address)
        new = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [new, new]
        recorded = [bytes(said) for said in proxy.said if len(said) > 200]
        assert recorded
        members = len(group.session.members)
        decided = group.session.decided
        # All of it again, in one piece and in pieces, on connections of its own and in a sync.
        replayers = []

        def replay():
            for said in recorded:
                for step in (len(said), 64, 7):
                    stranger = connection(group.session.address)
                    replayers.append(stranger)
                    with contextlib.suppress(OSError):
                        for begin in range(0, len(said), step):
                            stranger.sendall(said[begin : begin + step])

        group.source.when(12, replay)
        newer = group.sync(3.0)
        assert [peer.outcome().checksum for peer in group.peers] == [newer, newer]
        assert len(replayers) >= 3
        assert len(group.session.members) == members
        assert group.session.decided == decided + 1
        for stranger in replayers:
            stranger.close()
        proxy.close()


HOSTILE_FRAMES = [
    b"\xc1",
    b"\xdf\xff\xff\xff\xff",
    b"\xc6\xff\xff\xff\xff",
    b"\x91" * 100_000,
    b"\x92\xcf\x7f\xff\xff\xff\xff\xff\xff\xff\xa5Offer",
    encode(Commit(3), 1),
    encode(Offer(1, DIGEST), 1 << 40),
    encode(Staged(0.0, b"", {}), 1),
    bytes(1 << 20),
]


@pytest.mark.fault(30)
@pytest.mark.parametrize("secret", [True, False], ids=["with the secret", "without"])
def test_hostile_frames_of_a_peer_are_refused_and_the_session_serves_on(secret):
    from packedcomm.session.authentication import Keys
    from tests.helpers.peers import SECRET

    context = zmq.Context()
    with training(2) as group:
        members = len(group.session.members)
        hostile = []

        def attack():
            for frame in HOSTILE_FRAMES:
                peer = context.socket(zmq.DEALER)
                peer.linger = 0
                # One that was refused already has nobody to send to.
                peer.sndtimeo = 1000
                if secret:
                    keys = Keys.of_receivers(SECRET)
                    peer.curve_serverkey = Keys.of_sender(SECRET).public
                    peer.curve_publickey, peer.curve_secretkey = keys.public, keys.private
                peer.connect(f"tcp://{group.session.address}")
                with contextlib.suppress(zmq.Again):
                    peer.send(frame)
                hostile.append(peer)

        group.source.when(12, attack)
        for value in (2.0, 3.0):
            new = group.sync(value)
            assert [peer.outcome().checksum for peer in group.peers] == [new, new]
        if secret:
            # It is told why, and never was a member.
            assert hostile[0].poll(20_000)
            assert b"Refused" in hostile[0].recv()
        assert len(group.session.members) == members
        for peer in hostile:
            peer.close()
    context.term()


def _says_garbage_instead_of_its_vote(receiver):
    reply = receiver.session.reply
    votes = []

    def replying(message):
        if isinstance(message, Staged):
            votes.append(message)
            if len(votes) == 2:
                receiver.session._channel.send(b"\xdf\xff\xff\xff\xff")
                return
        reply(message)

    receiver.session.reply = replying


@pytest.mark.fault(30)
def test_a_receiver_that_says_garbage_is_named_and_nothing_is_committed():
    with training(1, Receiving(in_place)) as group:
        group.add(Receiving(in_place, _says_garbage_instead_of_its_vote))
        first = group.sync(2.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        with pytest.raises(Exception, match="receiver rank 2: .*frame") as caught:
            group.sync(3.0)
        assert type(caught.value).__name__ == "ProtocolError"
        assert group.sender.version == 1
        for peer in group.peers:
            outcome = peer.outcome()
            assert outcome.error == "ProtocolError"
            assert outcome.shown is None
        new = group.sync(4.0)
        assert [peer.outcome().checksum for peer in group.peers] == [new, new]


@pytest.mark.fault(29)
def test_a_silent_connection_is_cut_by_the_oldest_first():
    settings = Settings(max_pending_connections=4)
    with Session.listen(
        "127.0.0.1:0", receivers=1, secret="sixteen and more characters", settings=settings,
        device="cpu",
    ) as session:  # fmt: skip
        silent = [connection(session.address) for _ in range(8)]
        begin = time.monotonic()
        for stranger in silent[:4]:
            # ZeroMQ's greeting, then the end: a reset, so that a receiver tries again.
            with pytest.raises(ConnectionResetError):
                all(iter(partial(stranger.recv, 64), b""))
        # ZeroMQ itself would end them too, much later.
        assert time.monotonic() - begin < HANDSHAKE_MS / 1000 / 3
        assert session._channel.pending <= 4
        silent[-1].settimeout(0.2)
        with contextlib.suppress(TimeoutError):
            while True:
                assert silent[-1].recv(64), "the youngest one was cut"
        for stranger in silent:
            stranger.close()


@pytest.mark.fault(30)
def test_random_bytes_at_the_port_of_a_session_without_a_secret_change_nothing():
    live = [{"w": torch.zeros(64)}, {"w": torch.zeros(64)}]
    with sessions(2) as (session, ends):
        receivers = [WeightReceiver(TensorTarget(w), e) for w, e in zip(live, ends, strict=True)]
        # Some of them look like the first bytes of an old version of the protocol.
        strangers = [connection(session.address) for _ in range(150)]
        for seed, stranger in enumerate(strangers):
            with contextlib.suppress(OSError):
                stranger.sendall(random.Random(seed).randbytes(2000))
        sent = {"w": torch.zeros(64)}
        sender = FullWeightSender(sent, session)
        for version in range(20):
            sent["w"].fill_(version)
            assert Round(sender.sync, receivers).sent.version == version
            assert all(bool((held["w"] == version).all()) for held in live)
        for stranger in strangers:
            stranger.close()
