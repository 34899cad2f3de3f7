"""A model's weights in a running engine: loaded by its own loader at first, replayed later.

The first update of a manifest is recorded while the engine's loader carries it out, the second one
shows that the loader does the same again, and from the third one on boxes are received straight
into the live parameters. Addresses never change.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils.dlpack import from_dlpack

from packedcomm.engines.vllm.live import Links, live_tensors
from packedcomm.engines.vllm.recorded import Proof, RecordedTarget, Recording
from packedcomm.engines.vllm.recording import Recorder
from packedcomm.engines.vllm.reload import PASSED_OVER, Reload
from packedcomm.errors import ManifestError
from packedcomm.manifest import Manifest

__all__ = ["ModelWeights"]

logger = logging.getLogger("packedcomm")

# Manifests whose recordings are kept, and of how many it is known whether the loader takes them.
_KEPT = 4
_MOST_CHECKED = 64

# What has come over a manifest's constants if nobody knows.
_ANYTHING = ""

Rename = Callable[[str], str]

# Above this share of the bytes the loader gets everything: what it is given needs memory aside.
_MOST_BY_LOADER = 0.25


class ModelWeights:
    """Chooses how a model is updated: by its loader or by a recording of it.

    Belongs to one thread.

    Args:
        model: the engine's model.
        model_config, vllm_config: the engine's configurations.
        device: where its parameters are.
        renames: ways from names as they are sent to names that the loader may know, of which the
            first one counts that it takes; None is no change.
        lender: another model, whose modules this one uses too, as a draft model may those of the
            model that it is for; nothing need be sent for them.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        model_config: Any,
        vllm_config: Any,
        device: torch.device,
        *,
        renames: Sequence[Rename | None] = (None,),
        lender: torch.nn.Module | None = None,
    ) -> None:
        self._model = model
        self._configs = (model_config, vllm_config)
        self._device = device
        self._renames = renames
        self._lender = lender
        self._recordings: dict[str, Recording] = {}
        self._targets: dict[str, RecordedTarget] = {}
        self._links: dict[str, Links] = {}
        # By manifest: the others that came since it is known that all of its constants are in
        # place, or _ANYTHING.
        self._since: dict[str, set[str]] = {}
        # By manifest and `partial`: why its loader can't be tried, and which names it knows.
        self._checked: dict[tuple[str, bool], tuple[str, Rename | None]] = {}
        self._checked_layout: dict[str, Any] | None = None
        self._untried = ""
        self._rename = renames[0]
        # What is being received.
        self._present = ""
        self._reload: Reload | None = None
        self.partial = False
        """Whether a manifest may leave parameters out."""
        self.way = ""
        """How the last update was carried out: `"recorded"`, `"proved"`, `"replayed"` or
        `"loaded"`."""

    def choose(self, manifest: Manifest) -> Any:
        """How to receive a manifest: a target, or a callback that gives chunks to the loader.

        Raises:
            ManifestError: the engine's loader doesn't know a name or a shape, or parameters are
                missing, or vLLM can't load this model twice; nothing is touched.
        """
        if self._device.type == "cpu" and getattr(self._configs[1], "quant_config", None):
            # Some of their kernels keep the address of what they were made of, and a reload frees
            # that: vLLM's own `reload_weights` leaves NaN too.
            raise ManifestError("on CPUs vLLM can't load the weights of a quantised model again")
        digest = self._present = manifest.digest
        target = self._targets.get(digest)
        if target is not None and (target.moved or self._links[digest].changed):
            logger.warning("the engine's parameters have moved: recording its loader again")
            self.forget()
        self._check(manifest)
        recording = self._recordings.get(digest)
        for other, theirs in self._recordings.items():
            if other != digest and theirs.constants.names:
                self._since.setdefault(other, set()).add(digest)
        if recording is None:
            return _Recorded(self, manifest)
        # The one that was used last is kept longest.
        self._recordings[digest] = self._recordings.pop(digest)
        if not recording.proved:
            return _Proved(self, manifest, recording)
        if not self._replayable(manifest, recording) or not self._constants_held(digest):
            return _Loaded(self, manifest)
        self.way = "replayed"
        target = self._replay(manifest, recording)
        target.whole = self.whole
        return target

    def foreseen(self, manifest: Manifest) -> RecordedTarget | None:
        """The target of the next update of a manifest that was received, if it will be replayed,
        and all of it straight into the parameters: memory aside isn't taken before it is needed."""
        recording = self._recordings.get(manifest.digest)
        if recording is None or not recording.proved or recording.reasons:
            return None
        if manifest.digest in self._since:
            return None
        return self._replay(manifest, recording)

    @property
    def whole(self) -> bool:
        """Whether the present update leaves nothing as it was."""
        return not self.partial and not self._untried

    def _replay(self, manifest: Manifest, recording: Recording) -> RecordedTarget:
        digest = manifest.digest
        if digest not in self._targets:
            live = live_tensors(self._model)
            self._targets[digest] = RecordedTarget(
                recording, live, self._device, lambda items: self._load_rest(recording, items)
            )
            self._links[digest] = Links(self._model, self._targets[digest].names)
        return self._targets[digest]

    def forget(self) -> None:
        """Drop all recordings."""
        self._recordings.clear()
        self._targets.clear()
        self._links.clear()
        self._since.clear()
        # What a loader takes depends on what the model has, not on where that is: some move their
        # parameters at every load.
        if (layout := self._layout()) != self._checked_layout:
            self._checked.clear()
            self._checked_layout = layout

    def _layout(self) -> dict[str, Any]:
        return {
            name: (tensor.shape, tensor.dtype) for name, tensor in live_tensors(self._model).items()
        }

    def lose_contents(self) -> None:
        """All memory has other contents now than the last update left."""
        for digest, recording in self._recordings.items():
            if recording.constants.names:
                self._since.setdefault(digest, set()).add(_ANYTHING)

    def loaded(self, manifest: Manifest) -> None:
        """The loader has carried out all of an update."""
        self._since.pop(manifest.digest, None)

    def take_back(self) -> None:
        """After a failed update: end the reload that it has begun, so that the engine can answer.
        Idempotent."""
        reload, self._reload = self._reload, None
        if reload is not None:
            reload.take_back()

    @property
    def reasons(self) -> dict[str, str]:
        """Layers that are left to the loader, and why, of all manifests."""
        found: dict[str, str] = {}
        for recording in self._recordings.values():
            found.update(recording.reasons)
        return found

    @property
    def notes(self) -> tuple[str, ...]:
        """How the present update is carried out, and why not otherwise, for the trainer."""
        present = self._recordings.get(self._present)
        reasons = [
            _short(f"{layer or 'the model'} stays with the engine's loader: {reason}")
            for layer, reason in (present.reasons if present else {}).items()
        ]
        more = [f"and {len(reasons) - 13} more layers"] if len(reasons) > 13 else []
        untried = [_short(f"not tried before: {self._untried}")] if self._untried else []
        return (self.way, *untried, *reasons[:13], *more)

    def reload(self, layers: list[str] | None = None) -> Reload:
        """A new reload, which `take_back` would take back."""
        model_config, vllm_config = self._configs
        self._reload = Reload(
            self._model,
            model_config,
            vllm_config,
            layers=layers,
            rename=self._rename,
            lender=self._lender,
        )
        return self._reload

    def keep(self, manifest: Manifest, recording: Recording) -> None:
        """Remember what was recorded."""
        self._recordings.pop(manifest.digest, None)
        while len(self._recordings) >= _KEPT:
            oldest = next(iter(self._recordings))
            del self._recordings[oldest]
            self._targets.pop(oldest, None)
            self._links.pop(oldest, None)
            self._since.pop(oldest, None)
        self._recordings[manifest.digest] = recording
        for layer, reason in recording.reasons.items():
            logger.info("stays with the engine's loader: %s: %s", layer or "the model", reason)

    def _check(self, manifest: Manifest) -> None:
        key = (manifest.digest, self.partial)
        if key not in self._checked:
            described = [
                (s.name, torch.empty(s.shape, dtype=getattr(torch, s.dtype), device="meta"))
                for s in manifest.specs
            ]
            while len(self._checked) >= _MOST_CHECKED:
                del self._checked[next(iter(self._checked))]
            if self._checked_layout is None:
                self._checked_layout = self._layout()
            untried = self._try_names(described)
            self._checked[key] = untried, self._rename
            if untried:
                logger.warning(
                    "the engine's loader can't be tried, so nobody sees whether parameters are "
                    "missing: %s",
                    untried,
                )
        self._untried, self._rename = self._checked[key]

    def _try_names(self, described: list[tuple[str, torch.Tensor]]) -> str:
        """Find out which names the loader knows; returns why it can't be tried, if it can't."""
        refused: ManifestError | None = None
        for rename in self._renames:
            self._rename = rename
            try:
                return self.reload().check(described, partial=self.partial)
            except ManifestError as error:
                # The first one says most, but where it only says that names aren't known.
                if refused is None or str(refused).startswith(PASSED_OVER):
                    refused = error
        assert refused is not None
        raise refused

    def _replayable(self, manifest: Manifest, recording: Recording) -> bool:
        if "" in recording.reasons:
            return False
        aside = sum(manifest.by_name[name].nbytes for name in recording.by_loader)
        return aside <= _MOST_BY_LOADER * manifest.nbytes

    def _constants_held(self, digest: str) -> bool:
        """Whether everything is in place that a manifest's loader sets to constants."""
        recording = self._recordings[digest]
        for other in self._since.get(digest, ()):
            theirs = self._recordings.get(other)
            # Where loaders do more than is followed, they may do so beside the parameters, too,
            # and that can't be compared.
            if theirs is None or theirs.leaves_to_loader(recording.constants.names):
                return False
        if digest in self._since and not recording.constants.held_in(live_tensors(self._model)):
            return False
        self._since.pop(digest, None)
        return True

    def _load_rest(self, recording: Recording, items: list[tuple[str, torch.Tensor]]) -> None:
        reload = self.reload(list(recording.reasons))
        reload.begin()
        reload.load(items)
        reload.end()


def _short(text: str) -> str:
    return text.encode()[:500].decode(errors="ignore")


def _alias(tensor: torch.Tensor) -> torch.Tensor:
    """The same memory under a storage of its own: many tensors of a chunk share one, which is kept
    for longer than they are."""
    if not tensor.numel():
        return tensor
    return from_dlpack(tensor.reshape(-1).view(torch.uint8)).view(tensor.dtype).view(tensor.shape)


class _Loaded:
    """A callback that gives what it is shown to the engine's loader."""

    way = "loaded"

    def __init__(self, weights: ModelWeights, manifest: Manifest) -> None:
        self._weights = weights
        self._manifest = manifest
        self._left = len(manifest)
        self._reload: Reload | None = None
        weights.way = self.way
        self.whole = weights.whole

    def __call__(self, _version: int, items: list[tuple[str, torch.Tensor]]) -> None:
        if self._reload is None:
            self._begin()
        assert self._reload is not None
        self._load(self._reload, items)
        self._left -= len(items)
        if not self._left:
            self._end(self._reload)
            self._weights.loaded(self._manifest)

    def _begin(self) -> None:
        self._reload = self._weights.reload()
        self._reload.begin()

    def _load(self, reload: Reload, items: list[tuple[str, torch.Tensor]]) -> None:
        reload.load(items)

    def _end(self, reload: Reload) -> None:
        reload.end()


class _Recorded(_Loaded):
    """The same, and recorded."""

    way = "recorded"

    def _begin(self) -> None:
        self._live = live_tensors(self._weights._model)
        self._recorder = Recorder(self._live)
        super()._begin()

    def _load(self, reload: Reload, items: list[tuple[str, torch.Tensor]]) -> None:
        own = [(name, _alias(tensor)) for name, tensor in items]
        for name, tensor in own:
            self._recorder.receive(name, tensor)
        with self._recorder:
            reload.load(own, self._recorder)

    def _end(self, reload: Reload) -> None:
        with self._recorder:
            reload.end(self._recorder)
        # What is only waiting to be collected isn't kept.
        gc.collect()
        self._weights.keep(self._manifest, Recording.of(self._recorder, self._manifest, self._live))


class _Proved(_Loaded):
    """The same, and compared with a recording."""

    way = "proved"

    def __init__(self, weights: ModelWeights, manifest: Manifest, recording: Recording) -> None:
        super().__init__(weights, manifest)
        self._recording = recording

    def _begin(self) -> None:
        live = live_tensors(self._weights._model)
        self._proof = Proof(self._recording, live)
        super()._begin()

    def _load(self, reload: Reload, items: list[tuple[str, torch.Tensor]]) -> None:
        for name, tensor in items:
            self._proof.receive(name, tensor)
        reload.load(items, self._proof)

    def _end(self, reload: Reload) -> None:
        reload.end(self._proof)
        self._proof.end()
        self._weights.keep(self._manifest, self._recording)
