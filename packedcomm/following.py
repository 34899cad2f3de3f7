"""The receiver's side of one sync: agree, receive, verify, commit."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from packedcomm.completion import Measured, await_cause, wait_for_device
from packedcomm.decisions import Decisions
from packedcomm.endpoints import Target, TargetChooser, is_target
from packedcomm.errors import ArgumentError, ContextLost, ProtocolError, RemoteError, summary
from packedcomm.events import ChunkMoved, TransferFinished
from packedcomm.holding import Vote, Writing
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import chunk_rule
from packedcomm.results import ChangeStatistics
from packedcomm.session import ReceiverSession
from packedcomm.session.messages import (
    Commit,
    NeedManifest,
    NoChange,
    Offer,
    Proceed,
    Ready,
    Region,
    Staged,
)
from packedcomm.session.states import AT_END, AT_REST, SyncState
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


@dataclass(slots=True, weakref_slot=True, eq=False)
class Held:
    """What is digested of a manifest: regions, and the memory that holds them."""

    regions: tuple[Region, ...]
    plan: TargetPlan | None
    memory: ReceivedDigests | None
    """None for a callback, whose tensors are digested as they come."""


class Following:
    """Runs the stages of a receiver's syncs over its session; keeps what they agreed on.

    Args:
        target: where the data goes: a target, a callback, or a chooser of either.
        session: the session.
    """

    def __init__(self, target: Any, session: ReceiverSession) -> None:
        self._given = target
        # Asked once: over a protocol it takes tens of microseconds.
        self._chooser = target if isinstance(target, TargetChooser) else None
        self._target = target
        self._session = session
        self._manifests: dict[str, Manifest] = {}
        self._held: dict[str, Held] = {}
        self._changes = ChangeCount()
        self.decisions = Decisions(session)
        # What was held when data began to move.
        self._held_before = self.decisions.holding
        self.under_way = False
        """Whether a sync is. Any thread may look."""

    def attach(self, session: ReceiverSession) -> int | None:
        """Go on in another session.

        Returns:
            The version of a sync that this receiver had voted for when it lost the sender, if the
            sender says now that it was committed: it is then committed here too.
        """
        self._session = session
        self._held.clear()
        return self.decisions.attach(session)

    def receive(self, message: Offer | NoChange | Commit) -> Update:
        """Take part in what the sender begins, up to its commit.

        Args:
            message: what the sender has just sent; a `Commit` of what this receiver is in doubt of.
        """
        session, decisions = self._session, self.decisions
        decisions.sender_knows = False
        self.under_way = True
        try:
            if isinstance(message, Commit):
                return Update(decisions.commit_in_doubt().version)
            decisions.forget_doubt()
            if isinstance(message, NoChange):
                decisions.confirm(message)
                return Update(message.version)
            received = self._receive(message)
        except BaseException as error:
            cause = self._cause(error)
            # Who was interrupted when all had been said has no more to say: it would be taken for
            # the answer to the next question.
            answered = decisions.has_committed(message.number) and not session.owes
            if not (decisions.sender_knows or answered):
                session.fail(cause or error)
            session.record_failure(cause or error)
            try:
                if session.state is SyncState.MOVING:
                    if session.untouched:
                        decisions.holding = self._held_before
                    # Not used again: only the sender knows whether every rank has come to its end.
                    session.drop_communicator(summary(error))
            except ContextLost as lost:
                session.fail(lost, ended=True)
                raise lost from error
            finally:
                decisions.settle()
            if cause is not None and cause is not error:
                raise cause from cause.__cause__ or error
            raise
        finally:
            self.under_way = False
        # The sender has heard that it is committed.
        return self._counted(message, *received)

    def clear_up(self) -> None:
        """Before the next sync: do what an interrupt has left undone of the end of the last one.

        Raises:
            ContextLost: the communicator can't be given up.
        """
        session = self._session
        if session.state in AT_REST | AT_END:
            return
        session.fail(RemoteError("interrupted in the middle of a sync"))
        try:
            if session.state is SyncState.MOVING:
                session.drop_communicator("a sync was interrupted")
        except ContextLost as lost:
            session.fail(lost, ended=True)
            raise
        finally:
            self.decisions.settle()

    def plan_ahead(self, offer: Offer) -> None:
        """Plan the next sync of what was offered, where a chooser knows its target already. Never
        raises: what fails now is planned again when it is chosen."""
        try:
            manifest = self._manifests[offer.digest]
            foreseen = getattr(self._chooser, "foreseen", None)
            if foreseen is None:
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
            self.decisions.sender_knows = True
        return cause

    def _receive(self, offer: Offer) -> tuple[Update, torch.Tensor | None]:
        session = self._session
        seconds: dict[str, float] = {}
        with Measured(seconds, "agree"):
            manifest, offer = self._manifest(offer)
        if self._chooser is not None:
            with Measured(seconds, "agree"):
                self._target = self._chooser.choose(manifest)
        target = self._target
        shown = None
        staged = isinstance(target, StagedTarget)
        verify = offer.verify == "always" or (offer.verify == "staged" and staged)
        whole = bool(getattr(target, "whole", False))
        if not is_target(target):
            writing = Writing(manifest, None, whole)
            target = shown = ShownDigests(
                offer.version, target, partial(self.decisions.begin, writing)
            )
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
            with Measured(seconds, "agree"):
                plan = None if shown is not None else receiving.place(manifest)
                regions = self._regions_to_tell(offer, manifest, plan) if verify else None
                if not verify:
                    # Then the sender forgets what it was told before.
                    session.told.forget(offer.sender, manifest.digest)
                session.phases.enter(SyncState.AGREED)
                session.reply(Ready(verify, regions))
                if not offer.at_once:
                    self.decisions.expect("agree", 0, Proceed)
            memory = self._held[manifest.digest].memory if verify else None
            allowed = session.settings.move_seconds(manifest.nbytes)
            if offer.at_once:
                # Others may still be asked.
                allowed += session.settings.agree_timeout_s
            session.chunk = 0
            # Before data can be under way: what a sync that is given up untouched goes back to.
            self._held_before = self.decisions.holding
            session.phases.enter(SyncState.MOVING, allowed)
            group.set_timeout(allowed)
            if staged:
                pairs = target.staged_pairs(manifest)
                writing = Writing(manifest, lambda: [pair.live for pair in pairs], whole)
            elif plan is not None:
                destinations = plan.destinations
                writing = Writing(manifest, lambda: destinations, whole)
                self.decisions.begin(writing)
            with abort_on_failure(group, "sync"):
                receiving.run(manifest, memory)
        to_commit = None if shown is not None else target
        vote = Vote(session.epoch, offer.number, offer.version, writing, to_commit)
        return self._finish(offer, vote, shown, verify, seconds)

    def _finish(
        self,
        offer: Offer,
        vote: Vote,
        shown: ShownDigests | None,
        verify: bool,
        seconds: dict[str, float],
    ) -> tuple[Update, torch.Tensor | None]:
        session = self._session
        manifest = self._manifests[offer.digest]
        with Measured(seconds, "verify"):
            digests = self._digests(manifest, shown) if verify else None
            changes: dict[str, ChangeStatistics] = {}
            if offer.statistics:
                changes = change_statistics(vote.target.staged_pairs(manifest))
        session.phases.enter(SyncState.STAGED)
        packed = b"" if digests is None else packed_digests(digests)
        notes = tuple(getattr(self._given, "notes", ()))
        with Measured(seconds, "commit"):
            self.decisions.vote(vote, Staged(seconds.get("unpack", 0.0), packed, changes, notes))
        count, size = len(manifest), manifest.nbytes
        update = Update(vote.version, count, size, seconds, verify, changes=changes, notes=notes)
        return update, digests

    def _counted(self, offer: Offer, update: Update, digests: torch.Tensor | None) -> Update:
        if digests is None:
            return update
        regions = self._held[offer.digest].regions
        changed = self._changes.count(self._manifests[offer.digest], digests, regions)
        return replace(update, changed_tensors=changed)

    def _manifest(self, offer: Offer) -> tuple[Manifest, Offer]:
        known = self._manifests.get(offer.digest)
        if known is None and not offer.manifest:
            self._session.reply(NeedManifest())
            offer = self.decisions.expect("agree", 0, Offer)
        if known is None:
            known = Manifest.from_json(offer.manifest)
            if known.digest != offer.digest:
                raise ProtocolError(
                    f"the offered manifest has digest {known.digest}, announced was {offer.digest}"
                )
            known.check_limits(self._session.settings)
            while len(self._manifests) >= _KEPT_MANIFESTS:
                oldest = next(iter(self._manifests))
                del self._manifests[oldest]
                self._held.pop(oldest, None)
            self._manifests[known.digest] = known
        return known, offer

    def _regions_to_tell(
        self, offer: Offer, manifest: Manifest, plan: TargetPlan | None
    ) -> tuple[Region, ...] | None:
        """What is held of a manifest; None where this sender knows it, and it hasn't moved."""
        held = self._held.get(manifest.digest)
        if held is None or held.plan is not plan:
            if plan is None:
                held = Held(whole_regions(manifest), None, None)
            else:
                held = Held(regions_of(plan.parts), plan, ReceivedDigests(plan.destinations))
            self._held[manifest.digest] = held
        # Another receiver may use this session too, and have told that sender of its own.
        news = self._session.told.note(offer.sender, manifest.digest, held)
        return held.regions if news or not offer.regions_known else None

    def _digests(self, manifest: Manifest, shown: ShownDigests | None) -> torch.Tensor:
        if shown is not None:
            return shown.take(manifest)
        memory = self._held[manifest.digest].memory
        assert memory is not None
        return memory.take()

    def _wait(self) -> None:
        session = self._session
        remaining = max(0.1, session.phases.present.remaining)
        wait_for_device(session.device, remaining, session.failure, "sync")
