"""The trainer's side of updating vLLM engines, without vLLM: pause, sync and resume."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from packedcomm.communicators.listener import Address
from packedcomm.completion import Measured
from packedcomm.engines.vllm.calls import Calls, call_all
from packedcomm.engines.vllm.handles import (
    EngineHandle,
    LocalEngine,
    PauseMode,
    RayEngine,
    pause_mode_checked,
)
from packedcomm.engines.vllm.http_engine import HttpEngine
from packedcomm.engines.vllm.interruption import Interruption
from packedcomm.engines.vllm.requests import InitRequest, UpdateRequest
from packedcomm.engines.vllm.steps import Pauses, UpdateSteps
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    RendezvousTimeout,
    SessionStateError,
)
from packedcomm.results import SyncResult
from packedcomm.senders import FullWeightSender
from packedcomm.session import SenderSession
from packedcomm.session.states import AT_END

__all__ = [
    "EngineHandle",
    "EngineUpdate",
    "EngineUpdater",
    "HttpEngine",
    "LocalEngine",
    "PauseMode",
    "RayEngine",
]

_LOOK_S = 0.02


@dataclass(frozen=True, slots=True)
class EngineUpdate:
    """One update of the engines."""

    result: SyncResult
    """What the sync did."""

    seconds: Mapping[str, float]
    """Time by stage of the engines: `pause`, `flush`, `start`, `update` (with the sync in it),
    `finish`, `resume`, and `total`. Empty on a process that doesn't lead."""


class EngineUpdater:
    """Brings weights into one or several vLLM engines over a session.

    Belongs to one thread at a time, that of the session. Engines are called in threads of their
    own.

    Args:
        engines: an engine (`HttpEngine`, `RayEngine`, `LocalEngine`, a `vllm.LLM`, or any object
            like `EngineHandle`), or a sequence of engines, which are updated together.
        session: from `Session.listen`; None on the processes of a sharded trainer that don't lead.
        address: "host:port" by which workers reach the session; None is the session's own, which
            must then be one that others can reach.
        pause_mode: what happens to requests under way while the engines pause; None if the caller
            pauses and resumes them, which is asked of those that can tell. An engine that can't
            pause must not generate meanwhile. One that was paused by hand is resumed, too.
        flush: whether what the engines have cached of prompts is forgotten, as it should be unless
            the weights are known to be the same.
        timeout_s: how long engines may take for a call, and workers wait for the sync to begin, in
            seconds. The sync itself has the session's deadlines.

    Raises:
        ArgumentError: an argument is malformed.
    """

    def __init__(
        self,
        engines: Any,
        session: SenderSession | None,
        *,
        address: str | None = None,
        pause_mode: PauseMode | None = "wait",
        flush: bool = True,
        timeout_s: float = 120.0,
    ) -> None:
        self.engines = [] if session is None else engines_of(engines)
        self.session = session
        self._address = address
        self._pause_mode = None if pause_mode is None else pause_mode_checked(pause_mode)
        self._flush = flush
        self._timeout_s = timeout_s
        self._pauses = Pauses()
        UpdateRequest(timeout_s=timeout_s)

    def connect(self, receivers: int | None = None) -> int:
        """Let every engine's workers connect to the session; returns how many receivers are there.

        The workers join as the session's supervisor takes them in, so nothing of the session waits
        meanwhile and a failure here leaves it as it was: `connect` can be called again, after a
        failure or when an engine was restarted. The communicator is connected by the first update.

        Args:
            receivers: how many must be there in the end; None asks the engines, and where one
                doesn't know, is what the session was told.

        Raises:
            PackedCommError: an engine failed, as what `HttpEngine` says; the others may have
                connected.
            ConfigMismatch: the session waits for more receivers than the engines have.
            RendezvousTimeout: not all came within `Settings.connect_timeout_s`; says how many did.
            ArgumentError: workers can't know how to reach the session: it listens on all
                interfaces.
            SessionStateError: the session is closed or was aborted.
        """
        session = self._leading("connect")
        allowed = session.settings.connect_timeout_s
        request = InitRequest(self._reachable(session), allowed).as_dict()
        if receivers is not None and (type(receivers) is not int or receivers < 1):
            raise ArgumentError(f"receivers must be an integer >= 1, got {receivers!r:.80}")
        wanted = self._wanted(session) if receivers is None else receivers
        deadline = time.monotonic() + allowed
        calls = Calls(
            "init_weight_transfer_engine",
            self.engines,
            lambda engine: engine.init_weight_transfer_engine(request),
        )
        while not calls.done or len(session.members.present) < wanted:
            if (failure := calls.failure) is not None:
                raise failure
            if session.state in AT_END:
                raise SessionStateError(f"connect: {session!r}")
            if time.monotonic() >= deadline:
                raise RendezvousTimeout(
                    f"{len(session.members.present)} of {wanted} receivers came to "
                    f"{session.address} within {allowed:.3g} s, {len(calls.results)} of "
                    f"{len(self.engines)} engines have answered"
                )
            time.sleep(_LOOK_S)
        if (failure := calls.failure) is not None:
            raise failure
        session.replace_lost()
        return len(session.members.present)

    def update(
        self,
        sender: FullWeightSender,
        version: int | None = None,
        *,
        adapter: str = "",
        partial: bool = False,
        draft: bool = False,
    ) -> EngineUpdate:
        """Pause the engines, sync into them, and let them go on; they go on after a failure too.

        When a sync fails because of an engine, or an engine because of the sync, the error is the
        session's, except that an engine's is raised where it says more; the other one is a note.

        Args:
            sender: of this session. On a process that doesn't lead only its `sync` is called.
            version: as for `sync`; engines are told it as text, where vLLM takes that.
            adapter: the LoRA adapter that the sender's tensors are, as vLLM's requests name it;
                empty for the model's own weights.
            partial: whether layers of the model may be left out. Those that are sent must be whole,
                as the engine has them: queries with keys and values, all experts of a layer.
            draft: whether the weights are those of the engines' draft model for speculative
                decoding. What it shares with the model needn't be sent. The version that engines
                are told stays the model's.

        Raises:
            As `sync`, and:
            PackedCommError: an engine failed, as what `HttpEngine` says. If it did so after the
                commit, a note says so.
            DeadlineExceeded: an engine didn't answer in time.
            PeerLost, DeadlineExceeded: a receiver was lost since the last sync; said once, then the
                session goes on without it.
            SessionStateError: no receiver is connected; or another thread uses the session.
            ArgumentError: the sender is another session's, an adapter's weights are to be a draft
                model's, or an engine knows no draft models (vLLM does from 0.26 on).
        """
        if sender._session is not self.session:
            raise ArgumentError("update: the sender has another session than the updater")
        seconds: dict[str, float] = {}
        if draft and adapter:
            raise ArgumentError(f"update: adapter {adapter!r:.80} isn't a draft model's")
        if self.session is None:
            return EngineUpdate(sender.sync(version), seconds)
        request = UpdateRequest(
            "adapter" if adapter else "weights",
            adapter,
            self._timeout_s,
            partial,
            self.session.said,
            self.session.epoch,
        )
        update = UpdateSteps(self.engines, self._timeout_s, seconds, self._pauses)
        with self.session.exclusive("update"), Measured(seconds, "total"):
            try:
                session = self._leading("update")
                if not session.members.present:
                    session.drop_gone()
                    raise SessionStateError("update: no receiver is connected: call connect")
                if draft:
                    self._check_drafts()
                update.pause(self._pause_mode, self._flush)
                update.start(draft=draft)
                result = update.transfer(
                    request.as_dict(), lambda: sender.sync(version), Interruption(self.session)
                )
                update.finish(None if draft else str(result.version))
            except BaseException as error:
                if not update.begun:
                    _release_followers(sender, error)
                update.clean_up(error)
                raise
            if self._pause_mode is not None:
                update.resume()
        return EngineUpdate(result, seconds)

    def _leading(self, operation: str) -> SenderSession:
        session = self.session
        if session is None:
            raise SessionStateError(f"{operation}: this process doesn't lead: it has no session")
        if session.state in AT_END:
            raise SessionStateError(f"{operation}: {session!r}")
        return session

    def _check_drafts(self) -> None:
        for engine in self.engines:
            if not hasattr(engine, "start_draft_weight_update"):
                raise ArgumentError(f"update: {engine!r} has no start_draft_weight_update")

    def _reachable(self, session: SenderSession) -> str:
        address = session.address if self._address is None else self._address
        if Address.parse(address).all_interfaces:
            raise ArgumentError(
                f"the session listens on {address}: EngineUpdater needs the address by which "
                "workers reach this machine"
            )
        return address

    def _wanted(self, session: SenderSession) -> int:
        expected = session.world_size - 1
        sizes = call_all("get_world_size", self.engines, _world_size, self._timeout_s)
        if any(size is None for size in sizes):
            return expected
        wanted: int = sum(sizes)
        others = len(session.members.present)
        if session.generation == 0 and expected > wanted + others:
            raise ConfigMismatch(
                f"the session waits for {expected} receivers, but the engines have {wanted} workers"
            )
        return wanted


def engines_of(engines: Any) -> list[Any]:
    """The engines that were given: one, or a sequence.

    Raises:
        ArgumentError: there is none, one is given twice, or one has not all methods of
            `EngineHandle`.
    """
    given = list(engines) if isinstance(engines, Sequence) else [engines]
    if not given:
        raise ArgumentError("at least one engine is needed")
    which = [e.base_url if isinstance(e, HttpEngine) else id(e) for e in given]
    for index, key in enumerate(which):
        if key in which[:index]:
            raise ArgumentError(f"engines {which.index(key)} and {index} are the same one")
    return [_as_engine(engine) for engine in given]


def _as_engine(engine: Any) -> Any:
    # An LLM has the methods too, but wants what they take wrapped.
    if hasattr(engine, "llm_engine"):
        return LocalEngine(engine)
    if not isinstance(engine, EngineHandle):
        raise ArgumentError(
            f"an engine needs vLLM's four methods of weight transfer, {type(engine).__name__} "
            "has not all of them; for a server give HttpEngine(url)"
        )
    return engine


def _world_size(engine: Any) -> int | None:
    ask = getattr(engine, "get_world_size", None)
    size = None if ask is None else ask()
    return None if size is None else int(size)


def _release_followers(sender: FullWeightSender, error: BaseException) -> None:
    """Take the part of a sync that the trainer's other processes wait in, to tell them that there
    is none."""
    # What fails in these is raised on all of them.
    with contextlib.suppress(Exception):
        sender.source.snapshot()
        sender.source.share(f"{type(error).__name__}: {error}")
