"""What is read from vLLM's LoRA layers, here from stand-ins of the same names."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from packedcomm.engines.vllm.lora_layers import stack_of


class ColumnParallelLinearWithLoRA:
    def __init__(self, *output_sizes, merged=True, slices=1):
        self.base_layer = SimpleNamespace(output_sizes=list(output_sizes))
        self.is_merged_col_linear = merged
        self.lora_a_stacked = (torch.zeros(1, 1, 8, 6),) * slices
        self.lora_b_stacked = (torch.zeros(1, 1, 4, 8),) * slices


class ColumnParallelLinearWithShardedLoRA(ColumnParallelLinearWithLoRA):
    pass


class QKVParallelLinearWithLoRA(ColumnParallelLinearWithLoRA):
    pass


class QKVParallelLinearWithShardedLoRA(QKVParallelLinearWithLoRA):
    pass


@pytest.mark.parametrize(
    ("layer", "division"),
    [
        (ColumnParallelLinearWithLoRA(8, merged=False), "whole"),
        (ColumnParallelLinearWithLoRA(4, 4), "halves"),
        (ColumnParallelLinearWithShardedLoRA(4, 4), "halves"),
        (ColumnParallelLinearWithLoRA(4, 4, slices=2), None),
        (ColumnParallelLinearWithLoRA(6, 2), "unknown"),
        (ColumnParallelLinearWithLoRA(8), "unknown"),
        (QKVParallelLinearWithLoRA(4, 2, 2, merged=False), "unknown"),
        (QKVParallelLinearWithShardedLoRA(4, 2, 2, merged=False), "unknown"),
    ],
    ids=[
        "plain",
        "two parts",
        "two parts, fully sharded",
        "two pairs",
        "unequal parts",
        "one part",
        "attention",
        "attention, fully sharded",
    ],
)
def test_the_kind_of_a_layer_tells_how_ranks_divide_its_outputs(layer, division):
    assert stack_of(layer).division == division
