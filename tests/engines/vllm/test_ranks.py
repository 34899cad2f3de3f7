"""Engines of two workers, which are processes."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from safetensors.torch import load_file

from packedcomm import FullWeightSender
from packedcomm.engines.vllm.client import LocalEngine
from packedcomm.engines.vllm.requests import InitRequest, UpdateRequest
from packedcomm.errors import ManifestError, PackedCommError, RemoteError
from tests.helpers.vllm_adapters import GPUS, TRAINER, generated, llama, qwen3_moe
from tests.helpers.vllm_engines import (
    DyingTrainer,
    SyncedEngine,
    agree,
    changed,
    tensors_of,
    trainer_of,
    two_models,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(GPUS == 2, reason="the trainer has a GPU of its own"),
]


@pytest.fixture(scope="module")
def models():
    return two_models()


def break_loader(worker, rank, after):
    """Runs in each worker: one rank's loader fails once."""
    # Where it is replayed the loader isn't asked.
    worker.weight_transfer_engine._model_weights().forget()
    if worker.rank != rank:
        return
    model = worker.get_model()
    load, calls = model.load_weights, []

    def failing(weights):
        calls.append(1)
        if len(calls) > after:
            del model.load_weights
            raise OSError("no more room")
        return load(weights)

    model.load_weights = failing


def leave_session(worker, rank):
    """Runs in each worker: one rank's connection breaks."""
    if worker.rank == rank:
        worker.weight_transfer_engine._session.close()


def release(worker):
    """Runs in each worker: as servers can be told to from vLLM 0.32 on."""
    getattr(worker, "shutdown_weight_transfer_engine", worker.weight_transfer_engine.shutdown)()


def is_updating(worker):
    """Runs in each worker."""
    return worker._weight_update_active


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory):
    engine = SyncedEngine(llama(), tmp_path_factory.mktemp("two"), tensor_parallel_size=2)
    yield engine
    engine.close()


@pytest.fixture
def trainer(two_ranks):
    with trainer_of(two_ranks.llm, 2) as both:
        yield both


def well(engine, trainer, models):
    """Every worker answers for itself, and the next updates work."""
    session, updater = trainer
    for version, (model, expected) in enumerate(models, start=40):
        updater.update(FullWeightSender(model, session), version)
        agree(engine.generate(), expected)
        assert [s["version"] for s in engine.statuses()] == [version] * 2


def test_both_take_their_parts(two_ranks, trainer, models):
    agree(two_ranks.generate(), generated(llama()))
    session, updater = trainer
    for seed in range(1, 5):
        model, expected = models[seed % 2]
        updater.update(FullWeightSender(model, session), seed)
        agree(two_ranks.generate(), expected)
        assert [s["version"] for s in two_ranks.statuses()] == [seed] * 2


@pytest.mark.parametrize("after", [0, 1], ids=["at once", "in the middle"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_failure_of_one_is_everybodys(two_ranks, trainer, models, rank, after):
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))
    two_ranks.llm.collective_rpc(break_loader, args=(rank, after))
    with pytest.raises(RemoteError, match="no more room"):
        updater.update(FullWeightSender(models[0][0], session))
    found = two_ranks.generate()
    # On GPUs the other one's loader may have copied what was cut off on the way.
    if not GPUS or "torn" not in {status["state"] for status in two_ranks.statuses()}:
        agree(found, models[0][1])
    well(two_ranks, trainer, models)


@pytest.mark.parametrize("rank", [0, 1])
def test_a_worker_that_has_lost_its_session(two_ranks, trainer, models, rank):
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))
    two_ranks.llm.collective_rpc(leave_session, args=(rank,))
    with pytest.raises(PackedCommError):
        updater.update(FullWeightSender(models[0][0], session))
    two_ranks.generate()
    assert updater.connect() == 2
    well(two_ranks, trainer, models)


def test_what_is_refused_leaves_no_stale_answers(two_ranks, trainer, models):
    session, updater = trainer
    tensors = tensors_of(models[0][0])
    del tensors["model.layers.1.input_layernorm.weight"]
    with pytest.raises(ManifestError, match="not sent"):
        updater.update(FullWeightSender(tensors, session))
    handle = LocalEngine(two_ranks.llm)
    with pytest.raises(Exception, match=r"\[packedcomm:ArgumentError\].*bogus"):
        handle.init_weight_transfer_engine({"address": session.address, "bogus": 1})
    handle.start_weight_update()
    with pytest.raises(Exception, match=r"\[packedcomm:ArgumentError\].*bogus"):
        handle.update_weights({"bogus": 1})
    well(two_ranks, trainer, models)


def rank_of(worker):
    """Runs in each worker."""
    return worker.rank


def test_calls_out_of_order_leave_no_stale_answers(two_ranks, trainer, models):
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))
    llm = two_ranks.llm
    with pytest.raises(Exception, match="without a matching start"):
        llm.finish_weight_update()
    assert llm.collective_rpc(rank_of) == [0, 1]
    with pytest.raises(Exception, match="must be called before"):
        llm.update_weights({"update_info": {}})
    assert llm.collective_rpc(rank_of) == [0, 1]
    agree(two_ranks.generate(), models[0][1])
    well(two_ranks, trainer, models)


def test_a_refused_update_is_over_on_every_worker(two_ranks, trainer, models):
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))
    tensors = tensors_of(models[0][0])
    del tensors["model.norm.weight"]
    with pytest.raises(ManifestError, match="not sent"):
        updater.update(FullWeightSender(tensors, session))
    assert two_ranks.llm.collective_rpc(is_updating) == [False, False]
    assert two_ranks.llm.collective_rpc(release) == [None, None]
    assert two_ranks.llm.collective_rpc(rank_of) == [0, 1]
    agree(two_ranks.generate(), models[0][1])
    assert updater.connect() == 2
    well(two_ranks, trainer, models)


def test_a_draft_model_that_is_not_there(two_ranks, trainer, models):
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))
    with pytest.raises(RemoteError, match="no draft model"):
        updater.update(FullWeightSender(models[1][0], session), draft=True)
    agree(two_ranks.generate(), models[0][1])
    well(two_ranks, trainer, models)


def test_a_killed_trainer(two_ranks, models):
    handle = LocalEngine(two_ranks.llm)
    trainer = DyingTrainer(models[0][0], receivers=2)
    try:
        handle.init_weight_transfer_engine(InitRequest(trainer.hear(), 20.0).as_dict())
        handle.start_weight_update()
        handle.update_weights(UpdateRequest(timeout_s=20.0).as_dict())
        handle.finish_weight_update()
        assert trainer.hear() == "synced"
        handle.start_weight_update()
        with pytest.raises(Exception, match=r"\[packedcomm:PeerLost\]"):
            handle.update_weights(UpdateRequest(timeout_s=20.0).as_dict())
        trainer.gone()
    finally:
        trainer.close()
    two_ranks.generate()
    assert {s["state"] for s in two_ranks.statuses()} == {"torn"}
    with trainer_of(two_ranks.llm, 2) as again:
        well(two_ranks, again, models)


def test_every_rank_needs_its_own_experts(tmp_path):
    engine = SyncedEngine(
        qwen3_moe(), tmp_path / "model", tensor_parallel_size=2, enable_expert_parallel=True
    )

    def answers_as(model):
        # vLLM's CPU build ends in a step with experts on several ranks.
        if GPUS:
            agree(engine.generate(), generated(model))

    try:
        with trainer_of(engine.llm, 2) as (session, updater):
            for seed in range(1, 6):
                model = changed(qwen3_moe(), seed)
                model.save_pretrained(tmp_path / str(seed))
                # As files have them: expert by expert.
                tensors = load_file(tmp_path / str(seed) / "model.safetensors", str(TRAINER))
                updater.update(FullWeightSender(tensors, session), seed)
                answers_as(model)
            for absent in (["experts.2.", "experts.3."], ["experts.0.", "experts.1."]):
                some = {n: t for n, t in tensors.items() if not any(a in n for a in absent)}
                with pytest.raises(ManifestError, match=r"not sent: .*experts.*w13_weight"):
                    updater.update(FullWeightSender(some, session))
            answers_as(model)
            assert [status["version"] for status in engine.statuses()] == [5, 5]
    finally:
        engine.close()


@pytest.mark.skipif(not GPUS, reason="vLLM's CPU build can't run the stages of a pipeline")
def test_the_stages_of_a_pipeline_take_their_layers(tmp_path):
    engine = SyncedEngine(llama(), tmp_path, pipeline_parallel_size=2)
    try:
        with trainer_of(engine.llm, 2) as (session, updater):
            for seed in range(1, 6):
                model = changed(llama(), seed)
                update = updater.update(FullWeightSender(model, session))
                agree(engine.generate(), generated(model))
            assert [note.partition(": ")[2] for note in update.result.notes] == ["replayed"] * 2
            tensors = tensors_of(model)
            missing = [name for name in tensors if "layers.1.mlp.down_proj" in name]
            for name in missing:
                del tensors[name]
            with pytest.raises(ManifestError, match="down_proj"):
                updater.update(FullWeightSender(tensors, session))
            agree(engine.generate(), generated(model))
    finally:
        engine.close()
