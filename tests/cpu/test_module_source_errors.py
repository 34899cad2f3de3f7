"""`ModuleSource`: what it refuses, and that the messages name it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from packedcomm.errors import ArgumentError, ManifestError, TensorError
from packedcomm.sources import ModuleSource, holds_dtensors


def test_a_pattern_that_matches_no_buffer_is_an_error():
    with pytest.raises(ManifestError, match="buffers: pattern 'nothing' matches no name"):
        ModuleSource(nn.BatchNorm1d(4), buffers=["*mean", "nothing"]).snapshot()


def test_buffers_of_a_mapping_are_refused():
    with pytest.raises(ArgumentError, match="of a module only"):
        ModuleSource({}, buffers=True)


def test_names_that_collide_without_wrappers_are_an_error():
    tensors = {"_orig_mod.a": torch.ones(1), "a": torch.zeros(1)}
    with pytest.raises(ManifestError, match="several tensors are named 'a'"):
        ModuleSource(tensors).snapshot()


def test_a_function_that_makes_no_mapping_is_an_error():
    with pytest.raises(ArgumentError, match="it made a list"):
        ModuleSource(list).snapshot()


def test_something_that_has_no_tensors_is_an_error():
    with pytest.raises(ArgumentError, match="got list"):
        ModuleSource([torch.ones(1)])


def test_a_name_that_is_no_text_is_an_error():
    with pytest.raises(ArgumentError, match="got a key 3"):
        ModuleSource({3: torch.ones(1)}).snapshot()


def wrapper_tensor():
    from torch.testing._internal.two_tensor import TwoTensor

    return TwoTensor(torch.ones(2), torch.ones(2))


def quantised_parameter():
    parameter = torch.ones(2, dtype=torch.uint8)
    parameter.quant_state = object()
    return parameter


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: torch.ones(2, device="meta"), "meta device"),
        (lambda: torch.ones(2, 2).to_sparse(), "dense"),
        (wrapper_tensor, "TwoTensor"),
        (quantised_parameter, "quantised"),
        (lambda: torch._neg_view(torch.ones(2)), "resolve_neg"),
        (lambda: "text", "got str"),
        (lambda: np.arange(4)[::-1], "negative strides"),
    ],
)
def test_a_tensor_that_cannot_be_sent_is_named(make, message):
    source = ModuleSource({"good": torch.ones(1), "the.bad.one": make()})
    with pytest.raises(TensorError, match=message) as caught:
        source.snapshot()
    assert "'the.bad.one'" in str(caught.value)


def test_a_dtensor_is_refused_with_the_source_to_use(tmp_path):
    import torch.distributed as dist
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/s", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        tensors = {"w": distribute_tensor(torch.ones(2), mesh, [Replicate()])}
        assert holds_dtensors(tensors)
        with pytest.raises(TensorError, match=r"'w'.*DTensorSource"):
            ModuleSource(tensors).snapshot()
    finally:
        dist.destroy_process_group()


def test_memory_that_is_gone_is_an_error_until_it_is_back():
    model = nn.Sequential(nn.Linear(3, 4))
    source = ModuleSource(model)
    source.snapshot()
    replaced = model[0].weight
    model[0].weight = nn.Parameter(torch.empty(4, 3, device="meta"))
    for _ in range(2):
        with pytest.raises(TensorError, match=r"'0\.weight'.*meta"):
            source.snapshot()
    model[0].weight = replaced
    assert len(source.snapshot().manifest) == 2


def test_a_parameter_that_is_not_initialised_is_named():
    model = nn.Sequential(nn.LazyLinear(3))
    with pytest.raises(TensorError, match=r"tensor '0\.weight': is uninitialised"):
        ModuleSource(model).snapshot()
    model(torch.ones(1, 2))
    assert ModuleSource(model).snapshot().manifest.by_name["0.weight"].shape == (3, 2)
