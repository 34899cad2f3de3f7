"""What a loader's trial says of parameters that get nothing, or only a part."""

from __future__ import annotations

import pytest
import torch

from packedcomm.engines.vllm.trial import Trial


def meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, device="meta")


class Tried:
    """One parameter, and what its loader does with each tensor that it is given."""

    def __init__(self, rows: int, load, parts: int = 1, whole: int | None = None) -> None:
        self.parameter = meta(rows, 4)
        numel = rows * 4 if whole is None else whole * 4
        self.trial = Trial({"a.w": self.parameter}, lambda tensor: numel)
        self.load = self.trial.noting(load, "a.w", parts)

    def given(self, *calls) -> list[str]:
        for rows, *which in calls:
            self.load(self.parameter, meta(rows, 4), *which)
        return self.trial.missing(partial=False)


OFFSETS = {0: 0, 1: 32, 2: 40, "q": 0, "k": 32, "v": 40}
PART = ["a.w (a part of it)"]


def merged(parameter, tensor, shard=None):
    first = 0 if shard is None else OFFSETS[shard[0] if isinstance(shard, tuple) else shard]
    parameter[first : first + tensor.shape[0]].copy_(tensor)


@pytest.mark.parametrize(
    ("calls", "expected"),
    [
        ([], ["a.w"]),
        ([(32, "q")], PART),
        ([(32, "q"), (8, "k")], PART),
        ([(8, "k"), (8, "v")], PART),
        ([(32, "q"), (32, "q"), (32, "q")], PART),
        ([(32, "q"), (8, "v"), (8, "k")], []),
        ([(48,)], []),
        ([(48, (0, 1, 2))], []),
        ([(40, (0, 1))], PART),
    ],
    ids=str,
)
def test_merged_layers_need_all_their_parts(calls, expected):
    assert Tried(48, merged, 3).given(*calls) == expected


def test_a_part_by_its_keyword():
    tried = Tried(48, lambda parameter, tensor, *, loaded_shard_id: None, 3)
    tried.load(tried.parameter, meta(8, 4), loaded_shard_id="k")
    assert tried.trial.missing(partial=False) == ["a.w"]


def expert(parameter, tensor, number):
    """Clears the expert's padding first."""
    parameter[number * 6 : number * 6 + 6].fill_(0)
    parameter[number * 6 : number * 6 + 4].copy_(tensor)


def test_memory_that_is_written_twice_counts_once():
    assert Tried(48, expert).given(*((4, number) for number in range(8))) == []
    assert Tried(48, expert).given(*((4, number) for number in range(7))) == PART
    assert Tried(48, expert).given(*((4, number) for number in (0, 1, 2, 3, 0, 1, 2, 3))) == PART


def unpadded(parameter, tensor, number):
    parameter[number * 6 : number * 6 + 4].copy_(tensor)


@pytest.mark.parametrize("whole", [None, 32], ids=["undeclared", "declared"])
def test_padding_that_nothing_is_loaded_into(whole):
    tried = Tried(48, unpadded, whole=whole)
    assert tried.given(*((4, number) for number in range(7))) == PART
    assert tried.given((4, 7)) == []


def test_a_loader_that_takes_nothing():
    assert Tried(8, lambda parameter, tensor: False).given((8,)) == ["a.w"]


def test_other_ways_of_writing():
    rows = torch.arange(8, device="meta")
    assert Tried(8, lambda p, t: p.index_copy_(0, rows, t)).given((8,)) == []
    assert Tried(8, lambda p, t: torch.add(t, 1, out=p)).given((8,)) == []


def test_live_memory_is_left_alone():
    live = torch.ones(8, 4)
    trial = Trial({"a.w": live}, lambda tensor: tensor.numel())

    def put(parameter, tensor):
        aside = torch.zeros(3)
        aside.add_(1)
        assert aside.tolist() == [1, 1, 1]
        parameter.copy_(tensor)

    trial.noting(put, "a.w")(live, meta(8, 4))
    assert trial.missing(partial=False) == []
    with pytest.raises(NotImplementedError, match="live memory"):
        trial.noting(lambda p, t: p.mul_(2), "a.w")(live, meta(8, 4))
    assert live.eq(1).all()
