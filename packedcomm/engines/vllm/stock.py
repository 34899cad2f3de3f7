"""A trainer's end of a transfer to stock vLLM's `backend="nccl"`; needs no vLLM."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import torch

from packedcomm.communicators import Communicator, NcclCommunicator
from packedcomm.communicators.listener import Address, Listener
from packedcomm.communicators.nccl_library import find_nccl
from packedcomm.completion import Measured, wait_for_device
from packedcomm.copying import as_tensor
from packedcomm.engines.vllm import release_of
from packedcomm.engines.vllm.calls import Calls, call_all
from packedcomm.engines.vllm.client import engines_of
from packedcomm.engines.vllm.handles import PauseMode, pause_mode_checked
from packedcomm.engines.vllm.steps import Pauses, UpdateSteps
from packedcomm.engines.vllm.stock_receiver import StockReceiver
from packedcomm.engines.vllm.stock_wire import StockWire
from packedcomm.errors import (
    ArgumentError,
    PackedCommError,
    SessionStateError,
    VersionMismatch,
    summary,
)
from packedcomm.manifest import named_pairs
from packedcomm.settings import DEFAULTS, Settings
from packedcomm.transports.broadcast import abort_on_failure
from packedcomm.transports.sending import Sending

__all__ = ["StockReceiver", "StockSender", "StockWire"]

# vLLM's workers return from init when a first all-reduce is done that this side takes part in.
_CONNECTED_S = 10.0

# vLLM from 0.30 on takes part in nothing with an NCCL older than this, and doesn't say so.
_SWITCHES_OFF = (0, 30)
_NCCL_WANTED = (2, 29, 7)

# The version from which on the packed settings travel in the init info.
_SETTINGS_IN_INIT = (0, 28)


class StockSender:
    """Sends weights to vLLM engines that run their own `backend="nccl"`.

    There is no session: no digests, no commit, no word from a worker but its engine's. When a
    transfer fails, workers may wait in NCCL for ever, as with vLLM's own trainer.

    Belongs to one thread at a time.

    Args:
        engines: as for `EngineUpdater`.
        address: "host:port" to listen on while the workers connect, by which they reach it; port 0
            lets the system choose.
        device: this side's GPU.
        wire: how tensors travel; None is packed, with vLLM's sizes.
        vllm_version: the engines', such as "0.32.0"; None asks them. It isn't tried out: a
            call that fails in several workers leaves answers behind, which vLLM takes for the next
            call's.
        nccl_version: the NCCL that the engines run, if it is known, such as "2.28.9".
        workers: how many each engine has; None asks them.
        pause_mode, flush: as for `EngineUpdater`.
        timeout_s: how long engines may take for a call, and the data to get there, in seconds.
        settings: `connect_timeout_s`, `nccl_library` and so on.

    Raises:
        ArgumentError: an argument is malformed.
    """

    def __init__(
        self,
        engines: Any,
        address: str,
        *,
        device: torch.device | str | int,
        wire: StockWire | None = None,
        vllm_version: str | None = None,
        nccl_version: str | None = None,
        workers: Sequence[int] | None = None,
        pause_mode: PauseMode | None = "wait",
        flush: bool = True,
        timeout_s: float = 120.0,
        settings: Settings = DEFAULTS,
    ) -> None:
        self.engines = engines_of(engines)
        self.wire = StockWire(packed=True) if wire is None else wire
        self.group: Communicator | None = None
        """The communicator of this process, rank 0, and all workers."""
        if workers is not None and len(workers) != len(self.engines):
            raise ArgumentError(f"{len(workers)} numbers of workers, {len(self.engines)} engines")
        Address.parse(address)
        self._address = address
        self._device = device
        self._vllm_version = vllm_version
        self._nccl_version = nccl_version
        self._workers = workers
        self._pause_mode = None if pause_mode is None else pause_mode_checked(pause_mode)
        self._flush = flush
        self._timeout_s = timeout_s
        self._settings = settings
        self._settings_in_init = True
        self._pauses = Pauses()

    def connect(self) -> None:
        """Connect to every worker; again after a failure, with another communicator.

        Raises:
            VersionMismatch: the engines run another NCCL, or one with which vLLM switches its
                communicator off. Where that can't be known before, when the engines say that they
                are connected and NCCL isn't.
            ArgumentError: engines don't tell their version or their number of workers.
            RendezvousTimeout: not all workers came in time.
            PackedCommError: an engine failed, as what `HttpEngine` says; or as
                `NcclCommunicator.from_vllm`.
        """
        self.close()
        version = self._checked_versions()
        self._settings_in_init = version >= _SETTINGS_IN_INIT
        sizes = self._sizes()
        listener = Listener.bind(self._address)
        deadline = time.monotonic() + self._settings.connect_timeout_s
        infos: dict[int, dict[str, Any]] = {}
        first = 1
        for engine, size in zip(self.engines, sizes, strict=True):
            infos[id(engine)] = {
                "master_address": listener.host,
                "master_port": listener.port,
                "rank_offset": first,
                "world_size": sum(sizes) + 1,
                **(self.wire.as_dict() if self._settings_in_init else {}),
            }
            first += size
        calls = Calls(
            "init_weight_transfer_engine",
            self.engines,
            lambda engine: engine.init_weight_transfer_engine(infos[id(engine)]),
        )
        try:
            group = NcclCommunicator.from_vllm(
                listener.host,
                listener.port,
                0,
                sum(sizes) + 1,
                device=self._device,
                timeout_s=self._settings.connect_timeout_s,
                settings=self._settings,
                listener=listener,
                check=_Watch(calls, self._settings),
            )
        except PackedCommError as error:
            if (failure := calls.failure) is not None and failure is not error:
                raise failure from error
            raise
        try:
            remaining = deadline + _CONNECTED_S - time.monotonic()
            if (failure := calls.wait(max(0.0, remaining))) is not None:
                raise failure
        except BaseException as error:
            group.abort(f"connecting failed: {summary(error)}")
            group.close()
            raise
        self.group = group

    def send(
        self, tensors: Mapping[str, Any] | Iterable[tuple[str, Any]], version: str | None = None
    ) -> dict[str, float]:
        """Pause the engines, send all tensors, and let the engines go on, after a failure too.

        Args:
            tensors: by name, under the names of the checkpoint, all on the device.
            version: the weight version, where vLLM takes one.

        Returns:
            Seconds by stage, as `EngineUpdate.seconds`.

        Raises:
            SessionStateError: not connected.
            TensorError, CapacityError, NcclError, DeadlineExceeded: the data couldn't be sent.
            PackedCommError: an engine failed, as what `HttpEngine` says.
        """
        group = self.group
        if group is None:
            raise SessionStateError("send: not connected: call connect")
        named = [(name, as_tensor(array)) for name, array in named_pairs(tensors)]
        body: dict[str, Any] = {
            "names": [name for name, _ in named],
            "dtype_names": [str(tensor.dtype).removeprefix("torch.") for _, tensor in named],
            "shapes": [list(tensor.shape) for _, tensor in named],
            **({} if self._settings_in_init else self.wire.as_dict()),
        }
        seconds: dict[str, float] = {}
        steps = UpdateSteps(self.engines, self._timeout_s, seconds, self._pauses)
        with Measured(seconds, "total"):
            try:
                steps.pause(self._pause_mode, self._flush)
                steps.start()
                steps.transfer(body, partial(self._broadcast, group, named), _Abort(group))
                steps.finish(version)
            except BaseException as error:
                if steps.begun:
                    # Nobody knows how far the workers are.
                    self.close()
                steps.clean_up(error)
                raise
            if self._pause_mode is not None:
                steps.resume()
        return seconds

    def close(self) -> None:
        """Give the communicator up. Idempotent."""
        group, self.group = self.group, None
        if group is not None:
            group.abort("the sender was closed")
            group.close()

    def __enter__(self) -> StockSender:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self.close()

    def _broadcast(self, group: Communicator, named: list[tuple[str, torch.Tensor]]) -> None:
        with abort_on_failure(group, "send"):
            Sending(group, 0, self.wire.cut).run(named, None, self.wire.num_buffers, None)
            wait_for_device(group.device, self._timeout_s, lambda: None, "send")

    def _checked_versions(self) -> tuple[int, int]:
        versions = [self._vllm_version]
        if self._vllm_version is None:
            versions = call_all("get_version", self.engines, _version, self._timeout_s)
        found = {_parsed(version) for version in versions}
        if len(found) != 1:
            raise ArgumentError(f"the engines run different versions of vLLM: {versions}")
        version = found.pop()
        own = tuple(find_nccl(self._settings).version)
        shown = ".".join(map(str, own))
        if self._nccl_version is not None and self._nccl_version != shown:
            raise VersionMismatch(
                f"NCCL here is {shown}, the engines' is {self._nccl_version}: it must be the same"
            )
        if version >= _SWITCHES_OFF and own < _NCCL_WANTED:
            raise VersionMismatch(_switched_off(shown))
        return version

    def _sizes(self) -> list[int]:
        if self._workers is not None:
            return list(self._workers)
        sizes = call_all("get_world_size", self.engines, _world_size, self._timeout_s)
        if any(size is None for size in sizes):
            raise ArgumentError("an engine doesn't tell its number of workers: give workers")
        return [int(size) for size in sizes]


class _Watch:
    """Gives the connecting up where the engines' side of it has failed: as it is called."""

    def __init__(self, calls: Calls, settings: Settings) -> None:
        self._calls = calls
        self._settings = settings
        self._connected_at: float | None = None

    def __call__(self) -> None:
        if (failure := self._calls.failure) is not None:
            raise failure
        if not self._calls.done:
            return
        now = time.monotonic()
        self._connected_at = self._connected_at or now
        if now - self._connected_at > _CONNECTED_S:
            shown = ".".join(map(str, find_nccl(self._settings).version))
            raise VersionMismatch(
                "the engines say that they are connected, but take no part in it: "
                + _switched_off(shown)
            )


class _Abort:
    """Ends a transfer by its communicator."""

    def __init__(self, group: Communicator) -> None:
        self._group = group
        self.error: PackedCommError | None = None

    def end(self, error: PackedCommError) -> None:
        self.error = self.error or error
        self._group.abort(str(error))

    def close(self, failed: BaseException | None) -> None:
        pass


def _version(engine: Any) -> str | None:
    ask = getattr(engine, "get_version", None)
    return None if ask is None else ask()


def _world_size(engine: Any) -> int | None:
    ask = getattr(engine, "get_world_size", None)
    return None if ask is None else ask()


def _parsed(version: str | None) -> tuple[int, int]:
    found = release_of(version or "")
    if found is None:
        raise ArgumentError(f"the engine's vLLM version isn't known ({version}): give vllm_version")
    return found


def _switched_off(nccl: str) -> str:
    wanted = ".".join(map(str, _NCCL_WANTED))
    return (
        f"vLLM 0.30 and later switches its communicator off with an NCCL older than {wanted}, and "
        f"all ranks need the same NCCL; here it is {nccl}"
    )
