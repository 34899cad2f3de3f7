"""vLLM's worker engine of this backend: takes part in a session's syncs when vLLM tells it to."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import vllm
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)

from packedcomm.endpoints import Target
from packedcomm.engines.vllm import READ, TESTED, release_of
from packedcomm.engines.vllm.adapters import (
    adapter_receivers,
    adapter_target,
    fill_adapters_again,
)
from packedcomm.engines.vllm.lora_layers import engine_names
from packedcomm.engines.vllm.requests import InitRequest, UpdateRequest
from packedcomm.engines.vllm.weights import ModelWeights
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    PackedCommError,
    SessionStateError,
)
from packedcomm.manifest import Manifest
from packedcomm.receivers import WeightReceiver
from packedcomm.results import SyncResult
from packedcomm.session import ReceiverSession, Session
from packedcomm.settings import Settings

__all__ = ["InitInfo", "PackedCommEngine", "UpdateInfo"]

logger = logging.getLogger("packedcomm")


@dataclass
class InitInfo(WeightTransferInitInfo):
    """An `InitRequest` as it has come, not looked at yet."""

    fields: Mapping[str, Any]


@dataclass
class UpdateInfo(WeightTransferUpdateInfo):
    """An `UpdateRequest` as it has come, not looked at yet."""

    fields: Mapping[str, Any]


class PackedCommEngine(WeightTransferEngine[InitInfo, UpdateInfo]):
    """One worker's end: a receiver in the trainer's session.

    Every worker of every replica is a receiver of its own. vLLM calls one method at a time, on the
    worker's own thread. The secret is read from the worker's environment (`PACKEDCOMM_SECRET` or
    `PACKEDCOMM_SECRET_FILE`), like all other settings.

    A call that fails on one worker fails on all of them (see `worker_hooks`). After it the engine
    answers: with the old weights where nothing was loaded yet, else with weights that the message
    calls torn, until the next update.
    """

    init_info_cls = InitInfo
    update_info_cls = UpdateInfo

    def __init__(
        self, config: Any, vllm_config: Any, device: torch.device, model: torch.nn.Module
    ) -> None:
        """Called by vLLM when the model is loaded."""
        super().__init__(config, vllm_config, device, model)
        release = release_of(vllm.__version__)
        if release is not None and release > READ:
            logger.warning(
                "vLLM %s is newer than packedcomm knows; tested: %s",
                vllm.__version__,
                ", ".join(TESTED),
            )
        self._settings = Settings.from_environment()
        self._session: ReceiverSession | None = None
        # By model; those of adapters are kept beside the adapters.
        self._receivers: dict[int, WeightReceiver] = {}
        self._weights: weakref.WeakKeyDictionary[torch.nn.Module, ModelWeights] = (
            weakref.WeakKeyDictionary()
        )
        # vLLM sets `model` to a draft model for the time of an update of that.
        self._main_model = model
        self._main_config: Any = vllm_config.model_config
        self._slots_lost = False
        self.result: SyncResult | None = None
        """What this worker has received last."""

    def parse_init_info(self, init_dict: dict[str, Any]) -> InitInfo:
        """Keep what has come; it is looked at where a failure can be agreed on."""
        return InitInfo(init_dict)

    def parse_update_info(self, update_dict: dict[str, Any]) -> UpdateInfo:
        """Keep what has come; it is looked at where a failure can be agreed on."""
        return UpdateInfo(update_dict)

    def init_transfer_engine(self, init_info: InitInfo) -> None:
        """Connect to the trainer's session, and leave the one before.

        Raises:
            ArgumentError: an unknown key, or a malformed value.
            ConfigMismatch: the engine moves its experts while it runs (`enable_eplb`).
            AuthenticationError, RendezvousTimeout, VersionMismatch, ...: as `Session.connect`.
        """
        request: InitRequest = _request(InitRequest, init_info.fields)
        if getattr(self.vllm_config.parallel_config, "enable_eplb", False):
            raise ConfigMismatch(
                "the engine balances its experts (enable_eplb), which moves them to other places "
                "while it runs: weights would go to the wrong experts"
            )
        self._leave()
        settings = replace(self._settings, connect_timeout_s=request.connect_timeout_s)
        self._session = Session.connect(request.address, device=self.device, settings=settings)

    def begin_anew(self) -> None:
        """Forget an update that was begun and never finished (see `worker_hooks`)."""
        self.model, self.model_config = self._main_model, self._main_config

    def lose_contents(self) -> None:
        """The weights' memory is given up for a while: replays can't rely on what was in it."""
        for weights in self._weights.values():
            weights.lose_contents()
        for receiver in self._receivers.values():
            receiver.lose_weights()
        self._slots_lost = True

    def start_weight_update(self) -> None:
        """Nothing: what an update needs is known when it is offered."""

    def receive_weights(self, update_info: UpdateInfo) -> None:
        """Take part in one sync; returns when it is committed.

        Raises:
            ArgumentError: an unknown key, or a malformed value.
            ManifestError: the engine's loader doesn't know what is sent, or parameters are missing.
            SessionStateError: not connected, asleep, or no such adapter.
            PeerLost, DeadlineExceeded, IntegrityError, ...: as `WeightReceiver.receive`.
        """
        request: UpdateRequest = _request(UpdateRequest, update_info.fields)
        if self._session is None:
            raise SessionStateError("update: not connected to a trainer: initialize it first")
        if request.epoch not in ("", self._session.epoch):
            raise SessionStateError(
                "update: another trainer has connected this engine to its session since: connect "
                "it again"
            )
        _check_awake()
        weights = self._model_weights()
        weights.partial = request.partial
        receiver = self._receiver(request, weights)
        try:
            self.result = receiver.receive(request.timeout_s, since=request.since)
        except BaseException as error:
            weights.take_back()
            if receiver.status().state == "torn" and isinstance(error, PackedCommError):
                raise type(error)(f"{error} (torn: some weights are new, some old)") from error
            raise
        if self.result is None:
            raise SessionStateError("update: the trainer has closed the session")
        if request.kind == "adapter":
            logger.info("version %s of adapter %r", self.result.version, request.adapter)
            return
        logger.info("version %s: %s", self.result.version, weights.way)
        if self._slots_lost and self.model is self._main_model:
            # Those of adapters are among what a sleeping engine gives up; vLLM fills none of them.
            fill_adapters_again(self.model)
            self._slots_lost = False

    def _receiver(self, request: UpdateRequest, weights: ModelWeights) -> WeightReceiver:
        """The one that keeps what was agreed on for this model or this adapter."""
        assert self._session is not None
        if request.kind == "adapter":
            adapters, name = adapter_receivers(self.model), request.adapter
            if name not in adapters:
                chosen = _Adapter(self.model, self.vllm_config, self.device, name)
                adapters[name] = WeightReceiver(chosen, self._session)
            return adapters[name]
        receiver = self._receivers.get(id(self.model))
        if receiver is None:
            receiver = self._receivers[id(self.model)] = WeightReceiver(weights, self._session)
        elif receiver.session is not self._session:
            receiver.reconnect(self._session)
        return receiver

    def _model_weights(self) -> ModelWeights:
        found = self._weights.get(self.model)
        if found is None:
            found = self._weights[self.model] = ModelWeights(
                self.model,
                self.model_config,
                self.vllm_config,
                self.device,
                renames=wrapped_names(self.model),
                lender=None if self.model is self._main_model else self._main_model,
            )
        return found

    def finish_weight_update(self) -> None:
        """Nothing is left to do: what was received counts since the commit."""

    def shutdown(self) -> None:
        """Leave the session. Idempotent; the engine can be initialized again."""
        self._leave()

    def status(self) -> dict[str, Any]:
        """How this worker stands, as JSON values: version, state, how the last update was carried
        out, and the layers that stay with vLLM's loader, with reasons."""
        weights = self._model_weights()
        receiver = self._receivers.get(id(self.model))
        status = None if receiver is None else receiver.status()
        return {
            "state": "idle" if status is None else status.state,
            "version": None if status is None else status.version,
            "way": weights.way,
            "by_loader": weights.reasons,
            "seconds": {} if self.result is None else dict(self.result.seconds),
        }

    def _leave(self) -> None:
        session, self._session = self._session, None
        # Those of models know what is torn; an adapter never is.
        adapter_receivers(self._main_model).clear()
        if session is not None:
            session.close()

    @staticmethod
    def trainer_send_weights(iterator: Any, trainer_args: Any) -> None:  # noqa: ARG004
        """Not the way of this backend, which vLLM up to 0.27 asks every engine for."""
        raise SessionStateError("send with packedcomm.FullWeightSender in the trainer's session")


class _Adapter:
    """Chooses the memory of a live adapter, which vLLM may have moved to another slot."""

    def __init__(
        self, model: torch.nn.Module, vllm_config: Any, device: torch.device, name: str
    ) -> None:
        self._where = (model, vllm_config, device, name)

    def choose(self, manifest: Manifest) -> Target:  # noqa: ARG002
        return adapter_target(*self._where)


def _request(kind: type[InitRequest | UpdateRequest], given: Mapping[str, Any]) -> Any:
    known = [field.name for field in fields(kind)]
    unknown = sorted(set(given) - set(known))
    if unknown:
        raise ArgumentError(f"unknown keys: {', '.join(unknown)}; there are {', '.join(known)}")
    try:
        return kind(**given)
    except TypeError as error:
        raise ArgumentError(str(error).partition("() ")[2] or str(error)) from None


def _check_awake() -> None:
    """Raise if vLLM has put the weights to sleep: their memory is unmapped then."""
    if not torch.cuda.is_available():
        return
    try:
        from vllm.device_allocator.cumem import CuMemAllocator
    except ImportError:
        return
    allocator = CuMemAllocator.instance
    asleep = allocator is not None and any(
        getattr(data, "is_asleep", False) and data.tag == "weights"
        for data in allocator.pointer_to_data.values()
    )
    if asleep:
        raise SessionStateError("the engine is asleep: wake its weights up before an update")


def wrapped_names(model: torch.nn.Module) -> Sequence[Callable[[str], str] | None]:
    """How a checkpoint's names may have changed where LoRA wraps layers: up to vLLM 0.27 these
    don't forward their loader, and since then some models' loaders don't ask them to."""
    manager = getattr(model, "lora_manager", None)
    if manager is None:
        return (None,)
    from vllm.lora.layers import BaseLayerWithLoRA

    wrapped: set[str] = set()
    for name, module in model.named_modules():
        if not isinstance(module, BaseLayerWithLoRA):
            continue
        prefix, _, last = name.rpartition(".")
        parts = manager.packed_modules_mapping.get(last, [last])
        wrapped.update(f"{prefix}.{part}" if prefix else part for part in (*parts, last))

    # The loader maps names by itself, whatever comes behind a module's.
    engine_name = engine_names(model) or str

    def rename(name: str) -> str:
        module, _, parameter = name.rpartition(".")
        return f"{module}.base_layer.{parameter}" if engine_name(module) in wrapped else name

    return (None, rename) if hasattr(BaseLayerWithLoRA, "load_weights") else (rename,)
