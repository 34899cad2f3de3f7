"""Adapters that are gone: the contents of slots, as an engine that sleeps deeply gives them up, and
the memory of adapters that are removed."""

from __future__ import annotations

import gc
import shutil

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from packedcomm import FullWeightSender, LoraSender, WeightReceiver
from packedcomm.engines.vllm.live_adapter import LiveAdapter
from packedcomm.targets import StagedTarget
from tests.helpers.vllm_adapters import ADAPTED, Trainer, agree, llama
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


def alive():
    """How many live adapters, staging targets and receivers there are."""
    kinds = (LiveAdapter, StagedTarget, WeightReceiver)
    gc.collect()
    return [sum(type(o) is kind for o in gc.get_objects()) for kind in kinds]


def test_the_memory_of_adapters_is_given_back_when_they_are_removed(tmp_path):
    engine = SyncedEngine(llama(), tmp_path, enable_lora=True, max_lora_rank=16, dtype=ADAPTED)
    calls = engine.llm.llm_engine
    trainer = Trainer(llama())
    try:
        before = alive()
        with trainer_of(engine.llm) as (session, updater):
            sender = LoraSender(trainer.model, session)
            for number, name in enumerate(["first", "second", "first"], start=1):
                request = engine.request(name, number)
                calls.add_lora(request)
                expected = trainer.randomise(number)
                updater.update(sender, adapter=name)
                assert [now - then for now, then in zip(alive(), before, strict=True)] == [1, 1, 1]
                agree(engine.generate(request), expected)
                calls.remove_lora(number)
                assert alive() == before
    finally:
        engine.close()


def test_the_memory_of_an_adapter_is_given_back_when_files_take_its_name(tmp_path):
    engine = SyncedEngine(
        llama(), tmp_path / "model", enable_lora=True, max_lora_rank=16, dtype=ADAPTED
    )
    calls = engine.llm.llm_engine
    trainer = Trainer(llama())
    trainer.randomise(1, generate=False)
    trainer.model.save_pretrained(tmp_path / "adapter")
    try:
        before = alive()
        with trainer_of(engine.llm) as (session, updater):
            calls.add_lora(engine.request("policy", 1, str(tmp_path / "adapter")))
            updater.update(LoraSender(trainer.model, session), adapter="policy")
            assert alive() != before
            calls.add_lora(engine.request("policy", 2, str(tmp_path / "adapter")))
            assert alive() == before
    finally:
        engine.close()


def checkpoints(engine, trainer, path):
    """What two checkpoints under one name answer, and the requests for them."""
    read, requests = [], []
    for number in (1, 2):
        read.append(trainer.randomise(number))
        trainer.model.save_pretrained(path / str(number))
        requests.append(engine.request("policy", number, str(path / str(number))))
    return read, requests


@pytest.mark.parametrize("gone", [False, True])
def test_files_whose_place_others_take_are_shown_again_at_once(tmp_path, gone):
    options = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2, "max_cpu_loras": 4}
    engine = SyncedEngine(llama(), tmp_path / "model", dtype=ADAPTED, **options)
    trainer = Trainer(llama())
    read, requests = checkpoints(engine, trainer, tmp_path)
    try:
        with trainer_of(engine.llm) as (session, updater):
            agree(engine.generate(requests[0]), read[0])
            expected = trainer.randomise(3)
            updater.update(LoraSender(trainer.model, session), adapter="policy")
            agree(engine.generate(requests[0]), expected)
            if gone:
                shutil.rmtree(tmp_path / "1")
            manager = engine.model.lora_manager
            engine.generate(engine.request("other", 3))
            agree(engine.generate(requests[1]), read[1])
            # As vLLM has chosen: the one that was used last stays.
            assert set(manager.lora_index_to_id) == {2, 3}
            # What has no files any more keeps what it has received, in this slot and the next.
            for _ in range(2):
                agree(engine.generate(requests[0]), expected if gone else read[0])
                for request in (engine.request("other", 3), requests[1]):
                    engine.generate(request)
            # vLLM forgets them all at the end of each update from 0.28 on.
            manager.remove_all_adapters()
            engine.generate(engine.request("other", 4))
            assert not manager.packedcomm_adapters._orphans
    finally:
        engine.close()


def test_files_whose_place_others_take_are_shown_again_in_their_slot(tmp_path):
    options = {"enable_lora": True, "max_lora_rank": 16, "max_loras": 2, "dtype": ADAPTED}
    engine = SyncedEngine(llama(), tmp_path / "model", **options)
    trainer = Trainer(llama())
    read, requests = checkpoints(engine, trainer, tmp_path)
    try:
        with trainer_of(engine.llm) as (session, updater):
            engine.generate(requests[0])
            trainer.randomise(3, generate=False)
            updater.update(LoraSender(trainer.model, session), adapter="policy")
            engine.generate(requests[0])
            agree(engine.generate(requests[1]), read[1])
            assert set(engine.model.lora_manager.lora_index_to_id) == {1, 2}
            agree(engine.generate(requests[0]), read[0])
    finally:
        engine.close()
