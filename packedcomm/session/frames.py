"""Control messages as bytes and back: msgpack with strict types, bounded, typed errors only.

A frame is the msgpack array `[number, name, fields]`: the number that ties an answer to its
question, the message's class name, and its fields in the order of the class. A tuple or a record is
an array, a dictionary an array of `[key, value]`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass
from functools import cache
from types import UnionType
from typing import Any, get_args, get_origin, get_type_hints

import msgpack

from packedcomm.errors import ProtocolError
from packedcomm.session.messages import MESSAGES, Message
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["decode", "encode"]

Reader = Callable[[Any], Any]

# What msgpack and the readers raise on malformed input. Out of memory isn't among them: the caps
# below are what keeps it away.
_MALFORMED = (ValueError, TypeError, OverflowError, RecursionError, msgpack.UnpackException)


def encode(message: Message, number: int = 0, settings: Settings = DEFAULTS) -> bytes:
    """A message as a frame.

    Args:
        message: any of `MESSAGES`.
        number: what ties it to another message, 0 <= number < 2^64.
        settings: `max_frame_bytes`.

    Raises:
        ProtocolError: the frame would be larger than `max_frame_bytes`.
    """
    held = [getattr(message, name) for name in _names(type(message))]  # type: ignore[arg-type]  # classes are hashable
    values = [list(value.items()) if type(value) is dict else value for value in held]
    frame: bytes = msgpack.packb([number, type(message).__name__, values], default=_plain)
    if len(frame) > settings.max_frame_bytes:
        raise ProtocolError(
            f"{type(message).__name__} has {len(frame):,} bytes, "
            f"Settings.max_frame_bytes is {settings.max_frame_bytes:,}"
        )
    return frame


def decode(frame: bytes, settings: Settings = DEFAULTS) -> tuple[int, Message]:
    """Read a frame.

    No array longer than the frame or than `max_tensors` is allocated, and what is built stays below
    a fixed multiple of the frame's size.

    Args:
        frame: what came, from whomever.
        settings: `max_frame_bytes` and `max_tensors`.

    Returns:
        The number and the message.

    Raises:
        ProtocolError: the frame isn't exactly a valid message.
    """
    size = len(frame)
    if size > settings.max_frame_bytes:
        raise ProtocolError(
            f"a frame has {size:,} bytes, Settings.max_frame_bytes is {settings.max_frame_bytes:,}"
        )
    most = min(size, max(settings.max_tensors, 64))
    try:
        document = msgpack.unpackb(
            frame,
            raw=False,
            use_list=True,
            max_str_len=size,
            max_bin_len=size,
            max_array_len=most,
            # Nothing of ours is a map or an extension.
            max_map_len=0,
            max_ext_len=0,
        )
        number, name, values = _array(document)
        if type(number) is not int or not 0 <= number < 1 << 64:
            raise TypeError(f"number {number!r:.80} is not one")
        if type(name) is not str or name not in MESSAGES:
            raise TypeError(f"there is no message {name!r:.80}")
        kind: Any = MESSAGES[name]
        message: Message = _record(kind)(values)
    except ProtocolError as error:
        raise ProtocolError(f"malformed frame: {error}") from None
    except _MALFORMED as error:
        reason = f"{type(error).__name__}: {str(error)[:200]}"
        raise ProtocolError(f"malformed frame of {size:,} bytes: {reason}") from None
    return number, message


@cache
def _names(kind: Any) -> tuple[str, ...]:
    """The fields of a message's class, in their order."""
    return tuple(field.name for field in fields(kind))


def _plain(value: Any) -> Any:
    """What msgpack doesn't know: records. Called for each one that it meets."""
    if is_dataclass(value) and not isinstance(value, type):
        return [getattr(value, field.name) for field in fields(value)]
    raise TypeError(f"{type(value).__name__} can't be sent")


def _array(value: Any) -> list[Any]:
    if type(value) is not list:
        raise TypeError(f"an array was expected, not {type(value).__name__}")
    return value


@cache
def _record(kind: Any) -> Reader:
    """A reader of a record's fields from an array; the record checks their values itself."""
    hints = get_type_hints(kind)
    readers = [_reader(hints[field.name]) for field in fields(kind)]
    needed = [(index, reader) for index, reader in enumerate(readers) if reader is not _as_it_is]

    def read(value: Any) -> Any:
        entries = _array(value)
        if len(entries) != len(readers):
            raise TypeError(f"{kind.__name__} has {len(readers)} fields, {len(entries)} came")
        for index, reader in needed:
            entries[index] = reader(entries[index])
        return kind(*entries)

    return read


def _reader(hint: Any) -> Reader:
    if get_origin(hint) is tuple:
        return _tuple(_reader(get_args(hint)[0]))
    if get_origin(hint) is dict:
        return _dictionary(_reader(get_args(hint)[1]))
    if get_origin(hint) is UnionType:
        inner = _reader(next(kind for kind in get_args(hint) if kind is not type(None)))
        return lambda value: None if value is None else inner(value)
    record: Any = hint
    return _record(record) if is_dataclass(hint) else _as_it_is


def _as_it_is(value: Any) -> Any:
    return value


def _key(value: Any) -> str:
    # Before there is a dictionary: hashes of numbers are known, and keys can be chosen that make
    # filling one quadratic. Those of text are random in every process.
    if type(value) is not str:
        raise TypeError(f"a name must be text, not {type(value).__name__}")
    return value


def _tuple(item: Reader) -> Reader:
    if item is _as_it_is:
        return lambda value: tuple(_array(value))
    return lambda value: tuple(map(item, _array(value)))


def _dictionary(item: Reader) -> Reader:
    def read(value: Any) -> dict[str, Any]:
        pairs = [(_key(key), item(entry)) for key, entry in map(_array, _array(value))]
        entries = dict(pairs)
        if len(entries) != len(pairs):
            raise ValueError("a name occurs twice")
        return entries

    return read
