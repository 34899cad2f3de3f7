"""Every default, limit and environment variable, in one frozen dataclass.

Nothing else in packedcomm reads the environment, and nothing reads it implicitly: only launch code
and the command line call `Settings.from_environment()`, which also reads the secret's file.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from packedcomm.errors import ArgumentError
from packedcomm.secret import check_length, read_secret

__all__ = ["DEFAULTS", "Settings"]

GiB = 1 << 30

# About four months: what timers of every library involved can hold.
MOST_SECONDS = 10_000_000

# What a setting may be, by the type of its default.
_KINDS: dict[Any, tuple[tuple[type, ...], str]] = {
    str: ((str,), "text"),
    int: ((int,), "an integer"),
    float: ((int, float), "a number"),
}


# Limits that hold for every manifest, and that settings can only lower.
LOWERED = ("max_tensors", "max_name_bytes", "max_dimensions")


@dataclass(frozen=True, slots=True)
class Settings:
    """Defaults and limits.

    Each field `name` is read from the environment variable `PACKEDCOMM_NAME` (upper case) by
    `from_environment`, and only there. Sizes are in bytes, times in seconds.
    """

    buffer_size_bytes: int = 1 * GiB
    """Size at which a packed chunk is cut."""

    num_buffers: int = 2
    """Slots that packing, broadcast and unpacking rotate through."""

    connect_timeout_s: float = 120.0
    """Deadline for a rendezvous and for making a communicator."""

    operation_timeout_s: float = 600.0
    """Deadline for one collective on Gloo and for one launch on NCCL, outside of sessions."""

    agree_timeout_s: float = 600.0
    """Deadline for receivers to answer an offer: they may be busy generating when it comes. One
    that is dead or stopped is noticed long before."""

    move_timeout_s: float = 60.0
    """Deadline for the data of a sync, and for its verification, apart from the time that its bytes
    take at `least_bytes_per_second`."""

    commit_timeout_s: float = 60.0
    """Deadline for the commit, likewise."""

    least_bytes_per_second: int = 100_000_000
    """Rate below which a transfer counts as stuck: a sync of n bytes has `move_timeout_s` plus n
    divided by this. An adapter of 84 MB has a minute, a model of 1 TB three hours."""

    heartbeat_interval_s: float = 1.0
    """How often each end of a session says that it is alive and what it does."""

    heartbeat_timeout_s: float = 30.0
    """Silence after which a peer of a session counts as stopped. Longer than anything that keeps a
    process from running a Python thread."""

    close_timeout_s: float = 10.0
    """Deadline for an orderly close; after it a communicator is aborted."""

    max_frame_bytes: int = 64 << 20
    """Cap on one control message of a session; the largest holds a manifest."""

    max_pending_connections: int = 1024
    """Connections to a session's address from which nothing has come yet; beyond it the oldest are
    cut. Where half of the descriptors that the process may have are taken, 64."""

    flight_record_events: int = 256
    """Last events of a session that are written down when a sync fails."""

    flight_record_dir: str = ""
    """Existing folder for these records; empty means the system's folder for temporary files."""

    max_tensors: int = 4_000_000
    """Cap on the entries of a manifest; this and the next two can be lowered only."""

    max_name_bytes: int = 4096
    """Cap on the length of a tensor's name in UTF-8."""

    max_dimensions: int = 64
    """Cap on a tensor's number of dimensions."""

    nccl_home: str = ""
    """Folder of an NCCL installation, searched last; `from_environment` takes NCCL_HOME too."""

    nccl_library: str = ""
    """Path of the NCCL library to use; empty means the one already loaded in the process, then
    NVIDIA's wheel, then conda, then the system's loader, then `nccl_home`."""

    secret: str = field(default="", repr=False)
    """The job's secret, which sessions use that are given none. Never shown."""

    secret_file: str = ""
    """File that `from_environment` reads `secret` from."""

    def __post_init__(self) -> None:
        for entry in fields(self):
            kinds, what = _KINDS[type(entry.default)]
            found = type(getattr(self, entry.name))
            if not issubclass(found, kinds) or found is bool:
                # Not its value: it may be the secret.
                raise ArgumentError(f"Settings.{entry.name} must be {what}, not {found.__name__}")
        if self.secret:
            check_length(self.secret)
        elif self.secret_file:
            # It would be left out silently, and a session on loopback would need none.
            raise ArgumentError(
                "Settings.secret_file is read by Settings.from_environment only; "
                "give Settings.secret"
            )
        for entry in fields(self):
            value = getattr(self, entry.name)
            if isinstance(value, str):
                continue
            if entry.name.endswith("_s"):
                if not 0 < value <= MOST_SECONDS:
                    raise ArgumentError(
                        f"Settings.{entry.name} must be > 0 and <= {MOST_SECONDS:,} seconds, "
                        f"got {value!r}"
                    )
            elif value < 1:
                raise ArgumentError(f"Settings.{entry.name} must be >= 1, got {value!r}")
            elif entry.name in LOWERED and value > entry.default:
                raise ArgumentError(
                    f"Settings.{entry.name} must be <= {entry.default:,}, got {value!r}"
                )
        if self.heartbeat_interval_s * 2 > self.heartbeat_timeout_s:
            raise ArgumentError(
                f"Settings.heartbeat_timeout_s must be at least twice heartbeat_interval_s, got "
                f"{self.heartbeat_timeout_s!r} and {self.heartbeat_interval_s!r}"
            )

    def assembly_seconds(self) -> float:
        """Seconds that a sender may take before the data of a sync: receivers come, say that they
        are there, connect, answer the offer and then the manifest; and a communicator is closed."""
        return 2 * self.connect_timeout_s + 3 * self.agree_timeout_s + self.close_timeout_s

    def gather_seconds(self, nbytes: int) -> float:
        """Deadline in seconds for a sharded source of so many bytes to gather them: nine tenths of
        `move_seconds`, so that what is late there isn't taken for a receiver that is late. What the
        receivers take doesn't count."""
        return 0.9 * self.move_seconds(nbytes)

    def transfer_seconds(self, nbytes: int) -> float:
        """Seconds that a sender may take from the agreement to the end of a sync of so many bytes:
        the data, then the commit, or where the data fail the rest of what is gathered."""
        rest = self.gather_seconds(nbytes)
        return self.move_seconds(nbytes) + rest + self.commit_seconds(nbytes)

    def move_seconds(self, nbytes: int) -> float:
        """Deadline in seconds for the data of a sync of so many bytes, or for its verification."""
        return self.move_timeout_s + nbytes / self.least_bytes_per_second

    def commit_seconds(self, nbytes: int) -> float:
        """Deadline in seconds for the commit of a sync of so many bytes."""
        return self.commit_timeout_s + nbytes / self.least_bytes_per_second

    def shown(self) -> dict[str, Any]:
        """Every setting by name, for people to read: of the secret only whether there is one."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        return values | {"secret": "(set)" if self.secret else ""}

    @classmethod
    def from_environment(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Read `PACKEDCOMM_*` variables over the defaults (`PACKEDCOMM_BUILD_*` are setup.py's).

        Args:
            environ: mapping to read; the process environment when None. It is never changed.

        Raises:
            ArgumentError: a variable is unknown, isn't a number, or is out of range; the message
                names it. Or PACKEDCOMM_SECRET and PACKEDCOMM_SECRET_FILE are both there, one of
                them is empty, or the file is unreadable or empty.
        """
        environ = os.environ if environ is None else environ
        known = {f"PACKEDCOMM_{entry.name.upper()}": entry for entry in fields(cls)}
        values: dict[str, int | float | str] = {"nccl_home": environ.get("NCCL_HOME", "")}
        for variable, text in environ.items():
            if not variable.startswith("PACKEDCOMM_") or variable.startswith("PACKEDCOMM_BUILD_"):
                continue
            if variable not in known:
                raise ArgumentError(
                    f"unknown environment variable {variable}; known: {', '.join(sorted(known))}"
                )
            default = getattr(DEFAULTS, known[variable].name)
            try:
                values[known[variable].name] = type(default)(text)
            except ValueError:
                raise ArgumentError(
                    f"{variable}={text!r} is not a valid {type(default).__name__}"
                ) from None
        _read_secret_file(values)
        return cls(**values)  # type: ignore[arg-type]


def _read_secret_file(values: dict[str, int | float | str]) -> None:
    given = [name for name in ("secret", "secret_file") if name in values]
    if len(given) == 2:
        raise ArgumentError("PACKEDCOMM_SECRET and PACKEDCOMM_SECRET_FILE are both set; use one")
    for name in given:
        if not values[name]:
            raise ArgumentError(f"PACKEDCOMM_{name.upper()} is set, but empty")
    if "secret_file" in values:
        values["secret"] = read_secret(str(values["secret_file"]))


DEFAULTS = Settings()
