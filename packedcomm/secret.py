"""The job's secret: made here, or read from a file that the processes of a job share."""

from __future__ import annotations

import logging
import os
import secrets
import stat
from pathlib import Path

from packedcomm.errors import ArgumentError

__all__ = ["check_length", "generate_secret", "read_secret"]

logger = logging.getLogger("packedcomm")

MOST_BYTES = 4096
LEAST_CHARACTERS = 16


def generate_secret() -> str:
    """A new secret for one job: 43 characters that hold 256 random bits, safe in URLs, shells and
    environment variables."""
    return secrets.token_urlsafe(32)


def check_length(secret: str) -> None:
    """Raise `ArgumentError`, without the secret, if it is too short to be one."""
    if len(secret) < LEAST_CHARACTERS:
        raise ArgumentError(
            f"secret has {len(secret)} characters, at least {LEAST_CHARACTERS} are needed"
        )


def read_secret(path: str) -> str:
    """The secret in a file, without the newline at its end.

    Logs a warning if others than the file's owner may read it.

    Raises:
        ArgumentError: the file can't be read, is empty, isn't UTF-8 or is larger than 4 KiB. The
            message names it; what it holds is never in a message.
    """
    try:
        with Path(path).open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            content = file.read(MOST_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such path can exist"
        raise ArgumentError(f"can't read the secret's file {path!r}: {reason}") from error
    problem = None
    if len(content) > MOST_BYTES:
        problem = f"has more than {MOST_BYTES:,} bytes"
    elif not (secret := content.decode("utf-8", "replace").removesuffix("\n").removesuffix("\r")):
        problem = "is empty"
    elif secret.encode() != content[: len(secret.encode())]:
        problem = "isn't UTF-8"
    if problem is not None:
        raise ArgumentError(f"the secret's file {path!r} {problem}")
    if mode & (stat.S_IRGRP | stat.S_IROTH):
        logger.warning(
            "others than its owner may read the secret's file %r: mode %o", path, mode & 0o777
        )
    return secret
