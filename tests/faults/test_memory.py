"""A receiver that runs out of memory: every rank learns it, and smaller buffers help."""

from __future__ import annotations

import resource
from dataclasses import replace
from pathlib import Path

import pytest

from packedcomm.errors import CapacityError
from tests.helpers.peers import PATIENT, Receiving, in_place, staged, training, weights

# More than new threads and the allocator need for themselves, less than the weights have.
SLACK_BYTES = 80 << 20
TENSORS = 64
LARGE = replace(PATIENT, buffer_size_bytes=1 << 30)


def many():
    """128 MiB, which are one chunk of 1 GiB."""
    return weights(0.0, TENSORS)


def _without_memory(receiver):
    """From its second sync on this process can't have much more memory than it has."""
    receive = receiver.receive
    calls = []

    def receiving():
        calls.append(None)
        if len(calls) == 2:
            status = Path("/proc/self/status").read_text()
            size = int(status.partition("VmSize:")[2].split()[0]) * 1024
            resource.setrlimit(resource.RLIMIT_AS, (size + SLACK_BYTES,) * 2)
        return receive()

    receiver.receive = receiving


@pytest.mark.fault(17)
def test_a_receiver_without_memory_for_a_buffer_is_named_and_smaller_buffers_help():
    settings = LARGE
    with training(1, Receiving(in_place, make=many), settings=settings, sent=many()) as group:
        group.add(Receiving(in_place, _without_memory, make=many))
        group.session.buffer_size_bytes = 2 << 20
        first = group.sync(1.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        group.session.buffer_size_bytes = 1 << 30
        with pytest.raises(CapacityError, match="receiver rank 2: .*no memory for a buffer of"):
            group.sync(2.0)
        for peer in group.peers:
            outcome = peer.outcome()
            assert outcome.error == "CapacityError"
            assert "buffer_size_bytes" in outcome.text
            assert outcome.lasts
        group.session.buffer_size_bytes = 2 << 20
        new = group.sync(3.0)
        for peer in group.peers:
            outcome = peer.outcome()
            assert (outcome.state, outcome.shown, outcome.checksum) == ("committed", 2, new)


@pytest.mark.fault(17)
def test_a_receiver_without_memory_to_stage_is_named_before_any_data_and_the_others_go_on():
    with training(1, Receiving(make=many), settings=LARGE, sent=many()) as group:
        poor = group.add(Receiving(_staged_from_the_second_on, _without_memory, make=many))
        first = group.sync(1.0)
        assert [peer.outcome().checksum for peer in group.peers] == [first, first]
        with pytest.raises(CapacityError, match="receiver rank 2: no memory to stage"):
            group.sync(2.0)
        for peer in group.peers:
            outcome = peer.outcome()
            assert outcome.error == "CapacityError"
            assert (outcome.shown, outcome.checksum) == (1, first)
        poor.kill()
        new, _ = group.sync_at_last(3.0)
        assert group.peers[0].received().checksum == new


def _staged_from_the_second_on(tensors):
    """A staging target that lets its memory go after every commit."""
    target = staged(tensors)
    commit = target.commit

    def committing(manifest):
        commit(manifest)
        target.release()

    target.commit = committing
    return target
