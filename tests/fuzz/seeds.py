"""What the fuzzer starts from: valid frames of every message, valid manifests, and their words."""

from __future__ import annotations

import json
from collections import defaultdict

from hypothesis import HealthCheck, given, settings

from packedcomm.manifest import DTYPE_SIZES, Manifest
from packedcomm.session.frames import encode
from packedcomm.session.messages import MESSAGES
from tests.cpu.test_frames import BAD, messages
from tests.cpu.test_manifest import SPECS

__all__ = ["SEEDS", "WORDS", "dictionary", "frames_by_message"]

# The smallest of those that are drawn.
KEPT = 4


def frames_by_message() -> dict[str, list[bytes]]:
    """A few small frames of each message, drawn from the strategies of the codec's own tests; the
    same at every call."""
    drawn: defaultdict[str, set[bytes]] = defaultdict(set)

    @settings(
        max_examples=600,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(messages)
    def draw(message):
        drawn[type(message).__name__].add(encode(message, len(drawn)))

    draw()
    return {
        name: sorted(found, key=lambda frame: (len(frame), frame))[:KEPT]
        for name, found in sorted(drawn.items())
    }


def _frames() -> list[bytes]:
    valid = [frame for frames in frames_by_message().values() for frame in frames]
    deep = [b"\x93\x00\xa5Moved\x91" + b"\x91" * depth + b"\xc0" for depth in (500, 1000, 1100)]
    return [*valid, *(bad for bad in BAD.values() if len(bad) < 1000), *deep]


def _manifests() -> list[bytes]:
    drawn: list[Manifest] = [Manifest([], {"lora": {"r": 8}, "transforms": [["Cast", "bfloat16"]]})]

    @settings(
        max_examples=40,
        database=None,
        derandomize=True,
        deadline=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(SPECS)
    def draw(specs):
        drawn.append(Manifest(specs))

    draw()
    valid = sorted({manifest.to_json().encode() for manifest in drawn}, key=len)[:20]
    # Up to where JSON can be read, and a little beyond: there it could not always be written.
    nested = [
        json.dumps({"attributes": {"a": 0}, "tensors": [], "version": 1})
        .replace("0", "[" * depth + "]" * depth)
        .encode()
        for depth in (10, 500, *range(950, 1000))
    ]
    return [*valid, *nested]


SEEDS = {"frames": _frames, "manifests": _manifests}
"""Makes the seeds of each target of the fuzzer."""

WORDS: dict[str, list[bytes]] = {
    "frames": [
        *(name.encode() for name in MESSAGES),
        *(name.encode() for name in DTYPE_SIZES),
        *(b"cpu", b"cuda", b"nccl", b"gloo", b"vllm", b"native"),
        *(b"\x90", b"\xdc\xff\xff", b"\xdd\xff\xff\xff\xff", b"\xd9\xff", b"\xc4\xff", b"\xc1"),
        *(b"\xcf" + b"\xff" * 8, b"\xd3\x80" + b"\x00" * 7, b"\xcb\x7f\xf8" + b"\x00" * 6),
    ],
    "manifests": [
        *(f'"{name}"'.encode() for name in DTYPE_SIZES),
        *(b'"attributes":{}', b'"tensors":[]', b'"version":1', b'["a","int8",[1]]'),
        *(b"NaN", b"Infinity", b"1e999", b"9223372036854775807", b'"\\ud800"', b"true", b"null"),
        *(b"[[[[[[[[", b"]]]]]]]]", b'{"a":', b"torch.int8"),
    ],
}
"""What each target's dictionary holds."""


def dictionary(target: str) -> str:
    """A target's words in the form of libFuzzer's `-dict`."""
    quoted = ("".join(f"\\x{byte:02x}" for byte in word) for word in WORDS[target])
    return "".join(f'"{word}"\n' for word in quoted)
