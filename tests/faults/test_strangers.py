"""Crowds of connections that say nothing: what they cost the process that listens."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from dataclasses import replace

import pytest

from packedcomm.session.channel import HANDSHAKE_MS
from tests.helpers.peers import PATIENT, Outcome, Peer, eventually, training

STRANGERS = 600

# Beside connections: whoever looks has a descriptor too.
SLACK = 8

# ZeroMQ itself ends a silent connection a while later; by then it must be long gone.
CUT_S = HANDSHAKE_MS / 1000 / 3


def _descriptors():
    return len(os.listdir("/proc/self/fd"))  # noqa: PTH208


def _crowd(connection, address):
    """The main function of strangers' process: they come one by one, and stay as long as they may.
    Each command is answered with how many still do."""
    host, _, port = address.rpartition(":")
    strangers = []
    for _ in range(STRANGERS):
        stranger = socket.create_connection((host, int(port)), timeout=20)
        with contextlib.suppress(OSError):
            stranger.recv(1)  # of ZeroMQ's greeting: it has been let in
        stranger.setblocking(False)
        strangers.append(stranger)
    while True:
        connection.send(Outcome("stay", detail=sum(map(_is_open, strangers))))
        connection.recv()


def _is_open(stranger):
    try:
        while stranger.recv(1 << 10):
            pass
    except BlockingIOError:
        return True
    except OSError:
        pass
    return False


@pytest.mark.fault(29)
def test_a_crowd_that_comes_one_by_one_in_a_sync_keeps_few_descriptors_and_the_sync_goes_on():
    limit = 32
    with training(2, settings=replace(PATIENT, max_pending_connections=limit)) as group:
        before = _descriptors()
        crowd = []

        def look():
            crowd.append(Peer(_crowd, group.session.address))
            crowd[0].outcome()
            begin = time.monotonic()
            eventually(lambda: _descriptors() <= before + limit + SLACK, CUT_S)
            crowd[0].tell("count")
            assert crowd[0].outcome().detail <= limit
            assert time.monotonic() - begin < CUT_S

        try:
            # In the middle of the data.
            group.source.when(12, look)
            for value in (2.0, 3.0):
                new = group.sync(value)
                assert [peer.outcome().checksum for peer in group.peers] == [new, new]
            assert crowd
        finally:
            for peer in crowd:
                peer.end()
        eventually(lambda: _descriptors() <= before)
