"""Adapters that a trainer syncs into the real engine: small random models."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from packaging.version import Version

from packedcomm import LoraSender, WeightReceiver
from packedcomm.engines.vllm.adapters import adapter_target, install_adapter_hook
from packedcomm.errors import ArgumentError, ManifestError, SessionStateError
from tests.helpers.in_process import Round, sessions
from tests.helpers.vllm_adapters import (
    ENGINE,
    LINEAR,
    TRAINER,
    Engine,
    Trainer,
    agree,
    differ,
    generated,
    llama,
    succeeded,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def nothing_backend():
    from vllm.distributed.weight_transfer import WeightTransferEngineFactory as Factory
    from vllm.distributed.weight_transfer.base import WeightTransferEngine

    class Idle(WeightTransferEngine):
        init_info_cls = update_info_cls = dict

        def init_transfer_engine(self, init_info):
            pass

        def start_weight_update(self):
            pass

        def finish_weight_update(self):
            pass

        def receive_weights(self, *_):
            pass

        def shutdown(self):
            pass

        @staticmethod
        def trainer_send_weights(*_):
            pass

    if "nothing" not in Factory._registry:
        Factory.register_engine("nothing", Idle)


@pytest.fixture(scope="module")
def base():
    return llama()


@pytest.fixture(scope="module")
def engine(base, tmp_path_factory):
    nothing_backend()
    path = tmp_path_factory.mktemp("llama")
    options = {"max_loras": 1, "max_cpu_loras": 2}
    return Engine(base, path, weight_transfer_config={"backend": "nothing"}, **options)


@pytest.fixture
def link():
    with sessions(1, devices=(TRAINER, ENGINE)) as (sender, receivers):
        yield sender, receivers[0]


@pytest.mark.parametrize(
    ("number", "config"),
    [
        (11, {}),
        (12, {"r": 16, "lora_alpha": 8, "use_rslora": True}),
        (13, {"r": 3}),
        (14, {"r": 4, "rank_pattern": {"o_proj": 6}, "alpha_pattern": {"k_proj": 3}}),
    ],
    ids=["plain", "rslora", "odd rank", "patterns"],
)
def test_requests_use_the_weights_of_the_last_sync(engine, base, link, number, config):
    trainer, name = Trainer(base, **config), f"policy{number}"
    request = engine.request(name, number)
    agree(engine.generate(request), engine.base)
    sender = LoraSender(trainer.model, link[0])
    slots = engine.slots()
    for seed in (1, 2):
        expected = trainer.randomise(seed)
        assert differ(expected, engine.base)
        assert succeeded(engine.sync(sender, link[1], name)).verified
        agree(engine.generate(request), expected)
    assert engine.slots() == slots
    agree(engine.generate(), engine.base)


def test_the_output_layer_is_adapted_too(engine, base, link):
    trainer = Trainer(base, target_modules=["o_proj", "lm_head"])
    request = engine.request("policy18", 18)
    engine.generate(request)
    expected = trainer.randomise(3)
    succeeded(engine.sync(LoraSender(trainer.model, link[0]), link[1], "policy18"))
    agree(engine.generate(request), expected)
    # On a CPU vLLM takes the last slot's output layer for requests without an adapter.
    engine.generate(engine.request("policy19", 19))


def test_modules_that_the_next_adapter_leaves_alone_are_zero(engine, base, link):
    everything, less = Trainer(base), Trainer(base, r=4, target_modules=["q_proj", "down_proj"])
    request = engine.request("policy21", 21)
    engine.generate(request)
    for trainer in (everything, less):
        expected = trainer.randomise(3)
        succeeded(engine.sync(LoraSender(trainer.model, link[0]), link[1], "policy21"))
        agree(engine.generate(request), expected)


def test_an_evicted_adapter_comes_back_with_what_was_synced_meanwhile(engine, base, link):
    trainer = Trainer(base)
    sender = LoraSender(trainer.model, link[0])
    mine, other, third = (engine.request(f"policy{n}", n) for n in (31, 32, 33))
    engine.generate(mine)
    trainer.randomise(4)
    succeeded(engine.sync(sender, link[1], "policy31"))
    agree(engine.generate(other), engine.base)
    assert engine.slots() == [32]
    agree(engine.generate(mine), generated(trainer.model))
    engine.generate(other)
    expected = trainer.randomise(5)
    succeeded(engine.sync(sender, link[1], "policy31"))
    assert engine.slots() == [32]
    agree(engine.generate(other), engine.base)
    agree(engine.generate(mine), expected)
    # Out of vLLM's memory on the host as well.
    engine.generate(other)
    engine.generate(third)
    assert 31 not in engine.llm.llm_engine.list_loras()
    agree(engine.generate(mine), expected)


def test_adapters_survive_the_end_of_a_weight_update(engine, base, link):
    trainer = Trainer(base)
    sender = LoraSender(trainer.model, link[0])
    request = engine.request("policy41", 41)
    engine.generate(request)
    expected = trainer.randomise(6)
    succeeded(engine.sync(sender, link[1], "policy41"))
    finished(engine)
    agree(engine.generate(request), expected)
    finished(engine)
    expected = trainer.randomise(7)
    succeeded(engine.sync(sender, link[1], "policy41"))
    agree(engine.generate(request), expected)


def finished(engine):
    engine.llm.start_weight_update()
    engine.llm.finish_weight_update()
    import vllm

    drops = Version(vllm.__version__) >= Version("0.28")
    assert engine.slots() == [None if drops else 41]


def test_an_adapter_from_disk_is_updated_until_it_is_removed(engine, base, link, tmp_path):
    # What of it a sync can't bring must go as well.
    trainer = Trainer(base, target_modules=[*LINEAR, "embed_tokens"])
    on_disk = trainer.randomise(8)
    trainer.model.save_pretrained(tmp_path)
    request = engine.request("policy51", 51, str(tmp_path))
    agree(engine.generate(request), on_disk)
    less = Trainer(base, target_modules=["v_proj"])
    expected = less.randomise(9)
    succeeded(engine.sync(LoraSender(less.model, link[0]), link[1], "policy51"))
    agree(engine.generate(request), expected)
    for number in (52, 53):
        engine.generate(engine.request(f"policy{number}", number))
    assert 51 not in engine.llm.llm_engine.list_loras()
    agree(engine.generate(request), expected)
    engine.llm.llm_engine.remove_lora(51)
    with pytest.raises(ArgumentError, match="no adapter 'policy51'"):
        engine.target("policy51")
    agree(engine.generate(request), on_disk)


def test_files_under_another_number_are_another_adapter(engine, base, link, tmp_path):
    trainer, number = Trainer(base), 64
    name, begin = f"policy{number}", trainer.randomise(10)
    trainer.model.save_pretrained(tmp_path)
    path = str(tmp_path)
    old, new = (engine.request(name, n, path) for n in (number, number + 1))
    sender = LoraSender(trainer.model, link[0])
    engine.generate(old)
    expected = trainer.randomise(11)
    succeeded(engine.sync(sender, link[1], name))
    agree(engine.generate(old), expected)
    # As after unloading it over HTTP, of which a worker hears nothing, and loading it again.
    agree(engine.generate(new), begin)
    expected = trainer.randomise(12)
    succeeded(engine.sync(sender, link[1], name))
    agree(engine.generate(new), expected)
    # A request that has waited all the time brings nothing back, and takes nothing away.
    engine.generate(engine.request("policy69", 69))
    assert number not in engine.llm.llm_engine.list_loras()
    agree(engine.generate(old), begin)
    agree(engine.generate(new), expected)
    expected = trainer.randomise(13)
    succeeded(engine.sync(sender, link[1], name))
    agree(engine.generate(new), expected)
    engine.llm.llm_engine.remove_lora(number + 1)
    with pytest.raises(ArgumentError, match=f"no adapter '{name}'"):
        engine.target(name)


def test_a_name_without_files_is_one_adapter_under_all_its_numbers(engine, base, link):
    """Some callers make a new number for every request."""
    trainer, name = Trainer(base), "policy61"
    first, second, third = (engine.request(name, number) for number in (61, 62, 70))
    sender = LoraSender(trainer.model, link[0])
    engine.generate(first)
    expected = trainer.randomise(11)
    succeeded(engine.sync(sender, link[1], name))
    agree(engine.generate(first), expected)
    agree(engine.generate(second), expected)
    agree(engine.generate(first), expected)
    expected = trainer.randomise(12)
    succeeded(engine.sync(sender, link[1], name))
    for request in (second, first, third):
        agree(engine.generate(request), expected)
    engine.llm.llm_engine.remove_lora(62)
    agree(engine.generate(first), expected)
    for number in (61, 70):
        engine.llm.llm_engine.remove_lora(number)
    with pytest.raises(ArgumentError, match=f"no adapter '{name}'"):
        engine.target(name)


@pytest.mark.parametrize("number", [101, 104])
def test_files_whose_place_others_have_taken_are_as_files_are(engine, base, link, tmp_path, number):
    trainer, name = Trainer(base), f"policy{number}"
    read, requests = [], []
    for seed in (20, 21):
        read.append(trainer.randomise(seed + number))
        path = tmp_path / str(seed)
        trainer.model.save_pretrained(path)
        requests.append(engine.request(name, number + len(requests), str(path)))
    beside = engine.request(name, number + 2)
    if number == 104:
        engine.generate(beside)
    engine.generate(requests[0])
    sender = LoraSender(trainer.model, link[0])
    for seed in (22, 23):
        expected = trainer.randomise(seed)
        succeeded(engine.sync(sender, link[1], name))
        # As each end of an update does from vLLM 0.28 on.
        engine.model.lora_manager.remove_all_adapters()
        agree(engine.generate(requests[0]), expected)
    # vLLM keeps both, and has one slot.
    for _ in range(2):
        for request, answers in zip(reversed(requests), reversed(read), strict=True):
            agree(engine.generate(request), answers)
    agree(engine.generate(beside), expected if number == 104 else engine.base)


def test_an_old_number_with_other_files_is_a_new_adapter(engine, base, link, tmp_path):
    trainer, name = Trainer(base), "policy108"
    sender = LoraSender(trainer.model, link[0])
    for seed, number in enumerate([108, 109, 108], start=24):
        read = trainer.randomise(seed)
        trainer.model.save_pretrained(tmp_path / str(seed))
        request = engine.request(name, number, str(tmp_path / str(seed)))
        # Out of vLLM's memory, in which the number has other files.
        for other in (110, 111):
            engine.generate(engine.request(f"policy{other}", other))
        agree(engine.generate(request), read)
        expected = trainer.randomise(seed + 10)
        succeeded(engine.sync(sender, link[1], name))
        agree(engine.generate(request), expected)


def test_files_take_nothing_from_a_name_without_files(engine, base, link, tmp_path):
    """As when a checkpoint is looked at under the name that is trained."""
    trainer, name = Trainer(base), "policy94"
    on_disk = trainer.randomise(17)
    trainer.model.save_pretrained(tmp_path)
    mine, looked_at = engine.request(name, 94), engine.request(name, 95, str(tmp_path))
    sender = LoraSender(trainer.model, link[0])
    engine.generate(mine)
    expected = trainer.randomise(18)
    succeeded(engine.sync(sender, link[1], name))
    # Each is evicted by the other.
    for _ in range(2):
        agree(engine.generate(looked_at), on_disk)
        agree(engine.generate(mine), expected)
    remove = engine.llm.llm_engine.remove_lora
    remove(94)
    agree(engine.generate(looked_at), on_disk)
    agree(engine.generate(mine), engine.base)
    expected = trainer.randomise(19)
    succeeded(engine.sync(sender, link[1], name))
    for request in (mine, looked_at):
        agree(engine.generate(request), expected)
    remove(95)
    agree(engine.generate(looked_at), on_disk)
    agree(engine.generate(mine), expected)
    for number in (94, 95):
        remove(number)
    with pytest.raises(ArgumentError, match=f"no adapter '{name}'"):
        engine.target(name)


def test_a_number_of_another_name_is_another_adapter(engine, base, link):
    trainer = Trainer(base)
    mine = engine.request("policy66", 66)
    engine.generate(mine)
    trainer.randomise(14)
    succeeded(engine.sync(LoraSender(trainer.model, link[0]), link[1], "policy66"))
    for request in (engine.request("policy63", 66), mine):
        # Out of vLLM's memory, which else takes it for the one of this number.
        for number in (67, 68):
            engine.generate(engine.request(f"policy{number}", number))
        agree(engine.generate(request), engine.base)


def test_a_reload_in_place_keeps_what_was_received(engine, base, link, tmp_path):
    trainer = Trainer(base)
    on_disk = trainer.randomise(15)
    trainer.model.save_pretrained(tmp_path)
    agree(engine.generate(engine.request("policy65", 70, str(tmp_path))), on_disk)
    expected = trainer.randomise(16)
    succeeded(engine.sync(LoraSender(trainer.model, link[0]), link[1], "policy65"))
    again = engine.request("policy65", 70, str(tmp_path), load_inplace=True)
    agree(engine.generate(again), expected)


@pytest.mark.parametrize(
    ("config", "text"),
    [
        ({"r": 17}, "rank 17 is above max_lora_rank 16"),
        ({"use_dora": True}, "DoRA"),
        ({"target_modules": ["embed_tokens"]}, "not a LoRA matrix that slots hold"),
    ],
    ids=["rank", "dora", "embeddings"],
)
def test_an_adapter_that_doesnt_fit_is_refused_at_both_ends(engine, base, link, config, text):
    fitting, wrong = Trainer(base), Trainer(base, **config)
    request = engine.request("policy71", 71)
    engine.generate(request)
    expected = fitting.randomise(11)
    succeeded(engine.sync(LoraSender(fitting.model, link[0]), link[1], "policy71"))
    outcome = engine.sync(LoraSender(wrong.model, link[0]), link[1], "policy71")
    for error in outcome:
        assert isinstance(error, ManifestError)
        assert text in str(error)
    agree(engine.generate(request), expected)
    expected = fitting.randomise(12)
    succeeded(engine.sync(LoraSender(fitting.model, link[0]), link[1], "policy71"))
    agree(engine.generate(request), expected)


def test_an_adapter_that_was_never_created_is_an_error(engine):
    engine.generate(engine.request("policy81", 81))
    with pytest.raises(ArgumentError, match="no adapter 'strange'; it has .*'policy81'"):
        engine.target("strange")


def test_an_engine_without_lora_is_an_error(engine):
    with pytest.raises(SessionStateError, match="enable_lora=True"):
        adapter_target(torch.nn.Linear(1, 1), engine.worker.vllm_config, ENGINE, "policy")


def test_the_hook_is_installed_once(engine):
    from vllm.lora.worker_manager import WorkerLoRAManager

    before = WorkerLoRAManager._load_adapter
    install_adapter_hook()
    assert WorkerLoRAManager._load_adapter is before


def test_a_target_is_planned_once(engine, base, link):
    trainer = Trainer(base)
    sender = LoraSender(trainer.model, link[0])
    engine.generate(engine.request("policy91", 91))
    target = engine.target("policy91")
    places = []
    place = target._target.place
    target._target.place = lambda manifest: places.append(1) or place(manifest)
    receiver = WeightReceiver(target, link[1])
    for seed in (13, 14, 15):
        trainer.randomise(seed)
        assert not isinstance(Round(sender.sync, [receiver]).sent, Exception)
    assert engine.target("policy91") is target
    assert len(places) == 1
