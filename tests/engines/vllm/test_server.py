"""A real server that trainers in other processes sync into over HTTP."""

from __future__ import annotations

import json
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("uvicorn", reason="needs vLLM with its server")

from packedcomm import FullWeightSender, LoraSender, Session
from packedcomm.engines.vllm import http_engine
from packedcomm.engines.vllm.client import EngineUpdater, HttpEngine
from packedcomm.engines.vllm.requests import UpdateRequest
from packedcomm.errors import (
    ArgumentError,
    AuthenticationError,
    ManifestError,
    RemoteError,
    SessionStateError,
)
from tests.helpers.sessions import SECRET
from tests.helpers.vllm_adapters import TRAINER, Trainer, agree, differ, generated, llama
from tests.helpers.vllm_engines import (
    SMALL,
    DyingTrainer,
    Server,
    free_port,
    tensors_of,
    two_models,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    options = ["--enable-lora", "--max-lora-rank", "16", "--lora-modules"]
    options += ["policy=packedcomm:policy"]
    path = tmp_path_factory.mktemp("server") / "model"
    environment = {"PACKEDCOMM_SECRET": SECRET, "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}
    with Server(llama(), path, free_port(), *options, **environment) as started:
        yield started


@pytest.fixture(scope="module")
def models():
    return two_models()


@pytest.fixture
def engine(server):
    return HttpEngine(server.url, timeout_s=60)


@contextmanager
def listening(engine, secret=SECRET):
    with Session.listen(
        "127.0.0.1:0", receivers=1, device=TRAINER, settings=replace(SMALL, secret=secret)
    ) as session:
        yield session, EngineUpdater(engine, session, timeout_s=20)


@pytest.fixture
def trainer(engine):
    with listening(engine) as (session, updater):
        assert updater.connect() == 1
        yield session, updater


@pytest.fixture
def synced(server, trainer, models):
    """The first model has been synced; a function that shows that the server still has it, and that
    the second one can be."""
    session, updater = trainer
    updater.update(FullWeightSender(models[0][0], session))

    def well():
        agree(server.generate(), models[0][1])
        updater.update(FullWeightSender(models[1][0], session))
        agree(server.generate(), models[1][1])

    return well


@pytest.fixture
def sent(monkeypatch):
    """All that `HttpEngine` sends: addresses, bodies and headers."""
    requests = []

    class Opener:
        def open(self, request, timeout):
            requests.append(request)
            return opener.open(request, timeout=timeout)

    opener = http_engine._OPENER
    monkeypatch.setattr(http_engine, "_OPENER", Opener())
    return requests


def test_the_server_answers_as_the_trainer_and_the_secret_stays_out(server, sent, engine, models):
    agree(server.generate(), generated(llama()))
    with listening(engine) as (session, updater):
        assert updater.connect() == 1
        for version in range(3):
            model, expected = models[version % 2]
            assert (
                updater.update(FullWeightSender(model, session), version).result.version == version
            )
            agree(server.generate(), expected)
    routes = {request.selector.partition("?")[0] for request in sent}
    assert routes >= {"/init_weight_transfer_engine", "/update_weights", "/pause", "/wake_up"}
    for request in sent:
        said = [request.full_url, str(request.header_items()), (request.data or b"").decode()]
        assert not any(SECRET in text for text in said)
    (init,) = [json.loads(r.data) for r in sent if "init_weight" in r.selector]
    assert init["init_info"].keys() == {"address", "connect_timeout_s"}
    assert SECRET not in server.log()


def test_another_secret_is_refused_at_the_trainer(server, engine, models):
    with listening(engine, "another one " * 3) as (_, updater), pytest.raises(AuthenticationError):
        updater.connect()
    server.generate()
    with listening(engine) as (session, updater):
        updater.connect()
        updater.update(FullWeightSender(models[0][0], session))
        agree(server.generate(), models[0][1])


def test_a_caller_that_pauses_by_itself_must_have_done_so(server, engine, trainer, models):
    session, _ = trainer
    model, expected = models[0]
    updater = EngineUpdater(engine, session, pause_mode=None, timeout_s=20)
    sender = FullWeightSender(model, session)
    with pytest.raises(SessionStateError, match="isn't paused"):
        updater.update(sender)
    engine.pause("wait", clear_cache=True)
    updater.update(sender)
    assert engine.is_paused()
    engine.resume()
    agree(server.generate(), expected)


def test_errors_keep_their_classes_on_the_way(trainer, synced, models, engine):
    session, updater = trainer
    tensors = tensors_of(models[1][0])
    del tensors["model.norm.weight"]
    with pytest.raises(ManifestError, match=r"not sent: model\.norm\.weight"):
        updater.update(FullWeightSender(tensors, session))
    tensors = tensors_of(models[1][0]) | {"model.bogus": torch.zeros(3, device=TRAINER)}
    with pytest.raises(ManifestError, match="bogus"):
        updater.update(FullWeightSender(tensors, session))
    with pytest.raises(ArgumentError, match="secret"):
        engine.init_weight_transfer_engine({"address": session.address, "secret": "told"})
    engine.start_weight_update()
    with pytest.raises(ArgumentError, match="bogus"):
        engine.update_weights({"bogus": 1})
    # vLLM's own.
    with pytest.raises(RemoteError, match=r"start_weight_update must be called(.|\n)*HTTP 500"):
        engine.update_weights(UpdateRequest().as_dict())
    synced()


def test_an_adapter_is_updated_beside_the_models_own_weights(server, trainer, models):
    session, updater = trainer
    model, expected = models[0]
    updater.update(FullWeightSender(model, session))
    agree(server.generate("policy"), expected)
    adapted = Trainer(model)
    sender = LoraSender(adapted.model, session)
    for seed in (1, 2):
        with_adapter = adapted.randomise(seed)
        assert differ(with_adapter, expected)
        updater.update(sender, adapter="policy")
        agree(server.generate("policy"), with_adapter)
        agree(server.generate(), expected)
    # The model's own weights are another's now, the adapter is the same.
    second, expected = models[1]
    updater.update(FullWeightSender(second, session))
    agree(server.generate(), expected)
    both = Trainer(second)
    agree(server.generate("policy"), both.randomise(2))


@pytest.mark.parametrize("from_disk", [False, True], ids=["without files", "from disk"])
def test_an_adapter_that_is_unloaded_and_loaded_again(
    server, engine, trainer, models, tmp_path, from_disk
):
    session, updater = trainer
    model, begin = models[0]
    updater.update(FullWeightSender(model, session))
    adapted = Trainer(model)
    name, path = "again", "packedcomm:again"
    if from_disk:
        begin = adapted.randomise(3)
        adapted.model.save_pretrained(tmp_path)
        name, path = "disk", str(tmp_path)
    sender = LoraSender(adapted.model, session)
    for seed in (4, 5):
        engine._call("POST", "/v1/load_lora_adapter", {"lora_name": name, "lora_path": path})
        agree(server.generate(name), begin)
        expected = adapted.randomise(seed)
        updater.update(sender, adapter=name)
        agree(server.generate(name), expected)
        engine._call("POST", "/v1/unload_lora_adapter", {"lora_name": name})
        # Nobody hears of that: the update is taken, for a name without files.
        if not from_disk:
            begin = adapted.randomise(seed + 10)
        updater.update(sender, adapter=name)


@pytest.mark.parametrize(
    ("config", "adapter", "error", "text"),
    [
        ({"r": 17}, "policy", ManifestError, "rank 17 is above max_lora_rank 16"),
        ({}, "strange", ArgumentError, "no adapter 'strange'"),
    ],
    ids=["rank", "name"],
)
def test_adapters_that_dont_fit_are_refused(trainer, synced, config, adapter, error, text):
    session, updater = trainer
    sender = LoraSender(Trainer(llama(), **config).model, session)
    with pytest.raises(error, match=text):
        updater.update(sender, adapter=adapter)
    synced()


def test_a_trainer_that_is_killed_in_the_middle_leaves_a_server_that_answers(
    server, engine, models, monkeypatch
):
    monkeypatch.setenv("PACKEDCOMM_SECRET", SECRET)
    trainer = DyingTrainer(models[0][0], url=server.url)
    try:
        trainer.hear()
        assert trainer.hear() == "synced"
        trainer.gone()
    finally:
        trainer.close()
    # It had paused the engine.
    engine.resume()
    server.generate()
    with listening(engine) as (session, updater):
        updater.connect()
        for model, expected in reversed(models):
            updater.update(FullWeightSender(model, session))
            agree(server.generate(), expected)


def test_a_trainer_that_dies_between_its_calls_holds_nobody_up(server, engine, models):
    with listening(engine) as (session, updater):
        updater.connect()
        engine.pause("wait", clear_cache=True)
        engine.start_weight_update()
        updater.update(FullWeightSender(models[0][0], session))
        agree(server.generate(), models[0][1])


def test_a_server_whose_trainer_has_left_says_so(server, engine, models):
    with listening(engine) as (session, updater):
        updater.connect()
        updater.update(FullWeightSender(models[0][0], session))
    engine.start_weight_update()
    with pytest.raises(SessionStateError):
        engine.update_weights(UpdateRequest(timeout_s=5.0).as_dict())
    agree(server.generate(), models[0][1])
    with pytest.raises(ArgumentError, match="nowhere"):
        engine.init_weight_transfer_engine({"address": "nowhere"})


def test_an_engine_whose_cache_is_asleep_is_updated_and_stays_paused(
    server, engine, trainer, models
):
    session, updater = trainer
    (first, _), (second, expected) = models
    updater.update(FullWeightSender(first, session))
    engine._call("POST", "/sleep?level=1")
    engine._call("POST", "/wake_up?tags=weights")
    with pytest.raises(ManifestError, match="model.norm.weight"):
        updater.update(
            FullWeightSender({"model.norm.weight": torch.ones(3, device=TRAINER)}, session)
        )
    assert engine.is_paused()
    updater.update(FullWeightSender(second, session))
    assert engine.is_paused()
    engine._call("POST", "/wake_up?tags=kv_cache")
    assert not engine.is_paused()
    agree(server.generate(), expected)
