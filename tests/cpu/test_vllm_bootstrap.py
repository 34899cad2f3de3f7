"""vLLM's bootstrap: the bytes of the unique id, and the meeting with vLLM's own process group."""

from __future__ import annotations

import ctypes
import pickle
import socket
import sys
import threading
import time
from types import ModuleType

import pytest

from packedcomm.communicators.listener import Address, Listener
from packedcomm.communicators.vllm_bootstrap import (
    decode_unique_id,
    encode_unique_id,
    exchange_unique_id,
)
from packedcomm.errors import ArgumentError, ProtocolError, RendezvousTimeout
from tests.helpers.ranks import AddressBox, run_ranks
from tests.helpers.vllm_peer import load_vllm_peer, needs_vllm_files

MODULE = "vllm.distributed.device_communicators.pynccl_wrapper"
UNIQUE_ID = bytes(range(128))


class _UniqueId(ctypes.Structure):
    _fields_ = (("internal", ctypes.c_byte * 128),)


@pytest.fixture
def vllm_class(monkeypatch):
    """A class of vLLM's layout under vLLM's name, so that pickle finds it there."""
    module = ModuleType(MODULE)
    structure = type("ncclUniqueId", (_UniqueId,), {"__module__": MODULE})
    module.ncclUniqueId = structure
    for name in ("vllm", "vllm.distributed", "vllm.distributed.device_communicators"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return structure


@pytest.mark.parametrize("unique_id", [UNIQUE_ID, bytes(128), b"\xff" * 128, b"\x94." * 64])
def test_what_is_written_is_the_pickle_that_vllm_writes(vllm_class, unique_id):
    theirs = pickle.dumps(vllm_class.from_buffer_copy(unique_id), protocol=4)
    assert encode_unique_id(unique_id) == theirs
    assert len(theirs) == 247


@pytest.mark.parametrize("protocol", [4, 5])
def test_what_vllm_writes_is_read_and_back(vllm_class, protocol):
    theirs = pickle.dumps(vllm_class.from_buffer_copy(UNIQUE_ID), protocol=protocol)
    assert decode_unique_id(theirs) == UNIQUE_ID
    loaded = pickle.loads(encode_unique_id(UNIQUE_ID))
    assert type(loaded) is vllm_class
    assert bytes(loaded) == UNIQUE_ID


@pytest.mark.parametrize("position", [0, 1, 2, 10, 60, 110])
def test_a_changed_prefix_is_a_protocol_error(position):
    data = bytearray(encode_unique_id(UNIQUE_ID))
    data[position] ^= 0x40
    with pytest.raises(ProtocolError, match="beginning"):
        decode_unique_id(bytes(data))


@pytest.mark.parametrize("position", [239, 243, 246])
def test_a_changed_suffix_is_a_protocol_error(position):
    data = bytearray(encode_unique_id(UNIQUE_ID))
    data[position] ^= 0x40
    with pytest.raises(ProtocolError, match="end"):
        decode_unique_id(bytes(data))


@pytest.mark.parametrize("data", [b"", b"x", bytes(246), bytes(248), bytes(1 << 20)])
def test_another_length_is_a_protocol_error(data):
    with pytest.raises(ProtocolError, match=f"{len(data)} bytes, not 247"):
        decode_unique_id(data)


def test_a_pickle_that_would_run_code_is_refused_unread():
    class Attack:
        def __reduce__(self):
            return (sys.exit, ("unpickled",))

    attack = pickle.dumps(Attack(), protocol=4)
    with pytest.raises(ProtocolError):
        decode_unique_id(attack + bytes(247 - len(attack)))


def test_an_id_of_another_length_is_not_written():
    with pytest.raises(ArgumentError, match="128 bytes, got 127"):
        encode_unique_id(bytes(127))


def _meet_vllm(rank, world_size, box, vllm_rank):
    endpoint = box.endpoint(rank)
    if isinstance(endpoint, Listener):
        address = Address(endpoint.host, endpoint.port)
    else:
        address = Address.parse(endpoint)
    if rank != vllm_rank:
        listener = endpoint if rank == 0 else None
        deadline = time.monotonic() + 20
        with exchange_unique_id(
            address, rank, world_size, deadline, lambda: UNIQUE_ID, listener
        ) as unique_id:
            # Rank 0 serves until the others have read the id; here, until they hung up.
            time.sleep(1.0 if rank == 0 else 0.0)
            return unique_id
    peer = load_vllm_peer()
    options = {}
    if rank == 0:
        # vLLM takes a socket over too; so the port is held all along.
        options["listen_socket"] = socket.socket(fileno=endpoint.detach())
    group = peer.StatelessProcessGroup.create(
        address.host, address.port, rank, world_size, store_timeout=20, **options
    )
    mine = peer.ncclUniqueId.from_buffer_copy(UNIQUE_ID) if rank == 0 else None
    received = group.broadcast_obj(mine, src=0)
    time.sleep(1.0 if rank == 0 else 0.0)
    return bytes(received)


@needs_vllm_files
@pytest.mark.parametrize("vllm_rank", [0, 1])
@pytest.mark.parametrize("world_size", [2, 3])
def test_vllms_own_process_group_meets_ours(vllm_rank, world_size):
    results = run_ranks(_meet_vllm, world_size, AddressBox(world_size), vllm_rank)
    assert results == [UNIQUE_ID] * world_size


def test_rank_0_says_how_many_ranks_are_there():
    listener = Listener.bind("127.0.0.1:0")
    address = Address("127.0.0.1", listener.port)
    started = time.monotonic()
    expected = r"rank 0 of 3 at 127\.0\.0\.1:\d+: only 1 of 3 ranks are there"
    with (
        pytest.raises(RendezvousTimeout, match=expected),
        exchange_unique_id(address, 0, 3, started + 3.0, lambda: UNIQUE_ID, listener),
    ):
        pass
    assert time.monotonic() - started < 3.5
    Listener.bind(str(address)).close()


def test_a_worker_without_a_trainer_names_rank_0():
    with Listener.bind("127.0.0.1:0") as listener:
        port = listener.port
    started = time.monotonic()
    with (
        pytest.raises(RendezvousTimeout, match="rank 0 is missing"),
        exchange_unique_id(Address("127.0.0.1", port), 1, 2, started + 0.5, bytes),
    ):
        pass
    assert time.monotonic() - started < 1.5


def test_a_trainer_that_listens_but_never_serves_is_a_timeout():
    with Listener.bind("127.0.0.1:0") as listener:
        started = time.monotonic()
        with (
            pytest.raises(RendezvousTimeout, match="rank 0 is missing"),
            exchange_unique_id(Address("127.0.0.1", listener.port), 1, 2, started + 1.0, bytes),
        ):
            pass
        assert time.monotonic() - started < 2.0


class GivenUpError(Exception):
    pass


def _give_up_after(seconds):
    end = time.monotonic() + seconds

    def check():
        if time.monotonic() >= end:
            raise GivenUpError

    return check


@pytest.mark.parametrize("workers", [0, 1])
def test_a_meeting_that_is_given_up_frees_the_port(workers):
    listener = Listener.bind("127.0.0.1:0")
    address = Address("127.0.0.1", listener.port)
    for attempt in range(3):
        started = time.monotonic()
        # Whoever has come already hears of it: the server has gone.
        client = _client_of(address, 3) if workers and attempt == 0 else None
        with (
            pytest.raises(GivenUpError),
            exchange_unique_id(address, 0, 3, started + 60.0, bytes, listener, _give_up_after(0.2)),
        ):
            pass
        assert time.monotonic() - started < 2.0
        listener = Listener.bind(str(address))
        if client is not None:
            client.join(5.0)
            assert not client.is_alive()
    listener.close()


def _client_of(address, world_size):
    def join():
        with (
            pytest.raises(RendezvousTimeout),
            exchange_unique_id(address, 1, world_size, time.monotonic() + 30.0, bytes),
        ):
            pass

    thread = threading.Thread(target=join)
    thread.start()
    return thread


def test_a_worker_gives_up_waiting_for_a_trainer():
    started = time.monotonic()
    with Listener.bind("127.0.0.1:0") as listener:
        port = listener.port
    with (
        pytest.raises(GivenUpError),
        exchange_unique_id(
            Address("127.0.0.1", port), 1, 2, started + 60.0, bytes, check=_give_up_after(0.2)
        ),
    ):
        pass
    assert time.monotonic() - started < 2.0
