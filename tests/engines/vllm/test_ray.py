"""Real engines that are Ray actors."""

from __future__ import annotations

import threading

import pytest

pytest.importorskip("vllm", reason="needs vLLM")
pytest.importorskip("ray", reason="needs Ray")

import ray

from packedcomm import FullWeightSender
from packedcomm.engines.vllm.client import RayEngine
from packedcomm.errors import ManifestError
from tests.helpers.vllm_adapters import (
    OPTIONS,
    PROMPT_TOKENS,
    TRAINER,
    answers,
    generated,
    greedy,
    llama,
)
from tests.helpers.vllm_engines import (
    WAIT_S,
    agree,
    changed,
    tensors_of,
    trainer_of,
    two_models,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.skipif(TRAINER.type == "cuda", reason="the actors would be given no GPU"),
]


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def options(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    llama().save_pretrained(path)
    backend = {"weight_transfer_config": {"backend": "packedcomm"}}
    return {"model": str(path), "dtype": "float32", **backend, **OPTIONS}


@pytest.fixture(scope="module")
def models():
    return two_models()


class Blocking:
    """An actor that is a `vllm.LLM`."""

    def __init__(self, options):
        from vllm import LLM

        self.actor = ray.remote(LLM).remote(**options)

    def generate(self, prompts=PROMPT_TOKENS):
        done = self.actor.generate.remote(prompts, greedy(), use_tqdm=False)
        return answers(ray.get(done, timeout=WAIT_S))


class Async:
    """An actor that is an `AsyncLLM`."""

    def __init__(self, options):
        from vllm import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM
        from vllm.v1.executor import Executor

        class Actor(AsyncLLM):
            def __init__(self, options):
                config = AsyncEngineArgs(**options).create_engine_config()
                super().__init__(config, Executor.get_class(config), log_stats=False)

            async def answer(self, prompt, sampling, name):
                last = None
                async for output in self.generate(prompt, sampling, name):
                    last = output
                return last

        self.actor = ray.remote(Actor).remote(options)
        self._asked = 0

    def generate(self):
        self._asked += 1
        asked = [
            self.actor.answer.remote(prompt, greedy(), f"{self._asked}-{number}")
            for number, prompt in enumerate(PROMPT_TOKENS)
        ]
        return answers(ray.get(asked, timeout=WAIT_S))


@pytest.fixture(scope="module", params=[Blocking, Async])
def engine(request, options):
    started = request.param(options)
    yield started
    ray.kill(started.actor)


def test_an_actor_answers_as_the_trainer_after_each_sync(engine, models):
    agree(engine.generate(), generated(llama()))
    with trainer_of(RayEngine(engine.actor)) as (session, updater):
        for turn in range(4):
            model, expected = models[turn % 2]
            done = updater.update(FullWeightSender(model, session), turn)
            assert done.result.version == turn
            agree(engine.generate(), expected)


def test_an_actors_errors_keep_their_classes_and_the_next_update_works(engine, models):
    with trainer_of(RayEngine(engine.actor)) as (session, updater):
        updater.update(FullWeightSender(models[0][0], session))
        tensors = tensors_of(models[1][0])
        del tensors["model.norm.weight"]
        with pytest.raises(ManifestError, match=r"not sent: model\.norm\.weight"):
            updater.update(FullWeightSender(tensors, session))
        agree(engine.generate(), models[0][1])
        updater.update(FullWeightSender(models[1][0], session))
        agree(engine.generate(), models[1][1])


def test_what_others_ask_in_an_update_leaves_nothing_of_the_old_weights(options):
    block = 32
    prompt = [(7 * position + 3) % 512 for position in range(block + 5)]
    asked = [{"prompt_token_ids": prompt}]
    engine = Blocking({**options, "enable_prefix_caching": True, "block_size": block})
    stop = threading.Event()

    def ask():
        while not stop.is_set():
            engine.generate(asked)

    others = threading.Thread(target=ask, daemon=True)
    try:
        agree(engine.generate(asked), generated(llama(), [prompt]))
        others.start()
        with trainer_of(RayEngine(engine.actor)) as (session, updater):
            for seed in (1, 2, 3):
                model = changed(llama(), seed)
                updater.update(FullWeightSender(model, session))
                agree(engine.generate(asked), generated(model, [prompt]))
        stop.set()
        others.join(WAIT_S)
    finally:
        stop.set()
        ray.kill(engine.actor)


@pytest.mark.parametrize("engine", [Async], indirect=True)
def test_two_actors_are_synced_at_once(engine, options, models):
    other = Blocking(options)
    try:
        both = RayEngine([engine.actor, other.actor])
        with trainer_of(both, receivers=2) as (session, updater):
            updater.update(FullWeightSender(models[0][0], session))
            agree(engine.generate(), models[0][1])
            agree(other.generate(), models[0][1])
    finally:
        ray.kill(other.actor)
