"""The control channel: who gets in, what is refused, and what is noticed when a peer goes."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import math
import socket
import threading
import time

import psutil
import pytest
import zmq
from zmq.utils import z85

from packedcomm import Session
from packedcomm.errors import (
    AddressInUse,
    ArgumentError,
    AuthenticationError,
    PeerLost,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.session import sender_channel
from packedcomm.session.authentication import Keys
from packedcomm.session.messages import Ready
from packedcomm.session.receiver_channel import ReceiverChannel
from packedcomm.session.sender_channel import SenderChannel
from packedcomm.settings import DEFAULTS, Settings
from tests.helpers.in_process import sessions
from tests.helpers.interrupts import Interrupt
from tests.helpers.sessions import QUICK

SECRET = "correct horse battery staple"


@contextlib.contextmanager
def _listening(secret=None, settings=DEFAULTS, address="127.0.0.1:0"):
    channel = SenderChannel(address, secret, settings)
    try:
        yield channel
    finally:
        channel.close()


@contextlib.contextmanager
def _connected(address, secret=None, settings=DEFAULTS, timeout_s=10.0):
    channel = ReceiverChannel(address, secret, settings, time.monotonic() + timeout_s)
    try:
        yield channel
    finally:
        channel.close()


def _frames(sender, count, timeout_s=5.0, peers=()):
    """What came until there were so many frames, and who went."""
    frames, gone = [], set()
    deadline = time.monotonic() + timeout_s
    while len(frames) < count:
        assert time.monotonic() < deadline, f"{len(frames)} of {count} frames came"
        gone |= sender.wait(0.05, peers)
        while sender.received:
            peer, frame = sender.received.popleft()
            frames.append((peer.bytes, frame.bytes))
    return frames, gone


def _gone(sender, peers, timeout_s=2.0):
    deadline = time.monotonic() + timeout_s
    gone = set()
    while not gone and time.monotonic() < deadline:
        gone |= sender.wait(0.05, peers)
    return gone


def _received(receiver, count, timeout_s=5.0):
    frames = []
    deadline = time.monotonic() + timeout_s
    while len(frames) < count:
        assert time.monotonic() < deadline, f"{len(frames)} of {count} frames came"
        receiver.wait(0.05)
        while receiver.received:
            frames += filter(None, [receiver.received.popleft()])
    return frames


@pytest.mark.parametrize("secret", [None, SECRET])
@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]", "localhost"])
def test_frames_go_both_ways_in_order(secret, host):
    with _listening(secret, address=f"{host}:0") as sender:
        port = sender.address.rpartition(":")[2]
        with _connected(f"{host}:{port}", secret) as receiver:
            for i in range(20):
                receiver.send(b"up %d" % i)
            frames, _ = _frames(sender, 20)
            peer = frames[0][0]
            assert frames == [(peer, b"up %d" % i) for i in range(20)]
            for i in range(20):
                assert sender.send(peer, b"down %d" % i)
            assert _received(receiver, 20) == [b"down %d" % i for i in range(20)]


def test_keys_follow_from_the_secret_and_differ_by_side():
    sender, receivers = Keys.of_sender(SECRET), Keys.of_receivers(SECRET)
    mac = hmac.new(SECRET.encode(), b"packedcomm control sender 1", hashlib.sha256)
    assert z85.decode(sender.private) == mac.digest()
    assert zmq.curve_public(sender.private) == sender.public
    assert len({sender.public, sender.private, receivers.public, receivers.private}) == 4
    assert Keys.of_sender(SECRET + "!").public != sender.public
    assert sender.private.decode() not in repr(sender)


@pytest.mark.fault(29)
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(SECRET, SECRET + "!"), (SECRET, None), (None, SECRET)],
    ids=["wrong", "missing at the receiver", "missing at the sender"],
)
def test_another_secret_is_an_authentication_error_within_seconds(theirs, ours):
    with _listening(theirs) as sender:
        begin = time.monotonic()
        with pytest.raises(AuthenticationError, match=f"{sender.address} refuses") as raised:
            ReceiverChannel(sender.address, ours, DEFAULTS, begin + 30)
        assert time.monotonic() - begin < 5
        assert SECRET not in str(raised.value)
        with _connected(sender.address, theirs) as receiver:
            receiver.send(b"still open")
            assert _frames(sender, 1)[0][0][1] == b"still open"


def test_a_peer_that_knows_the_senders_public_key_only_is_refused():
    with _listening(SECRET) as sender, zmq.Context() as context:
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 0
        stranger.curve_serverkey = Keys.of_sender(SECRET).public
        stranger.curve_publickey, stranger.curve_secretkey = zmq.curve_keypair()
        monitor = stranger.get_monitor_socket(zmq.EVENT_HANDSHAKE_FAILED_AUTH)
        stranger.connect(f"tcp://{sender.address}")
        stranger.send(b"let me in")
        assert monitor.poll(5000)
        sender.wait(0.05, ())
        assert not sender.received
        stranger.disable_monitor()
        monitor.close(0)
        stranger.close(0)


def _pass_on(source, sink, seen):
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            seen.extend(data)
            sink.sendall(data)
    with contextlib.suppress(OSError):
        sink.shutdown(socket.SHUT_RDWR)


def test_what_is_said_is_encrypted():
    """A listener in the middle passes everything on and keeps it."""
    seen = bytearray()
    with _listening(SECRET) as sender, socket.create_server(("127.0.0.1", 0)) as middle:
        host, port = sender.address.split(":")
        threads, sockets = [], []

        def serve():
            # The first connection only finds out whether somebody listens.
            for _ in range(2):
                client, _ = middle.accept()
                server = socket.create_connection((host, int(port)))
                sockets.extend((client, server))
                for pair in ((client, server), (server, client)):
                    threads.append(threading.Thread(target=_pass_on, args=(*pair, seen)))
                    threads[-1].start()

        serving = threading.Thread(target=serve)
        serving.start()
        with _connected(f"127.0.0.1:{middle.getsockname()[1]}", SECRET) as receiver:
            receiver.send(b"the quick brown fox")
            assert _frames(sender, 1)[0][0][1] == b"the quick brown fox"
        serving.join()
        for thread in threads:
            thread.join()
        for end in sockets:
            end.close()
    assert b"CURVE" in seen
    assert b"quick" not in seen


@pytest.mark.parametrize("secret", ["", "fifteen letters", 16 * b"x"])
def test_a_bad_secret_is_refused_without_being_shown(secret):
    with pytest.raises(ArgumentError, match="secret (has|must be)") as raised:
        SenderChannel("127.0.0.1:0", secret, DEFAULTS)
    assert "letters" not in str(raised.value)
    with pytest.raises(ArgumentError, match="secret (has|must be)"):
        ReceiverChannel("127.0.0.1:1", secret, DEFAULTS, time.monotonic() + 1)


def test_between_machines_a_secret_is_needed():
    with pytest.raises(
        ArgumentError, match=r"0\.0\.0\.0 is not a loopback address.*needs a secret"
    ):
        SenderChannel("0.0.0.0:0", None, DEFAULTS)
    with pytest.raises(ArgumentError, match=r"192\.0\.2\.1 is not a loopback address"):
        ReceiverChannel("192.0.2.1:29500", None, DEFAULTS, time.monotonic() + 1)
    with _listening(SECRET, address="0.0.0.0:0") as sender:
        port = sender.address.rpartition(":")[2]
        with _connected(f"127.0.0.1:{port}", SECRET) as receiver:
            assert receiver.reached == "127.0.0.1"


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:99999", "0:0", "nowhere.invalid:1"])
def test_a_bad_address_is_refused_by_the_sender(address):
    with pytest.raises(ArgumentError, match="address|can't listen"):
        SenderChannel(address, SECRET, DEFAULTS)


@pytest.mark.parametrize("timeout_s", [math.nan, "5"])
def test_a_timeout_that_is_no_number_is_refused(timeout_s):
    with sessions(1) as (session, (end,)):
        for wait in (end.receive, end.poll, lambda s: session.answers(Ready, "Offer", s)):
            with pytest.raises(ArgumentError, match="timeout_s must be a number"):
                wait(timeout_s)


def test_a_name_may_come_to_mean_something_while_it_is_waited_for(monkeypatch):
    known = socket.getaddrinfo
    asked = []

    def getaddrinfo(host, *arguments, **options):
        if host != "trainer":
            return known(host, *arguments, **options)
        asked.append(host)
        if len(asked) < 3:
            raise socket.gaierror(-2, "Name or service not known")
        return known("127.0.0.1", *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu") as session:
        _, _, port = session.address.rpartition(":")
        with Session.connect(f"trainer:{port}", device="cpu", settings=QUICK) as end:
            assert end.epoch == session.epoch
    assert len(asked) >= 3


@pytest.mark.parametrize("hangs", [False, True])
def test_a_name_that_never_means_anything_is_a_late_sender(monkeypatch, hangs):
    def getaddrinfo(*_, **__):
        time.sleep(20 if hangs else 0)
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    begin = time.monotonic()
    with pytest.raises(RendezvousTimeout, match=r"trainer:1 .*name"):
        Session.connect("trainer:1", device="cpu", settings=Settings(connect_timeout_s=0.5))
    assert time.monotonic() - begin < 2


@pytest.mark.parametrize("address", ["127.0.0.1", "127.0.0.1:0", f"{'x' * 64}.invalid:1"])
def test_a_bad_address_is_refused_by_a_receiver(address):
    with pytest.raises(ArgumentError, match="address|can't connect"):
        ReceiverChannel(address, SECRET, DEFAULTS, time.monotonic() + 1)


@pytest.mark.fault(27)
def test_a_taken_port_is_named_and_a_closed_channel_frees_its_port():
    with _listening() as sender:
        with pytest.raises(AddressInUse, match=sender.address):
            SenderChannel(sender.address, None, DEFAULTS)
        address = sender.address
    with _listening(address=address) as again:
        assert again.address == address


def test_nothing_listens_on_another_address():
    def listening():
        connections = psutil.Process().net_connections("tcp")
        return {c.laddr for c in connections if c.status == psutil.CONN_LISTEN}

    before = listening()
    with _listening(SECRET) as sender:
        assert {f"{ip}:{port}" for ip, port in listening() - before} == {sender.address}
    assert listening() == before


def test_a_sender_that_is_not_there_is_a_rendezvous_timeout():
    with socket.create_server(("127.0.0.1", 0)) as held:
        address = f"127.0.0.1:{held.getsockname()[1]}"
    begin = time.monotonic()
    with pytest.raises(RendezvousTimeout, match=f"no sender listens on {address}"):
        ReceiverChannel(address, SECRET, DEFAULTS, begin + 0.5)
    assert 0.3 < time.monotonic() - begin < 2


def test_a_listener_that_says_nothing_is_a_rendezvous_timeout():
    with socket.create_server(("127.0.0.1", 0)) as silent:
        address = f"127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(RendezvousTimeout, match="has not answered as a sender"):
            ReceiverChannel(address, SECRET, DEFAULTS, time.monotonic() + 0.5)


@pytest.mark.fault(29)
def test_silent_and_garbled_connections_disturb_nobody():
    with _listening(SECRET) as sender, contextlib.ExitStack() as stack:
        host, port = sender.address.split(":")
        for i in range(200):
            stranger = stack.enter_context(socket.create_connection((host, int(port))))
            if i % 2:
                stranger.sendall(bytes([i]) * 500)
        with _connected(sender.address, SECRET) as receiver:
            receiver.send(b"hello")
            ((peer, frame),), _ = _frames(sender, 1)
            assert frame == b"hello"
            stack.close()
            assert _gone(sender, {peer}, 0.5) == set()


def test_the_end_of_a_receiver_is_noticed_within_a_second():
    with _listening(SECRET) as sender, _connected(sender.address, SECRET) as staying:
        staying.send(b"staying")
        with _connected(sender.address, SECRET) as leaving:
            leaving.send(b"leaving")
            peers = {frame: peer for peer, frame in _frames(sender, 2)[0]}
            assert _gone(sender, peers.values(), 0.3) == set()
        begin = time.monotonic()
        assert _gone(sender, peers.values()) == {peers[b"leaving"]}
        assert time.monotonic() - begin < 1
        assert not sender.send(peers[b"leaving"], b"anybody?")
        assert sender.send(peers[b"staying"], b"still here?")
        # Questions whether it is still there are not for it to see.
        assert _received(staying, 1) == [b"still here?"]


def test_what_a_peer_said_before_it_left_still_arrives():
    with _listening(SECRET) as sender:
        with _connected(sender.address, SECRET) as receiver:
            receiver.send(b"hello")
            ((peer, _),), _ = _frames(sender, 1)
            for i in range(50):
                receiver.send(b"%d" % i)
        time.sleep(0.2)
        frames, gone = _frames(sender, 50, peers={peer})
        assert frames == [(peer, b"%d" % i) for i in range(50)]
        assert gone | _gone(sender, {peer}) == {peer}

    sender = SenderChannel("127.0.0.1:0", None, DEFAULTS)
    with _connected(sender.address) as receiver:
        receiver.send(b"hello")
        ((peer, _),), _ = _frames(sender, 1)
        for i in range(50):
            sender.send(peer, b"%d" % i)
        sender.close()
        time.sleep(0.2)
        assert _received(receiver, 50) == [b"%d" % i for i in range(50)]
        assert receiver.lost


def test_a_receiver_that_has_lost_its_sender_does_not_connect_to_the_next_one():
    sender = SenderChannel("127.0.0.1:0", None, DEFAULTS)
    address = sender.address
    with _connected(address) as receiver:
        sender.close()
        deadline = time.monotonic() + 2
        while not receiver.lost and time.monotonic() < deadline:
            receiver.wait(0.05)
        assert receiver.lost
        with _listening(address=address) as successor:
            with pytest.raises(PeerLost, match=f"{address} has ended the connection"):
                receiver.send(b"hello?")
            time.sleep(0.5)
            successor.wait(0.05, ())
            assert not successor.received


def test_a_frame_above_the_cap_costs_its_sender_the_connection():
    small = Settings(max_frame_bytes=1000)
    with _listening(settings=small) as sender, _connected(sender.address) as receiver:
        receiver.send(b"x" * 1000)
        ((peer, frame),), _ = _frames(sender, 1)
        assert frame == b"x" * 1000
        receiver.send(b"x" * 1001)
        assert _gone(sender, {peer}) == {peer}


def test_frames_of_several_parts_are_no_frames():
    with _listening() as sender, zmq.Context() as context:
        stranger = context.socket(zmq.DEALER)
        stranger.linger = 1000
        stranger.connect(f"tcp://{sender.address}")
        stranger.send_multipart([b"one", b"two", b"three"])
        stranger.send(b"good")
        assert [frame for _, frame in _frames(sender, 2)[0]] == [b"\xc1", b"good"]
        stranger.close()


def test_an_interrupted_send_leaves_whole_frames():
    with _listening() as sender, _connected(sender.address) as receiver:
        receiver.send(b"here")
        ((peer, _),), _ = _frames(sender, 1)
        got, number, interrupt = [], 0, None
        while interrupt is None or interrupt.where is not None:
            number += 1
            interrupt = Interrupt((sender_channel,), number)
            interrupt.run(lambda: sender._try_to_send(peer, b"maybe"))
            assert sender.send(peer, b"%d" % number)
            while not got or got[-1] != b"%d" % number:
                got += _received(receiver, 1)
        assert number > 3
        assert {*got} == {b"maybe", *(b"%d" % n for n in range(1, number + 1))}


def test_closing_is_idempotent_quick_and_final():
    with _listening(SECRET) as sender:
        receiver = ReceiverChannel(sender.address, SECRET, DEFAULTS, time.monotonic() + 5)
        receiver.send(b"hello")
        _frames(sender, 1)
        begin = time.monotonic()
        for _ in range(2):
            receiver.close()
            sender.close()
        assert time.monotonic() - begin < 1
        for use in (
            lambda: receiver.send(b""),
            lambda: receiver.wait(0),
            lambda: sender.send(b"peer", b""),
            lambda: sender.wait(0, ()),
        ):
            with pytest.raises(SessionStateError, match="closed"):
                use()


def test_closing_does_not_wait_for_a_peer_that_reads_nothing():
    with _listening() as sender, zmq.Context() as context:
        deaf = context.socket(zmq.DEALER)
        deaf.linger = 0
        deaf.rcvhwm = 1
        deaf.connect(f"tcp://{sender.address}")
        deaf.send(b"hello")
        ((peer, _),), _ = _frames(sender, 1)
        for _ in range(40):
            sender.send(peer, bytes(1 << 20))
        begin = time.monotonic()
        sender.close()
        assert time.monotonic() - begin < 2
        deaf.close(0)


def test_opening_and_closing_leaves_no_threads_and_no_files():
    process = psutil.Process()
    seen = []
    for _ in range(12):
        with _listening(SECRET) as sender, _connected(sender.address, SECRET) as receiver:
            receiver.send(b"hello")
            _frames(sender, 1)
        seen.append((process.num_fds(), process.num_threads()))
    # A thread that was joined may be counted for a moment longer.
    deadline = time.monotonic() + 5
    while (last := (process.num_fds(), process.num_threads())) > seen[2]:
        assert time.monotonic() < deadline, (seen, last)
        time.sleep(0.01)
