"""What the processes of a sharded trainer tell and send each other: agreement, failures, shards."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist

from packedcomm import errors
from packedcomm.errors import ManifestError, PackedCommError, RemoteError, listed
from packedcomm.sources.bounded_group import BoundedGroup, Transfers

__all__ = ["Exchange"]

_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_SECONDS_BYTES = 8
_NOTHING = -1
_MOST_TEXT_BYTES = 1 << 20

# What one process tells all others of its failure: its class and text.
_MOST_FAILURE_BYTES = 16_384


class Exchange:
    """A process group of torch.distributed and the operations on it that sources need.

    Only tensors travel: no pickled objects. The group's rank 0 leads, and whatever it says to all
    (`agree`, `share`) also says how long the others may wait for its next word. Before its first
    one, and where it says so, they wait for as long as torch lets them.

    Whatever waits for other processes raises `DeadlineExceeded`, `PeerLost` or `NcclError` as
    `BoundedGroup` does, on whichever process notices; later calls raise `SessionStateError`.

    Args:
        group: the processes of the source; None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self._bounded = BoundedGroup(group)
        self.group = self._bounded.group
        self.rank = self._bounded.rank
        self.size = self._bounded.size
        self.leader = self.rank == 0
        self._others_s: float | None = None
        pairs = (
            pair.split(":", 1)
            for pair in dist.get_backend_config(self.group).split(",")
            if ":" in pair
        )
        # Gloo is named for GPUs too, but can't send to one process what lies on a GPU.
        self._backends = {
            device: backend for device, backend in pairs if device == "cpu" or backend != "gloo"
        }
        self._prepared: set[str] = set()
        # Small messages are read by the host, so a CPU backend is the better one for them.
        self._device = self.carrier(torch.device("cpu"))

    @property
    def ended(self) -> bool:
        """Whether the processes can't tell each other anything any more."""
        return self._bounded.ended is not None

    def set_timeout(self, timeout_s: float, others_s: float | None) -> None:
        """See `BoundedSource`."""
        if self.leader:
            self._bounded.timeout_s, self._others_s = timeout_s, others_s
            self._bounded.renew()

    def begin(self, task: str) -> None:
        """What follows belongs to this call of the source, whose time runs from here.

        Raises:
            SessionStateError: the group has ended.
        """
        self._bounded.begin(task)

    def in_other_hands(self) -> AbstractContextManager[None]:
        """While nobody here waits for the source's processes: on the leader that time doesn't
        count. Elsewhere it does, since the leader's limit for the others has room for it."""
        return self._bounded.paused() if self.leader else nullcontext()

    def forget_timeout(self) -> None:
        """The leader's next word begins another sync, for which it may take its time."""
        if not self.leader:
            self._bounded.timeout_s = None

    def _adopt_timeout(self, others_ms: int) -> None:
        """Wait for the leader's next word for as long as it has said."""
        if not self.leader:
            self._bounded.timeout_s = others_ms / 1000 if others_ms else None
            self._bounded.renew()

    def carrier(self, device: torch.device) -> torch.device:
        """The device on which the group can send what lies on `device`: itself if possible."""
        if not self._backends or device.type in self._backends:
            return device
        kind = next(iter(self._backends))
        if kind == "cpu":
            return torch.device(kind)
        return torch.device(kind, torch.get_device_module(kind).current_device())

    def rank_of(self, global_rank: int) -> int:
        """Rank in the group, or -1 where the process isn't in it."""
        ranks = dist.get_process_group_ranks(self.group)
        return ranks.index(global_rank) if global_rank in ranks else -1

    def agree(self, failure: Exception | None, digest: bytes = bytes(_DIGEST_BYTES)) -> None:
        """Make sure that no process has failed, and that all describe the same tensors; a
        collective.

        Args:
            failure: why this process has failed, else None.
            digest: of what it describes, 32 bytes.

        Raises:
            PackedCommError: a process has failed, on all of them: the class of the first failure,
                `RemoteError` for those of other libraries; every failed rank and its failure is in
                the text. It is raised from this process's own failure, if there is one.
            ManifestError: the digests differ.
        """
        text = b"" if failure is None else _described(failure)
        if failure is not None:
            # A process that has never described its tensors has no digest.
            digest = bytes(_DIGEST_BYTES)
        others = _milliseconds(self._others_s).to_bytes(_SECONDS_BYTES, "big")
        status = list(len(text).to_bytes(_LENGTH_BYTES, "big") + digest + others)
        everyone = self._bounded.all_gather(
            torch.tensor(status, dtype=torch.uint8, device=self._device)
        )
        answers = [bytes(tensor.tolist()) for tensor in everyone]
        self._adopt_timeout(int.from_bytes(answers[0][-_SECONDS_BYTES:], "big"))
        lengths = [int.from_bytes(answer[:_LENGTH_BYTES], "big") for answer in answers]
        if any(lengths):
            own = torch.tensor(
                list(text.ljust(max(lengths), b" ")), dtype=torch.uint8, device=self._device
            )
            texts = [bytes(tensor.tolist()) for tensor in self._bounded.all_gather(own)]
            raise _combined(
                {r: texts[r][:length] for r, length in enumerate(lengths) if length}
            ) from failure
        seen: dict[bytes, list[int]] = {}
        for rank, answer in enumerate(answers):
            seen.setdefault(answer[_LENGTH_BYTES:-_SECONDS_BYTES], []).append(rank)
        if len(seen) > 1:
            problems = [
                f"ranks {', '.join(map(str, ranks))} have digest {value.hex()[:12]}"
                for value, ranks in seen.items()
            ]
            raise ManifestError(
                f"the source's processes have different tensors, shapes, shards or transforms: "
                f"{listed(problems)}"
            )

    def share(self, outcome: str | None) -> str | None:
        """The leader's text on every process; a collective. Text past 1 MiB is cut off."""
        text = b"" if outcome is None else outcome.encode(errors="replace")[:_MOST_TEXT_BYTES]
        word = torch.tensor(
            [_NOTHING if outcome is None else len(text), _milliseconds(self._others_s)],
            dtype=torch.int64,
            device=self._device,
        )
        self._bounded.broadcast(word)
        count, others_ms = word.tolist()
        self._adopt_timeout(others_ms)
        if count == _NOTHING:
            return None
        content = torch.empty(count, dtype=torch.uint8, device=self._device)
        if self.leader and count:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        if count:
            self._bounded.broadcast(content)
        return bytes(content.tolist()).decode(errors="replace")

    def prepare(self, device: torch.device) -> None:
        """Before the first transfers on a device of this type; a collective.

        NCCL makes a group's communicator at its first operation, in which all ranks must take part,
        while transfers are between some of them.
        """
        if device.type not in self._prepared:
            self._bounded.all_reduce(torch.zeros(1, device=device))
            self._prepared.add(device.type)

    def send(self, tensor: torch.Tensor, tag: int) -> dist.P2POp:
        """To the leader: a contiguous tensor's bytes, once started."""
        return self._operation(dist.isend, tensor, 0, tag)

    def receive(self, tensor: torch.Tensor, rank: int, tag: int) -> dist.P2POp:
        """On the leader: into a contiguous tensor, from a rank of the group, once started."""
        return self._operation(dist.irecv, tensor, rank, tag)

    def _operation(self, kind: Any, tensor: torch.Tensor, peer: int, tag: int) -> dist.P2POp:
        # As bytes, since not every backend knows every dtype.
        content = tensor.view(-1).view(torch.uint8)
        return dist.P2POp(kind, content, group=self.group, tag=tag, group_peer=peer)

    def start(self, operations: Sequence[dist.P2POp]) -> Transfers:
        """Start them all at once."""
        return self._bounded.start(operations)

    def wait(self, transfers: Transfers) -> Transfers:
        """Return when they are done; on a GPU at once, and the current stream waits for them.

        Returns:
            Those that may still be under way.
        """
        return self._bounded.wait(transfers)

    def settle(self, transfers: Transfers) -> None:
        """After `wait`: return when what it returned is done."""
        self._bounded.settle(transfers)

    def whole(self, tensor: Any) -> torch.Tensor:
        """All of a DTensor, by torch's own means; a collective over its mesh."""
        return self._bounded.call(lambda: tensor.full_tensor().contiguous(), tensor.device)


def _milliseconds(seconds: float | None) -> int:
    """0 for None."""
    return 0 if seconds is None else max(1, int(seconds * 1000))


def _described(failure: Exception) -> bytes:
    """The class and text of a failure, as `_combined` takes them."""
    kind, text = type(failure).__name__, str(failure)
    if not isinstance(failure, PackedCommError):
        kind, text = RemoteError.__name__, f"{kind}: {text}"
    return f"{kind}\n{text}".encode(errors="backslashreplace")[:_MOST_FAILURE_BYTES]


def _combined(failures: dict[int, bytes]) -> PackedCommError:
    """One error for the failures of some ranks."""
    kinds, problems = [], []
    for rank, described in failures.items():
        kind, _, text = described.decode(errors="replace").partition("\n")
        kinds.append(kind)
        problems.append(f"rank {rank} of the source: {text}")
    found = getattr(errors, kinds[0], None) if kinds[0] in errors.__all__ else None
    known = isinstance(found, type) and issubclass(found, PackedCommError)
    error: PackedCommError = (
        found(listed(problems)) if known and found else RemoteError(listed(problems))
    )
    return error
