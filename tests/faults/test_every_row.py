"""Every fault of the table below has tests that carry its number: `pytest.mark.fault(number)`."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

ROWS = {
    1: "a peer never arrives, or dies in rendezvous",
    2: "a peer is killed mid-chunk",
    3: "a peer is stopped, not dead",
    4: "the abort of a communicator hangs",
    5: "several communicators are aborted at once",
    6: "two senders join receivers in opposite order",
    7: "the receiver's callback raises",
    8: "a background receiver thread fails",
    9: "the sender's iterator raises half-way",
    10: "unknown, missing or duplicate name",
    11: "dtype or shape differs from the target",
    12: "buffer sizes or counts differ between the sides",
    13: "non-contiguous, 0-d, empty, misaligned, mixed dtypes, larger than a buffer",
    14: "the source is still being written when send starts",
    15: "a buffer slot would be reused before its consumer has finished",
    16: "the source is changed right after send returned",
    17: "a receiver runs out of memory",
    18: "many syncs, many connections: flat memory, descriptors, threads",
    19: "a failure after the first byte was applied in place",
    20: "a version is published while one receiver failed",
    21: "a receiver restarts, or joins late",
    22: "the trainer restarts; versions go backwards",
    23: "an old session is left open by a dead sender",
    24: "the payload is identical to the last one",
    25: "a destination is unmapped, freed, on another device, or needs grad",
    26: "addresses of destinations never change",
    27: "a port is taken",
    28: "NCCL's versions or libraries differ",
    29: "wrong secret, replayed message, silent connection, 1,000 connections",
    30: "hostile frames",
    31: "NaN payloads, signalling NaN, -0.0, denormals",
    32: "the process has no GPU, or fewer than asked",
}


def _rows_of(function: ast.FunctionDef) -> list[int]:
    return [
        argument.value
        for decorator in function.decorator_list
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.fault"
        for argument in decorator.args
        if isinstance(argument, ast.Constant) and isinstance(argument.value, int)
    ]


def marked() -> dict[int, list[str]]:
    """Tests by the row that they show."""
    found: dict[int, list[str]] = defaultdict(list)
    for path in sorted(TESTS.rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                for row in _rows_of(node):
                    found[row].append(f"{path.relative_to(TESTS)}::{node.name}")
    return found


def test_every_row_has_a_test_that_needs_no_gpu():
    found = marked()
    for row, title in ROWS.items():
        print(f"{row:2} {title}")
        for test in found[row]:
            print(f"     {test}")
    assert set(found) == set(ROWS)
    missing = [row for row in ROWS if all(test.startswith("gpu/") for test in found[row])]
    assert missing == []
