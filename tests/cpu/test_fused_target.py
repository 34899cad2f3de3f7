"""`FusedTarget`: what a transfer leaves in an engine rank's parameters."""

from __future__ import annotations

import pytest
import torch

from packedcomm.errors import ManifestError, TensorError
from packedcomm.manifest import Manifest
from packedcomm.planning.engine_layouts import ModelGeometry
from packedcomm.targets.fused import FusedTarget
from packedcomm.targets.placement import check_one_device
from packedcomm.targets.staged import StagedTarget
from tests.helpers.delivery import box_of_part, counting, deliver
from tests.helpers.engine_models import engine_parameters, models

PLAIN = ModelGeometry(2, 2, 2)


def nan(*shape, dtype=torch.float32):
    return torch.full(shape, float("nan"), dtype=dtype)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("family", ["llama", "qwen3 moe", "mixtral"])
def test_a_model_of_transformers_arrives_as_the_engine_would_have_loaded_it(family, size):
    state = models()[family].state_dict()
    for rank in range(size):
        expected = engine_parameters(state, rank, size)
        parameters = {name: nan(*tensor.shape) for name, tensor in expected.items()}
        experts = None if family == "llama" else 4
        geometry = ModelGeometry(4, 2, 8, 70, experts, tp_rank=rank, tp_size=size)
        deliver(FusedTarget(parameters, geometry), state)
        for name, tensor in expected.items():
            assert torch.equal(parameters[name], tensor), name


def test_parameters_are_written_where_they_are_whatever_their_strides():
    transposed = nan(6, 4).t()
    holder = nan(8, 12)
    columns = holder[:, 3:9]
    target = FusedTarget({"a.weight": transposed, "m.gate_up_proj.weight": columns}, PLAIN)
    addresses = transposed.data_ptr(), columns.data_ptr()
    for start in (0, 500):
        wire = {
            "a.weight": counting(4, 6, start=start),
            "m.gate_proj.weight": counting(4, 6, start=start),
            "m.up_proj.weight": counting(4, 6, start=start + 100),
        }
        deliver(target, wire)
        assert torch.equal(transposed, wire["a.weight"])
        assert torch.equal(
            columns, torch.cat([wire["m.gate_proj.weight"], wire["m.up_proj.weight"]])
        )
        assert holder[:, :3].isnan().all()
    assert (transposed.data_ptr(), columns.data_ptr()) == addresses


def test_padding_is_zeroed_at_the_commit_and_not_before():
    parameters = {"lm_head.weight": nan(32, 3), "model.norm.weight": nan(3)}
    target = FusedTarget(parameters, ModelGeometry(2, 2, 2, tp_rank=1, tp_size=2))
    wire = {"lm_head.weight": counting(40, 3), "model.norm.weight": counting(3)}
    manifest = Manifest.from_tensors(wire)
    target.place(manifest)
    assert parameters["lm_head.weight"].isnan().all()
    target.commit(manifest)
    assert parameters["lm_head.weight"][:8].isnan().all()
    assert (parameters["lm_head.weight"][8:] == 0).all()
    deliver(target, wire)
    assert torch.equal(parameters["lm_head.weight"][:8], wire["lm_head.weight"][32:])


def test_the_rank_of_nothing_but_padding_gets_zeros():
    parameters = {"lm_head.weight": nan(16, 3)}
    target = FusedTarget(parameters, ModelGeometry(4, 4, 2, tp_rank=3, tp_size=4))
    manifest = deliver(target, {"lm_head.weight": counting(40, 3)})
    assert target.place(manifest) == ((),)
    assert (parameters["lm_head.weight"] == 0).all()


def test_names_of_one_memory_are_one_destination():
    table = nan(64, 3)
    geometry = ModelGeometry(2, 2, 2, tied_embeddings=True)
    target = FusedTarget({"model.embed_tokens.weight": table, "lm_head.weight": table}, geometry)
    for wire in (
        {"model.embed_tokens.weight": counting(64, 3)},
        {"lm_head.weight": counting(64, 3, start=5)},
        {"lm_head.weight": counting(64, 3), "model.embed_tokens.weight": counting(64, 3)},
    ):
        manifest = deliver(target, wire)
        assert torch.equal(table, next(iter(wire.values())))
        assert sum(map(len, target.place(manifest))) == 1


def test_a_tied_name_of_the_manifest_is_a_second_destination():
    parameters = {"model.embed_tokens.weight": nan(64, 3), "lm_head.weight": nan(64, 3)}
    wire = {"model.embed_tokens.weight": counting(64, 3)}
    attributes = {"tied": {"lm_head.weight": "model.embed_tokens.weight"}}
    deliver(FusedTarget(parameters, PLAIN), wire, attributes)
    assert torch.equal(parameters["lm_head.weight"], wire["model.embed_tokens.weight"])
    assert torch.equal(parameters["model.embed_tokens.weight"], wire["model.embed_tokens.weight"])


@pytest.mark.parametrize("tied", [[], {"a": 3}, "a"], ids=str)
def test_a_malformed_tied_attribute_is_an_error(tied):
    target = FusedTarget({"a.weight": nan(2)}, PLAIN)
    with pytest.raises(ManifestError, match='"tied" must be'):
        target.place(Manifest.from_tensors({"a.weight": nan(2)}, {"tied": tied}))


@pytest.mark.parametrize(
    "rename", [{"old.weight": "a.weight"}, lambda name: name.replace("old", "a")]
)
def test_names_can_be_changed_on_arrival(rename):
    parameters = {"a.weight": nan(2), "b.weight": nan(3)}
    deliver(
        FusedTarget(parameters, PLAIN, rename=rename),
        {"old.weight": counting(2), "b.weight": counting(3)},
    )
    assert torch.equal(parameters["a.weight"], counting(2))
    assert torch.equal(parameters["b.weight"], counting(3))


def test_two_names_that_become_one_are_an_error():
    target = FusedTarget({"a.weight": nan(2)}, PLAIN, rename={"b.weight": "a.weight"})
    with pytest.raises(ManifestError, match="both go to parameter 'a.weight'"):
        deliver(target, {"a.weight": counting(2), "b.weight": counting(2)})


def test_another_dtype_is_refused_unless_casting_is_asked_for():
    parameters = {"a.weight": nan(4, dtype=torch.bfloat16)}
    wire = {"a.weight": torch.tensor([1.0, 1 / 3, -2.5, 1e-3])}
    with pytest.raises(ManifestError, match="received as float32, held as bfloat16"):
        deliver(FusedTarget(parameters, PLAIN), wire)
    deliver(FusedTarget(parameters, PLAIN, cast=True), wire)
    assert torch.equal(parameters["a.weight"], wire["a.weight"].to(torch.bfloat16))


@pytest.mark.parametrize(
    ("sent", "held"),
    [
        (torch.int32, torch.float32),
        (torch.float8_e4m3fn, torch.bfloat16),
        (torch.int64, torch.int32),
    ],
)
def test_dtypes_between_which_nothing_is_cast_are_an_error(sent, held):
    target = FusedTarget({"a.weight": torch.zeros(4, dtype=held)}, PLAIN, cast=True)
    with pytest.raises(ManifestError, match="can't become"):
        target.place(Manifest.from_tensors({"a.weight": torch.zeros(4, dtype=sent)}))


def test_a_parameter_that_requires_grad_is_an_error():
    with pytest.raises(TensorError, match="'a.weight' requires grad"):
        FusedTarget({"a.weight": torch.nn.Parameter(torch.zeros(2))}, PLAIN)


def test_a_parameter_that_overlaps_itself_is_an_error():
    with pytest.raises(TensorError, match="'a.weight'"):
        FusedTarget({"a.weight": torch.zeros(1).expand(4)}, PLAIN)


def test_a_parameter_without_memory_is_an_error():
    with pytest.raises(TensorError, match="'b'"):
        FusedTarget({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")}, PLAIN)


def test_parameters_on_two_devices_are_an_error():
    with pytest.raises(TensorError, match="'b' is on meta, 'a' on cpu"):
        check_one_device({"a": torch.zeros(2), "b": torch.zeros(2, device="meta")})


def test_staging_keeps_the_old_weights_and_padding_until_the_commit():
    parameters = {"lm_head.weight": nan(64, 3), "m.gate_up_proj.weight": nan(4, 5)}
    target = StagedTarget(FusedTarget(parameters, PLAIN))
    wire = {
        "lm_head.weight": counting(40, 3),
        "m.up_proj.weight": counting(2, 5, start=100),
        "m.gate_proj.weight": counting(2, 5),
    }
    manifest = Manifest.from_tensors(wire)
    for spec, parts in zip(manifest.specs, target.place(manifest), strict=True):
        for part in parts:
            part.tensor.copy_(wire[spec.name][box_of_part(part)])
    assert all(tensor.isnan().all() for tensor in parameters.values())
    target.commit(manifest)
    assert torch.equal(parameters["lm_head.weight"][:40], wire["lm_head.weight"])
    assert (parameters["lm_head.weight"][40:] == 0).all()
    gate_up = torch.cat([wire["m.gate_proj.weight"], wire["m.up_proj.weight"]])
    assert torch.equal(parameters["m.gate_up_proj.weight"], gate_up)


def test_a_name_that_occurs_twice_is_an_error():
    with pytest.raises(ManifestError, match="duplicate"):
        FusedTarget([("a", torch.zeros(2)), ("a", torch.zeros(2))], PLAIN)


def test_memory_that_was_replaced_is_noticed():
    module = torch.nn.Linear(2, 2, bias=False).requires_grad_(False)
    target = FusedTarget(module.named_parameters(), PLAIN)
    manifest = deliver(target, {"weight": counting(2, 2)})
    module.weight.data = torch.zeros(2, 2)
    with pytest.raises(TensorError, match="'weight' has been given other memory"):
        target.commit(manifest)


def test_a_failed_placement_writes_nothing():
    parameters = {"lm_head.weight": nan(64, 3), "model.norm.weight": nan(3)}
    target = FusedTarget(parameters, PLAIN)
    with pytest.raises(ManifestError):
        deliver(target, {"lm_head.weight": counting(40, 3)})
    assert parameters["lm_head.weight"].isnan().all()


def test_a_partial_transfer_zeroes_the_padding_of_what_it_brings():
    parameters = {"lm_head.weight": nan(64, 3), "embed_tokens.weight": nan(64, 3)}
    target = FusedTarget(parameters, PLAIN, partial=True)
    deliver(target, {"lm_head.weight": counting(40, 3)})
    assert (parameters["lm_head.weight"][40:] == 0).all()
    assert parameters["embed_tokens.weight"].isnan().all()


def test_the_same_manifest_is_placed_once():
    target = FusedTarget({"a.weight": nan(2)}, PLAIN)
    first = Manifest.from_tensors({"a.weight": counting(2)})
    again = Manifest.from_tensors({"a.weight": counting(2)})
    assert target.place(first) is target.place(again)
    assert target.layout(first).holes() == {}
