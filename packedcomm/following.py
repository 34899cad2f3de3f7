"""The receiver's side of one sync: agree, receive, verify, commit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from packedcomm.completion import await_cause, measured, wait_for_device
from packedcomm.digests import DigestPlan
from packedcomm.endpoints import Target
from packedcomm.errors import ArgumentError, PeerLost, ProtocolError
from packedcomm.events import ChunkMoved, TransferFinished
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import chunk_rule
from packedcomm.results import ChangeStatistics
from packedcomm.session import ReceiverSession
from packedcomm.session.messages import (
    Cancel,
    Close,
    Commit,
    Moved,
    NeedManifest,
    Offer,
    Proceed,
    Ready,
    Region,
    Staged,
)
from packedcomm.session.remote_errors import remote_error
from packedcomm.targets.staged import StagedTarget
from packedcomm.transports.broadcast import abort_on_failure
from packedcomm.transports.digest_sums import ReceivedDigests, digest_blocks
from packedcomm.transports.receiving import Receiving, TargetPlan
from packedcomm.transports.slots import PIPELINES
from packedcomm.verification import (
    ChangeCount,
    change_statistics,
    compare,
    regions_of,
    whole_regions,
)

__all__ = ["Following", "Update"]

# Manifests, and what was planned for them, that are remembered.
_KEPT_MANIFESTS = 8


@dataclass(frozen=True, slots=True)
class Update:
    """One committed sync, as a receiver saw it."""

    version: int
    tensors: int = 0
    nbytes: int = 0
    seconds: Mapping[str, float] = field(default_factory=dict)
    verified: bool = False
    changed_tensors: int | None = None
    changes: Mapping[str, ChangeStatistics] = field(default_factory=dict)


@dataclass(slots=True)
class Held:
    """What is digested of a manifest: regions, and the memory that holds them."""

    regions: tuple[Region, ...]
    plan: TargetPlan | None
    memory: ReceivedDigests | None
    """None for a callback, whose tensors are digested as they come."""


class ShownDigests:
    """Wraps a callback: digests of the tensors that it is shown, by name."""

    def __init__(self, version: int, callback: Callable[..., Any]) -> None:
        self._version = version
        self._callback = callback
        self._found: list[tuple[list[str], torch.Tensor]] = []
        self.digesting = False

    def __call__(self, items: list[tuple[str, torch.Tensor]]) -> None:
        if self.digesting:
            tensors = [tensor for _, tensor in items]
            plan = DigestPlan(tensors, blocks=digest_blocks(tensors[0].device) if tensors else 0)
            self._found.append(([name for name, _ in items], plan.run()))
        self._callback(self._version, items)

    def take(self, manifest: Manifest) -> torch.Tensor:
        """The digests as int64 in the manifest's order; waits for a GPU."""
        found = {
            name: digest
            for names, digests in self._found
            for name, digest in zip(names, digests.tolist(), strict=True)
        }
        return torch.tensor([found[spec.name] for spec in manifest.specs], dtype=torch.int64)


class Following:
    """Runs the stages of a receiver's syncs over its session; keeps what they agreed on.

    Args:
        target: where the data goes.
        session: the session.
    """

    def __init__(self, target: Any, session: ReceiverSession) -> None:
        self._target = target
        self._session = session
        self._manifests: dict[str, Manifest] = {}
        self._held: dict[str, Held] = {}
        self._changes = ChangeCount()
        self._torn: set[str] = set()
        self.broken = False
        """Whether the transport has failed, so that there can't be another sync."""
        self.cancelled = False
        """Whether the last failure was the sender's, who needn't be told then."""

    @property
    def torn(self) -> bool:
        """Whether failures have left destinations of which some are new, some old, that no later
        sync has written whole."""
        return bool(self._torn)

    def receive(self, offer: Offer, enter: Callable[[str], None]) -> Update:
        """Take part in the sync that is offered, up to its commit.

        Args:
            offer: what the sender has just sent.
            enter: told the states that this goes through.
        """
        session = self._session
        self.cancelled = False
        seconds: dict[str, float] = {}
        with measured(seconds, "agree"):
            manifest, offer = self._manifest(offer)
        target = self._target
        shown = None
        if not isinstance(target, Target):
            target = shown = ShownDigests(offer.version, target)
            shown.digesting = offer.verify
        if offer.statistics and not isinstance(target, StagedTarget):
            raise ArgumentError(
                "change statistics need the old weights beside the new ones: use a StagedTarget"
            )

        def note(event: ChunkMoved | TransferFinished) -> None:
            if isinstance(event, TransferFinished):
                seconds.update({k: v for k, v in event.seconds.items() if k != "total"})

        cut = chunk_rule(session.wire_format, session.buffer_size_bytes)
        group = session.communicator
        with PIPELINES.borrow(group, session.device, session.settings.num_buffers) as pipeline:
            receiving = Receiving(pipeline, group, 0, cut, target, note, self._wait)
            with measured(seconds, "agree"):
                plan = None if shown is not None else receiving.place(manifest)
                known = offer.regions_known and self._known(manifest, plan)
                new = offer.verify and not known
                ready = Ready(self._hold(manifest, plan) if new else None)
                session.reply(ready)
                while isinstance(again := self._expect(Proceed, Offer), Offer):
                    # Another receiver needed the manifest, so all are asked once more.
                    if again.digest != offer.digest:
                        raise ProtocolError("the sender offers something else meanwhile")
                    session.reply(ready)
            enter("receiving")
            in_place = shown is None and not isinstance(target, StagedTarget)
            memory = self._held[manifest.digest].memory if offer.verify else None
            self._move(receiving, manifest, memory, in_place=in_place)
        return self._finish(offer, manifest, target, shown, seconds, enter)

    def _move(
        self,
        receiving: Receiving,
        manifest: Manifest,
        memory: ReceivedDigests | None,
        *,
        in_place: bool,
    ) -> None:
        if in_place:
            # Old weights are overwritten from here on.
            self._torn.update(manifest.by_name)
        try:
            with abort_on_failure(self._session.communicator, "sync"):
                receiving.run(manifest, memory)
        except Exception as error:
            self.broken = True
            cause = await_cause(error, self._session.failure)
            if cause is not None:
                self.cancelled = True
                raise cause from cause.__cause__
            raise

    def _finish(
        self,
        offer: Offer,
        manifest: Manifest,
        target: Any,
        shown: ShownDigests | None,
        seconds: dict[str, float],
        enter: Callable[[str], None],
    ) -> Update:
        session = self._session
        changed: int | None = None
        with measured(seconds, "verify"):
            digests = self._digests(manifest, shown) if offer.verify else None
            moved = self._expect(Moved)
            regions: tuple[Region, ...] = ()
            if digests is not None:
                regions = self._held[manifest.digest].regions
                compare(manifest, regions, moved.digests, digests)
            changes: dict[str, ChangeStatistics] = {}
            if offer.statistics:
                changes = change_statistics(target.staged_pairs(manifest))
        enter("staged")
        session.reply(Staged(dict(seconds), changes))
        decided = self._expect(Commit)
        if decided.version != offer.version:
            raise ProtocolError(
                f"the sender commits version {decided.version}, offered was {offer.version}"
            )
        with measured(seconds, "commit"):
            if shown is None:
                self._torn.update(manifest.by_name)
                target.commit(manifest)
            self._wait()
            self._torn.difference_update(manifest.by_name)
        if digests is not None:
            changed = self._changes.count(manifest, digests, regions)
        return Update(
            offer.version,
            len(manifest),
            manifest.nbytes,
            seconds,
            offer.verify,
            changed,
            changes,
        )

    def _manifest(self, offer: Offer) -> tuple[Manifest, Offer]:
        known = self._manifests.get(offer.digest)
        if known is None and not offer.manifest:
            self._session.reply(NeedManifest())
            offer = self._expect(Offer)
        if known is None:
            known = Manifest.from_json(offer.manifest)
            if known.digest != offer.digest:
                raise ProtocolError(
                    f"the offered manifest has digest {known.digest}, announced was {offer.digest}"
                )
            while len(self._manifests) >= _KEPT_MANIFESTS:
                oldest = next(iter(self._manifests))
                del self._manifests[oldest]
                self._held.pop(oldest, None)
            self._manifests[known.digest] = known
        return known, offer

    def _known(self, manifest: Manifest, plan: TargetPlan | None) -> bool:
        """Whether the sender knows what is held of a manifest, and it hasn't moved."""
        held = self._held.get(manifest.digest)
        return held is not None and held.plan is plan

    def _hold(self, manifest: Manifest, plan: TargetPlan | None) -> tuple[Region, ...]:
        if plan is None:
            held = Held(whole_regions(manifest), None, None)
        else:
            memory = ReceivedDigests(plan.destinations)
            held = Held(regions_of(plan.parts), plan, memory)
        self._held[manifest.digest] = held
        return held.regions

    def _digests(self, manifest: Manifest, shown: ShownDigests | None) -> torch.Tensor:
        if shown is not None:
            return shown.take(manifest)
        memory = self._held[manifest.digest].memory
        assert memory is not None
        return memory.take()

    def _expect(self, *kinds: type[Any]) -> Any:
        message = self._session.receive(self._session.settings.operation_timeout_s)
        if isinstance(message, Cancel):
            self.cancelled = True
            raise remote_error(message, "cancelled by the sender")
        if isinstance(message, Close):
            self.cancelled = self.broken = True
            raise PeerLost(f"the sender has left the session: {message.reason}")
        if not isinstance(message, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ProtocolError(f"the sender sent {type(message).__name__}, expected {expected}")
        return message

    def _wait(self) -> None:
        session = self._session
        wait_for_device(
            session.device, session.settings.operation_timeout_s, session.failure, "sync"
        )
