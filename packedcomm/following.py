"""The receiver's side of one sync: agree, receive, verify, commit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from packedcomm.completion import await_cause, measured, wait_for_device
from packedcomm.endpoints import Target, TargetChooser, is_target
from packedcomm.errors import ArgumentError, ContextLost, PeerLost, ProtocolError, summary
from packedcomm.events import ChunkMoved, TransferFinished
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import chunk_rule
from packedcomm.results import ChangeStatistics
from packedcomm.session import ReceiverSession
from packedcomm.session.messages import (
    Cancel,
    Close,
    Commit,
    NeedManifest,
    Offer,
    Proceed,
    Ready,
    Region,
    Staged,
)
from packedcomm.session.remote_errors import remote_error
from packedcomm.session.states import SyncState
from packedcomm.shown_digests import ShownDigests
from packedcomm.targets.staged import StagedTarget
from packedcomm.transports.broadcast import abort_on_failure
from packedcomm.transports.digest_sums import ReceivedDigests
from packedcomm.transports.receiving import Receiving, TargetPlan
from packedcomm.transports.slots import PIPELINES
from packedcomm.verification import (
    ChangeCount,
    change_statistics,
    packed_digests,
    regions_of,
    whole_regions,
)

__all__ = ["Following", "Update"]

logger = logging.getLogger("packedcomm")

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
    notes: tuple[str, ...] = ()


@dataclass(slots=True)
class Held:
    """What is digested of a manifest: regions, and the memory that holds them."""

    regions: tuple[Region, ...]
    plan: TargetPlan | None
    memory: ReceivedDigests | None
    """None for a callback, whose tensors are digested as they come."""


@dataclass(frozen=True, slots=True)
class Doubt:
    """A sync that a receiver has voted for, and of which it doesn't know what was decided."""

    epoch: str
    number: int
    version: int
    manifest: Manifest
    staged: bool
    """Whether a target holds it, and not a callback."""


class Following:
    """Runs the stages of a receiver's syncs over its session; keeps what they agreed on.

    Args:
        target: where the data goes: a target, a callback, or a chooser of either.
        session: the session.
    """

    def __init__(self, target: Any, session: ReceiverSession) -> None:
        self._given = target
        self._target = target
        self._session = session
        self._manifests: dict[str, Manifest] = {}
        self._held: dict[str, Held] = {}
        self._changes = ChangeCount()
        self._torn: set[str] = set()
        self._torn_before: frozenset[str] = frozenset()
        self._doubt: Doubt | None = None
        self.cancelled = False
        """Whether the last failure was the sender's, who needn't be told then."""

    @property
    def torn(self) -> bool:
        """Whether failures have left destinations of which some are new, some old, that no later
        sync has written whole."""
        return bool(self._torn)

    def attach(self, session: ReceiverSession) -> int | None:
        """Go on in another session.

        Returns:
            The version of a sync that this receiver had voted for when it lost the sender, if the
            sender says now that it was committed: it is then committed here too.
        """
        doubt, self._doubt = self._doubt, None
        self._session = session
        self._held.clear()
        if doubt is None or session.epoch != doubt.epoch or session.decided > doubt.number:
            return None
        if session.decided < doubt.number:
            # The sender may not know yet that the connection was lost, and decide it still.
            self._doubt = doubt
            return None
        self._commit(doubt.manifest, staged=doubt.staged)
        return doubt.version

    def receive(self, offer: Offer) -> Update:
        """Take part in the sync that is offered, up to its commit.

        Args:
            offer: what the sender has just sent.
        """
        session = self._session
        self.cancelled = False
        self._doubt = None
        try:
            return self._receive(offer)
        except BaseException as error:
            cause = self._cause(error)
            if not self.cancelled:
                session.fail(cause or error)
            session.record_failure(cause or error)
            try:
                if session.state is SyncState.MOVING:
                    if session.untouched:
                        self._torn = set(self._torn_before)
                    # Not used again: only the sender knows whether every rank has come to its end.
                    session.drop_communicator(summary(error))
            except ContextLost as lost:
                session.fail(lost, ended=True)
                raise lost from error
            finally:
                if self.torn:
                    session.phases.tear()
                else:
                    session.phases.rest()
            if cause is not None and cause is not error:
                raise cause from cause.__cause__ or error
            raise

    def plan_ahead(self, offer: Offer) -> None:
        """Plan the next sync of what was offered, where a chooser knows its target already. Never
        raises: what fails now is planned again when it is chosen."""
        try:
            manifest = self._manifests[offer.digest]
            foreseen = getattr(self._given, "foreseen", None)
            if not isinstance(self._given, TargetChooser) or foreseen is None:
                return
            target = foreseen(manifest)
            fixed = is_target(target) and getattr(target, "fixed_destinations", False)
            if fixed and target is not self._target and self._session.lasts:
                self._plan(target, manifest, offer)
        except Exception:
            logger.debug("nothing is planned ahead", exc_info=True)

    def _plan(self, target: Target, manifest: Manifest, offer: Offer) -> None:
        session = self._session
        cut = chunk_rule(session.wire_format, offer.buffer_size_bytes)
        group, buffers = session.communicator, session.settings.num_buffers
        with PIPELINES.borrow(group, session.device, buffers) as pipeline:
            try:
                Receiving(pipeline, group, 0, cut, target, None).place(manifest)
            except Exception:
                # Nothing of the pipeline was used: it stays.
                logger.debug("a target that was foreseen doesn't fit", exc_info=True)

    def _cause(self, error: BaseException) -> Exception | None:
        """What another rank says is behind a failure of the transfer."""
        session = self._session
        if session.state is not SyncState.MOVING:
            return None
        cause = await_cause(error, session.failure)
        if cause is not None and cause is not session.phases.interruption:
            self.cancelled = True
        return cause

    def _receive(self, offer: Offer) -> Update:
        session = self._session
        seconds: dict[str, float] = {}
        with measured(seconds, "agree"):
            manifest, offer = self._manifest(offer)
        if isinstance(self._given, TargetChooser):
            with measured(seconds, "agree"):
                self._target = self._given.choose(manifest)
        target = self._target
        shown = None
        staged = isinstance(target, StagedTarget)
        verify = offer.verify == "always" or (offer.verify == "staged" and staged)
        if not is_target(target):
            target = shown = ShownDigests(offer.version, target, self._torn.update)
            shown.digesting = verify
        if offer.statistics and not staged:
            raise ArgumentError(
                "change statistics need the old weights beside the new ones: use a StagedTarget"
            )

        def note(event: ChunkMoved | TransferFinished) -> None:
            if isinstance(event, TransferFinished):
                seconds.update({k: v for k, v in event.seconds.items() if k != "total"})
            else:
                session.chunk += 1

        cut = chunk_rule(session.wire_format, offer.buffer_size_bytes)
        group = session.communicator
        with PIPELINES.borrow(group, session.device, session.settings.num_buffers) as pipeline:
            receiving = Receiving(pipeline, group, 0, cut, target, note, self._wait)
            with measured(seconds, "agree"):
                plan = None if shown is not None else receiving.place(manifest)
                known = offer.regions_known and self._known(manifest, plan)
                new = verify and not known
                ready = Ready(verify, self._hold(manifest, plan) if new else None)
                session.phases.enter(SyncState.AGREED)
                session.reply(ready)
                if not offer.at_once:
                    self._expect("agree", 0, Proceed)
            memory = self._held[manifest.digest].memory if verify else None
            allowed = session.settings.move_seconds(manifest.nbytes)
            if offer.at_once:
                # Others may still be asked.
                allowed += session.settings.agree_timeout_s
            session.chunk = 0
            session.phases.enter(SyncState.MOVING, allowed)
            group.set_timeout(allowed)
            self._torn_before = frozenset(self._torn)
            if shown is None and not staged:
                # Old weights are overwritten from here on.
                self._torn.update(manifest.by_name)
            with abort_on_failure(group, "sync"):
                receiving.run(manifest, memory)
        return self._finish(offer, manifest, target, shown, verify, seconds)

    def _finish(
        self,
        offer: Offer,
        manifest: Manifest,
        target: Any,
        shown: ShownDigests | None,
        verify: bool,
        seconds: dict[str, float],
    ) -> Update:
        session = self._session
        with measured(seconds, "verify"):
            digests = self._digests(manifest, shown) if verify else None
            changes: dict[str, ChangeStatistics] = {}
            if offer.statistics:
                changes = change_statistics(target.staged_pairs(manifest))
        session.phases.enter(SyncState.STAGED)
        packed = b"" if digests is None else packed_digests(digests)
        notes = tuple(getattr(self._given, "notes", ()))
        session.reply(Staged(dict(seconds), packed, changes, notes))
        with measured(seconds, "commit"):
            staged = shown is None
            self._await_decision(offer, manifest, staged=staged)
            self._commit(manifest, staged=staged)
        changed: int | None = None
        if digests is not None:
            regions = self._held[manifest.digest].regions
            changed = self._changes.count(manifest, digests, regions)
        return Update(
            offer.version, len(manifest), manifest.nbytes, seconds, verify, changed, changes, notes
        )

    def _await_decision(self, offer: Offer, manifest: Manifest, *, staged: bool) -> None:
        """Until the sender says Commit. Whoever loses it here, having voted, can't know what it has
        decided."""
        self._doubt = Doubt(self._session.epoch, offer.number, offer.version, manifest, staged)
        decided = self._expect("commit", manifest.nbytes, Commit)
        self._doubt = None
        if decided.version != offer.version:
            raise ProtocolError(
                f"the sender commits version {decided.version}, offered was {offer.version}"
            )

    def _commit(self, manifest: Manifest, *, staged: bool) -> None:
        """Make what was received the weights.

        Args:
            manifest: of what was received.
            staged: whether there is a target to tell; a callback has had everything already.
        """
        if staged:
            self._torn.update(manifest.by_name)
            self._target.commit(manifest)
        # Decided: whatever happens to the sender now changes nothing.
        allowed = self._session.settings.commit_seconds(manifest.nbytes)
        wait_for_device(self._session.device, allowed, lambda: None, "commit")
        self._torn.difference_update(manifest.by_name)

    def _manifest(self, offer: Offer) -> tuple[Manifest, Offer]:
        known = self._manifests.get(offer.digest)
        if known is None and not offer.manifest:
            self._session.reply(NeedManifest())
            offer = self._expect("agree", 0, Offer)
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

    def _expect(self, stage: str, nbytes: int, *kinds: type[Any]) -> Any:
        """The sender's next message.

        Args:
            stage: what it belongs to, "agree" or "commit", which has a deadline.
            nbytes: of the sync; other receivers may still be receiving them.
            kinds: what is expected.
        """
        settings = self._session.settings
        if stage == "agree":
            allowed = settings.agree_timeout_s
        else:
            allowed = settings.move_seconds(nbytes) + settings.commit_seconds(nbytes)
        message = self._session.receive(allowed)
        if isinstance(message, Cancel):
            self.cancelled = True
            self._doubt = None
            raise remote_error(message, "cancelled by the sender")
        if isinstance(message, Close):
            self.cancelled = True
            raise PeerLost(f"the sender has ended the session here: {message.reason}")
        if not isinstance(message, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise ProtocolError(f"the sender sent {type(message).__name__}, expected {expected}")
        return message

    def _wait(self) -> None:
        session = self._session
        remaining = max(0.1, session.phases.present.remaining)
        wait_for_device(session.device, remaining, session.failure, "sync")
