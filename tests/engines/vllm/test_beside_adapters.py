"""The model's own weights in engines whose layers are wrapped for adapters."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from packedcomm import FullWeightSender
from packedcomm.engines.vllm.client import LocalEngine
from tests.helpers.vllm_adapters import ADAPTED, ENGINE, agree, generated, llama, qwen3_moe
from tests.helpers.vllm_engines import SyncedEngine, changed, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


experts = pytest.mark.skipif(
    ENGINE.type == "cpu", reason="vLLM's kernels for experts with adapters are of Triton"
)


@pytest.mark.parametrize("make", [llama, pytest.param(qwen3_moe, marks=experts)])
def test_each_update_of_all_weights_is_answered_with(tmp_path, make):
    model = make()
    engine = SyncedEngine(
        model,
        tmp_path,
        enable_lora=True,
        max_lora_rank=16,
        dtype=str(ADAPTED).removeprefix("torch."),
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
