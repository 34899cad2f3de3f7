"""What the engine keeps of prompts that it has seen: nothing of it outlives an update."""

from __future__ import annotations

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from packedcomm import FullWeightSender, LoraSender
from packedcomm.engines.vllm.client import EngineUpdater, LocalEngine
from tests.helpers.vllm_adapters import (
    ADAPTED,
    Trainer,
    agree,
    answers,
    differ,
    generated,
    greedy,
    llama,
)
from tests.helpers.vllm_engines import SyncedEngine, changed, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

BLOCK = 32
DTYPE = str(ADAPTED).removeprefix("torch.")
# One whole block, which is kept, and some tokens more.
PROMPT = [(7 * position + 3) % 512 for position in range(BLOCK + 5)]


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture
def start(base, tmp_path):
    """Starts an engine."""
    engines = []

    def started(**options):
        options |= {"enable_prefix_caching": True, "block_size": BLOCK, "dtype": DTYPE}
        engines.append(SyncedEngine(base, tmp_path / "model", **options))
        return engines[-1]

    yield started
    for engine in engines:
        engine.close()


def asked(engine, request):
    """What the engine answers, and how many of the prompt's tokens it has had already."""
    prompt = [{"prompt_token_ids": PROMPT}]
    (output,) = engine.llm.generate(prompt, greedy(), use_tqdm=False, lora_request=request)
    return answers([output]), output.num_cached_tokens


def check(engine, model, request=None):
    """The first answer after an update is of the new weights, the second one from the cache."""
    expected = generated(model, [PROMPT])
    for cached in (0, BLOCK):
        found, had = asked(engine, request)
        assert had == cached
        agree(found, expected)
    return expected


def test_after_an_update_of_all_weights_nothing_of_the_old_ones_is_used(start, base):
    engine = start()
    with trainer_of(LocalEngine(engine.llm)) as (session, updater):
        model = changed(base, 1)
        sender = FullWeightSender(model, session)
        # The last one is replayed where vLLM repacks nothing.
        for seed in (2, 3, 4):
            model.load_state_dict(changed(model, seed).state_dict())
            updater.update(sender)
            check(engine, model)
        keeping = EngineUpdater(LocalEngine(engine.llm), session, flush=False)
        model.load_state_dict(changed(model, 5).state_dict())
        keeping.update(sender)
        assert asked(engine, None)[1] == BLOCK


def test_after_an_update_of_an_adapter_nothing_of_the_old_one_is_used(start, base):
    engine = start(enable_lora=True, max_lora_rank=16)
    request = engine.request("policy", 1)
    engine.llm.llm_engine.add_lora(request)
    with trainer_of(LocalEngine(engine.llm)) as (session, updater):
        trainer = Trainer(base)
        sender = LoraSender(trainer.model, session)
        before = generated(base, [PROMPT])
        for seed in (1, 2):
            trainer.randomise(seed, generate=False)
            updater.update(sender, adapter="policy")
            after = check(engine, trainer.model, request)
            assert differ(before, after)
            before = after
        check(engine, base)
