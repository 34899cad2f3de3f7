"""`ShardedSource`: lists of FSDP x TP shards, merged without concatenation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from packedcomm.errors import ArgumentError, LayoutError, ManifestError, TensorError
from packedcomm.sources import Cast, RotaryPermutation, ShardedSource
from tests.helpers.source_parts import everything


def split(whole, fsdp, tp, tp_dim):
    """Shards in dp-major, tp-minor order, by torch alone; views, so that memory can be compared."""
    columns = whole.tensor_split(tp, dim=tp_dim) if tp_dim is not None else [whole] * tp
    rows = [column.tensor_split(fsdp, dim=0) for column in columns]
    return [rows[t][d] for d in range(fsdp) for t in range(tp)]


def merged(shards, tp, tp_dim):
    """The rule of the merge, written out."""
    columns = [torch.cat(shards[i::tp], dim=0) for i in range(tp)]
    return torch.cat(columns, dim=tp_dim) if tp_dim is not None else columns[0]


@pytest.mark.parametrize("fsdp", [1, 2, 3, 8])
@pytest.mark.parametrize("tp", [1, 2, 4])
@pytest.mark.parametrize("tp_dim", [0, 1, -1, None])
def test_shards_make_up_the_whole_tensor(fsdp, tp, tp_dim):
    whole = torch.arange(13.0 * 5).reshape(13, 5)
    shards = split(whole, fsdp, tp, tp_dim)
    assert torch.equal(merged(shards, tp, tp_dim), whole)
    source = ShardedSource(
        {"w": shards}, dp_shard_degree=fsdp, tp_degree=tp, tp_shard_dim={"w": tp_dim}
    )
    assert torch.equal(everything(source)["w"], whole)


def test_nothing_is_copied():
    whole = torch.arange(12.0).reshape(4, 3)
    shards = split(whole, 2, 1, None)
    source = ShardedSource({"w": shards}, dp_shard_degree=2, tp_degree=1)
    [parts] = source.snapshot().parts
    assert [part.tensor.data_ptr() for part in parts] == [s.data_ptr() for s in shards]
    assert [part.offset for part in parts] == [(0, 0), (2, 0)]


def test_every_tensor_has_its_own_rule():
    column, row = torch.rand(8, 6), torch.rand(6, 9)
    norm, scalar = torch.rand(7), torch.tensor(3)
    shards = {
        "up.weight": split(column, 2, 2, 0),
        "down.weight": split(row, 2, 2, 1),
        "norm.weight": [norm.clone() for _ in range(4)],
        "only.fsdp": split(norm, 2, 2, None),
        "step": [scalar],
        "array": [np.arange(3)] * 4,
    }
    source = ShardedSource(
        shards,
        dp_shard_degree=2,
        tp_degree=2,
        tp_shard_dim={"up.weight": 0, "down.weight": 1, "only.fsdp": None},
        replicated=["norm*", "array"],
    )
    found = everything(source)
    assert torch.equal(found["up.weight"], column)
    assert torch.equal(found["down.weight"], row)
    assert torch.equal(found["norm.weight"], norm)
    assert torch.equal(found["only.fsdp"], norm)
    assert found["step"].item() == 3
    assert found["array"].tolist() == [0, 1, 2]


def test_empty_shards_may_have_one_dimension():
    whole = torch.rand(2, 3)
    shards = [whole[:1], whole[1:], torch.empty(0), torch.empty(0, 3)]
    source = ShardedSource({"w": shards}, dp_shard_degree=4, tp_degree=1)
    assert torch.equal(everything(source)["w"], whole)


def test_a_tensor_without_elements_is_sent():
    shards = [torch.empty(0), torch.empty(0)]
    source = ShardedSource({"w": shards}, dp_shard_degree=2, tp_degree=1)
    assert everything(source)["w"].shape == (0,)


def test_transforms_see_the_whole_tensor():
    heads, size = 3, 4
    whole = torch.rand(heads * size, 5)
    expected = whole.view(heads, size // 2, 2, 5).transpose(1, 2).reshape(heads * size, 5)
    for tp_dim in (0, 1):
        source = ShardedSource(
            {"a.wq.weight": split(whole, 3, 2, tp_dim)},
            dp_shard_degree=3,
            tp_degree=2,
            tp_shard_dim=tp_dim,
            transforms=[RotaryPermutation(heads, heads), Cast("float16")],
        )
        assert torch.equal(everything(source)["a.wq.weight"], expected.half())


def test_snapshots_are_new_only_when_shards_are():
    shards = {"w": [torch.ones(2, 2), torch.ones(1, 2)]}
    source = ShardedSource(shards, dp_shard_degree=2, tp_degree=1)
    first = source.snapshot()
    assert source.snapshot() is first
    assert source.leader
    assert source.share("text") == "text"
    assert [list(parts) for parts in source.gather(first)] == [list(p) for p in first.parts]
    shards["w"][1] = torch.zeros(2, 2)
    second = source.snapshot()
    assert second is not first
    assert second.manifest.by_name["w"].shape == (4, 2)
    shards["w"][0].data = torch.zeros(2, 2)
    assert source.snapshot() is not second
    assert torch.equal(everything(source)["w"], torch.zeros(4, 2))
    shards["v"] = shards.pop("w")
    assert list(everything(source)) == ["v"]


@pytest.mark.parametrize(
    ("shards", "options", "message"),
    [
        ([], {}, "no shards"),
        ([torch.ones(2, 2)] * 3, {}, r"expected 4 shards \(2 FSDP x 2 TP\), got 3"),
        ([torch.ones(2, 2)] * 3 + [torch.ones(2, 3)], {}, "differ in more than rows"),
        ([torch.ones(2, 2)] * 3 + [torch.ones(2)], {}, "differ in more than rows"),
        ([torch.ones(2, 2)] * 3 + [torch.ones(3, 2)], {"tp_shard_dim": 1}, "TP rank 1"),
        ([torch.ones(2)] * 4, {"tp_shard_dim": 1}, "has 1 dimensions, none of them is 1"),
        ([torch.tensor(1.0)] * 4, {"tp_shard_dim": {"bad.one": None}}, "no dimensions"),
        ([torch.ones(2)] * 3 + [torch.ones(2).half()], {}, "dtypes torch.float16, torch.float32"),
        ([torch.ones(2)] * 4, {"tp_shard_dim": {}}, "tp_shard_dim doesn't have it"),
        ([torch.ones(2)] * 4, {"shapes": {"bad.one": (9,)}}, r"\(8,\), expected \(9,\).*holes"),
        ([torch.ones(2)] * 4, {"shapes": {"bad.one": (7,)}}, "overlap"),
        (
            [torch.ones(2)] * 3 + [torch.ones(3)],
            {"replicated": "bad*"},
            r"replicas have shapes \[\(2,\), \(3,\)\]",
        ),
    ],
)
def test_shards_that_do_not_fit_are_named(shards, options, message):
    options = {"tp_shard_dim": 0, "shapes": None, **options}
    source = ShardedSource({"bad.one": shards}, dp_shard_degree=2, tp_degree=2, **options)
    with pytest.raises(LayoutError, match=message) as caught:
        source.snapshot()
    assert "'bad.one'" in str(caught.value)


def test_a_replicated_pattern_that_matches_nothing_is_an_error():
    source = ShardedSource(
        {"w": [torch.ones(1)]}, dp_shard_degree=1, tp_degree=1, replicated="norm*"
    )
    with pytest.raises(ManifestError, match="replicated: pattern 'norm\\*'"):
        source.snapshot()


def test_a_shape_of_no_tensor_is_an_error():
    source = ShardedSource({}, dp_shard_degree=1, tp_degree=1, shapes={"w": (1,)})
    with pytest.raises(ManifestError, match="shapes: no tensor is named 'w'"):
        source.snapshot()


@pytest.mark.parametrize("shard", ["text", torch.ones(1, device="meta")])
def test_a_shard_that_cannot_be_sent_is_named(shard):
    source = ShardedSource({"w": [shard]}, dp_shard_degree=1, tp_degree=1)
    with pytest.raises(TensorError, match="'w'"):
        source.snapshot()


@pytest.mark.parametrize("degree", [0, -1, True, 1.0])
@pytest.mark.parametrize("name", ["dp_shard_degree", "tp_degree"])
def test_a_degree_must_be_a_positive_integer(name, degree):
    degrees = {"dp_shard_degree": 1, "tp_degree": 1, name: degree}
    with pytest.raises(ArgumentError, match=name):
        ShardedSource({}, **degrees)


@pytest.mark.parametrize("tp_dim", [0, 1])
def test_a_tensor_parallel_rank_may_have_nothing_but_empty_shards(tp_dim):
    full = torch.arange(4.0).reshape(1, 4) if tp_dim == 0 else torch.arange(4.0).reshape(2, 2)
    for shards in ([full, torch.empty(0)], [torch.empty(0), full]):
        source = ShardedSource({"w": shards}, dp_shard_degree=1, tp_degree=2, tp_shard_dim=tp_dim)
        assert torch.equal(everything(source)["w"], full)


def test_shards_of_which_none_tells_the_shape_are_an_error():
    shards = {"w": [torch.empty(0), torch.ones(2, 2)]}
    with pytest.raises(LayoutError, match="no shard that tells its shape"):
        ShardedSource(shards, dp_shard_degree=1, tp_degree=2, tp_shard_dim={"w": None}).snapshot()


def test_shards_stacked_in_one_tensor_must_be_listed():
    stacked = torch.arange(12.0).reshape(2, 3, 2)
    with pytest.raises(LayoutError, match="tensor 'w': expected a list of shards, got a Tensor"):
        ShardedSource({"w": stacked}, dp_shard_degree=2, tp_degree=1).snapshot()
    source = ShardedSource({"w": list(stacked)}, dp_shard_degree=2, tp_degree=1)
    assert torch.equal(everything(source)["w"], stacked.reshape(6, 2))
    assert source.snapshot() is source.snapshot()


def test_several_tensor_parallel_ranks_without_a_dimension_are_refused():
    with pytest.raises(ArgumentError, match="tp_degree 2 needs tp_shard_dim"):
        ShardedSource({"w": [torch.zeros(2)] * 2}, dp_shard_degree=1, tp_degree=2)
