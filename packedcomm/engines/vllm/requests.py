"""What a trainer tells vLLM's workers through vLLM's own calls; needs no vLLM.

These travel as plain dictionaries, over HTTP, Ray or a function call. They carry no secret: workers
read it from their own environment (`Settings.from_environment`).
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

from packedcomm.communicators.listener import Address
from packedcomm.errors import ArgumentError
from packedcomm.settings import DEFAULTS

__all__ = ["BACKEND", "InitRequest", "Kind", "UpdateRequest"]

BACKEND = "packedcomm"
"""The name under which vLLM knows this backend."""

Kind = Literal["weights", "adapter"]
"""What an update brings: the model's own weights, or a LoRA adapter's."""


def _check_seconds(name: str, value: object) -> None:
    if type(value) not in (int, float) or not math.isfinite(value) or value <= 0:  # type: ignore[arg-type,operator]
        raise ArgumentError(f"{name} must be a positive number of seconds, got {value!r:.80}")


@dataclass(frozen=True, slots=True)
class InitRequest:
    """Where the trainer's session is. The body of `init_weight_transfer_engine`.

    Args:
        address: "host:port" by which the workers reach the session.
        connect_timeout_s: how long a worker tries to reach it, in seconds.

    Raises:
        ArgumentError: a value is malformed.
    """

    address: str
    connect_timeout_s: float = DEFAULTS.connect_timeout_s

    def __post_init__(self) -> None:
        if type(self.address) is not str or Address.parse(self.address).port == 0:
            raise ArgumentError(f"address must be 'host:port', got {self.address!r:.80}")
        _check_seconds("connect_timeout_s", self.connect_timeout_s)

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class UpdateRequest:
    """What the next sync brings. The body of `update_weights`.

    Args:
        kind: `"weights"`, or `"adapter"` for a LoRA adapter.
        adapter: name of the adapter, as vLLM's requests name it; only with `"adapter"`.
        timeout_s: how long a worker waits for the sync to begin, in seconds. Once it has begun the
            session's own deadlines count.
        partial: whether layers of the model may be left out.
        since: the session's `said` before this update; what it had said by then is of earlier ones,
            and what it gives up later is this one. For `WeightReceiver.receive`, which otherwise
            waits for the sync after a failed one.
        epoch: the session's; a worker that has joined another one since refuses. Empty is any.

    Raises:
        ArgumentError: a value is malformed, or they don't go together.
    """

    kind: Kind = "weights"
    adapter: str = ""
    timeout_s: float = 120.0
    partial: bool = False
    since: int = 0
    epoch: str = ""

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ArgumentError(f"kind must be 'weights' or 'adapter', got {self.kind!r:.80}")
        if type(self.adapter) is not str or bool(self.adapter) is not (self.kind == "adapter"):
            raise ArgumentError(f"{self.kind}: adapter {self.adapter!r:.80} doesn't go with it")
        _check_seconds("timeout_s", self.timeout_s)
        if type(self.partial) is not bool:
            raise ArgumentError(f"partial must be true or false, got {self.partial!r:.80}")
        if type(self.since) is not int or self.since < 0:
            raise ArgumentError(f"since must be an integer >= 0, got {self.since!r:.80}")
        if type(self.epoch) is not str:
            raise ArgumentError(f"epoch must be text, got {self.epoch!r:.80}")

    def as_dict(self) -> dict[str, Any]:
        """As JSON values."""
        return asdict(self)
