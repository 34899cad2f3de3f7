"""Whole models synced into the real engine: small random models."""

from __future__ import annotations

import time

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from transformers import LlamaConfig, LlamaForCausalLM

from packedcomm import FullWeightSender, LoraSender, ModuleSource
from packedcomm.engines.vllm import OLDEST, register
from packedcomm.engines.vllm.client import LocalEngine
from packedcomm.engines.vllm.requests import BACKEND, InitRequest, UpdateRequest
from packedcomm.errors import (
    ArgumentError,
    ConfigMismatch,
    ManifestError,
    PackedCommError,
    PeerLost,
    RemoteError,
    RendezvousTimeout,
    SessionStateError,
    TensorError,
    VersionMismatch,
)
from tests.helpers.interrupted import Interrupted
from tests.helpers.vllm_adapters import (
    COMMON,
    ENGINE,
    TRAINER,
    Trainer,
    generated,
    llama,
    qwen3_moe,
)
from tests.helpers.vllm_engines import (
    DyingTrainer,
    SyncedEngine,
    agree,
    changed,
    qwen3,
    tensors_of,
    trainer_of,
    two_models,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

MODELS = {"qwen3_moe": qwen3_moe, "llama": llama, "qwen3": qwen3}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """Starts the engine of a model when it is first needed, in this process."""
    started = {}

    def engine(name):
        # One with experts first: vLLM makes what those need only for a process's first model.
        for each in ("qwen3_moe", name):
            if each not in started:
                path = tmp_path_factory.mktemp(each)
                started[each] = SyncedEngine(MODELS[each](), path)
        return started[name]

    yield engine
    for each in started.values():
        each.close()


@pytest.fixture(scope="module")
def engine(engines):
    return engines("llama")


@pytest.fixture(scope="module")
def models():
    return two_models()


@pytest.fixture
def trainer(engine):
    with trainer_of(engine.llm) as both:
        yield both


@pytest.fixture
def synced(engine, trainer, models):
    """The first model has been synced; a function that shows that the engine still has it, and that
    the second one can be."""
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))

    def well(holds=True):
        if holds:
            agree(engine.generate(), models[0][1])
        else:
            engine.generate()
        updater.update(FullWeightSender(models[1][0], session))
        agree(engine.generate(), models[1][1])

    return well


@pytest.mark.parametrize("name", MODELS)
def test_the_engine_answers_as_the_trainer_after_each_of_ten_syncs(engines, name):
    engine = engines(name)
    model = MODELS[name]()
    agree(engine.generate(), generated(model))
    with trainer_of(engine.llm) as (session, updater):
        trained = changed(model, 1)
        sender = FullWeightSender(trained, session)
        ways = []
        for version in range(10):
            # The last ones are the first ones again.
            seed = version % 9
            for one, other in zip(
                trained.parameters(), changed(model, seed + 1).parameters(), strict=True
            ):
                one.data.copy_(other)
            update = updater.update(sender, version)
            assert update.result.version == version
            agree(engine.generate(), generated(trained))
            (status,) = engine.statuses()
            assert (status["state"], status["version"]) == ("committed", version)
            ways.append(status["way"])
            # The trainer hears of it too.
            assert update.result.notes[0] == f"receiver rank 1: {ways[-1]}"
            if version == 0:
                loaded = {n: p.data.clone() for n, p in engine.model.named_parameters()}
    assert ways[:2] == ["recorded", "proved"]
    if ENGINE.type == "cuda":
        assert ways[2:] == ["replayed"] * 8
        assert not status["by_loader"]
        # As vLLM's own loader has filled them with the same weights, to the last bit.
        for name, parameter in engine.model.named_parameters():
            assert torch.equal(parameter.data, loaded[name]), name
    else:
        # This build packs its matrices, so its loader stays.
        assert ways[2:] == ["loaded"] * 8
        assert status["by_loader"]
        assert "stays with the engine's loader" in update.result.notes[1]


def test_models_that_are_cut_otherwise_take_turns(engines, tmp_path):
    # Experts are one tensor in transformers' memory, and many in its files.
    from safetensors.torch import load_file

    engine = engines("qwen3_moe")
    with trainer_of(engine.llm) as (session, updater):
        for seed in range(1, 7):
            model = changed(qwen3_moe(), seed)
            source = model
            if seed % 2:
                model.save_pretrained(tmp_path / str(seed))
                source = load_file(tmp_path / str(seed) / "model.safetensors", str(TRAINER))
                assert len(source) > len(tensors_of(model))
            updater.update(FullWeightSender(source, session))
            agree(engine.generate(), generated(model))


def unknown(tensors):
    tensors["model.layers.0.self_attn.bogus"] = torch.zeros(3, device=TRAINER)


def misshapen(tensors):
    tensors["model.layers.1.mlp.down_proj.weight"] = torch.zeros(64, 256, device=TRAINER)


def missing(tensors):
    del tensors["model.layers.1.input_layernorm.weight"]


@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (unknown, "bogus"),
        (misshapen, "refuses this manifest"),
        (missing, r"not sent: model\.layers\.1\.input_layernorm\.weight"),
    ],
)
def test_a_manifest_that_doesnt_fit_is_refused(trainer, synced, models, spoil, text):
    session, updater = trainer
    tensors = tensors_of(models[1][0])
    spoil(tensors)
    with pytest.raises(ManifestError, match=text):
        updater.update(FullWeightSender(tensors, session))
    synced()


def test_parameters_may_be_left_out_if_that_is_said(engine, trainer, synced, models):
    session, updater = trainer
    first, second = models[0][0], models[1][0]
    some = {name: t for name, t in tensors_of(second).items() if "layers.1.mlp" in name}
    updater.update(FullWeightSender(some, session), partial=True)
    mixed = changed(first, 1)
    mixed.load_state_dict(first.state_dict() | some)
    agree(engine.generate(), generated(mixed))
    with pytest.raises(ManifestError, match="not sent"):
        updater.update(FullWeightSender(some, session))
    synced(holds=False)


class Failing(ModuleSource):
    """Has nothing to offer."""

    def snapshot(self):
        raise TensorError("nothing here")


def test_a_sender_that_fails_before_its_offer_ends_the_update(trainer, synced, models):
    session, updater = trainer
    begin = time.monotonic()
    with pytest.raises(TensorError, match="nothing here"):
        updater.update(FullWeightSender(Failing(tensors_of(models[0][0])), session))
    assert time.monotonic() - begin < 10
    synced()


def test_a_draft_model_that_isnt_there_is_an_error(trainer, synced, models):
    session, updater = trainer
    with pytest.raises(RemoteError, match="no draft model"):
        updater.update(FullWeightSender(models[1][0], session), draft=True)
    synced()


def test_an_adapter_for_an_engine_without_them_is_refused(trainer, synced):
    session, updater = trainer
    adapted = Trainer(llama())
    with pytest.raises(SessionStateError, match="enable_lora=True"):
        updater.update(LoraSender(adapted.model, session), adapter="policy")
    synced()


def test_an_engine_that_moves_its_experts_is_refused(engine, trainer, synced, monkeypatch):
    session, _ = trainer
    config = engine.worker.weight_transfer_engine.vllm_config.parallel_config
    with monkeypatch.context() as changed_config:
        changed_config.setattr(config, "enable_eplb", True)
        with pytest.raises(ConfigMismatch, match="enable_eplb"):
            LocalEngine(engine.llm).init_weight_transfer_engine({"address": session.address})
    synced()


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({}, "address"),
        ({"address": "127.0.0.1:1", "bogus": 1}, "bogus"),
        ({"address": 5}, "host:port"),
        ({"address": "nowhere"}, "nowhere"),
        ({"address": "127.0.0.1:1", "connect_timeout_s": -1}, "connect_timeout_s"),
        ({"address": "127.0.0.1:1", "secret": "told"}, "secret"),
    ],
)
def test_a_malformed_init_changes_nothing(engine, synced, info, text):
    with pytest.raises(ArgumentError, match=text):
        LocalEngine(engine.llm).init_weight_transfer_engine(info)
    synced()


@pytest.mark.parametrize(
    ("info", "text"),
    [
        ({"bogus": 1}, "bogus"),
        ({"kind": "other"}, "other"),
        ({"adapter": "policy"}, "policy"),
        ({"kind": "adapter"}, "adapter"),
        ({"timeout_s": "soon"}, "timeout_s"),
        ({"partial": 1}, "partial"),
    ],
)
def test_a_malformed_update_changes_nothing(engine, synced, info, text):
    handle = LocalEngine(engine.llm)
    handle.start_weight_update()
    with pytest.raises(ArgumentError, match=text):
        handle.update_weights(info)
    synced()


def test_a_trainer_that_isnt_there_is_an_error(engine, models):
    handle = LocalEngine(engine.llm)
    with pytest.raises(RendezvousTimeout):
        handle.init_weight_transfer_engine(InitRequest("127.0.0.1:1", 1.0).as_dict())
    # The session before was left.
    handle.start_weight_update()
    with pytest.raises(SessionStateError, match="initialize it first"):
        handle.update_weights(UpdateRequest().as_dict())
    with trainer_of(engine.llm) as (session, updater):
        updater.update(FullWeightSender(models[0][0], session))
    agree(engine.generate(), models[0][1])


def test_an_update_that_nobody_sends_ends(engine, trainer, synced):
    handle = LocalEngine(engine.llm)
    handle.start_weight_update()
    with pytest.raises(PackedCommError):
        handle.update_weights(UpdateRequest(timeout_s=0.5).as_dict())
    synced()


def test_updates_after_a_shutdown_need_an_init(engine, trainer, synced):
    engine.worker.weight_transfer_engine.shutdown()
    engine.worker.weight_transfer_engine.shutdown()
    handle = LocalEngine(engine.llm)
    handle.start_weight_update()
    with pytest.raises(SessionStateError, match="initialize it first"):
        handle.update_weights(UpdateRequest().as_dict())
    trainer[1].connect()
    synced()


def test_a_second_init_replaces_the_first(engine, models):
    with trainer_of(engine.llm) as (first, old):
        old.update(FullWeightSender(models[0][0], first))
        with trainer_of(engine.llm) as (second, new):
            new.update(FullWeightSender(models[1][0], second))
            agree(engine.generate(), models[1][1])
            begin = time.monotonic()
            with pytest.raises(SessionStateError, match="no receiver is connected"):
                old.update(FullWeightSender(models[0][0], first))
            assert time.monotonic() - begin < 5
            agree(engine.generate(), models[1][1])
            new.update(FullWeightSender(models[0][0], second))
            agree(engine.generate(), models[0][1])
        # And back.
        assert old.connect() == 1
        old.update(FullWeightSender(models[1][0], first))
        agree(engine.generate(), models[1][1])


# On a GPU the loader is given a chunk's memory before the chunk is there.
@pytest.mark.parametrize(
    ("share", "state"), [(0.0, "torn" if ENGINE.type == "cuda" else "failed"), (0.67, "torn")]
)
@pytest.mark.parametrize("name", ["llama", "qwen3_moe"])
def test_a_trainer_that_is_killed_leaves_an_engine_that_answers(engines, name, share, state):
    engine = engines(name)
    models = [changed(MODELS[name](), seed) for seed in (1, 2)]
    answers = [generated(model) for model in models]
    handle = LocalEngine(engine.llm)
    trainer = DyingTrainer(models[0], share=share)
    try:
        handle.init_weight_transfer_engine(InitRequest(trainer.hear(), 20.0).as_dict())
        handle.start_weight_update()
        handle.update_weights(UpdateRequest(timeout_s=20.0).as_dict())
        handle.finish_weight_update()
        assert trainer.hear() == "synced"
        agree(engine.generate(), answers[0])
        handle.start_weight_update()
        with pytest.raises(PeerLost) as caught:
            handle.update_weights(UpdateRequest(timeout_s=20.0).as_dict())
        trainer.gone()
    finally:
        trainer.close()
    (status,) = engine.statuses()
    assert status["state"] == state
    assert ("torn: some weights are new" in str(caught.value)) is (state == "torn")
    found = engine.generate()
    if state != "torn":
        agree(found, answers[0])
    with trainer_of(engine.llm) as (session, updater):
        for model, expected in zip(models[::-1], answers[::-1], strict=True):
            updater.update(FullWeightSender(model, session))
            agree(engine.generate(), expected)


def test_torn_weights_stay_torn_for_another_trainer(engine, trainer, synced, models):
    session, updater = trainer
    tensors = tensors_of(models[1][0])
    source = Interrupted(tensors)

    def fail():
        raise TensorError("no more")

    source.when(len(tensors) // 2, fail)
    with pytest.raises(TensorError, match="no more"):
        updater.update(FullWeightSender(source, session))
    assert engine.statuses()[0]["state"] == "torn"
    updater.connect()
    norm = {name: t for name, t in tensors.items() if name == "model.norm.weight"}
    updater.update(FullWeightSender(norm, session), partial=True)
    assert engine.statuses()[0]["state"] == "torn"
    synced(holds=False)
    assert engine.statuses()[0]["state"] == "committed"


def test_weights_that_were_lost_are_torn_until_all_have_come(engine, trainer, synced, models):
    session, updater = trainer
    tensors = tensors_of(models[0][0])
    engine.worker.weight_transfer_engine.lose_contents()
    assert engine.statuses()[0]["state"] == "torn"
    norm = {name: t for name, t in tensors.items() if name == "model.norm.weight"}
    updater.update(FullWeightSender(norm, session), partial=True)
    assert engine.statuses()[0]["state"] == "torn"
    updater.update(FullWeightSender(tensors, session))
    assert engine.statuses()[0]["state"] == "committed"
    agree(engine.generate(), models[0][1])


def test_parts_of_a_model_in_turns_are_replayed(engine, trainer, synced, models):
    """Each of them makes attention's scales anew when it is loaded."""
    session, updater = trainer
    model = changed(models[0][0], 0)
    model.load_state_dict(models[0][0].state_dict())
    ways = []
    for turn in range(6):
        part = f"layers.{turn % 2}.input_layernorm"
        own, other = tensors_of(model), tensors_of(changed(model, turn + 20))
        norms = {name: own[name].copy_(other[name]) for name in own if part in name}
        updater.update(FullWeightSender(norms, session), partial=True)
        agree(engine.generate(), generated(model))
        ways.append(engine.statuses()[0]["way"])
    assert ways == ["recorded"] * 2 + ["proved"] * 2 + ["replayed"] * 2
    synced(holds=False)


@pytest.fixture
def replaying(monkeypatch):
    """Norms are replayed on CPUs, too."""
    monkeypatch.setattr("packedcomm.engines.vllm.weights._MOST_BY_LOADER", 1.0)


def test_a_parameter_that_was_replaced_is_followed(engine, trainer, synced, models, replaying):
    session, updater = trainer
    for turn in range(4):
        updater.update(FullWeightSender(models[turn % 2][0], session))
    assert engine.statuses()[0]["way"] == "replayed"
    norm = engine.model.get_submodule("model.norm")
    norm.weight = torch.nn.Parameter(norm.weight.detach().clone(), requires_grad=False)
    for model, expected in models:
        updater.update(FullWeightSender(model, session))
        agree(engine.generate(), expected)


def test_casts_that_only_the_loader_can_do(engine, trainer, synced, models, replaying):
    session, updater = trainer
    name = "model.norm.weight"
    small = changed(models[0][0], 5)
    for _ in range(4):
        tensors = tensors_of(small)
        tensors[name] = tensors[name].to(torch.float8_e4m3fn)
        updater.update(FullWeightSender(tensors, session))
        held = engine.model.get_submodule("model.norm").weight
        assert torch.equal(held.cpu(), tensors[name].float().cpu())
    (status,) = engine.statuses()
    assert "cast from float8_e4m3fn to float32" in status["by_loader"]["model.norm"]


@pytest.mark.skipif(ENGINE.type == "cpu", reason="the CPU build can't sleep")
def test_an_engine_that_sleeps_is_updated_when_it_is_awake(tmp_path):
    """With its padding, where it has lost that. vLLM allows one such engine per process."""
    models = []
    for seed in range(1, 7):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(LlamaConfig(**COMMON | {"vocab_size": 500})).to(TRAINER)
        models.append(changed(model, seed))
    engine = SyncedEngine(models[0], tmp_path, enable_sleep_mode=True)
    try:
        with trainer_of(engine.llm) as (session, updater):
            ways = []
            for turn, model in enumerate(models):
                if turn == 2:
                    engine.llm.sleep(level=1)
                    with pytest.raises(SessionStateError, match="asleep"):
                        updater.update(FullWeightSender(model, session))
                    engine.llm.wake_up()
                    agree(engine.generate(), generated(models[1]))
                if turn in (3, 5):
                    engine.llm.sleep(level=2)
                    engine.llm.wake_up()
                    assert engine.statuses()[0]["state"] == "torn"
                updater.update(FullWeightSender(model, session))
                agree(engine.generate(), generated(model))
                ways.append(engine.statuses()[0]["way"])
            assert ways == ["recorded", "proved", "replayed", "loaded", "replayed", "loaded"]
            embeddings = engine.model.get_submodule("model.embed_tokens").weight
            assert embeddings.shape[0] > 500
            assert not embeddings[500:].any()
    finally:
        engine.close()


def test_unknown_keys_of_the_configuration_are_refused(tmp_path):
    from vllm.engine.arg_utils import EngineArgs

    llama().save_pretrained(tmp_path)
    with pytest.raises((ValueError, TypeError), match="bogus"):
        EngineArgs(str(tmp_path), weight_transfer_config={"backend": BACKEND, "bogus": 1})


def test_a_version_that_isnt_supported_is_named_by_choosing_the_backend(monkeypatch):
    import vllm
    from vllm.config import WeightTransferConfig
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory as Factory

    kept = {name: made for name, made in Factory._registry.items() if name != BACKEND}
    monkeypatch.setattr(Factory, "_registry", dict(kept))
    monkeypatch.setattr(vllm, "__version__", "0.24.0")
    register()
    register()
    assert {name: made for name, made in Factory._registry.items() if name != BACKEND} == kept
    config = WeightTransferConfig(backend=BACKEND)
    with pytest.raises(VersionMismatch, match=r"needs vLLM 0\.25 or newer.*this is 0\.24\.0"):
        Factory.create_engine(config, None, torch.device("cpu"), torch.nn.Linear(1, 1))
    assert OLDEST == (0, 25)
