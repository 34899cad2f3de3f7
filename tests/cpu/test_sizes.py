"""Byte counts as people write them."""

import pytest

from packedcomm.cli.sizes import format_size, parse_size
from packedcomm.errors import ArgumentError

MiB = 1 << 20


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("1", 1),
        ("1048576", MiB),
        ("64MiB", 64 * MiB),
        (" 1.5 GiB ", 3 << 29),
        ("1gib", 1 << 30),
        ("1GB", 10**9),
        ("250kB", 250_000),
        ("12B", 12),
        ("2TiB", 1 << 41),
    ],
)
def test_sizes_are_read(text: str, nbytes: int) -> None:
    assert parse_size(text) == nbytes


def test_size_that_is_too_long_to_be_a_number() -> None:
    with pytest.raises(ArgumentError):
        parse_size("9" * 400 + ".5")


@pytest.mark.parametrize(
    ("nbytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (3 << 29, "1.50 GiB"),
        (1 << 42, "4.00 TiB"),
    ],
)
def test_sizes_are_printed(nbytes: int, text: str) -> None:
    assert format_size(nbytes) == text
