"""Adapters whose slots have lost their contents, as an engine that sleeps deeply gives them up."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from packedcomm import FullWeightSender, LoraSender
from tests.helpers.vllm_adapters import ADAPTED, Trainer, llama
from tests.helpers.vllm_engines import SyncedEngine, changed, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def test_slots_are_filled_again_by_the_next_update_of_the_weights(tmp_path):
    engine = SyncedEngine(llama(), tmp_path, enable_lora=True, max_lora_rank=16, dtype=ADAPTED)
    manager = engine.model.lora_manager

    def slots():
        layers = manager.modules.values()
        return [t for layer in layers for t in (*layer.lora_a_stacked, *layer.lora_b_stacked)]

    try:
        request = engine.request("policy", 1)
        engine.llm.llm_engine.add_lora(request)
        trainer = Trainer(llama())
        trainer.randomise(1, generate=False)
        with trainer_of(engine.llm) as (session, updater):
            updater.update(LoraSender(trainer.model, session), adapter="policy")
            engine.generate(request)
            before = [tensor.clone() for tensor in slots()]
            assert any(tensor.any() for tensor in before)
            for tensor in slots():
                tensor.zero_()
            engine.worker.weight_transfer_engine.lose_contents()
            # vLLM gives all adapters up here from 0.28 on, and fills their slots when they come
            # again.
            finish, seen = engine.worker.finish_weight_update, []

            def finishing():
                seen.append([tensor.clone() for tensor in slots()])
                finish()

            engine.worker.finish_weight_update = finishing
            updater.update(FullWeightSender(changed(llama(), 2), session))
            assert len(seen) == 1
            assert all(map(torch.equal, seen[0], before))
    finally:
        engine.close()
