"""The sender's side of one sync: agree, move, verify, commit."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from packedcomm.completion import await_cause, measured, wait_for_device
from packedcomm.copying import Part
from packedcomm.errors import ProtocolError
from packedcomm.events import ChunkMoved, TransferFinished
from packedcomm.manifest import Manifest
from packedcomm.planning.chunks import chunk_rule
from packedcomm.region_digests import RegionDigests
from packedcomm.results import ChangeStatistics, combined_changes
from packedcomm.session import SenderSession
from packedcomm.session.messages import (
    Commit,
    Committed,
    Moved,
    NeedManifest,
    NoChange,
    Offer,
    Proceed,
    Ready,
    Region,
    Staged,
)
from packedcomm.sources import Snapshot
from packedcomm.transports.broadcast import abort_on_failure
from packedcomm.transports.sending import Sending
from packedcomm.verification import packed_digests, whole_regions

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
        self.tensors = len(manifest)
        self._by_receiver = [
            torch.tensor([numbers[region] for region in regions], dtype=torch.int64)
            for regions in held
        ]
        self.held = held

    def for_receivers(self, digests: torch.Tensor) -> list[Moved]:
        """The message to each receiver: the digests of its regions."""
        return [Moved(packed_digests(digests[numbers])) for numbers in self._by_receiver]


class Leading:
    """Runs the stages of a sender's syncs over its session; keeps what they agreed on.

    Args:
        session: the session.
        verify: whether digests are compared.
        statistics: whether receivers report change statistics.
    """

    def __init__(self, session: SenderSession, verify: bool, statistics: bool) -> None:
        self._session = session
        self._verify = verify
        self._statistics = statistics
        self._held: dict[str, list[tuple[Region, ...]]] = {}
        self._agreed: dict[str, None] = {}
        self._digests: weakref.WeakKeyDictionary[Snapshot, Digests] = weakref.WeakKeyDictionary()
        self._votes: list[Staged] = []
        self._digest_plan: Digests | None = None

    def agree(self, snapshot: Snapshot, version: int, seconds: dict[str, float]) -> None:
        """Come to know that every receiver can take this manifest; then let them proceed."""
        with measured(seconds, "agree"), self._cancelling():
            manifest = snapshot.manifest
            digest = manifest.digest
            text = "" if digest in self._agreed else manifest.to_json()
            replies = self._offer(version, digest, text)
            if any(isinstance(reply, NeedManifest) for reply in replies):
                replies = self._offer(version, digest, manifest.to_json())
            self._remember(digest, replies)
            if self._verify:
                self._digest_plan = self._digests.get(snapshot)
                if self._digest_plan is None or self._digest_plan.held is not self._held[digest]:
                    self._digest_plan = Digests(manifest, self._held[digest])
                    self._digests[snapshot] = self._digest_plan
            self._session.tell(Proceed(version))

    def _offer(self, version: int, digest: str, text: str) -> Sequence[Any]:
        known = digest in self._held
        offer = Offer(version, digest, text, self._verify, self._statistics, known)
        # A receiver that has just been given the manifest can't need it again.
        expected = (Ready,) if text else (Ready, NeedManifest)
        return self._session.ask(offer, expected)

    def _remember(self, digest: str, replies: Sequence[Any]) -> None:
        held = self._held.get(digest) or [()] * len(replies)
        for rank, reply in enumerate(replies):
            if not isinstance(reply, Ready):
                raise ProtocolError(f"receiver rank {rank + 1} answered an offer with {reply!r}")
            if reply.regions is not None:
                # Another list, by which whatever was made of the old one is known to be old.
                held = [*held[:rank], reply.regions, *held[rank + 1 :]]
        while len(self._agreed) >= _KEPT_MANIFESTS and digest not in self._agreed:
            oldest = next(iter(self._agreed))
            del self._agreed[oldest]
            self._held.pop(oldest, None)
        self._agreed[digest] = None
        if self._verify:
            self._held[digest] = held

    def move(
        self, snapshot: Snapshot, gathered: Iterator[Sequence[Part]], seconds: dict[str, float]
    ) -> None:
        """Send the data; returns when this side's part is done."""
        session = self._session
        digests = self._digest_plan if self._verify else None
        computed = None if digests is None else digests.computed
        cut = chunk_rule(session.wire_format, session.buffer_size_bytes)

        def note(event: ChunkMoved | TransferFinished) -> None:
            if isinstance(event, TransferFinished):
                seconds.update({k: v for k, v in event.seconds.items() if k != "total"})

        try:
            with abort_on_failure(session.communicator, "sync"):
                Sending(session.communicator, 0, cut, computed, self._wait).run_parts(
                    snapshot.manifest,
                    gathered if snapshot.parts is None else snapshot.parts,
                    session.device,
                    session.settings.num_buffers,
                    note,
                    keep_for=None if snapshot.parts is None else snapshot,
                )
        except Exception as error:
            cause = await_cause(error, self._session.failure)
            # Receivers that were waiting learn why, and nobody uses what is left of the transport.
            self._session.cancel(cause or error)
            self._session.abort(f"{type(error).__name__}: {error}")
            if cause is not None:
                raise cause from cause.__cause__
            raise

    def verify(self, seconds: dict[str, float]) -> torch.Tensor | None:
        """Have every receiver say that it holds everything; returns each tensor's digest."""
        with measured(seconds, "verify"), self._cancelling():
            found: torch.Tensor | None = None
            messages = [Moved()] * (self._session.world_size - 1)
            digests = self._digest_plan
            if self._verify and digests is not None:
                found = digests.computed.take()
                messages = digests.for_receivers(found)
            self._votes = _all_of(Staged, self._session.ask(messages, Staged))
            for vote in self._votes:
                for stage, spent in vote.seconds.items():
                    # The slowest receiver's; of stages that the sender has too, the sender's.
                    if stage == "unpack":
                        seconds[stage] = max(seconds.get(stage, 0.0), spent)
            return None if found is None or digests is None else found[: digests.tensors]

    def commit(self, version: int, seconds: dict[str, float]) -> Mapping[str, ChangeStatistics]:
        """Let every receiver commit; returns the statistics that they reported."""
        with measured(seconds, "commit"), self._cancelling():
            for reply in _all_of(Committed, self._session.ask(Commit(version), Committed)):
                if reply.version != version:
                    raise ProtocolError(
                        f"a receiver committed version {reply.version}, expected {version}"
                    )
        return combined_changes([vote.changes for vote in self._votes])

    def announce_no_change(self, version: int, since: int) -> None:
        """Let every receiver show a version without data, of the weights of version `since`."""
        with self._cancelling():
            self._session.ask(NoChange(version, since), Committed)

    def _wait(self) -> None:
        session = self._session
        wait_for_device(
            session.device, session.settings.operation_timeout_s, session.failure, "sync"
        )

    @contextmanager
    def _cancelling(self) -> Iterator[None]:
        """What fails here ends the sync for every receiver, but not the session, unless a receiver
        is lost to it."""
        try:
            yield
        except Exception as error:
            self._session.cancel(error)
            if self._session.incomplete:
                # Whoever is left would wait for a sync that can't come.
                self._session.abort(f"{type(error).__name__}: {error}")
            raise


Kind = TypeVar("Kind")


def _all_of(kind: type[Kind], messages: Sequence[object]) -> list[Kind]:
    """What `ask` has made sure of, for the type checker."""
    return [message for message in messages if isinstance(message, kind)]
