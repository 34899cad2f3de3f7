"""`ModuleSource`: names, ties, what is noticed and what is refused."""

from __future__ import annotations

import sys
from types import MappingProxyType

import numpy as np
import pytest
import torch
from torch import nn

from packedcomm.copying import BufferPlan
from packedcomm.errors import ManifestError, SessionStateError
from packedcomm.manifest import Manifest
from packedcomm.sources import Cast, ModuleSource
from packedcomm.sources.structure import ModuleRecord
from tests.helpers.source_parts import everything


def small():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2, bias=False))


def tied():
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    model["head"].weight = model["embed"].weight
    return model


def check_same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def transformers_model(kind, **options):
    transformers = pytest.importorskip("transformers")
    sizes = {
        "vocab_size": 32,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    config = getattr(transformers, f"{kind}Config")(**sizes, **options)
    return getattr(transformers, f"{kind}ForCausalLM")(config)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("Llama", {}),
        ("Llama", {"tie_word_embeddings": True}),
        ("Qwen3", {"head_dim": 4}),
        ("Qwen3Moe", {"num_experts": 4, "moe_intermediate_size": 8}),
        ("Mixtral", {"num_local_experts": 4}),
    ],
)
def test_a_transformers_model_arrives_with_the_names_of_its_state_dict(kind, options):
    model = transformers_model(kind, **options)
    expected = model.state_dict()
    source = ModuleSource(model, buffers=True)
    found = everything(source)
    check_same({name: found[name] for name in expected}, expected)
    assert found.keys() == expected.keys()
    attributes = source.snapshot().manifest.attributes
    if options.get("tie_word_embeddings"):
        assert attributes == {"tied": {"lm_head.weight": "model.embed_tokens.weight"}}
    else:
        assert source.snapshot().manifest == Manifest.from_tensors(expected, {"tied": {}})
    loaded = transformers_model(kind, **options)
    loaded.load_state_dict(found)
    check_same(loaded.state_dict(), expected)


def test_parts_are_what_the_copy_engine_takes():
    model = small()
    snapshot = ModuleSource(model, transforms=[Cast("bfloat16")]).snapshot()
    plan = BufferPlan(torch.device("cpu"), into_buffer=True)
    offset = 0
    for spec, parts in zip(snapshot.manifest.specs, snapshot.parts, strict=True):
        dtype = getattr(torch, spec.dtype)
        plan.add_parts(parts, dtype, spec.shape, offset, spec.name)
        offset += spec.nbytes
    buffer = torch.zeros(offset, dtype=torch.uint8)
    plan.run(buffer)
    flat = torch.cat([p.detach().flatten().bfloat16() for p in model.parameters()])
    assert torch.equal(buffer.view(torch.bfloat16), flat)


def test_it_leads_and_has_nobody_to_tell():
    source = ModuleSource(small())
    assert source.leader
    assert source.share(None) is None
    assert source.share("text") == "text"
    snapshot = source.snapshot()
    assert list(source.gather(snapshot)) == list(snapshot.parts)


def test_an_unchanged_module_gives_the_same_snapshot_whatever_its_values():
    model = small()
    source = ModuleSource(model)
    snapshot = source.snapshot()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model(torch.rand(6, 3)).sum().backward()
    optimizer.step()
    assert source.snapshot() is snapshot
    found = everything(source)
    check_same(found, {name: p.detach() for name, p in model.named_parameters()})


def test_comparing_runs_no_python_per_tensor():
    """Frames entered by a snapshot are as many for a large model as for a small one."""

    def frames(count):
        source = ModuleSource(nn.Sequential(*(nn.Linear(2, 2) for _ in range(count))))
        source.snapshot()
        entered = 0

        def count_frames(frame, event, argument):
            nonlocal entered
            entered += event == "call"

        sys.setprofile(count_frames)
        try:
            source.snapshot()
        finally:
            sys.setprofile(None)
        return entered

    assert frames(200) == frames(2) > 0


def swap_data(model):
    model[0].weight.data = torch.ones(4, 3)


def change_dtype(model):
    model[2].weight.data = model[2].weight.data.double()


def transpose_data(model):
    model[2].weight.data = torch.ones(4, 2).t()


def replace_parameter(model):
    model[0].bias = nn.Parameter(torch.ones(4))


def replace_module(model):
    model[2] = nn.Linear(4, 2, bias=False)


def add_parameter(model):
    model[0].register_parameter("extra", nn.Parameter(torch.ones(1)))


def remove_parameter(model):
    model[0].bias = None


def delete_parameter(model):
    del model[0].bias


def replace_buffer(model):
    model[1].running_mean = torch.ones(4)


def replace_dictionary(model):
    model[0]._parameters = {"weight": nn.Parameter(torch.ones(4, 3)), "bias": None}


def reorder(model):
    model[0]._parameters["weight"] = model[0]._parameters.pop("weight")


def tie(model):
    model[0].register_parameter("also", model[0].weight)


def move_whole_model(model):
    model.half()


@pytest.mark.parametrize(
    "change",
    [
        swap_data,
        change_dtype,
        transpose_data,
        replace_parameter,
        replace_module,
        add_parameter,
        remove_parameter,
        delete_parameter,
        replace_buffer,
        replace_dictionary,
        reorder,
        tie,
        move_whole_model,
    ],
)
def test_a_change_is_noticed_and_what_is_sent_is_the_new_state(change):
    model = small()
    source = ModuleSource(model, buffers=True)
    before = source.snapshot()
    change(model)
    after = source.snapshot()
    assert after is not before
    found, expected = everything(source), model.state_dict()
    assert found.keys() == expected.keys()
    # Tied names come last, all others in the state dict's order.
    check_same({name: found[name] for name in expected}, expected)
    assert source.snapshot() is after


def test_moved_memory_keeps_the_manifest():
    model = small()
    source = ModuleSource(model)
    manifest = source.snapshot().manifest
    swap_data(model)
    assert source.snapshot().manifest is manifest


def test_tied_weights_are_sent_once():
    model = tied()
    snapshot = ModuleSource(model).snapshot()
    assert [spec.name for spec in snapshot.manifest.specs] == ["embed.weight"]
    assert snapshot.manifest.attributes == {"tied": {"head.weight": "embed.weight"}}


def test_a_state_dict_with_tied_weights_is_sent_as_the_module_is():
    model = tied()
    of_module = ModuleSource(model).snapshot().manifest
    assert ModuleSource(model.state_dict()).snapshot().manifest == of_module


def test_a_module_in_two_places_is_sent_once():
    shared = nn.Linear(2, 2)
    snapshot = ModuleSource(nn.ModuleList([shared, shared])).snapshot()
    assert snapshot.manifest.attributes["tied"] == {"1.weight": "0.weight", "1.bias": "0.bias"}


def test_untying_changes_the_digest():
    model = tied()
    source = ModuleSource(model)
    digest = source.snapshot().manifest.digest
    model["head"].weight = nn.Parameter(model["head"].weight.detach().clone())
    assert source.snapshot().manifest.digest != digest
    assert source.snapshot().manifest == Manifest.from_tensors(model.state_dict(), {"tied": {}})


def test_views_of_the_same_memory_with_other_shapes_are_not_tied():
    memory = torch.arange(6.0)
    found = everything(ModuleSource({"a": memory, "b": memory.view(2, 3), "c": memory[:3]}))
    assert found["b"].tolist() == [[0, 1, 2], [3, 4, 5]]
    assert found["c"].tolist() == [0, 1, 2]
    manifest = ModuleSource({"a": memory, "b": memory.view(2, 3)}).snapshot().manifest
    assert manifest.attributes["tied"] == {}


def test_empty_tensors_are_not_tied_to_each_other():
    manifest = ModuleSource({"a": torch.empty(0), "b": torch.empty(0)}).snapshot().manifest
    assert len(manifest) == 2
    assert manifest.attributes == {"tied": {}}


def test_buffers_are_sent_when_asked_for():
    model = small()
    model.register_buffer("cache", torch.ones(2), persistent=False)

    def names(buffers):
        return {s.name for s in ModuleSource(model, buffers=buffers).snapshot().manifest.specs}

    parameters = {name for name, _ in model.named_parameters()}
    assert names(False) == parameters
    assert names(True) == set(model.state_dict())
    assert names("*running*") == parameters | {"1.running_mean", "1.running_var"}
    assert names(["cache", "*.num_batches_tracked"]) - parameters == {
        "cache",
        "1.num_batches_tracked",
    }


def test_wrappers_are_left_out_of_names():
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    plain = small()
    expected = ModuleSource(plain).snapshot().manifest
    wrapped = [
        torch.compile(plain),
        nn.DataParallel(plain),
        nn.DataParallel(torch.compile(plain)),
        torch.compile(plain).state_dict(),
        nn.Sequential(torch.compile(plain[0]), checkpoint_wrapper(plain[1]), plain[2]),
    ]
    for model in wrapped:
        buffers = {} if isinstance(model, dict) else {"buffers": True}
        names = {s.name for s in ModuleSource(model, **buffers).snapshot().manifest.specs}
        assert names == set(plain.state_dict())
        if not isinstance(model, dict):
            assert ModuleSource(model).snapshot().manifest == expected


def test_wrappers_stay_in_names_when_asked():
    compiled = torch.compile(small())
    names = [s.name for s in ModuleSource(compiled, unwrap=False).snapshot().manifest.specs]
    assert names == [name for name, _ in compiled.named_parameters()]
    assert names[0] == "_orig_mod.0.weight"


def test_a_child_called_module_keeps_its_name():
    model = nn.ModuleDict({"module": nn.Linear(2, 2)})
    for tensors in (model, model.state_dict()):
        names = [spec.name for spec in ModuleSource(tensors).snapshot().manifest.specs]
        assert names == ["module.weight", "module.bias"]


def test_a_mapping_is_followed():
    tensors = {"a": torch.ones(2), "b": np.arange(3, dtype=np.int32)}
    source = ModuleSource(MappingProxyType(tensors))
    snapshot = source.snapshot()
    assert source.snapshot() is snapshot
    tensors["b"][0] = 7
    assert source.snapshot() is snapshot
    assert everything(source)["b"].tolist() == [7, 1, 2]
    tensors["b"] = np.arange(3, dtype=np.int64)
    assert source.snapshot().manifest.by_name["b"].dtype == "int64"
    tensors["c"] = torch.ones(1)
    assert list(everything(source)) == ["a", "b", "c"]
    tensors["a"].data = torch.zeros(2)
    assert everything(source)["a"].tolist() == [0, 0]


def test_a_function_is_called_at_every_snapshot_and_its_tensors_are_gathered():
    calls = []

    def make():
        calls.append(len(calls))
        return {"a": torch.full((2,), float(calls[-1])), "b": torch.ones(1)}

    source = ModuleSource(make)
    first = source.snapshot()
    assert first.parts is None
    assert [parts[0].tensor.tolist() for parts in source.gather(first)] == [[0, 0], [1]]
    second = source.snapshot()
    assert second is first
    assert [parts[0].tensor.tolist() for parts in source.gather(second)] == [[1, 1], [1]]
    # Gathered again without a new snapshot: made anew.
    assert [parts[0].tensor.tolist() for parts in source.gather(second)] == [[2, 2], [1]]


def test_a_function_that_makes_other_tensors_gives_another_snapshot():
    made = {"a": torch.ones(2)}
    source = ModuleSource(lambda: dict(made))
    first = source.snapshot()
    made["b"] = torch.ones(1)
    second = source.snapshot()
    assert second is not first
    assert len(list(source.gather(second))) == 2
    with pytest.raises(SessionStateError, match="latest snapshot"):
        next(source.gather(first))
    del made["b"]
    with pytest.raises(ManifestError, match="other tensors than at the snapshot"):
        next(source.gather(second))


def test_a_gathered_tensor_is_not_kept():
    import gc
    import weakref

    source = ModuleSource(lambda: {"a": torch.ones(2), "b": torch.ones(2)})
    gathered = source.gather(source.snapshot())
    parts = next(gathered)
    alive = weakref.ref(parts[0].tensor)
    del parts
    next(gathered)
    gc.collect()
    assert alive() is None


def test_a_module_record_holds_shared_modules_once():
    shared = nn.Linear(2, 2)
    record = ModuleRecord(nn.ModuleList([shared, shared]))
    assert len(record.modules) == 2
    assert record.holds()
