"""What the trainer's side calls on an engine, and engines that are called in Python or by Ray."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol, get_args, runtime_checkable

from packedcomm.errors import ArgumentError, DeadlineExceeded, RemoteError

__all__ = [
    "EngineHandle",
    "LocalEngine",
    "PauseMode",
    "RayEngine",
    "finish_update",
    "pause_mode_checked",
]

PauseMode = Literal["abort", "wait", "keep"]
"""What happens to requests under way while an engine pauses: they are aborted, waited for, or kept
and continued with the new weights."""


@runtime_checkable
class EngineHandle(Protocol):
    """An engine, as the trainer's side sees it: vLLM's own four methods with plain dictionaries.

    Any object that has them will do, vLLM's own weight-sync clients among them. They return when
    the engine is done and raise if it failed. A call may come from any thread; two at once only
    where one takes longer than its deadline. What an engine has of the following is used too:

    - `pause(mode, clear_cache=...)` and `resume()`: stop scheduling, and go on, though not while a
      part of the engine's memory is asleep;
    - `reset_prefix_cache()`: forget what was computed with the old weights, also of requests that
      are kept;
    - `takes_requests: bool`: whether it may be asked something while it is updated, so that its
      caches are reset at the end too;
    - `is_paused() -> bool | None`: asked where the caller pauses it;
    - `get_world_size() -> int | None`: how many workers will connect, over all data-parallel ranks;
    - `get_version() -> str | None`: vLLM's;
    - `start_draft_weight_update()`: as `start_weight_update`, for the draft model.

    `finish_weight_update` is given `weight_version` where it takes that. The dictionaries are
    `InitRequest.as_dict()` and `UpdateRequest.as_dict()`. An engine whose workers are receivers of
    one's own, and not this backend's, gives `timeout_s` and `since` to `WeightReceiver.receive`.
    """

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> Any:
        """Let every worker connect."""

    def start_weight_update(self) -> Any:
        """Prepare every worker for an update."""

    def update_weights(self, update_info: dict[str, Any]) -> Any:
        """Let every worker receive."""

    def finish_weight_update(self) -> Any:
        """Let every worker process what it has received."""


def pause_mode_checked(mode: str) -> PauseMode:
    """The mode, if it is one.

    Raises:
        ArgumentError: it isn't.
    """
    if mode not in get_args(PauseMode):
        raise ArgumentError(f"pause_mode must be 'abort', 'wait' or 'keep', got {mode!r:.80}")
    return mode  # type: ignore[return-value]


def finish_update(engine: Any, version: str | None) -> Any:
    """Call an engine's `finish_weight_update`, with the version where it takes one."""
    finish = engine.finish_weight_update
    if version is not None and takes(finish, "weight_version"):
        return finish(weight_version=version)
    return finish()


def takes(function: Callable[..., Any], name: str) -> bool:
    """Whether a function can be given an argument by this name."""
    try:
        parameters = inspect.signature(function).parameters
    except (TypeError, ValueError):  # written in C, or without a signature
        return False
    return name in parameters or any(
        parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()
    )


def _check_reset(engine: Any, answers: list[Any]) -> None:
    if any(answer is False for answer in answers):
        raise RemoteError(f"{engine!r}: the prefix cache could not be reset")


class LocalEngine:
    """A `vllm.LLM` in this process.

    Nothing needs to pause: it generates only while one of its methods is called, which must not be
    during an update.

    Args:
        llm: the object; its class isn't looked at.
    """

    def __init__(self, llm: Any) -> None:
        self._llm = llm

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See `EngineHandle`."""
        self._llm.init_weight_transfer_engine({"init_info": init_info})

    def start_weight_update(self) -> None:
        """See `EngineHandle`."""
        self._llm.start_weight_update()

    def start_draft_weight_update(self) -> None:
        """See `EngineHandle`; needs vLLM 0.26."""
        self._llm.start_draft_weight_update()

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See `EngineHandle`."""
        self._llm.update_weights({"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `EngineHandle`; vLLM notes the version from 0.27 on."""
        finish_update(self._llm, weight_version)

    def reset_prefix_cache(self) -> None:
        """See `EngineHandle`; also what a KV connector keeps elsewhere, and what the encoder of a
        multimodal model has computed, of which only the LLM's engine has a method.

        Raises:
            RemoteError: the engine says that it couldn't.
        """
        if (reset := getattr(self._llm, "reset_prefix_cache", None)) is not None:
            options = {"reset_connector": True} if takes(reset, "reset_connector") else {}
            _check_reset(self, [reset(**options)])
        for owner, method in (
            (self._llm, "reset_mm_cache"),
            (getattr(self._llm, "llm_engine", None), "reset_encoder_cache"),
        ):
            if hasattr(owner, method):
                getattr(owner, method)()

    def get_world_size(self) -> int | None:
        """See `EngineHandle`."""
        ask = getattr(self._llm, "get_world_size", None)
        return None if ask is None else int(ask())

    def get_version(self) -> str | None:
        """See `EngineHandle`; of the vllm that the object's class is of."""
        package = type(self._llm).__module__.partition(".")[0]
        return getattr(importlib.import_module(package), "__version__", None)

    def __repr__(self) -> str:
        return f"LocalEngine({type(self._llm).__name__})"


class _Request(dict[str, Any]):
    """What vLLM's Python methods take: a dictionary for an LLM, an object with an attribute for an
    AsyncLLM. Where it is unpickled and vLLM is, it becomes vLLM's own request, which 0.25 wants."""

    init_info = property(lambda self: self["init_info"])
    update_info = property(lambda self: self["update_info"])

    def __reduce__(self) -> tuple[Any, ...]:
        return _request, (dict(self),)


def _request(fields: dict[str, Any]) -> Any:
    try:
        base = importlib.import_module("vllm.distributed.weight_transfer.base")
    except ImportError:
        return _Request(fields)
    if "init_info" in fields:
        return base.WeightTransferInitRequest(**fields)
    return base.WeightTransferUpdateRequest(**fields)


class RayEngine:
    """One or several Ray actors that have the methods of vLLM's LLM or AsyncLLM.

    Every call goes to all actors at once. An actor without `pause_generation`, such as an LLM's,
    isn't paused: what it is asked between the calls of an update is answered with the weights that
    it has then, or with new ones over what was cached with the old. What it caches meanwhile is
    reset before the update is done.

    Args:
        handle: an actor's handle, or several.
        get: `ray.get`, or what stands for it: takes a list of references, returns the results or
            raises. None imports ray when it is needed.
        timeout_s: deadline for a call of all actors, in seconds; only with `get` None.
    """

    def __init__(
        self,
        handle: Any,
        get: Callable[[list[Any]], list[Any]] | None = None,
        *,
        timeout_s: float = 600.0,
    ) -> None:
        self._handles = list(handle) if isinstance(handle, Sequence) else [handle]
        if not self._handles:
            raise ArgumentError("RayEngine needs at least one actor")
        self._given_get = get
        self._timeout_s = timeout_s

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        """See `EngineHandle`."""
        self._call("init_weight_transfer_engine", _Request(init_info=init_info))

    def start_weight_update(self) -> None:
        """See `EngineHandle`."""
        self._call("start_weight_update")

    def start_draft_weight_update(self) -> None:
        """See `EngineHandle`; needs vLLM 0.26."""
        self._call("start_draft_weight_update")

    def update_weights(self, update_info: dict[str, Any]) -> None:
        """See `EngineHandle`."""
        self._call("update_weights", _Request(update_info=update_info))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        """See `EngineHandle`. What `finish_weight_update` takes isn't known of an actor, so the
        version is told by `update_weight_version`, where there is that."""
        self._call("finish_weight_update")
        if weight_version is not None:
            self._call_where_there("update_weight_version", weight_version)

    def pause(self, mode: PauseMode, *, clear_cache: bool) -> None:
        """See `EngineHandle`."""
        pausing = [h for h in self._handles if hasattr(h, "pause_generation")]
        self._call("pause_generation", mode=mode, clear_cache=clear_cache, handles=pausing)
        if clear_cache and len(pausing) < len(self._handles):
            self.reset_prefix_cache()

    def resume(self) -> None:
        """See `EngineHandle`."""
        able = [handle for handle in self._handles if hasattr(handle, "resume_generation")]
        # Where there is `wake_up`, as vLLM has: it resumes nothing of which a part is asleep.
        waking = [handle for handle in able if hasattr(handle, "wake_up")]
        try:
            self._call("wake_up", ["scheduling"], handles=waking)
        except TypeError:
            waking = []  # an actor's own `wake_up`, which takes no tags
        self._call("resume_generation", handles=[h for h in able if h not in waking])

    @property
    def takes_requests(self) -> bool:
        """Whether actors that can't be paused may be asked something during an update."""
        return not all(hasattr(handle, "pause_generation") for handle in self._handles)

    def is_paused(self) -> bool | None:
        """See `EngineHandle`; None if no actor can tell."""
        telling = [handle for handle in self._handles if hasattr(handle, "is_paused")]
        return all(self._call("is_paused", handles=telling)) if telling else None

    def reset_prefix_cache(self) -> None:
        """See `EngineHandle`; also what a KV connector keeps elsewhere, and what the encoder of a
        multimodal model has computed, where an actor has `reset_encoder_cache`, as an AsyncLLM
        does.

        Raises:
            RemoteError: an actor says that it couldn't.
        """
        # For running requests and connectors too, which an actor's own may know nothing of.
        for arguments in ((True, True), (True,), ()):
            try:
                answers = self._call_where_there("reset_prefix_cache", *arguments)
                break
            except TypeError:
                if not arguments:
                    raise
        _check_reset(self, answers)
        # An AsyncLLM takes requests meanwhile, which would miss in it what they rely on.
        quiet = [h for h in self._handles if not hasattr(h, "pause_generation")]
        self._call("reset_mm_cache", handles=[h for h in quiet if hasattr(h, "reset_mm_cache")])
        self._call_where_there("reset_encoder_cache")

    def get_world_size(self) -> int | None:
        """See `EngineHandle`; None if an actor can't tell, as an AsyncLLM can't."""
        if not all(hasattr(handle, "get_world_size") for handle in self._handles):
            return None
        return sum(int(size) for size in self._call("get_world_size"))

    def _call_where_there(self, method: str, *arguments: Any) -> list[Any]:
        handles = [handle for handle in self._handles if hasattr(handle, method)]
        return self._call(method, *arguments, handles=handles)

    def _call(
        self, method: str, *arguments: Any, handles: list[Any] | None = None, **options: Any
    ) -> list[Any]:
        called = self._handles if handles is None else handles
        references = [getattr(handle, method).remote(*arguments, **options) for handle in called]
        return self._get(method, references) if references else []

    def _get(self, method: str, references: list[Any]) -> list[Any]:
        if self._given_get is not None:
            return self._given_get(references)
        ray = importlib.import_module("ray")
        try:
            results: list[Any] = ray.get(references, timeout=self._timeout_s)
        except ray.exceptions.GetTimeoutError as error:
            raise DeadlineExceeded(
                f"{self!r}: {method} isn't done after {self._timeout_s:.3g} s"
            ) from error
        return results

    def __repr__(self) -> str:
        return f"RayEngine({len(self._handles)} actors)"
