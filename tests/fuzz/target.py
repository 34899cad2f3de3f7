"""One target under libFuzzer: `python -m tests.fuzz.target frames|manifests [libFuzzer options]`.

Mutations are libFuzzer's own and changes to the decoded tree of msgpack or JSON, which leave the
rest well-formed.
"""

from __future__ import annotations

import json
import random
import shlex
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import atheris
import msgpack

MODULES = [
    "packedcomm.manifest",
    "packedcomm.results",
    "packedcomm.session.frames",
    "packedcomm.session.messages",
    "packedcomm.session.rules",
]

with atheris.instrument_imports(include=MODULES):
    from packedcomm.session.messages import MESSAGES
    from tests.fuzz.checks import CHECKS

VALUES: list[Any] = [
    *(None, True, False, 0, 1, -1, 255, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, -(1 << 63)),
    *(0.0, -0.0, 1.0, 1e308, float("nan"), float("inf"), "", "cpu", "gloo", "int8", "a" * 64),
    *([], [[]], [0], [[0, [0], [4], "int8", 1.0]], [["a", 1.0]], ["a", "int8", [1]]),
]
BYTES = [b"", b"\x00" * 8, b"\x00" * 128]


def mutated_tree(value: Any, source: random.Random, leaves: list[Any]) -> Any:
    """The tree with one change somewhere: a value replaced, an entry dropped, doubled, added,
    changed a little, or wrapped many times."""
    if isinstance(value, dict) and value and source.random() < 0.95:
        key = source.choice(list(value))
        return {**value, key: mutated_tree(value[key], source, leaves)}
    if not isinstance(value, list) or not value or source.random() < 0.1:
        if source.random() < 0.2:
            # Near to where Python's and msgpack's recursion ends, or anywhere.
            for _ in range(source.choice((source.randrange(40), source.randrange(900, 1040)))):
                value = [value]
            return value
        return source.choice(leaves)
    index = source.randrange(len(value))
    entry = value[index]
    match source.randrange(8):
        case 0:
            changed = []
        case 1:
            changed = [entry, entry]
        case 2:
            changed = [entry, source.choice(leaves)]
        case 3 if isinstance(entry, int):
            changed = [entry + source.choice((-1, 1))]
        case 4 if isinstance(entry, str):
            changed = [source.choice([*MESSAGES, entry + "a", entry[:-1], entry * 2])]
        case _:
            changed = [mutated_tree(entry, source, leaves)]
    return [*value[:index], *changed, *value[index + 1 :]]


def mutated_frame(data: bytes, source: random.Random) -> bytes:
    tree = msgpack.unpackb(data, max_map_len=0)
    return bytes(msgpack.packb(mutated_tree(tree, source, [*VALUES, *BYTES])))


def mutated_manifest(data: bytes, source: random.Random) -> bytes:
    leaves = [*VALUES, {}, {"a": 1}, {"a": []}, "\ud800", 10**400]
    return json.dumps(mutated_tree(json.loads(data), source, leaves)).encode()


STRUCTURED = {"frames": mutated_frame, "manifests": mutated_manifest}


def mutator(target: str) -> Callable[[bytes, int, int], bytes]:
    """Half of the time a change of the tree, otherwise libFuzzer's own."""

    def mutate(data: bytes, most: int, seed: int) -> bytes:
        source = random.Random(seed)
        if source.random() < 0.5:
            with suppress(ValueError, TypeError, OverflowError, RecursionError):
                changed = STRUCTURED[target](data, source)
                if changed != data and len(changed) <= most:
                    return changed
        return bytes(atheris.Mutate(data, most))

    return mutate


def main() -> None:
    target = sys.argv.pop(1)
    # libFuzzer merges in processes of its own, which a shell starts by this.
    sys.argv[0] = f"{shlex.quote(sys.executable)} -m tests.fuzz.target {target}"
    tracemalloc.start()
    atheris.Setup(sys.argv, CHECKS[target], custom_mutator=mutator(target))
    atheris.Fuzz()


if __name__ == "__main__":
    main()
