"""`AdapterTarget`, and modules as targets."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn

from packedcomm import AdapterTarget, LoraSource, ModuleSource, TensorTarget, WeightReceiver
from packedcomm.errors import ArgumentError, ManifestError
from tests.helpers.delivery import deliver

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


def model(name="default", **options):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3))
    base[1].scaling = 0.125  # as attention layers have
    adapted = get_peft_model(
        base, LoraConfig(r=2, target_modules=["0", "2"], **options), adapter_name=name
    )
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_()
    return adapted


def send(source_model, target, adapter="default", **options):
    manifest = LoraSource(source_model, adapter, **options).snapshot().manifest
    wire = get_peft_model_state_dict(source_model, adapter_name=adapter)
    deliver(target, wire, manifest.attributes)


def test_an_adapter_lands_in_the_live_model_whatever_it_is_called_there():
    trainer, server = model("trained"), model("served")
    inputs = torch.randn(4, 6)
    with torch.no_grad():
        for parameter in server.parameters():
            if parameter.requires_grad:
                parameter.zero_()
        assert not torch.allclose(trainer(inputs), server(inputs))
        send(trainer, AdapterTarget(server, "served"), "trained")
        assert torch.equal(trainer(inputs), server(inputs))


@pytest.mark.parametrize("other", [{"lora_alpha": 64}, {"use_rslora": True}])
def test_an_adapter_that_is_scaled_otherwise_is_refused(other):
    target = AdapterTarget(model())
    with pytest.raises(ManifestError, match="'0' is scaled by .*, here by"):
        send(model(**other), target)


def test_a_scaling_that_was_folded_would_be_applied_twice():
    with pytest.raises(ManifestError, match="folds the scaling"):
        send(model(), AdapterTarget(model()), fold_scaling=True)


def test_an_adapter_that_is_not_there_is_refused():
    with pytest.raises(ManifestError, match="no adapter 'x'; it has: 'default'"):
        AdapterTarget(model(), "x")
    with pytest.raises(ManifestError, match="it has: none"):
        AdapterTarget(nn.Linear(1, 1))


def test_a_module_as_target_means_its_parameters():
    trainer, server = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    nn.init.normal_(trainer.weight)
    manifest = ModuleSource(trainer).snapshot().manifest
    parameters = {name: p.detach() for name, p in trainer.named_parameters()}
    deliver(TensorTarget(server), parameters, manifest.attributes)
    assert torch.equal(server.weight, trainer.weight)
    assert server.weight.requires_grad


def test_missing_buffers_are_named_with_what_would_send_them():
    module = nn.BatchNorm1d(3)
    manifest = ModuleSource(module).snapshot().manifest
    with pytest.raises(ManifestError, match=r"'running_mean' is not sent.*buffers=True"):
        TensorTarget(module.state_dict()).place(manifest)


def test_a_module_is_no_callback():
    with pytest.raises(ArgumentError, match=r"TensorTarget\(module\)"):
        WeightReceiver(nn.Linear(1, 1), None)


def test_a_session_is_missed_at_once():
    with pytest.raises(ArgumentError, match="session must be a receiver's.*not NoneType"):
        WeightReceiver(TensorTarget({}), None)


def test_a_merged_adapter_is_refused_until_it_is_unmerged():
    trainer, server = model(), model()
    target = AdapterTarget(server)
    send(trainer, target)
    server.merge_adapter()
    with pytest.raises(ManifestError, match="merged here: unmerge it first"):
        send(trainer, target)
    server.unmerge_adapter()
    send(trainer, target)
    assert not target.fixed_destinations


def test_memory_that_a_modules_parameters_get_later_is_followed():
    trainer, server = nn.Linear(3, 2), nn.Linear(3, 2)
    manifest = ModuleSource(trainer).snapshot().manifest
    parameters = {name: p.detach() for name, p in trainer.named_parameters()}
    target = TensorTarget(server)
    deliver(target, parameters, manifest.attributes)
    before = [tensor.data_ptr() for tensor in target.memory]
    server.weight.data = torch.zeros(2, 3)
    assert [tensor.data_ptr() for tensor in target.memory] != before
    deliver(target, parameters, manifest.attributes)
    assert torch.equal(server.weight, trainer.weight)
