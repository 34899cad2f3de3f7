"""Addresses, the listener, and what becomes of it when a `connect` gets bad arguments."""

from __future__ import annotations

import socket

import psutil
import pytest

from packedcomm import GlooCommunicator, NcclCommunicator
from packedcomm.communicators.listener import Address, Listener
from packedcomm.errors import AddressInUse, ArgumentError, SessionStateError


def _listening():
    return {
        (c.laddr.ip, c.laddr.port)
        for c in psutil.Process().net_connections("tcp")
        if c.status == psutil.CONN_LISTEN
    }


@pytest.mark.parametrize(
    ("text", "host", "port"),
    [
        ("127.0.0.1:80", "127.0.0.1", 80),
        ("node-1.cluster:65535", "node-1.cluster", 65535),
        ("[::1]:0", "::1", 0),
        ("[fe80::1%eth0]:5", "fe80::1%eth0", 5),
    ],
)
def test_an_address_is_parsed_and_written_back(text, host, port):
    address = Address.parse(text)
    assert (address.host, address.port, str(address)) == (host, port, text)


@pytest.mark.parametrize(
    "text",
    [
        "",
        ":",
        "host",
        "host:",
        ":80",
        "host:port",
        "host:-1",
        "host:65536",
        "host:8 0",
        "host:٣",
        "::1:80",
        "[::1]",
        "[::1]80",
        "[host]:80",
        "[]:80",
        "tcp://host:80",
        "user@host:80",
        "ho st:80",
        None,
        80,
    ],
)
def test_a_malformed_address_is_refused_and_quoted(text):
    with pytest.raises(ArgumentError) as raised:
        Address.parse(text)
    assert repr(text) in str(raised.value)


def test_a_listener_holds_the_port_that_the_system_chose():
    with Listener.bind("127.0.0.1:0") as listener:
        assert ("127.0.0.1", listener.port) in _listening()
        assert listener.address == f"127.0.0.1:{listener.port}"
        with pytest.raises(AddressInUse, match=listener.address):
            Listener.bind(listener.address)
    listener.close()
    assert listener.closed
    Listener.bind(listener.address).close()


def test_a_listener_takes_ipv6_in_brackets():
    with Listener.bind("[::1]:0") as listener:
        assert listener.address == f"[::1]:{listener.port}"
        assert ("::1", listener.port) in _listening()


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]"])
def test_every_interface_is_listened_on_only_by_its_own_name(host):
    with Listener.bind(f"{host}:0") as listener:
        assert (host.strip("[]"), listener.port) in _listening()


@pytest.mark.parametrize("host", ["0", "0x0", "00.0.0.0", "[::ffff:0.0.0.0]", "[0:0::0]"])
def test_other_spellings_of_every_interface_are_refused(host):
    with pytest.raises(ArgumentError, match=r"every interface|can't listen"):
        Listener.bind(f"{host}:0")


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.host.invalid"])
def test_an_address_that_is_not_this_machines_is_refused(host):
    with pytest.raises(ArgumentError, match=host):
        Listener.bind(f"{host}:0")


def test_a_used_listener_is_closed():
    listener = Listener.bind("127.0.0.1:0")
    socket.socket(fileno=listener.detach()).close()
    with pytest.raises(SessionStateError, match=listener.address):
        listener.detach()


CONNECTS = {
    "gloo": GlooCommunicator.connect,
    "unique id": lambda _, *ranks, **options: NcclCommunicator.from_unique_id(
        bytes(128), *ranks, device=0, **options
    ),
    "vllm": lambda listener, *ranks, **options: NcclCommunicator.from_vllm(
        "127.0.0.1", 1, *ranks, device=0, listener=listener, **options
    ),
}


@pytest.mark.parametrize("connect", ["gloo", "vllm"])
@pytest.mark.parametrize(
    "arguments",
    [(5, 2), (0, 0), (1, 2), ("0", 2)],
)
def test_a_listener_is_closed_when_arguments_are_bad(connect, arguments):
    listener = Listener.bind("127.0.0.1:0")
    with pytest.raises(ArgumentError):
        CONNECTS[connect](listener, *arguments)
    assert listener.closed


@pytest.mark.parametrize("connect", CONNECTS)
@pytest.mark.parametrize(
    "timeout_s", [0, -1.0, 1e7 + 1, 1e10, float("inf"), float("nan"), "5", None, True, 1j]
)
def test_a_timeout_that_no_timer_holds_is_refused(connect, timeout_s):
    listener = Listener.bind("127.0.0.1:0")
    with listener, pytest.raises(ArgumentError, match="timeout_s must be a number"):
        CONNECTS[connect](listener, 0, 1, timeout_s=timeout_s)
