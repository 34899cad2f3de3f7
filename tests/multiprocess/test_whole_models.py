"""Whole models of transformers through a session: logits and every rank's fused parameters."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

from packedcomm import (
    Cast,
    FullWeightSender,
    FusedTarget,
    LoraSender,
    ModelGeometry,
    ModuleSource,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from tests.helpers.engine_models import engine_parameters, models
from tests.helpers.ranks import run_ranks
from tests.helpers.syncs import Meeting

FAMILIES = ["llama", "qwen3", "qwen3 moe", "mixtral"]
TOKENS = torch.arange(20).view(2, 10)


@torch.no_grad()
def _logits(model: torch.nn.Module) -> torch.Tensor:
    return model.eval()(TOKENS).logits


def _send_model(rank: int, world_size: int, meeting: Meeting, family: str) -> object:
    """Rank 0 trains in fp32, rank 1 serves the same model in bfloat16, ranks 2 and 3 are an engine
    of two tensor-parallel ranks."""
    model = models()[family]
    with meeting.session("gloo", rank, world_size) as session:
        if rank == 0:
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.mul_(1.5).add_(torch.randn_like(parameter), alpha=0.01)
            source = ModuleSource(model, transforms=[Cast("bfloat16")])
            sender = FullWeightSender(source, session, verify=True)
            assert sender.sync().verified
            return _logits(model.to(torch.bfloat16)), dict(model.state_dict())
        if rank == 1:
            model.to(torch.bfloat16)
            receiver = WeightReceiver(TensorTarget(model.state_dict()), session)
            assert receiver.receive() is not None
            assert receiver.receive() is None
            return _logits(model)
        state = {name: t.to(torch.bfloat16) for name, t in model.state_dict().items()}
        expected = engine_parameters(state, rank - 2, 2)
        parameters = {n: torch.full_like(t, float("nan")) for n, t in expected.items()}
        geometry = ModelGeometry(
            4, 2, 8, 70, 4 if family in ("qwen3 moe", "mixtral") else None,
            tp_rank=rank - 2, tp_size=2, tied_embeddings=family == "qwen3",
        )  # fmt: skip
        target = FusedTarget(parameters, geometry)
        receiver = WeightReceiver(StagedTarget(target) if rank == 2 else target, session)
        assert receiver.receive() is not None
        assert receiver.receive() is None
        return parameters


@pytest.mark.parametrize("family", FAMILIES)
def test_a_whole_model_arrives_cast_fused_and_sliced(family):
    (logits, state), served, first, second = run_ranks(
        _send_model, 4, Meeting(4), family, deadline_s=100
    )
    assert torch.equal(served, logits)
    for rank, parameters in enumerate((first, second)):
        for name, expected in engine_parameters(state, rank, 2).items():
            assert torch.equal(parameters[name], expected), (rank, name)


def _adapter(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """The adapter's tensors. PEFT would add the whole embedding that it adapts."""
    return get_peft_model_state_dict(model, save_embedding_layers=False)


def _send_adapter(
    rank: int, world_size: int, meeting: Meeting, family: str, options: dict[str, object]
) -> torch.Tensor:
    torch.manual_seed(0)
    model = get_peft_model(models()[family], LoraConfig(r=4, lora_alpha=8, **options))
    with meeting.session("gloo", rank, world_size) as session:
        if rank == 0:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if "lora_" in name:
                        parameter.add_(torch.randn_like(parameter), alpha=0.1)
            result = LoraSender(model, session).sync()
            assert result.verified
            assert result.tensors == len(_adapter(model))
            return _logits(model.merge_and_unload())
        receiver = WeightReceiver(TensorTarget(_adapter(model)), session)
        assert receiver.receive() is not None
        assert receiver.receive() is None
        return _logits(model)


@pytest.mark.filterwarnings("ignore::FutureWarning:transformers.*")
@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {"target_modules": ["q_proj", "v_proj", "down_proj"]}),
        ("llama", {"target_modules": ["k_proj", "embed_tokens"], "use_rslora": True}),
        ("qwen3", {"target_modules": ["q_proj", "o_proj"], "use_dora": True}),
        ("qwen3 moe", {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}),
    ],
)
def test_a_trained_adapter_answers_as_the_merged_model(family, options):
    merged, served = run_ranks(_send_adapter, 2, Meeting(2), family, options, deadline_s=100)
    assert not torch.equal(merged, _logits(models()[family]))
    torch.testing.assert_close(served, merged, rtol=1e-4, atol=1e-5)
