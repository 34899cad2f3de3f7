"""What must hold for any bytes that a peer may send: a value that comes back as it was, or a typed
error; and memory in proportion to the bytes."""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from packedcomm.errors import ManifestError, ProtocolError
from packedcomm.manifest import Manifest, TensorSpec
from packedcomm.session.frames import decode, encode
from packedcomm.session.messages import Message

__all__ = ["CHECKS", "MULTIPLE", "SPARE_BYTES", "bounded_memory", "check_frame", "check_manifest"]

# What may be allocated while a byte is read. The worst is an array of empty arrays: one byte each
# on the wire; in memory a list, its garbage collector's header, and a pointer or two.
MULTIPLE = 128

# Besides: caches of hints and dtypes, an exception with its traceback.
SPARE_BYTES = 1 << 18


def check_frame(data: bytes) -> bool:
    """Decode; what is a message must come back equal, bytes included. Whether it is one."""
    with bounded_memory(len(data)):
        try:
            number, message = decode(data)
        except ProtocolError:
            return False
    assert isinstance(message, Message)
    frame = encode(message, number)
    again = decode(frame)
    # NaN isn't equal to itself; its repr is.
    assert again == (number, message) or repr(again) == repr((number, message))
    assert encode(again[1], number) == frame
    return True


def check_manifest(data: bytes) -> bool:
    """Read as JSON; what is a manifest must come back equal, with its digest. Whether it is one."""
    text = data.decode("utf-8", "surrogateescape")
    _check_entries(text)
    # A text may need four bytes for what is one byte of UTF-8.
    with bounded_memory(4 * len(data)):
        try:
            manifest = Manifest.from_json(text)
        except ManifestError:
            return False
    again = Manifest.from_json(manifest.to_json())
    assert again == manifest
    assert again.digest == manifest.digest
    assert again.nbytes == manifest.nbytes >= 0
    assert len(manifest.by_name) == len(list(manifest)) == len(manifest)
    repr(manifest)
    return True


def _check_entries(text: str) -> None:
    """Entries given to `TensorSpec` as they are, of whatever type."""
    try:
        rows = json.loads(text)["tensors"]
    except (KeyError, TypeError, IndexError, ValueError, RecursionError):
        return
    for row in rows if isinstance(rows, list) else ():
        if isinstance(row, list) and len(row) == 3:
            with suppress(ManifestError):
                spec = TensorSpec(*row)
                assert TensorSpec(spec.name, spec.dtype, spec.shape) == spec
                assert 0 <= spec.nbytes < 1 << 63


@contextmanager
def bounded_memory(size: int) -> Iterator[None]:
    """Allow `MULTIPLE` bytes of memory per byte; measured only while tracemalloc runs."""
    if not tracemalloc.is_tracing():
        yield
        return
    tracemalloc.reset_peak()
    before, _ = tracemalloc.get_traced_memory()
    yield
    _, peak = tracemalloc.get_traced_memory()
    allowed = MULTIPLE * size + SPARE_BYTES
    assert peak - before <= allowed, f"{peak - before:,} bytes for {size:,}, {allowed:,} allowed"


CHECKS: dict[str, Callable[[bytes], bool]] = {"frames": check_frame, "manifests": check_manifest}
"""Each target of the fuzzer by name."""
