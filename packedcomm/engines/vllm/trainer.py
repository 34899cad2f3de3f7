"""The trainer's side through vLLM's own interface, `WeightTransferTrainerFactory` (vLLM 0.26+).

What differs between vLLM 0.26 and 0.33 is where the factory passes a config, whether the init info
has a `backend`, and what a `WeightSource` looks like.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from vllm.distributed.weight_transfer import base, factory

from packedcomm.engines.vllm.client import EngineUpdate, EngineUpdater
from packedcomm.engines.vllm.handles import PauseMode
from packedcomm.engines.vllm.requests import BACKEND
from packedcomm.engines.vllm.weight_source import WeightSourceAdapter
from packedcomm.errors import ArgumentError, VersionMismatch
from packedcomm.senders import FullWeightSender
from packedcomm.session import Session
from packedcomm.settings import Settings

__all__ = ["PackedCommTrainerEngine", "PackedCommTrainerInitInfo", "register_trainer"]

if not hasattr(base, "TrainerWeightTransferEngine"):
    raise VersionMismatch(
        "this vLLM has no trainer interface, which came with 0.26: use "
        "packedcomm.engines.vllm.client"
    )


@dataclass
class PackedCommTrainerInitInfo(base.TrainerInitInfo):
    """What the trainer's side is made of; rank 0 sends.

    The job's secret isn't among it: trainer and workers read it from their environment
    (PACKEDCOMM_SECRET or PACKEDCOMM_SECRET_FILE), as all other settings.
    """

    backend: ClassVar[str] = BACKEND

    address: str
    """"host:port" to listen on, on rank 0's machine; port 0 lets the system choose."""

    receivers: int | None = None
    """Workers over all data-parallel ranks; None asks the client, if it has `get_world_size`."""

    reached_at: str | None = None
    """"host:port" by which workers reach it; None is the address itself."""

    pause_mode: PauseMode | None = "wait"
    """As for `EngineUpdater`; vLLM's own clients can't pause, so then the caller does."""

    flush: bool = True
    """As for `EngineUpdater`."""

    timeout_s: float = 120.0
    """As for `EngineUpdater`, in seconds."""

    verify: bool | None = None
    """As for `FullWeightSender`."""

    device: str | None = None
    """Where the weights are; None is the current GPU if there is one, else the CPU."""


class PackedCommTrainerEngine(base.TrainerWeightTransferEngine):
    """vLLM's trainer engine over a session. Make one with `WeightTransferTrainerFactory`, after
    `register_trainer`, or with `trainer_init`.

    Every rank of the trainer makes one and calls `send_weights`; belongs to one thread at a time.
    """

    init_info_cls = PackedCommTrainerInitInfo

    def __init__(
        self, info: PackedCommTrainerInitInfo, *, client: Any, source: Any, config: Any = None
    ) -> None:
        """Use `trainer_init`."""
        # Not the base's constructor, which takes a config in 0.26 and a rank in 0.33.
        self.config = config
        self.client = client
        self.source = source
        self.rank = info.rank
        self.is_sender = info.is_sender
        self.last_update: EngineUpdate | None = None
        """What the last `send_weights` did, on the rank that sends."""
        self._adapter = WeightSourceAdapter(source)
        self._updater: EngineUpdater | None = None
        self._sender: FullWeightSender | None = None
        if not self.is_sender:
            return
        settings = Settings.from_environment()
        session = Session.listen(
            info.address, receivers=info.receivers or 1, device=info.device, settings=settings
        )
        try:
            self._updater = EngineUpdater(
                client,
                session,
                address=info.reached_at,
                pause_mode=info.pause_mode,
                flush=info.flush,
                timeout_s=info.timeout_s,
            )
            self._updater.connect(info.receivers)
            self._sender = FullWeightSender(self._adapter, session, verify=info.verify)
        except BaseException:
            session.close()
            raise

    @classmethod
    def trainer_init(
        cls,
        config: Any = None,
        init_info: PackedCommTrainerInitInfo | None = None,
        *,
        client: Any,
        source: Any = None,
    ) -> Self:
        """Meet the workers and return a ready engine; called on every rank of the trainer.

        Args:
            config: vLLM 0.26 gives one, which isn't looked at. A single positional argument is the
                init info, as in 0.27 and later.
            init_info: where to listen, and so on.
            client: vLLM's, or an engine of `packedcomm.engines.vllm.client`, which can pause too;
                used by rank 0 only.
            source: vLLM's `WeightSource`.

        Raises:
            ArgumentError: there is no source, or neither init info nor client tell how many workers
                there are.
            As `EngineUpdater.connect` and `Session.listen`.
        """
        if init_info is None:
            config, init_info = None, config
        if not isinstance(init_info, PackedCommTrainerInitInfo):
            raise ArgumentError(
                f"init_info must be a PackedCommTrainerInitInfo, got {type(init_info).__name__}"
            )
        if source is None:
            raise ArgumentError("the packedcomm backend sends all weights: it needs a source")
        asked = hasattr(client, "get_world_size") or hasattr(client, "llm_engine")
        if init_info.is_sender and init_info.receivers is None and not asked:
            raise ArgumentError(
                f"a {type(client).__name__} doesn't tell the number of workers: give receivers"
            )
        return cls(init_info, client=client, source=source, config=config)

    def send_weights(self) -> None:
        """Update all workers with the source's weights; called on every rank of the trainer.

        A failure is raised on the sending rank only, when all ranks are through with this round.

        Raises:
            As `EngineUpdater.update`.
        """
        adapter = self._adapter
        adapter.begin_round()
        if self._updater is None or self._sender is None:
            adapter.take_part()
            if torch.accelerator.is_available():
                # The sender reads what these gathers bring.
                torch.accelerator.current_stream().synchronize()
            return
        try:
            self.last_update = self._updater.update(self._sender)
        finally:
            adapter.end_failed_round()

    def shutdown(self) -> None:
        """Leave the session. Idempotent."""
        if self._updater is not None and self._updater.session is not None:
            self._updater.session.close()


def register_trainer() -> None:
    """Make the trainer's side known to vLLM under the name "packedcomm". Idempotent.

    vLLM runs plugins in its own processes only, so a trainer calls this before it uses
    `WeightTransferTrainerFactory`.
    """
    registered = factory.WeightTransferTrainerFactory
    if BACKEND not in registered._registry:
        registered.register_engine(BACKEND, PackedCommTrainerEngine)
