"""The corpus in the repository: a JSON list of base64 for each target, one input a line."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from pathlib import Path

__all__ = ["read_corpus", "write_corpus"]

FOLDER = Path(__file__).parent / "corpus"


def read_corpus(target: str) -> list[bytes]:
    """A target's inputs; none before the first were kept."""
    path = FOLDER / f"{target}.json"
    if not path.exists():
        return []
    return [base64.b64decode(line) for line in json.loads(path.read_text())]


def write_corpus(target: str, inputs: Iterable[bytes]) -> None:
    """Replace a target's inputs."""
    ordered = sorted(set(inputs), key=lambda data: (len(data), data))
    FOLDER.mkdir(exist_ok=True)
    lines = [base64.b64encode(data).decode() for data in ordered]
    (FOLDER / f"{target}.json").write_text(json.dumps(lines, indent=0) + "\n")
