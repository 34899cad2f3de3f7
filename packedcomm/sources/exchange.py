"""What the processes of a sharded trainer tell and send each other: agreement, failures, shards."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist

from packedcomm import errors
from packedcomm.errors import ManifestError, PackedCommError, RemoteError, listed

__all__ = ["Exchange"]

_DIGEST_BYTES = 32
_LENGTH_BYTES = 8
_NOTHING = -1
_MOST_TEXT_BYTES = 1 << 20

# What one process tells all others of its failure: its class and text.
_MOST_FAILURE_BYTES = 16_384


class Exchange:
    """A process group of torch.distributed and the operations on it that sources need.

    Only tensors travel: no pickled objects. The group's rank 0 leads.

    Args:
        group: the processes of the source; None for the default group.
    """

    def __init__(self, group: dist.ProcessGroup | None = None) -> None:
        self.group = dist.group.WORLD if group is None else group
        self.rank = dist.get_rank(self.group)
        self.size = dist.get_world_size(self.group)
        self.leader = self.rank == 0
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
        status = list(len(text).to_bytes(_LENGTH_BYTES, "big") + digest)
        everyone = self._all_gather(torch.tensor(status, dtype=torch.uint8, device=self._device))
        answers = [bytes(tensor.tolist()) for tensor in everyone]
        lengths = [int.from_bytes(answer[:_LENGTH_BYTES], "big") for answer in answers]
        if any(lengths):
            own = torch.tensor(
                list(text.ljust(max(lengths), b" ")), dtype=torch.uint8, device=self._device
            )
            texts = [bytes(tensor.tolist()) for tensor in self._all_gather(own)]
            raise _combined(
                {r: texts[r][:length] for r, length in enumerate(lengths) if length}
            ) from failure
        seen: dict[bytes, list[int]] = {}
        for rank, answer in enumerate(answers):
            seen.setdefault(answer[_LENGTH_BYTES:], []).append(rank)
        if len(seen) > 1:
            problems = [
                f"ranks {', '.join(map(str, ranks))} have digest {value.hex()[:12]}"
                for value, ranks in seen.items()
            ]
            raise ManifestError(
                f"the source's processes have different tensors, shapes, shards or transforms: "
                f"{listed(problems)}"
            )

    def _all_gather(self, own: torch.Tensor) -> list[torch.Tensor]:
        everyone = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(everyone, own, group=self.group)
        return everyone

    def share(self, failure: str | None) -> str | None:
        """The leader's text on every process; a collective. Text past 1 MiB is cut off."""
        text = b"" if failure is None else failure.encode(errors="replace")[:_MOST_TEXT_BYTES]
        length = torch.tensor(
            [_NOTHING if failure is None else len(text)], dtype=torch.int64, device=self._device
        )
        dist.broadcast(length, group=self.group, group_src=0)
        count = int(length.item())
        if count == _NOTHING:
            return None
        content = torch.empty(count, dtype=torch.uint8, device=self._device)
        if self.leader and count:
            content.copy_(torch.frombuffer(bytearray(text), dtype=torch.uint8))
        if count:
            dist.broadcast(content, group=self.group, group_src=0)
        return bytes(content.tolist()).decode(errors="replace")

    def prepare(self, device: torch.device) -> None:
        """Before the first transfers on a device of this type; a collective.

        NCCL makes a group's communicator at its first operation, in which all ranks must take part,
        while transfers are between some of them.
        """
        if device.type not in self._prepared:
            dist.all_reduce(torch.zeros(1, device=device), group=self.group)
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

    def start(self, operations: Sequence[dist.P2POp]) -> list[Any]:
        """Start them all at once; the works to wait for."""
        return dist.batch_isend_irecv(list(operations)) if operations else []


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
