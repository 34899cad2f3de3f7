"""What a rank says of itself when it arrives, and which differences between ranks are errors."""

from __future__ import annotations

import json
import os
import secrets
import socket
from dataclasses import asdict, dataclass, field, fields

from packedcomm.errors import ConfigMismatch, ProtocolError, VersionMismatch

__all__ = ["MAX_RECORD_BYTES", "RankRecord"]

# Raised when ranks of two versions of packedcomm could no longer meet.
PROTOCOL = 1

MAX_RECORD_BYTES = 4096


def _package_version() -> str:
    # Imported late: the package imports this module. importlib.metadata would take 0.2 s.
    from packedcomm import __version__

    return __version__


@dataclass(frozen=True, slots=True)
class RankRecord:
    """One rank's record; sent as JSON, validated when read."""

    rank: int
    world_size: int
    backend: str
    device: str
    nccl_version: str = ""
    """Empty for other backends."""

    nccl_path: str = ""
    reached: str = ""
    """IP address at which this rank reaches rank 0; empty on rank 0."""

    protocol: int = PROTOCOL
    package: str = field(default_factory=_package_version)
    hostname: str = field(default_factory=socket.gethostname)
    pid: int = field(default_factory=os.getpid)
    token: str = field(default_factory=lambda: secrets.token_hex(8))
    """Tells two claims of one rank apart, even from one process."""

    @property
    def place(self) -> str:
        """Where the process runs, for messages."""
        return f"process {self.pid} on {self.hostname}"

    def to_json(self) -> bytes:
        """The record as ASCII JSON, at most `MAX_RECORD_BYTES`."""
        # Only paths and names can be long; what matters of a path is its end.
        short = {k: v[-512:] if isinstance(v, str) else v for k, v in asdict(self).items()}
        return json.dumps(short, sort_keys=True).encode("ascii")

    @classmethod
    def from_json(cls, data: bytes, rank: int) -> RankRecord:
        """Read what `rank` published.

        Raises:
            ProtocolError: it is too long, isn't JSON, lacks an entry, has an unknown one, has one
                of another type, or is another rank's.
        """
        problem: str
        if len(data) > MAX_RECORD_BYTES:
            raise ProtocolError(f"record of rank {rank} has {len(data)} bytes, the cap is 4096")
        try:
            values = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise ProtocolError(f"record of rank {rank} isn't JSON: {error}") from None
        if not isinstance(values, dict):
            problem = f"it is a {type(values).__name__}"
        elif different := values.keys() ^ {f.name for f in fields(cls)}:
            problem = f"entries {sorted(different)[:4]} are missing or unknown"
        elif wrong := [f.name for f in fields(cls) if type(values[f.name]).__name__ != f.type]:
            problem = f"entries {wrong} have the wrong type"
        elif values["rank"] != rank:
            problem = f"it says rank {values['rank']}"
        else:
            return cls(**values)
        raise ProtocolError(f"record of rank {rank} is malformed: {problem}")

    def check_against(self, other: RankRecord) -> None:
        """Check that both ranks can be in one group.

        Raises:
            ConfigMismatch: world size or backend differ.
            VersionMismatch: NCCL's versions differ (both versions and paths are named), or the two
                packedcomm versions can't meet.
        """
        first, second = sorted((self, other), key=lambda record: record.rank)
        pair = (f"rank {first.rank} ({first.place})", f"rank {second.rank} ({second.place})")
        if first.protocol != second.protocol:
            raise VersionMismatch(
                f"{pair[0]} runs packedcomm {first.package}, {pair[1]} packedcomm "
                f"{second.package}: they meet by different rules"
            )
        for name in ("backend", "world_size"):
            values = getattr(first, name), getattr(second, name)
            if values[0] != values[1]:
                raise ConfigMismatch(
                    f"{pair[0]} has {name} {values[0]!r}, {pair[1]} has {name} {values[1]!r}"
                )
        if first.nccl_version != second.nccl_version:
            raise VersionMismatch(
                f"NCCL versions differ: {pair[0]} uses {first.nccl_version} from "
                f"{first.nccl_path}, {pair[1]} uses {second.nccl_version} from {second.nccl_path}"
            )
