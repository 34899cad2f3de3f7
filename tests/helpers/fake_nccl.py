"""Builds and controls the fake libnccl of `fake_nccl.c`."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest

__all__ = ["FakeNccl", "build_fake_nccl"]

SOURCE = Path(__file__).with_suffix(".c")


def build_fake_nccl(
    directory: Path,
    name: str = "libnccl.so.2",
    version: int = 22809,
    code: str | None = None,
) -> Path:
    """Compile the fake, or other code, into `directory`; skips where there is no C compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("needs a C compiler")
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / name
    source = directory / "fake_nccl.c"
    text = SOURCE.read_text() if code is None else code
    source.write_text(text.replace("fake_version = 22809", f"fake_version = {version}"))
    subprocess.run([compiler, "-shared", "-fPIC", "-o", str(path), str(source)], check=True)
    return path


class FakeNccl:
    """The fake's variables as attributes, without the prefix: `fake.aborts`, `fake.result = 6`."""

    def __init__(self, path: Path) -> None:
        object.__setattr__(self, "_library", ctypes.CDLL(str(path)))

    def __getattr__(self, name: str) -> int:
        return int(ctypes.c_int.in_dll(self._library, f"fake_{name}").value)

    def __setattr__(self, name: str, value: int) -> None:
        ctypes.c_int.in_dll(self._library, f"fake_{name}").value = value
