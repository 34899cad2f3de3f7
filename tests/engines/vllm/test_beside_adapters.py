"""The model's own weights in engines whose layers are wrapped for adapters."""

from __future__ import annotations

from functools import partial

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from safetensors.torch import load_file

from packedcomm import FullWeightSender
from packedcomm.engines.vllm.client import LocalEngine
from packedcomm.errors import ManifestError
from tests.helpers.vllm_adapters import (
    ADAPTED,
    ENGINE,
    agree,
    generated,
    gpt_oss,
    granite,
    llama,
    qwen3_moe,
)
from tests.helpers.vllm_engines import SyncedEngine, changed, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


DTYPE = str(ADAPTED).removeprefix("torch.")

experts = pytest.mark.skipif(
    ENGINE.type == "cpu", reason="vLLM's kernels for experts with adapters are of Triton"
)


def parameters_of(engine):
    return {name: tensor.clone() for name, tensor in engine.model.named_parameters()}


@pytest.mark.parametrize("apart", [False, True], ids=["fused", "one by one"])
@pytest.mark.skipif(ENGINE.type != "cpu", reason="the engine isn't in this process")
def test_experts_get_what_a_checkpoint_brings(tmp_path, apart):
    # Which the CPU build can't compute with where they may be adapted.
    model = changed(qwen3_moe(), 1)
    model.save_pretrained(tmp_path / "checkpoint")
    tensors = load_file(tmp_path / "checkpoint" / "model.safetensors") if apart else model
    options = {"enable_lora": True, "max_lora_rank": 16, "dtype": DTYPE}
    loaded = SyncedEngine(model, tmp_path / "loaded", **options)
    try:
        expected = parameters_of(loaded)
    finally:
        loaded.close()
    engine = SyncedEngine(qwen3_moe(), tmp_path / "synced", **options)
    try:
        with trainer_of(LocalEngine(engine.llm)) as (session, updater):
            for _ in range(3):
                updater.update(FullWeightSender(tensors, session))
            held = parameters_of(engine)
    finally:
        engine.close()
    experts = [name for name in expected if "routed_experts.w" in name]
    assert experts
    assert all(torch.equal(held[name], expected[name]) for name in experts)
    assert held.keys() == expected.keys()


@pytest.mark.parametrize("stages", [1, 2])
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.skipif(ENGINE.type != "cpu", reason="the engine isn't in this process")
def test_what_a_loader_passes_over_is_refused_in_partial_updates(
    tmp_path, monkeypatch, wrapped, stages
):
    # GPT-OSS' goes on at names that it doesn't know, as it does at those of wrapped layers; and
    # writes its sinks where a reload doesn't see it.
    options = {"enable_lora": True, "max_lora_rank": 16} if wrapped else {}
    model = gpt_oss()
    engine = SyncedEngine(model, tmp_path, dtype="bfloat16", **options)
    layer = "model.layers.0"
    # As each of several stages sees it.
    parallel = engine.worker.vllm_config.parallel_config
    monkeypatch.setattr(parallel, "pipeline_parallel_size", stages)
    try:
        with trainer_of(LocalEngine(engine.llm)) as (session, updater):

            def update(*names):
                parameters = dict(model.named_parameters())
                sent = {name: torch.full_like(parameters[name], 0.25) for name in names}
                return updater.update(FullWeightSender(sent, session), partial=True)

            passed_over = f"passes over 1 tensors: '{layer}.self_attn.sinks'"
            with pytest.raises(ManifestError, match=passed_over):
                update(f"{layer}.self_attn.sinks", f"{layer}.input_layernorm.weight")
            router = [f"{layer}.mlp.router.{leaf}" for leaf in ("weight", "bias")]
            experts = f"{layer}.mlp.experts.gate_up_proj"
            with pytest.raises(ManifestError, match=f"(over 1 tensors|manifest): '{experts}'"):
                update(*router, experts)
            with pytest.raises(ManifestError, match="router.*bias"):
                update(f"{layer}.mlp.router.weight")
            update(*router)
        held = parameters_of(engine)
        base = ".base_layer" if wrapped else ""
        assert held[f"{layer}.mlp.router{base}.bias"].tolist() == [0.25] * 4
    finally:
        engine.close()


# All experts are chosen: of two that are as likely float16 may choose another one.
@pytest.mark.parametrize(
    "make",
    # Granite's loader looks names up by itself, so that it knows others where layers are wrapped.
    [llama, granite, pytest.param(partial(qwen3_moe, 4), marks=experts, id="qwen3_moe")],
)
def test_each_update_of_all_weights_is_answered_with(tmp_path, make):
    model = make()
    engine = SyncedEngine(
        model,
        tmp_path,
        enable_lora=True,
        max_lora_rank=16,
        dtype=DTYPE,
    )
    try:
        with trainer_of(LocalEngine(engine.llm)) as (session, updater):
            sender = FullWeightSender(model, session)
            # The last one is replayed where vLLM repacks nothing.
            for seed in (1, 2, 3):
                model.load_state_dict(changed(model, seed).state_dict())
                updater.update(sender)
                agree(engine.generate(), generated(model))
    finally:
        engine.close()
