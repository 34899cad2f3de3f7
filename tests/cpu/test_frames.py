"""Control messages as frames: round trips, every rule of every field, and any bytes at all."""

from __future__ import annotations

import math
import typing
from dataclasses import fields

import msgpack
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm.errors import PackedCommError, ProtocolError
from packedcomm.manifest import DTYPE_SIZES, Manifest, TensorSpec
from packedcomm.results import ChangeStatistics
from packedcomm.session.frames import decode, encode
from packedcomm.session.messages import (
    MESSAGES,
    Assemble,
    Beat,
    Cancel,
    Close,
    Commit,
    Committed,
    Connect,
    Connected,
    Failure,
    Hello,
    Message,
    NeedManifest,
    NoChange,
    Offer,
    Present,
    Proceed,
    Ready,
    Refused,
    Region,
    Staged,
    Welcome,
)
from packedcomm.session.states import SyncState
from packedcomm.settings import Settings

counts = st.integers(0, (1 << 63) - 1)
versions = st.integers(-(1 << 63) + 1, (1 << 63) - 1)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
short_names = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=15)
kinds = st.text("abcdefg", max_size=64)
any_floats = st.floats(width=64)

regions = st.integers(0, 4).flatmap(
    lambda n: st.builds(
        Region,
        counts,
        st.tuples(*[st.integers(0, 1 << 40)] * n),
        st.tuples(*[st.integers(0, 1000)] * n),
        st.sampled_from(list(DTYPE_SIZES)),
        st.floats(allow_nan=False, allow_infinity=False),
    )
)
hellos = st.builds(
    Hello,
    short_names,
    counts,
    texts,
    st.sampled_from(["cpu", "cuda"]),
    kinds,
    texts,
    st.lists(st.integers(1, 9), min_size=1, max_size=16).map(tuple),
)
formats = st.sampled_from(["vllm", "native"])
welcomes = st.builds(
    Welcome,
    short_names,
    st.integers(1, 4),
    st.integers(5, 1 << 40),
    st.sampled_from(["nccl", "gloo"]),
    formats,
    st.integers(1, 1 << 60),
    counts,
)
connects = st.one_of(
    st.builds(Connect, st.binary(min_size=128, max_size=128)),
    st.builds(Connect, st.just(b""), short_names),
)
states = st.sampled_from([str(state) for state in SyncState])
digest_bytes = st.integers(0, 20).flatmap(lambda n: st.binary(min_size=8 * n, max_size=8 * n))
changes = st.dictionaries(
    short_names, st.builds(ChangeStatistics, any_floats, any_floats, any_floats, counts)
)
messages = st.one_of(
    hellos,
    welcomes,
    st.builds(Refused, kinds, texts),
    st.builds(Assemble, st.integers(1, 4), st.integers(5, 1 << 40)),
    st.builds(Present),
    connects,
    st.builds(Connected),
    st.builds(
        Offer,
        versions,
        st.text("0123456789abcdef", min_size=64, max_size=64),
        texts,
        counts,
        st.integers(1, 1 << 60),
        st.sampled_from(["always", "staged", "never"]),
        st.booleans(),
        st.booleans(),
        st.booleans(),
    ),
    st.builds(Proceed, versions),
    st.builds(Ready, st.booleans(), st.none() | st.lists(regions, max_size=20).map(tuple)),
    st.builds(NeedManifest),
    st.builds(NoChange, versions, versions),
    st.builds(
        Staged,
        st.floats(0, 1e300),
        digest_bytes,
        changes,
        st.lists(st.text(min_size=1, max_size=100), max_size=16).map(tuple),
    ),
    st.builds(Commit, versions, counts),
    st.builds(Committed, versions),
    st.builds(Cancel, kinds, texts, texts, st.booleans()),
    st.builds(Failure, kinds, texts, texts, st.booleans()),
    st.builds(Beat, states, texts),
    st.builds(Close, texts, st.booleans()),
)
numbers = st.integers(0, (1 << 64) - 1)


@given(messages, numbers)
def test_a_message_comes_back_as_it_was(message, number):
    frame = encode(message, number)
    came, decoded = decode(frame)
    assert came == number
    # NaN isn't equal to itself; its repr is.
    assert repr(decoded) == repr(message)
    assert encode(decoded, number) == frame


def test_the_round_trips_cover_every_message():
    made = set()

    @settings(max_examples=500, database=None)
    @given(messages)
    def collect(message):
        made.add(type(message).__name__)

    collect()
    assert made == set(MESSAGES)


def _decodes_or_is_refused(frame: bytes) -> None:
    try:
        number, message = decode(frame)
    except ProtocolError:
        return
    assert isinstance(message, Message)
    assert decode(encode(message, number))[0] == number


@pytest.mark.fault(30)
@given(st.binary(max_size=300))
def test_any_bytes_are_a_message_or_a_protocol_error(data):
    _decodes_or_is_refused(data)


@given(messages, st.data())
def test_a_damaged_frame_is_a_message_or_a_protocol_error(message, data):
    frame = bytearray(encode(message, 1))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    _decodes_or_is_refused(bytes(frame[: data.draw(st.integers(0, len(frame)))]))


plain = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(1 << 63), (1 << 64) - 1)
    | st.text()
    | st.binary()
    # No surrogates: msgpack can't write them.
    .map(bytes)
    | any_floats,
    lambda inner: st.lists(inner) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=12,
)


@given(st.sampled_from(sorted(MESSAGES)), st.lists(plain, max_size=8), numbers)
def test_any_fields_are_a_message_or_a_protocol_error(name, values, number):
    try:
        frame = msgpack.packb([number, name, values])
    except UnicodeEncodeError:
        return
    _decodes_or_is_refused(frame)


class _Large(typing.NamedTuple):
    name: str
    frame: bytes


@pytest.mark.fault(30)
@pytest.mark.parametrize(
    "large",
    [
        _Large("an array of 2^32 - 1", b"\xdd\xff\xff\xff\xff"),
        _Large("text of 2^32 - 1 bytes", b"\xdb\xff\xff\xff\xff"),
        _Large("bytes of 2^32 - 1", b"\xc6\xff\xff\xff\xff"),
        _Large("a map of 2^32 - 1", b"\xdf\xff\xff\xff\xff"),
        _Large("an extension of 2^32 - 1 bytes", b"\xc9\xff\xff\xff\xff\x05"),
        _Large("arrays in arrays", b"\x91" * 100_000),
        _Large("arrays that announce much, in arrays", b"\xdd\x00\x00\xff\xff" * 20_000),
    ],
    ids=lambda large: large.name,
)
def test_announced_sizes_are_refused_before_anything_is_allocated(large):
    with pytest.raises(ProtocolError, match="malformed frame of"):
        decode(large.frame)


def test_an_empty_frame_and_trailing_bytes_are_refused():
    frame = encode(NeedManifest())
    assert decode(frame) == (0, NeedManifest())
    for wrong in (b"", frame + b"\x00", frame[:-1]):
        with pytest.raises(ProtocolError, match="malformed"):
            decode(wrong)


def test_a_frame_above_the_cap_is_neither_made_nor_read():
    small = Settings(max_frame_bytes=1000)
    message = Failure("X", "y" * 2000)
    with pytest.raises(ProtocolError, match=r"Failure has 2,\d+ bytes.*max_frame_bytes is 1,000"):
        encode(message, 0, small)
    with pytest.raises(ProtocolError, match=r"a frame has 2,\d+ bytes.*max_frame_bytes is 1,000"):
        decode(encode(message), small)


def test_more_entries_than_tensors_are_allowed_are_refused():
    region = Region(0, (), (), "int8", 1.0)
    frame = encode(Ready(True, (region,) * 200))
    with pytest.raises(ProtocolError, match="max_array_len"):
        decode(frame, Settings(max_tensors=100))


def test_the_manifest_of_a_mixture_of_experts_fits_a_frame():
    specs = [
        TensorSpec(f"model.layers.{i // 400}.mlp.experts.{i % 400}.weight", "bfloat16", (768, 2048))
        for i in range(18_867)
    ]
    manifest = Manifest(specs)
    offer = Offer(1, manifest.digest, manifest.to_json())
    _, decoded = decode(encode(offer))
    assert Manifest.from_json(decoded.manifest) == manifest


def _wire(name: str, *values: object) -> bytes:
    return msgpack.packb([0, name, list(values)])


_REGION = [0, [0], [4], "float32", 1.0]
_CHANGE = ["w", [1.0, 2.0, 3.0, 1]]
_HELLO = ["0.1.0", 1, "host", "cpu", "", "", [1], 1.0, 30.0, 1 << 26]
_WELCOME = ["e", 1, 2, "gloo", "native", 1, 0]
_OFFER = [1, "a" * 64, "", 1, 1 << 30, "staged", False, True, False, 1]


def _with(values: list[object], index: int, value: object) -> list[object]:
    return [*values[:index], value, *values[index + 1 :]]


def test_the_frames_that_the_bad_ones_are_made_from_are_good():
    assert decode(_wire("Ready", True, [_REGION]))[1].regions[0].dtype == "float32"
    assert decode(_wire("Hello", *_HELLO))[1].device == "cpu"
    assert decode(_wire("Welcome", *_WELCOME))[1].rank == 1


BAD = {
    "an unknown message": _wire("Shutdown"),
    "a name that is no text": msgpack.packb([0, 7, []]),
    "a negative number": msgpack.packb([-1, "NeedManifest", []]),
    "a number that is true": msgpack.packb([True, "NeedManifest", []]),
    "no envelope": msgpack.packb("NeedManifest"),
    "an envelope with an entry too many": msgpack.packb([0, "NeedManifest", [], 0]),
    "fields as a map": msgpack.packb([0, "Commit", {"version": 1}]),
    "a field too many": _wire("Commit", 1, 2, 3),
    "a field too few": _wire("Commit"),
    "a version that is a float": _wire("Commit", 1.0, 0),
    "a version that is true": _wire("Commit", True, 0),
    "a version above 63 bits": _wire("Commit", 1 << 63, 0),
    "text as bytes": _wire("Close", b"reason", True),
    "text that is not UTF-8": _wire("Close", "", True).replace(b"\xa0", b"\xa1\xff"),
    "a digest that is short": _wire("Offer", *_with(_OFFER, 1, "abc")),
    "a flag that is a number": _wire("Offer", *_with(_OFFER, 6, 1)),
    "an offer that verifies somehow": _wire("Offer", *_with(_OFFER, 5, "maybe")),
    "an offer without buffers": _wire("Offer", *_with(_OFFER, 4, 0)),
    "part of a digest": _wire("Staged", 0.0, b"1234567", [], []),
    "digests that are no bytes": _wire("Staged", 0.0, 3, [], []),
    "nesting": _wire("Staged", 0.0, [[1]], [], []),
    "a Beat in an unknown state": _wire("Beat", "asleep", ""),
    "a Beat that waits for many": _wire("Beat", "idle", "x" * 300),
    "a Connect to nobody": _wire("Connect", b"", ""),
    "a Connect to two at once": _wire("Connect", b"x" * 128, "h:1"),
    "a Connect with a long unique id": _wire("Connect", b"x" * 129, ""),
    "an Assemble as the sender": _wire("Assemble", 0, 2),
    "an Assemble outside the world": _wire("Assemble", 2, 2),
    "a region with a negative offset": _wire("Ready", True, [_with(_REGION, 1, [-1])]),
    "a region with two ranks": _wire("Ready", True, [_with(_REGION, 1, [0, 0])]),
    "a region whose shape overflows": _wire("Ready", True, [_with(_REGION, 2, [(1 << 63) - 1])]),
    "a region that ends beyond 63 bits": _wire("Ready", True, [_with(_REGION, 1, [(1 << 63) - 1])]),
    "a region of an unknown dtype": _wire("Ready", True, [_with(_REGION, 3, "float31")]),
    "a region whose scale is NaN": _wire("Ready", True, [_with(_REGION, 4, math.nan)]),
    "a region whose scale is infinite": _wire("Ready", True, [_with(_REGION, 4, math.inf)]),
    "a region whose scale is an integer": _wire("Ready", True, [_with(_REGION, 4, 1)]),
    "a region with 65 dimensions": _wire("Ready", True, [[0, [0] * 65, [1] * 65, "int8", 1.0]]),
    "a region that is a number": _wire("Ready", True, [3]),
    "seconds that are NaN": _wire("Staged", math.nan, b"", [], []),
    "seconds that are negative": _wire("Staged", -1.0, b"", [], []),
    "seconds that are an integer": _wire("Staged", 1, b"", [], []),
    "changes under one name twice": _wire("Staged", 0.0, b"", [_CHANGE, _CHANGE], []),
    "changes without a name": _wire("Staged", 0.0, b"", [_CHANGE[1:]], []),
    "changes under an array": _wire("Staged", 0.0, b"", [[["w"], _CHANGE[1]]], []),
    "changes with a count that is a float": _wire(
        "Staged", 0.0, b"", [["w", [1.0, 2.0, 3.0, 4.0]]], []
    ),
    "changes with a negative count": _wire("Staged", 0.0, b"", [["w", [1.0, 2.0, 3.0, -1]]], []),
    "changes with an integer": _wire("Staged", 0.0, b"", [["w", [1, 2.0, 3.0, 1]]], []),
    "changes of a tensor without a name": _wire("Staged", 0.0, b"", [["", [1.0, 2.0, 3.0, 1]]], []),
    "a Hello of an unknown device": _wire("Hello", *_with(_HELLO, 3, "tpu")),
    "a Hello without a version": _wire("Hello", *_with(_HELLO, 0, "")),
    "a Hello without byte formats": _wire("Hello", *_with(_HELLO, 6, [])),
    "a Hello with a long path": _wire("Hello", *_with(_HELLO, 5, "x" * 5000)),
    "a Hello that never beats": _wire("Hello", *_with(_HELLO, 7, float("inf"))),
    "a Hello that takes no frames": _wire("Hello", *_with(_HELLO, 9, 0)),
    "a Welcome as the sender": _wire("Welcome", *_with(_WELCOME, 1, 0)),
    "a Welcome outside the world": _wire("Welcome", *_with(_WELCOME, 1, 2)),
    "a Welcome to an unknown transport": _wire("Welcome", *_with(_WELCOME, 3, "mpi")),
    "a Welcome without buffers": _wire("Welcome", *_with(_WELCOME, 5, 0)),
    "a Welcome in an unknown format": _wire("Welcome", *_with(_WELCOME, 4, "zip")),
    "a Welcome before any sync": _wire("Welcome", *_with(_WELCOME, 6, -1)),
    "an error kind that is long": _wire("Failure", "x" * 65, "", "", False),
    "a traceback that is long": _wire("Failure", "x", "", "x" * ((1 << 18) + 1), False),
}


def test_names_are_text_before_they_are_hashed():
    # Hashes of numbers are known: keys could be chosen that all collide.
    for key in (3, 3.0, None, True, b"w", [1]):
        with pytest.raises(ProtocolError, match="a name must be text, not"):
            decode(_wire("Staged", 0.0, b"", [[key, _CHANGE[1]]], []))


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_message_is_refused(name):
    with pytest.raises(ProtocolError, match="malformed frame") as raised:
        decode(BAD[name])
    # Each for its own reason.
    assert ("fields," in str(raised.value)) == name.startswith("a field too")


def test_a_message_that_breaks_a_rule_cannot_be_made():
    for make in (
        lambda: Commit("1"),
        lambda: Close("\ud800"),
        lambda: Connect(b"x"),
        lambda: Staged(1),
        lambda: Ready(True, (None,)),
    ):
        with pytest.raises(ProtocolError, match=r"^(Commit|Close|Connect|Staged|Ready)(\.|:)"):
            make()


def test_every_field_of_every_message_has_a_rule():
    for kind in MESSAGES.values():
        hints = typing.get_type_hints(kind, include_extras=True)
        for field in fields(kind):
            assert len(typing.get_args(hints[field.name])) > 1, (kind, field.name)
        assert kind.from_sender or kind.from_receiver
    assert issubclass(ProtocolError, PackedCommError)
