"""Where to look for the NCCL library when the process hasn't loaded one."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from packedcomm import _native
from packedcomm.settings import DEFAULTS, Settings

__all__ = ["find_nccl"]

SONAME = "libnccl.so.2"


def find_nccl(settings: Settings = DEFAULTS) -> _native.NcclLibrary:
    """The NCCL library to use; it has `path`, `version` (three integers) and `unique_id()`.

    In this order: `settings.nccl_library`, the one that the process has loaded (torch's, where
    torch is a CUDA build), NVIDIA's wheel, conda, the system's loader, NCCL_HOME.

    Raises:
        NcclError: none was found, or two are loaded and none is named; the message has the paths.
        VersionMismatch: it is older than 2.18.
    """
    return _native.nccl_library(_candidates(), settings.nccl_library)


def _candidates() -> list[str]:
    wheels = (Path(entry, "nvidia", "nccl", "lib", SONAME) for entry in sys.path if entry)
    files = [*wheels, Path(sys.prefix, "lib", SONAME)]
    candidates = [str(file) for file in files if file.is_file()]
    # NCCL's own variable, like LD_LIBRARY_PATH in the step before it.
    home = os.environ.get("NCCL_HOME")
    return [*candidates, SONAME, *([str(Path(home, "lib", SONAME))] if home else [])]
