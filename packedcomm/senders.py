"""`FullWeightSender` and `LoraSender`: send what a source has, version by version."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch

from packedcomm.completion import Measured
from packedcomm.copying import Part
from packedcomm.errors import (
    ArgumentError,
    ProtocolError,
    RemoteError,
    SessionStateError,
    summary,
)
from packedcomm.leading import Leading
from packedcomm.policy import SyncPolicy
from packedcomm.results import ChangeStatistics, SyncResult, UnchangedWeightsWarning
from packedcomm.session import SenderSession
from packedcomm.session.messages import Verify
from packedcomm.sources import (
    BoundedSource,
    DTensorSource,
    LoraSource,
    ModuleSource,
    Snapshot,
    Source,
    holds_dtensors,
)
from packedcomm.verification import ChangeCount

__all__ = ["FullWeightSender", "LoraSender"]

# What a sync is about to do: to begin, to move data, or to end.
Stage = Literal["begin", "data", "end"]

_LARGEST_VERSION = (1 << 63) - 1

# What the leader of a sharded trainer shares of a sync that has succeeded, before the version.
_COMMITTED = "committed as version "

_OTHER_CALL = "the leading process of the trainer makes another call than this one"


class FullWeightSender:
    """Sends all weights of a source to every receiver of a session.

    Belongs to one thread at a time, as its session does.

    Args:
        source: a `Source`; or an `nn.Module`, or a mapping of names to tensors, which may hold
            DTensors.
        session: the session; None on the processes of a sharded trainer that don't lead, which must
            call the same methods in the same order.
        verify: whether syncs compare digests of what was sent with digests of what each receiver
            holds, before the commit; None does so with the receivers that stage.
        statistics: whether receivers are asked for statistics of what changed, tensor by tensor;
            they must stage.
        policy: at which steps `step` syncs; None is every step, the first and the last.

    Raises:
        ArgumentError: a session is missing on the leader, given elsewhere, or not a sender's.
    """

    def __init__(
        self,
        source: Any,
        session: SenderSession | None,
        *,
        verify: bool | None = None,
        statistics: bool = False,
        policy: SyncPolicy | None = None,
    ) -> None:
        self.source: Source = self._as_source(source)
        if self.source.leader is (session is None):
            raise ArgumentError(
                "the leading process of a trainer needs a session"
                if session is None
                else "only the leading process of a sharded trainer takes a session"
            )
        if not isinstance(session, SenderSession | None):
            raise ArgumentError(
                f"session must be a sender's, from Session.listen, not {type(session).__name__}"
            )
        self.version: int | None = None
        """The last version that was committed."""
        # Asked once: `isinstance` takes tens of microseconds over a protocol.
        self._bounded = self.source if isinstance(self.source, BoundedSource) else None
        self._policy = policy or SyncPolicy()
        self._session = session
        which: Verify = "staged" if verify is None else "always" if verify else "never"
        self._leading = None if session is None else Leading(session, which, statistics)
        self._changes = ChangeCount()
        # Whether every receiver has the weights of `version`, as far as this sender knows.
        self._in_step = False

    def _as_source(self, source: Any) -> Source:
        if isinstance(source, Source):
            return source
        return DTensorSource(source) if holds_dtensors(source) else ModuleSource(source)

    def step(self, step: int, *, last: bool = False) -> SyncResult | None:
        """Sync if the policy says that it is due when `step` steps are done.

        Args:
            step: 0 before the first step; becomes the version.
            last: whether no further step follows.

        Returns:
            What `sync` returns; None if it isn't due, or this version was sent already.
        """
        if not self._policy.due(step, last=last) or self.version == step:
            return None
        return self.sync(step)

    def sync(self, version: int | None = None) -> SyncResult:
        """Send everything; returns when all receivers have committed.

        On a GPU the weights are read after the work that the current stream has at the call.

        Args:
            version: an integer >= 0 that the receivers will show; None is the next one.

        Raises:
            ArgumentError: the version isn't an integer >= 0.
            ManifestError: the source and a receiver don't fit; nothing was sent. The message names
                the receiver.
            TensorError, LayoutError: the source can't be sent.
            IntegrityError: digests differ; nothing was committed.
            RemoteError: a receiver failed otherwise; carries its traceback. An error of one of
                packedcomm's classes is raised as that class.
            PeerLost: a receiver has gone; the message names it. The next sync goes on without it.
            DeadlineExceeded, NcclError: the transfer failed. These and `PeerLost` also where
                another process of a sharded trainer is lost or late; the message names it as one of
                the source, and later syncs raise `SessionStateError`.
            ContextLost: this process must restart.
            SessionStateError: the session is closed or was aborted, another thread uses it, or a
                sharded trainer has lost one of its processes before.

        Warns:
            UnchangedWeightsWarning: digests show that not one tensor has changed.
        """
        with self._exclusive("sync"):
            return self._sync(version)

    def _sync(self, version: int | None) -> SyncResult:
        version = self._next_version(version)
        begin = time.perf_counter()
        seconds: dict[str, float] = {}
        self._in_step = False
        self._set_timeout("begin")
        with Measured(seconds, "describe"):
            snapshot = self.source.snapshot()
        manifest = snapshot.manifest
        changed: int | None = None
        changes: Mapping[str, ChangeStatistics] = {}
        if self._leading is None:
            version = self._follow(snapshot)
        else:
            digests, changes = self._lead(self._leading, snapshot, version, seconds)
            if digests is not None:
                changed = self._changes.count(manifest, digests)
        seconds["total"] = time.perf_counter() - begin
        self.version = version
        self._in_step = True
        if changed == 0 and len(manifest):
            warnings.warn(
                f"version {version} has exactly the bytes that this sender sent before: 0 of "
                f"{len(manifest)} tensors changed",
                UnchangedWeightsWarning,
                stacklevel=3,
            )
        return SyncResult(
            version=version,
            epoch=self._session.epoch if self._session else "",
            transport=self._session.transport if self._session else "",
            tensors=len(manifest),
            bytes=manifest.nbytes,
            seconds=seconds,
            changed_tensors=changed,
            verified=self._leading is not None and self._leading.verified,
            receivers=self._session.world_size - 1 if self._session else 0,
            left_out=snapshot.left_out,
            changes=changes,
            notes=() if self._leading is None else self._leading.notes,
        )

    def no_change(self, version: int | None = None) -> SyncResult:
        """Tell every receiver that `version` has the weights of the version before.

        Raises:
            SessionStateError: there is no such version: nothing was sent yet, the last sync failed,
                or was another sender's.
            RemoteError: a receiver doesn't have it.
            As `sync`.
        """
        with self._exclusive("no_change"):
            return self._no_change(version)

    def _no_change(self, version: int | None) -> SyncResult:
        begin = time.perf_counter()
        version = self._next_version(version)
        if self.version is None or not self._in_step:
            raise SessionStateError("no_change: the last call failed, or there was none")
        if self._leading is None:
            version = self._committed_version()
        else:
            self._in_step = False
            with self._leading.failing(), self._sharing_failure(version=version):
                self._leading.announce_no_change(version, self.version)
            self._in_step = True
        self.version = version
        return SyncResult(
            version=version,
            epoch=self._session.epoch if self._session else "",
            transport=self._session.transport if self._session else "",
            tensors=0,
            bytes=0,
            seconds={"total": time.perf_counter() - begin},
            receivers=self._session.world_size - 1 if self._session else 0,
        )

    def _exclusive(self, operation: str) -> contextlib.AbstractContextManager[None]:
        session = self._session
        return contextlib.nullcontext() if session is None else session.exclusive(operation)

    def _next_version(self, version: int | None) -> int:
        if version is None:
            # A version that was decided may be shown somewhere, also where its sync has failed.
            decided = None if self._leading is None else self._leading.decided_version
            known = [v for v in (self.version, decided) if v is not None]
            version = max(known) + 1 if known else 0
        if type(version) is not int or not 0 <= version <= _LARGEST_VERSION:
            raise ArgumentError(f"version must be an integer in 0..2^63-1, got {version!r}")
        return version

    def _lead(
        self, leading: Leading, snapshot: Snapshot, version: int, seconds: dict[str, float]
    ) -> tuple[torch.Tensor | None, Mapping[str, ChangeStatistics]]:
        with leading.failing():
            nbytes = snapshot.manifest.nbytes
            with self._sharing_failure(nbytes=nbytes, then="data"):
                leading.assemble(seconds)
                leading.agree(snapshot, version, seconds)
            gathered = self._gathered(leading, snapshot)
            with self._sharing_failure(gathered, nbytes, version=version):
                leading.move(snapshot, gathered, version, seconds)
                digests = leading.verify(seconds)
                changes = leading.commit(version, seconds)
        return digests, changes

    def _gathered(self, leading: Leading, snapshot: Snapshot) -> Iterator[Sequence[Part]]:
        """The source's parts; nothing is asked of it before the first one is."""
        if snapshot.parts is None:
            try:
                yield from self.source.gather(snapshot)
            except Exception as error:
                leading.failed_here(error)
                raise

    def _set_timeout(self, stage: Stage, nbytes: int = 0) -> None:
        """On the leader: say how long the trainer's processes may wait for each other.

        Args:
            stage: what the sync is about to do.
            nbytes: of the data.
        """
        if self._session is None or self._bounded is None:
            return
        settings = self._session.settings
        if stage == "data":
            self._bounded.set_timeout(
                settings.gather_seconds(nbytes), settings.transfer_seconds(nbytes)
            )
        else:
            # Between syncs the leader may do whatever it likes, for as long as it likes.
            others_s = settings.assembly_seconds() if stage == "begin" else None
            self._bounded.set_timeout(settings.agree_timeout_s, others_s)

    @contextlib.contextmanager
    def _sharing_failure(
        self,
        gathered: Iterator[Any] = iter(()),  # noqa: B008
        nbytes: int = 0,
        *,
        then: Stage = "end",
        version: int | None = None,
    ) -> Iterator[None]:
        """Tell the trainer's other processes how the body ended, which waits for their gathers.

        Args:
            gathered: what they are in the middle of.
            nbytes: of the data.
            then: what follows where the body succeeds.
            version: what the body commits, if it does.
        """
        try:
            yield
        except BaseException as error:
            # They are in the middle of the same gathers, which must come to an end, with time
            # enough however long the body took: a wait that ends too early ends their group.
            self._set_timeout("data", nbytes)
            with contextlib.suppress(Exception):
                for _ in gathered:
                    pass
            self._set_timeout("end")
            with contextlib.suppress(Exception):
                self.source.share(summary(error))
            raise
        self._set_timeout(then, nbytes)
        self.source.share(None if version is None else f"{_COMMITTED}{version}")

    def _follow(self, snapshot: Snapshot) -> int:
        """Take part in a sync; returns the version that was committed."""
        self._raise_shared(self.source.share(None))
        try:
            if snapshot.parts is None:
                for _ in self.source.gather(snapshot):
                    pass
        except Exception:
            # The leader knows; its next word is shared in any case, unless a process is lost.
            with contextlib.suppress(Exception):
                self.source.share(None)
            raise
        return self._committed_version()

    def _committed_version(self) -> int:
        # The leader's: it may know of versions that must not be used again.
        shared = self.source.share(None)
        if shared is not None and shared.startswith(_COMMITTED):
            return int(shared.removeprefix(_COMMITTED))
        self._raise_shared(shared)
        raise ProtocolError(_OTHER_CALL)

    def _raise_shared(self, outcome: str | None) -> None:
        if outcome is None:
            return
        if outcome.startswith(_COMMITTED):
            raise ProtocolError(_OTHER_CALL)
        raise RemoteError(f"the leading process of the trainer failed: {outcome}")


class LoraSender(FullWeightSender):
    """Sends a LoRA adapter to every receiver of a session, verified by default.

    Args:
        source: a PEFT model, or a `LoraSource` (for another adapter than `"default"`).
        session, verify, statistics, policy: as for `FullWeightSender`.
    """

    def __init__(
        self,
        source: Any,
        session: SenderSession | None,
        *,
        verify: bool | None = True,
        statistics: bool = False,
        policy: SyncPolicy | None = None,
    ) -> None:
        super().__init__(source, session, verify=verify, statistics=statistics, policy=policy)

    def _as_source(self, source: Any) -> Source:
        return source if isinstance(source, Source) else LoraSource(source)
