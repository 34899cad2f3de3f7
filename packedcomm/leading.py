"""The sender's side of one sync: agree, move, verify, commit."""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import TypeVar

import torch

from packedcomm.completion import Measured, await_cause, wait_for_device
from packedcomm.copying import Part
from packedcomm.errors import PackedCommError, ProtocolError, RemoteError, SessionStateError
from packedcomm.events import ChunkMoved, TransferFinished
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import chunk_rule
from packedcomm.region_digests import RegionDigests
from packedcomm.results import ChangeStatistics, combined_changes
from packedcomm.session import SenderSession
from packedcomm.session.messages import (
    Commit,
    Committed,
    NeedManifest,
    NoChange,
    Offer,
    Proceed,
    Ready,
    Region,
    Staged,
    Verify,
)
from packedcomm.session.remote_errors import combined
from packedcomm.session.states import AT_END, AT_REST, SyncState
from packedcomm.sources import Snapshot
from packedcomm.transports.broadcast import abort_on_failure
from packedcomm.transports.sending import Sending
from packedcomm.verification import compare, packed_digests, whole_regions

__all__ = ["Leading"]

# Snapshots of sources that gather anew are all alike; of manifests this many are remembered.
_KEPT_MANIFESTS = 8


class Digests:
    """What is digested for one snapshot: every tensor, and what each receiver holds of it."""

    def __init__(self, manifest: Manifest, held: Sequence[Sequence[Region]]) -> None:
        numbers: dict[Region, int] = {}
        for region in (*whole_regions(manifest), *(r for regions in held for r in regions)):
            numbers.setdefault(region, len(numbers))
        self.computed = RegionDigests(manifest, list(numbers))
        self._manifest = manifest
        self.digest = manifest.digest
        self.tensors = len(manifest)
        self._by_receiver = [
            torch.tensor([numbers[region] for region in regions], dtype=torch.int64)
            for regions in held
        ]
        self.held = held

    def compare(self, digests: torch.Tensor, votes: Sequence[Staged]) -> None:
        """Raise `IntegrityError` unless every receiver holds what was sent."""
        failures: dict[int, PackedCommError] = {}
        rows = zip(self._by_receiver, self.held, votes, strict=True)
        for rank, (numbers, regions, vote) in enumerate(rows, 1):
            try:
                compare(self._manifest, regions, packed_digests(digests[numbers]), vote.digests)
            except PackedCommError as error:
                failures[rank] = type(error)(f"receiver rank {rank}: {error}")
        if failures:
            raise combined(failures)


class Leading:
    """Runs the stages of a sender's syncs over its session; keeps what they agreed on.

    Args:
        session: the session.
        verify: which receivers' digests are compared.
        statistics: whether receivers report change statistics.
    """

    def __init__(self, session: SenderSession, verify: Verify, statistics: bool) -> None:
        self._session = session
        self._verify = verify
        self._statistics = statistics
        # By which receivers know whom they have told.
        self._sender = session.next_sender()
        self._generation = 0
        self._held: dict[str, list[tuple[Region, ...]]] = {}
        self._agreed: dict[str, None] = {}
        self._digests: weakref.WeakKeyDictionary[Snapshot, Digests] = weakref.WeakKeyDictionary()
        self._digest_plan: Digests | None = None
        self._votes: list[Staged] = []
        self._number = 0
        # Of the last sync that all have committed.
        self._committed = 0
        self._nbytes = 0
        self._at_once = False
        # Whether a sync is under way that receivers may know of; whether they may be waiting for
        # its data, so that only the end of the communicator lets them go.
        self._under_way = False
        self._awaited = False
        self._of_source: BaseException | None = None
        self.decided_version: int | None = None
        """The version of the last sync that was decided to be committed."""
        self.verified = False
        """Whether every receiver's digests were compared in the last sync."""

    def assemble(self, seconds: dict[str, float]) -> None:
        """Have a communicator of exactly the receivers that are there."""
        self._clear_up()
        begin = time.perf_counter()
        before = self._session.generation
        self._session.wait()
        if self._session.generation != before:
            seconds["connect"] = time.perf_counter() - begin

    def _clear_up(self) -> None:
        """Do what an interrupt has left undone of the end of the sync before, whoever's it was."""
        session = self._session
        if self._under_way or session.state not in AT_REST | AT_END:
            error = RemoteError("interrupted in the middle of a sync")
            session.fail_sync(error, decided=session.decided == session.last_sync)
        self._under_way = False

    def failed_here(self, error: Exception) -> None:
        """The source has failed while data moves: whatever the receivers say, they aren't why, for
        the time that they take is none of the source's. After a failure of the sync the rest of the
        source's data is for nobody, and neither is how that ends."""
        if self._under_way:
            self._of_source = error

    def agree(self, snapshot: Snapshot, version: int, seconds: dict[str, float]) -> None:
        """Come to know that every receiver can take this manifest."""
        session = self._session
        with Measured(seconds, "agree"), self.failing():
            manifest = snapshot.manifest
            digest = manifest.digest
            if self._generation != session.generation:
                # Somebody has come or gone, so ranks and what is held at them are others.
                self._generation = session.generation
                self._held.clear()
                self._agreed.clear()
            known = digest in self._agreed
            if not known:
                manifest.check_limits(session.settings)
            # Where a communicator is soon made anew, whoever has agreed before needn't wait for the
            # others' word before it waits for the data.
            self._at_once = known and session.transport == "gloo"
            self._begin(manifest.nbytes)
            self._awaited = self._at_once
            offer = self._offer(version, manifest)
            if not known:
                offer = replace(offer, manifest=manifest.to_json())
            try:
                self._remember(digest, self._replies(offer, manifest))
            except BaseException:
                # Some may have told their regions again, and think that this end knows them.
                self._held.pop(digest, None)
                raise
            self._digest_plan = self._planned_digests(snapshot) if digest in self._held else None
            session.phases.enter(SyncState.AGREED)

    def _begin(self, nbytes: int) -> None:
        self._number = self._session.next_sync()
        self._nbytes = nbytes
        self._awaited = False
        self._under_way = True

    def _offer(self, version: int, manifest: Manifest) -> Offer:
        return Offer(
            version,
            manifest.digest,
            number=self._number,
            buffer_size_bytes=self._session.buffer_size_bytes,
            verify=self._verify,
            statistics=self._statistics,
            regions_known=manifest.digest in self._held,
            at_once=self._at_once,
            sender=self._sender,
        )

    def _replies(self, offer: Offer, manifest: Manifest) -> list[Ready]:
        """What the receivers say to an offer, by rank; who has no manifest is given it."""
        ask = self._session.ask
        if offer.manifest:
            return _all_of(Ready, ask(offer, Ready))
        replies = ask(offer, (Ready, NeedManifest))
        needing = [rank for rank, r in enumerate(replies, 1) if isinstance(r, NeedManifest)]
        if needing:
            full = replace(offer, manifest=manifest.to_json())
            for rank, reply in zip(needing, ask(full, Ready, ranks=needing), strict=True):
                replies[rank - 1] = reply
        return _all_of(Ready, replies)

    def _remember(self, digest: str, replies: Sequence[Ready]) -> None:
        verifying = [reply.verifies for reply in replies]
        self.verified = all(verifying)
        held = self._held.get(digest) or [()] * len(replies)
        for rank, reply in enumerate(replies):
            regions = reply.regions if reply.verifies else ()
            if regions is not None and regions is not held[rank]:
                # Another list, by which whatever was made of the old one is known to be old.
                held = [*held[:rank], regions, *held[rank + 1 :]]
        while len(self._agreed) >= _KEPT_MANIFESTS and digest not in self._agreed:
            oldest = next(iter(self._agreed))
            del self._agreed[oldest]
            self._held.pop(oldest, None)
        self._agreed[digest] = None
        self._held.pop(digest, None)
        if any(verifying):
            self._held[digest] = held

    def _planned_digests(self, snapshot: Snapshot) -> Digests:
        held = self._held[snapshot.manifest.digest]
        found = self._digests.get(snapshot)
        if found is None or found.held is not held:
            found = self._digests[snapshot] = Digests(snapshot.manifest, held)
        return found

    def move(
        self,
        snapshot: Snapshot,
        gathered: Iterator[Sequence[Part]],
        version: int,
        seconds: dict[str, float],
    ) -> None:
        """Let the receivers proceed and send the data; returns when this side's part is done."""
        session = self._session

        def note(event: ChunkMoved | TransferFinished) -> None:
            if isinstance(event, TransferFinished):
                seconds.update({k: v for k, v in event.seconds.items() if k != "total"})
            else:
                session.chunk += 1

        with self.failing():
            digests = self._digest_plan
            computed = None if digests is None else digests.computed
            cut = chunk_rule(session.wire_format, session.buffer_size_bytes)
            session.chunk = 0
            if not self._at_once:
                self._awaited = True
                session.tell(Proceed(version))
            allowed = session.settings.move_seconds(self._nbytes)
            session.phases.enter(SyncState.MOVING, allowed)
            session.communicator.set_timeout(allowed)
            with abort_on_failure(session.communicator, "sync"):
                Sending(session.communicator, 0, cut, computed, self._wait).run_parts(
                    snapshot.manifest,
                    gathered if snapshot.parts is None else snapshot.parts,
                    session.device,
                    session.settings.num_buffers,
                    note,
                    keep_for=None if snapshot.parts is None else snapshot,
                )

    def verify(self, seconds: dict[str, float]) -> torch.Tensor | None:
        """Have every receiver's vote that it holds everything, and compare digests; returns each
        tensor's digest."""
        session = self._session
        digests = self._digest_plan
        with Measured(seconds, "verify"), self.failing():
            # Made while the votes are still on their way.
            found = None if digests is None else digests.computed.take()
            remaining = max(0.1, session.phases.present.remaining)
            self._votes = _all_of(Staged, session.answers(Staged, "the data", remaining))
            session.phases.enter(SyncState.STAGED)
            self._awaited = False
            # The slowest receiver's.
            seconds["unpack"] = max((vote.unpack_s for vote in self._votes), default=0.0)
            if digests is None or found is None:
                return None
            try:
                digests.compare(found, self._votes)
            except PackedCommError:
                # If it is what is held that this end is wrong about, the next sync must mend that.
                self._held.pop(digests.digest, None)
                raise
            return found[: digests.tensors]

    def commit(self, version: int, seconds: dict[str, float]) -> Mapping[str, ChangeStatistics]:
        """Let every receiver commit; returns the statistics that they reported."""
        session = self._session
        with Measured(seconds, "commit"), self.failing():
            if (failed := session.known_failure()) is not None:
                raise failed
            # May be shown somewhere from here on, so no other weights get it.
            self.decided_version = version
            try:
                # Decided: a receiver that is lost now learns it when it comes back.
                session.committed_number = 0
                session.decided = self._number
                session.tell(Commit(version, self._number))
            except BaseException:
                if session.decided == self._number:
                    # All must hear it; who has heard it already skips the second one.
                    session.tell(Commit(version, self._number))
                raise
            allowed = session.settings.commit_seconds(self._nbytes)
            replies = session.answers(Committed, "Commit", allowed, decided=True)
            for reply in _all_of(Committed, replies):
                if reply.version != version:
                    raise ProtocolError(
                        f"a receiver committed version {reply.version}, expected {version}"
                    )
            session.phases.enter(SyncState.COMMITTED)
            session.committed_generation = session.generation
            session.committed_number = self._committed = self._number
            self._under_way = False
        return combined_changes([vote.changes for vote in self._votes])

    @property
    def notes(self) -> tuple[str, ...]:
        """What receivers have said of the last sync, by rank."""
        return tuple(
            f"receiver rank {rank}: {note}"
            for rank, vote in enumerate(self._votes, 1)
            for note in vote.notes
        )

    def announce_no_change(self, version: int, since: int) -> None:
        """Let every receiver show a version without data, of the weights of version `since`."""
        self._clear_up()
        self._session.wait()
        if self._session.generation != self._session.committed_generation:
            raise SessionStateError("no_change: receivers have come or gone since the last sync")
        if self._session.committed_number != self._committed:
            raise SessionStateError("no_change: another sender of this session has synced since")
        with self.failing():
            self._begin(0)
            self._votes = []
            self._session.ask(NoChange(version, since, self._number, self._committed), Ready)
            self.commit(version, {})

    def _wait(self) -> None:
        session = self._session
        remaining = max(0.1, session.phases.present.remaining)
        wait_for_device(session.device, remaining, session.failure, "sync")

    def failing(self) -> AbstractContextManager[None]:
        """What fails within it ends the sync that is under way for every receiver, but not the
        session. One within another does nothing that the inner one has done."""
        return _Failing(self)

    def fail(self, error: BaseException) -> None:
        """End the sync that is under way for every receiver. Raises what is behind the error, if
        that is another one."""
        if not self._under_way:
            return
        session = self._session
        elsewhere = session.state is SyncState.MOVING and error is not self._of_source
        cause = await_cause(error, session.failure) if elsewhere else None
        self._of_source = None
        # A receiver that agrees but has no communicator tells that this end's is of no use: its
        # `SessionStateError` is a `RemoteError` here.
        useless = self._awaited or isinstance(error, (SessionStateError, RemoteError))
        decided = session.decided == self._number
        session.fail_sync(cause or error, transport_too=useless, decided=decided)
        self._under_way = False
        if cause is not None and cause is not error:
            raise cause from cause.__cause__ or error


class _Failing:
    """As `Leading.failing`."""

    __slots__ = ("_leading",)

    def __init__(self, leading: Leading) -> None:
        self._leading = leading

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if error is not None:
            self._leading.fail(error)


Kind = TypeVar("Kind")


def _all_of(kind: type[Kind], messages: Sequence[object]) -> list[Kind]:
    """What `ask` has made sure of, for the type checker."""
    return [message for message in messages if isinstance(message, kind)]
