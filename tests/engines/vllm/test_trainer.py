"""vLLM's own interface of trainers: its factory and its sources, with this backend."""

from __future__ import annotations

import inspect

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from vllm.config import WeightTransferConfig
from vllm.distributed.weight_transfer.base import ModuleSource
from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory

from packedcomm.engines.vllm.requests import BACKEND
from packedcomm.engines.vllm.trainer import PackedCommTrainerInitInfo, register_trainer
from packedcomm.errors import ArgumentError, ManifestError
from tests.helpers.vllm_adapters import TRAINER, generated, llama
from tests.helpers.vllm_engines import SyncedEngine, agree, changed

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


class Source(ModuleSource):
    """vLLM's, which counts its passes and may stop early."""

    def __init__(self, module):
        super().__init__(module)
        self.passes = 0
        self.most = None

    def __iter__(self):
        self.passes += 1
        for number, item in enumerate(super().__iter__()):
            if number == self.most:
                return
            yield item


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    found = SyncedEngine(llama(), tmp_path_factory.mktemp("llama"))
    yield found
    found.close()


def trainer_of(client, source, rank=0, **options):
    """As a user makes one; in 0.26 with a backend's name and a configuration."""
    register_trainer()
    register_trainer()
    info = PackedCommTrainerInitInfo(
        rank=rank, address="127.0.0.1:0", device=str(TRAINER), timeout_s=20, **options
    )
    make = WeightTransferTrainerFactory.trainer_init
    before = {"backend": BACKEND, "config": WeightTransferConfig(backend=BACKEND)}
    given = [before[name] for name in inspect.signature(make).parameters if name in before]
    return make(*given, info, client=client, source=source)


def test_the_engine_answers_as_the_trainer_after_each_update(engine):
    model = changed(llama(), 1)
    source = Source(model)
    trainer = trainer_of(engine.llm, source)
    try:
        for seed in (2, 3, 4):
            model.load_state_dict(changed(model, seed).state_dict())
            trainer.send_weights()
            agree(engine.generate(), generated(model))
        assert source.passes == 3
        assert trainer.last_update.result.version == 2
        assert trainer.last_update.result.receivers == 1
    finally:
        trainer.shutdown()
        trainer.shutdown()


def test_a_source_that_gives_less_than_it_says_is_refused_and_the_next_update_works(engine):
    model = changed(llama(), 5)
    source = Source(model)
    trainer = trainer_of(engine.llm, source)
    try:
        trainer.send_weights()
        source.most = 4
        with pytest.raises(ManifestError, match="gives 4 tensors, its metadata has"):
            trainer.send_weights()
        engine.generate()
        source.most = None
        trainer.send_weights()
        agree(engine.generate(), generated(model))
    finally:
        trainer.shutdown()


def test_what_doesnt_fit_is_refused_before_the_workers_are_asked(engine):
    with pytest.raises(ArgumentError, match="needs a source"):
        trainer_of(engine.llm, None)
    with pytest.raises(ArgumentError, match="give receivers"):
        trainer_of(object(), Source(llama()))


def test_other_ranks_take_part_in_each_pass():
    source = Source(torch.nn.Linear(2, 2).to(TRAINER))
    trainer = trainer_of(None, source, rank=1)
    for passes in (1, 2):
        trainer.send_weights()
        assert source.passes == passes
    assert trainer.last_update is None
    trainer.shutdown()
