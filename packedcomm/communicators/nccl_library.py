"""Where to look for the NCCL library when the process hasn't loaded one."""

from __future__ import annotations

import sys
from pathlib import Path

from packedcomm import _native
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["find_nccl"]

SONAME = "libnccl.so.2"


def find_nccl(settings: Settings = DEFAULTS) -> _native.NcclLibrary:
    """The NCCL library to use; it has `path`, `version` (three integers) and `unique_id()`.

    In this order: `settings.nccl_library`, the one that the process has loaded (torch's, where
    torch is a CUDA build), NVIDIA's wheel, conda, the system's loader, `settings.nccl_home`.

    Raises:
        NcclError: none was found, or two are loaded and none is named; the message has the paths.
        VersionMismatch: it is older than 2.18.
    """
    return _native.nccl_library(_candidates(settings), settings.nccl_library)


def _candidates(settings: Settings) -> list[str]:
    wheels = (Path(entry, "nvidia", "nccl", "lib", SONAME) for entry in sys.path if entry)
    files = [*wheels, Path(sys.prefix, "lib", SONAME)]
    home = [str(Path(settings.nccl_home, "lib", SONAME))] if settings.nccl_home else []
    return [*(str(file) for file in files if file.is_file()), SONAME, *home]
