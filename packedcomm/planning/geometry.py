"""`ModelGeometry`: what of a model's dimensions decides how a rank's parameters are cut."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatchcase

from packedcomm.errors import LayoutError
from packedcomm.layout import Box, Shard

__all__ = ["ModelGeometry", "experts_of"]


def given_rank(kind: str, rank: int | None, size: int) -> int:
    """The rank, 0 if there is only one.

    Raises:
        LayoutError: there are several and none was given: taking one would serve its slices on all.
    """
    if rank is None and type(size) is int and size > 1:
        raise LayoutError(f"{kind}_size {size} needs {kind}_rank")
    return 0 if rank is None else rank


@dataclass(frozen=True, slots=True)
class ModelGeometry:
    """Heads, vocabulary and experts of a model, and one rank's place among those that share it.

    Args:
        num_heads: query heads of the whole model.
        num_kv_heads: key and value heads of the whole model; fewer than ranks are replicated.
        head_size: elements of one head.
        vocab_size: rows of the embedding on the wire; None takes what the tensor has.
        num_experts: experts of a whole layer; None if the model has none or they aren't split.
        tp_rank, tp_size: this rank and the number of ranks of tensor parallelism; the rank must be
            given where there are several.
        ep_rank, ep_size: the same of expert parallelism; where `ep_size` is above 1 an engine
            holds whole experts, each on one rank.
        tied_embeddings: whether the output projection is the embedding. Then an engine's
            `lm_head` is filled from the embedding if it isn't sent, and an `lm_head` that is sent
            beside the embedding isn't needed by an engine without one.
        replicated: names of parameters that every rank of tensor parallelism holds whole, with `*`
            for any characters (`fnmatch`): `"*.shared_experts.*"`. Without them projections and
            experts must be divided, so that a tensor of another model isn't taken for a whole one.

    Raises:
        LayoutError: a number is out of range, or heads don't divide.
    """

    num_heads: int
    num_kv_heads: int
    head_size: int
    vocab_size: int | None = None
    num_experts: int | None = None
    tp_rank: int = None  # type: ignore[assignment]  # 0 from __post_init__ on
    tp_size: int = 1
    ep_rank: int = None  # type: ignore[assignment]  # as above
    ep_size: int = 1
    tied_embeddings: bool = False
    replicated: Sequence[str] = ()

    def __post_init__(self) -> None:
        for kind in ("tp", "ep"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            object.__setattr__(self, f"{kind}_rank", given_rank(kind, rank, size))
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name in ("tied_embeddings", "replicated"):
                continue
            if value is None and field.name in ("vocab_size", "num_experts"):
                continue
            least = 0 if field.name.endswith("_rank") else 1
            if type(value) is not int or value < least:
                raise LayoutError(f"{field.name} must be an integer >= {least}, got {value!r}")
        if isinstance(self.replicated, str) or any(type(n) is not str for n in self.replicated):
            raise LayoutError(f"replicated must be names of parameters, got {self.replicated!r}")
        object.__setattr__(self, "replicated", tuple(self.replicated))
        for kind in ("tp", "ep"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            if rank >= size:
                raise LayoutError(f"{kind}_rank {rank} is not below {kind}_size {size}")
        if self.num_heads % self.num_kv_heads:
            raise LayoutError(
                f"{self.num_heads} query heads can't share {self.num_kv_heads} KV heads evenly"
            )
        if self.num_heads % self.tp_size:
            raise LayoutError(
                f"{self.num_heads} query heads can't be divided among {self.tp_size} ranks"
            )
        if self.num_kv_heads % self.tp_size and self.tp_size % self.num_kv_heads:
            raise LayoutError(
                f"{self.num_kv_heads} KV heads can neither be divided among {self.tp_size} ranks "
                f"nor replicated evenly"
            )
        if self.num_experts is None and self.ep_size > 1:
            raise LayoutError(f"ep_size {self.ep_size} needs num_experts")

    @property
    def kv_shards(self) -> int:
        """Number of different shards of keys and values: ranks, or KV heads if those are fewer."""
        return min(self.tp_size, self.num_kv_heads)

    def shard_index(self, count: int) -> int:
        """Which of `count` shards this rank holds when ranks outnumber shards: neighbours hold the
        same one, as vLLM replicates KV heads."""
        return self.tp_rank // (self.tp_size // count)

    @property
    def experts(self) -> range | None:
        """Experts that this rank holds, None if their number isn't known."""
        if self.num_experts is None:
            return None
        return experts_of(self.num_experts, self.ep_rank, self.ep_size)

    def of(self, parameter: str) -> ModelGeometry:
        """The geometry by which one parameter is divided: that of a single rank of tensor
        parallelism for those that are replicated."""
        if self.tp_size > 1 and any(fnmatchcase(parameter, name) for name in self.replicated):
            return replace(self, tp_rank=0, tp_size=1)
        return self


def experts_of(count: int, rank: int, size: int) -> range:
    """The experts that a rank of expert parallelism holds of `count`.

    Consecutive ones; where they don't divide, the first ranks hold one more, as in vLLM's linear
    placement.
    """
    least, more = divmod(count, size)
    sizes = tuple(least + (index < more) for index in range(size))
    box: Box = Shard(0, rank, size, sizes).box((count,))
    return range(box.offset[0], box.stop[0])
