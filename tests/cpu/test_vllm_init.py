"""vLLM's init info, as a mapping or an object, and the rank that a worker gets from it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from packedcomm.communicators.vllm_init import VllmInitInfo
from packedcomm.errors import ArgumentError

FIELDS = {"master_address": "10.0.0.1", "master_port": 29500, "rank_offset": 1, "world_size": 9}


def test_a_mapping_and_an_object_give_the_same():
    extra = {"packed": True, "packed_num_buffers": 2}
    from_mapping = VllmInitInfo.parse(FIELDS | extra)
    assert from_mapping == VllmInitInfo.parse(SimpleNamespace(**FIELDS, **extra))
    assert from_mapping.master_port == 29500


@pytest.mark.parametrize("missing", FIELDS)
def test_a_missing_field_is_named(missing):
    rest = {name: value for name, value in FIELDS.items() if name != missing}
    for info in (rest, SimpleNamespace(**rest)):
        with pytest.raises(ArgumentError, match=f"no {missing}"):
            VllmInitInfo.parse(info)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("master_address", ""),
        ("master_address", None),
        ("master_port", 0),
        ("master_port", 65536),
        ("master_port", "29500"),
        ("rank_offset", -1),
        ("world_size", 0),
        ("world_size", True),
    ],
)
def test_a_field_out_of_range_is_named(field, value):
    with pytest.raises(ArgumentError, match=field):
        VllmInitInfo.parse(FIELDS | {field: value})


def test_worker_ranks_fill_the_group_without_gaps():
    info = VllmInitInfo.parse(FIELDS)
    ranks = [
        info.worker_rank(
            rank, data_parallel_index=index, tensor_parallel_size=2, pipeline_parallel_size=2
        )
        for index in range(2)
        for rank in range(4)
    ]
    assert ranks == [1, 2, 3, 4, 5, 6, 7, 8]


def test_a_worker_beyond_the_group_is_refused():
    with pytest.raises(ArgumentError, match="rank must be in"):
        VllmInitInfo.parse(FIELDS).worker_rank(8)
