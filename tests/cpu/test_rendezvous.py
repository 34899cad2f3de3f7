"""How ranks meet. Ranks are threads here."""

from __future__ import annotations

import json
import os
import signal
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import psutil
import pytest

from packedcomm.communicators.bounded_store import BoundedStore
from packedcomm.communicators.listener import Address
from packedcomm.communicators.rank_record import RankRecord
from packedcomm.communicators.rendezvous import Listener, Rendezvous
from packedcomm.errors import (
    AddressInUse,
    ArgumentError,
    ConfigMismatch,
    PackedCommError,
    ProtocolError,
    RemoteError,
    RendezvousTimeout,
    VersionMismatch,
)
from tests.helpers.ranks import AddressBox, run_ranks


def _listening():
    return {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.Process().net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }


def _meet(address, rank, world_size, timeout_s=10.0, **said):
    said = {"backend": "test", "device": "cpu"} | said
    with Rendezvous(address, rank, world_size, timeout_s) as rendezvous:
        message = rendezvous.agree(**said)
        rendezvous.finish()
    return message


def _meet_all(ranks, world_size, /, timeout_s=10.0, **said):
    """What each of `ranks` returned or raised. `said` maps names to one value per rank."""
    with Listener.bind("127.0.0.1:0") as listener:

        def one(index):
            address = listener if ranks[index] == 0 else listener.address
            own = {name: values[index] for name, values in said.items()}
            own_world_size = own.pop("world_size", world_size)
            try:
                return _meet(address, ranks[index], own_world_size, timeout_s, **own)
            except PackedCommError as error:
                return error

        with ThreadPoolExecutor(len(ranks)) as pool:
            results = list(pool.map(one, range(len(ranks))))
    # Whatever happened, the port is free again.
    Listener.bind(listener.address).close()
    return results


@pytest.mark.parametrize("world_size", [1, 2, 5])
def test_every_rank_gets_rank_0s_message(world_size):
    messages = [lambda: b"\x00from rank 0\xff", *[bytes] * (world_size - 1)]
    results = _meet_all(range(world_size), world_size, message=messages)
    assert results == [b"\x00from rank 0\xff"] * world_size


def test_rank_0_may_pass_a_string_and_the_others_may_come_first():
    with Listener.bind("127.0.0.1:0") as listener:
        address = listener.address
    with ThreadPoolExecutor(2) as pool:
        late = pool.submit(_meet, address, 1, 2)
        time.sleep(0.3)
        first = pool.submit(_meet, address, 0, 2)
        assert (first.result(), late.result()) == (b"", b"")


@pytest.mark.parametrize("host", ["127.0.0.1", "[::1]"])
def test_only_the_given_address_is_listened_on(host):
    before = _listening()
    with Listener.bind(f"{host}:0") as listener:
        expected = (host.strip("[]"), listener.port)
        address = listener.address
        with ThreadPoolExecutor(1) as pool, Rendezvous(listener, 0, 2, 10.0) as rendezvous:
            assert _listening() - before == {expected}
            other = pool.submit(_meet, address, 1, 2)
            rendezvous.agree("test", "cpu")
            assert _listening() - before == {expected}
            rendezvous.finish()
            other.result()
    assert _listening() <= before


def test_on_every_interface_rank_0_learns_its_address_from_the_others():
    with (
        Listener.bind("0.0.0.0:0") as listener,
        ThreadPoolExecutor(1) as pool,
        Rendezvous(listener, 0, 2, 10.0) as rendezvous,
    ):
        other = pool.submit(_meet, f"127.0.0.1:{listener.port}", 1, 2)
        rendezvous.agree("test", "cpu")
        assert rendezvous.local_host == "127.0.0.1"
        rendezvous.finish()
        other.result()


@pytest.mark.fault(1)
def test_missing_ranks_are_named_on_every_rank_that_came():
    started = time.monotonic()
    results = _meet_all([0, 2], 4, timeout_s=1.0)
    assert time.monotonic() - started < 3.0
    for result in results:
        assert isinstance(result, RendezvousTimeout)
        assert "ranks [1, 3] are missing" in str(result)


def test_a_missing_rank_0_is_named_with_its_address():
    with Listener.bind("127.0.0.1:0") as listener:
        address = listener.address
    started = time.monotonic()
    with pytest.raises(RendezvousTimeout, match=rf"{address}: ranks \[0\] are missing"):
        _meet(address, 1, 2, timeout_s=0.5)
    assert time.monotonic() - started < 1.5


def test_a_rank_0_that_listens_but_never_serves_is_missing():
    with Listener.bind("127.0.0.1:0") as listener:
        started = time.monotonic()
        with pytest.raises(RendezvousTimeout, match=r"ranks \[0\] are missing"):
            _meet(listener.address, 1, 2, timeout_s=1.0)
        assert time.monotonic() - started < 2.0


def _arrive(listener, rank, data):
    """Publish `data` as a rank's record, and nothing more."""
    store = BoundedStore.join(Address.parse(listener.address), time.monotonic() + 5)
    store.set(f"arrival/{rank}", data)
    return store


def _record(rank, world_size, /, **other):
    record = RankRecord(rank=rank, world_size=world_size, backend="test", device="cpu")
    return json.dumps(json.loads(record.to_json()) | other).encode()


@pytest.mark.fault(1)
def test_a_rank_that_goes_silent_after_arriving_is_named():
    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(2) as pool:
        silent = pool.submit(_arrive, listener, 1, _record(1, 3))
        busy = pool.submit(_meet, listener.address, 2, 3)
        with pytest.raises(RendezvousTimeout, match=r"ranks \[1\] are missing after 1\.[0-9] s"):
            _meet(listener, 0, 3, timeout_s=1.5)
        silent.result().close()
        busy.result()


@pytest.mark.fault(1, 3)
def test_a_stopped_rank_0_is_named_and_does_not_hang_the_others():
    box = AddressBox(2)
    message, seconds = run_ranks(_stop_rank_0, 2, box, lost=(0,))[1]
    assert "ranks [0] are missing" in message
    assert seconds < 4.0


def _stop_rank_0(rank, world_size, box):
    endpoint = box.endpoint(rank)
    if rank == 0:
        with Rendezvous(endpoint, rank, world_size, 10.0):
            os.kill(os.getpid(), signal.SIGSTOP)
    started = time.monotonic()
    try:
        _meet(endpoint, rank, world_size, timeout_s=2.0)
    except RendezvousTimeout as error:
        return str(error), time.monotonic() - started
    raise AssertionError("met a stopped rank")


@pytest.mark.parametrize(
    "data",
    [
        b"no json",
        b"\xff\xfe",
        b"[" * 4000,
        b"[]",
        b"{}",
        b"x" * 5000,
        _record(1, 2, rank=0),
        _record(1, 2, rank="1"),
        _record(1, 2, world_size=2.0),
        _record(1, 2, extra=1),
        _record(1, 2, pid=True),
    ],
)
def test_a_hostile_record_is_a_protocol_error(data):
    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(1) as pool:
        hostile = pool.submit(_arrive, listener, 1, data)
        with pytest.raises(ProtocolError, match="record of rank 1"):
            _meet(listener, 0, 2, timeout_s=5.0)
        hostile.result().close()


@pytest.mark.parametrize("data", [b"{", b"[1]", b'["Nonsense", ""]', b'"SystemExit"', b"[" * 9000])
def test_a_hostile_failure_is_a_protocol_error(data):
    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(1) as pool:

        def fail():
            store = BoundedStore.join(Address.parse(listener.address), time.monotonic() + 5)
            store.set("failure", data)
            return store

        hostile = pool.submit(fail)
        with pytest.raises(ProtocolError, match="malformed failure"):
            _meet(listener, 0, 2, timeout_s=5.0)
        hostile.result().close()


def test_two_processes_with_one_rank_are_a_mismatch_on_every_rank():
    results = _meet_all([0, 1, 1, 2], 4)
    for result in results:
        assert isinstance(result, ConfigMismatch)
        assert "rank 1 is claimed twice" in str(result)
        assert f"process {os.getpid()} on {socket.gethostname()}" in str(result)


def _claim_rank_1_twice(address, pool, world_size):
    """Two processes claim rank 1 and both have failed when this returns."""
    claims = [pool.submit(_meet, address, 1, world_size) for _ in range(2)]
    for claim in claims:
        assert isinstance(claim.exception(), ConfigMismatch)


def test_a_rank_that_comes_just_after_a_failure_learns_of_it():
    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(3) as pool:
        first = pool.submit(_meet, listener, 0, 3)
        _claim_rank_1_twice(listener.address, pool, 3)
        time.sleep(0.3)
        with pytest.raises(ConfigMismatch, match="rank 1 is claimed twice"):
            _meet(listener.address, 2, 3)
        assert isinstance(first.exception(), ConfigMismatch)


def test_a_rank_that_is_slow_to_look_learns_of_a_failure():
    everyone_came = threading.Event()

    def message():
        everyone_came.set()
        time.sleep(0.5)
        raise ValueError("not the first failure")

    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(3) as pool:
        first = pool.submit(_meet, listener, 0, 3, message=message)

        def slow():
            with Rendezvous(listener.address, 2, 3, 10.0) as rendezvous:
                get = rendezvous.store.get

                def get_slowly(key):
                    time.sleep(0.4)
                    return get(key)

                rendezvous.store.get = get_slowly
                rendezvous.agree("test", "cpu")

        slowly = pool.submit(slow)
        once = pool.submit(_meet, listener.address, 1, 3)
        assert everyone_came.wait(5.0)
        for again in (lambda: _meet(listener.address, 1, 3), once.result, slowly.result):
            with pytest.raises(ConfigMismatch, match="rank 1 is claimed twice"):
                again()
        assert isinstance(first.exception(), ValueError)


def test_different_world_sizes_are_a_mismatch_on_every_rank():
    results = _meet_all([0, 1, 2], 3, world_size=[3, 3, 4])
    for result in results:
        assert isinstance(result, ConfigMismatch)
        assert "world_size 3" in str(result)
        assert "rank 2" in str(result)
        assert "world_size 4" in str(result)


def test_different_backends_are_a_mismatch():
    for result in _meet_all([0, 1], 2, backend=["gloo", "nccl"]):
        assert isinstance(result, ConfigMismatch)
        assert "backend 'gloo'" in str(result)
        assert "backend 'nccl'" in str(result)


@pytest.mark.fault(28)
def test_different_nccl_versions_name_both_versions_and_paths():
    results = _meet_all(
        [0, 1], 2, nccl_version=["2.28.9", "2.27.5"], nccl_path=["/a/libnccl", "/b/libnccl"]
    )
    for result in results:
        assert isinstance(result, VersionMismatch)
        for text in ("2.28.9 from /a/libnccl", "2.27.5 from /b/libnccl", "rank 0", "rank 1"):
            assert text in str(result)


def test_equal_versions_from_different_paths_are_fine():
    assert _meet_all([0, 1], 2, nccl_version=["2.28.9"] * 2, nccl_path=["/a", "/b"]) == [b"", b""]


def test_a_failure_on_one_rank_reaches_the_others_with_its_traceback():
    def fail():
        raise ValueError("no unique id today")

    with Listener.bind("127.0.0.1:0") as listener, ThreadPoolExecutor(2) as pool:
        others = [pool.submit(_meet, listener.address, rank, 3) for rank in (1, 2)]
        with pytest.raises(ValueError, match="today"):
            _meet(listener, 0, 3, message=fail)
        for other in others:
            error = other.exception()
            assert isinstance(error, RemoteError)
            assert "rank 0 failed" in str(error)
            assert "no unique id today" in str(error)
            assert "in fail" in str(error)


def test_arguments_are_checked_before_anything_is_opened():
    before = _listening()
    with Listener.bind("127.0.0.1:0") as listener:
        for address, rank, world_size, timeout_s in (
            ("127.0.0.1:0", 0, 2, 1.0),
            ("127.0.0.1:0", 1, 2, 1.0),
            (listener, 1, 2, 1.0),
            ("127.0.0.1:1", 2, 2, 1.0),
            ("127.0.0.1:1", 0, 0, 1.0),
            ("nonsense", 1, 2, 1.0),
        ):
            with pytest.raises(ArgumentError):
                Rendezvous(address, rank, world_size, timeout_s)
    assert _listening() <= before


def test_the_longest_timeout_can_be_waited_for():
    assert _meet_all([0, 1], 2, timeout_s=1e7) == [b"", b""]


@pytest.mark.fault(27)
def test_a_taken_address_is_named():
    with (
        Listener.bind("127.0.0.1:0") as listener,
        pytest.raises(AddressInUse, match=listener.address),
    ):
        Rendezvous(listener.address, 0, 2, 1.0)


def test_many_meetings_leave_no_thread_or_descriptor_behind():
    _meet_all([0, 1], 2)
    process = psutil.Process()
    descriptors, threads = process.num_fds(), threading.active_count()
    for _ in range(10):
        assert _meet_all([0, 1], 2) == [b"", b""]
    assert process.num_fds() <= descriptors
    assert threading.active_count() <= threads
