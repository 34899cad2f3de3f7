"""What the fuzzer has found and starts from, checked without it: equal round trips or typed errors,
bounded memory and time."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Iterator
from contextlib import suppress

import pytest

from packedcomm.errors import ProtocolError
from packedcomm.session.frames import decode
from packedcomm.session.messages import MESSAGES, Hello, Offer, Ready, Staged, Welcome
from tests.fuzz.checks import CHECKS, bounded_memory
from tests.fuzz.corpus import read_corpus
from tests.fuzz.seeds import SEEDS, dictionary, frames_by_message

LARGE_BYTES = 1 << 18

# Of a processor's time; far more than any takes.
SECONDS_EACH = 5.0


@pytest.fixture
def traced() -> Iterator[None]:
    tracemalloc.start()
    yield
    tracemalloc.stop()


def _checked(target: str, data: bytes, seconds: float) -> bool:
    begin = time.thread_time()
    valid = CHECKS[target](data)
    took = time.thread_time() - begin
    assert took < seconds, f"{took:.1f} s for {len(data):,} bytes: {data[:40]!r}"
    return valid


@pytest.mark.fault(30)
@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("target", CHECKS)
def test_every_kept_input_is_a_value_or_a_typed_error(target):
    kept = read_corpus(target)
    valid = [_checked(target, data, SECONDS_EACH) for data in kept]
    assert len(kept) >= 20
    assert any(valid)
    assert not all(valid)


def test_kept_frames_are_of_the_present_format():
    # Where fields change the fuzzer has to run again: what it had found ends early then.
    kinds = set()
    for frame in read_corpus("frames"):
        with suppress(ProtocolError):
            kinds.add(type(decode(frame)[1]))
    assert kinds >= {Hello, Welcome, Offer, Ready, Staged}


@pytest.fixture(params=CHECKS)
def seeds(request) -> tuple[str, list[bytes]]:
    return request.param, SEEDS[request.param]()


# Seeds are drawn before tracing begins: it makes that slow.
def test_every_seed_is_a_value_or_a_typed_error(seeds, traced):
    target, drawn = seeds
    valid = [_checked(target, data, SECONDS_EACH) for data in drawn]
    assert any(valid)


def test_there_are_valid_seeds_of_every_message():
    frames = frames_by_message()
    assert set(frames) == set(MESSAGES)
    for name, found in frames.items():
        assert found, name
        assert all(type(decode(frame)[1]).__name__ == name for frame in found)


def test_the_dictionary_names_every_message():
    words = dictionary("frames")
    for name in MESSAGES:
        assert "".join(f"\\x{byte:02x}" for byte in name.encode()) in words


def test_the_corpus_is_small():
    kept = [read_corpus(target) for target in CHECKS]
    assert sum(len(inputs) for inputs in kept) <= 600
    # As base64 in the repository: below 200 kB.
    assert sum(len(data) for inputs in kept for data in inputs) <= 140_000


def _array(entry: bytes) -> bytes:
    count = LARGE_BYTES // len(entry)
    return b"\xdd" + count.to_bytes(4, "big") + entry * count


# Up to the regions.
READY = b"\x93\x00\xa5Ready\x92\xc3"

# Each with where its reading ends, None where it is valid: past its header.
LARGE = {
    "empty arrays": (READY + _array(b"\x90"), "Region has 5 fields, 0 came"),
    "arrays of an array": (READY + _array(b"\x91\x90"), "Region has 5 fields, 1 came"),
    "texts of one letter": (READY + _array(b"\xa2\xc3\xbf"), "expected, not str"),
    "a region each": (
        READY + _array(b"\x95\x00\x90\x90\xa4int8\xcb?\xf0\x00\x00\x00\x00\x00\x00"),
        None,
    ),
    "pairs with a number for a name": (
        b"\x93\x00\xa6Staged\x94\xcb" + bytes(8) + b"\xc4\x00" + _array(b"\x92\x00\x90") + b"\x90",
        "a name must be text, not int",
    ),
    "a text of wide letters": (
        b"\x93\x00\xa5Close\x92\xdb"
        + LARGE_BYTES.to_bytes(4, "big")
        + "\U000e0001".encode() * (LARGE_BYTES // 4)
        + b"\xc3",
        None,
    ),
    "a number that is an array": (b"\x93" + _array(b"\x90") + b"\xa5Close\x90", "is not one"),
    "a name that is an array": (b"\x93\x00" + _array(b"\x90") + b"\x90", "there is no message"),
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", LARGE)
def test_memory_stays_in_proportion_to_a_large_frame(name):
    frame, reason = LARGE[name]
    assert _checked("frames", frame, SECONDS_EACH) == (reason is None)
    if reason is not None:
        with pytest.raises(ProtocolError, match=reason):
            decode(frame)


def _document(tensors: str = "", attributes: str = "") -> bytes:
    return f'{{"attributes":{{{attributes}}},"tensors":[{tensors}],"version":1}}'.encode()


LARGE_DOCUMENTS = {
    "empty arrays": _document("[]," * 80_000 + "[]"),
    "empty objects as attributes": _document(attributes='"a":[' + "{}," * 80_000 + "{}]"),
    "dimensions": _document('["a","int8",[' + "0," * 120_000 + "0]]"),
    "tensors": _document(",".join(f'["{i}","int8",[]]' for i in range(15_000))),
    "a long dtype": _document('["a","' + "x" * LARGE_BYTES + '",[]]'),
    "long names": _document(",".join('["' + "n" * 4000 + '","int8",[1]]' for i in range(60))),
}


@pytest.mark.usefixtures("traced")
@pytest.mark.parametrize("name", LARGE_DOCUMENTS)
def test_memory_stays_in_proportion_to_a_large_manifest(name):
    _checked("manifests", LARGE_DOCUMENTS[name], SECONDS_EACH)


@pytest.mark.usefixtures("traced")
def test_the_check_of_memory_sees_what_is_too_much():
    with pytest.raises(AssertionError, match="bytes for 10,"), bounded_memory(10):
        assert bytearray(1 << 20)
