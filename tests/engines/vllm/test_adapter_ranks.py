"""Adapters in real engines of several ranks, and those of experts."""

from __future__ import annotations

import itertools
import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from safetensors.torch import load_file, save_file

from packedcomm import LoraSender, LoraSource, Session, WeightReceiver
from packedcomm.engines.vllm.adapters import adapter_target
from tests.helpers.delivery import deliver
from tests.helpers.lora import attributes
from tests.helpers.sessions import QUICK
from tests.helpers.vllm_adapters import (
    ADAPTED,
    GPUS,
    TRAINER,
    Engine,
    Trainer,
    agree,
    granite,
    llama,
    qwen3_moe,
)

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(GPUS == 2, reason="the trainer has a GPU of its own"),
]


@pytest.fixture
def start(tmp_path, monkeypatch):
    """Starts an engine whose workers are processes, with the hook as by an installed package."""
    metadata = tmp_path / "plugins" / "hooked-1.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: hooked\nVersion: 1\n")
    (metadata / "entry_points.txt").write_text(
        "[vllm.general_plugins]\nhooked = packedcomm.engines.vllm.adapters:install_adapter_hook\n"
    )
    # Processes that are spawned take over this one's path.
    monkeypatch.syspath_prepend(metadata.parent)
    engines = []

    def started(model, **options):
        alone = not any(name.endswith("parallel_size") for name in options)
        monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", str(int(alone)))
        engines.append(Engine(model, tmp_path / "model", **options))
        return engines[-1]

    yield started
    for engine in engines:
        engine.close()


def slots_that_differ(worker, one, other, reached):
    """Runs in each worker: where the slots of two adapters differ, and how many layers of kinds
    that are named aren't zero in the first one."""
    manager = worker.get_model().lora_manager
    slots = [manager.lora_index_to_id.index(number) for number in (one, other)]
    differing, filled = [], 0
    for name, layer in manager.modules.items():
        stacks = [
            stack
            for kind in ("lora_a", "lora_b", "w13_lora_a", "w13_lora_b", "w2_lora_a", "w2_lora_b")
            for stack in getattr(layer, f"{kind}_stacked", ())
            if stack.dim() == 4
        ]
        pairs = [(stack[slots[0]], stack[slots[1]]) for stack in stacks]
        # vLLM's loader rounds before it scales, too.
        rounding = 2**-10 if torch.float16 == ADAPTED else 1e-6
        if not all(torch.allclose(a, b, rtol=rounding, atol=1e-6) for a, b in pairs):
            differing.append(name)
        if hasattr(layer, "adapter_enabled") and reached == "experts":
            enabled = layer.adapter_enabled.tolist()
            assert [enabled[slot] for slot in slots] == [1, 1]
        filled += name.endswith(reached) and all(a.any() for a, _ in pairs)
    return differing, filled


def deliver_in_worker(worker, path, name):
    """Runs in each worker: write a saved adapter's tensors as a sync would."""
    target = adapter_target(worker.get_model(), worker.vllm_config, worker.device, name)
    described = json.loads((path / "attributes.json").read_text())
    deliver(target, load_file(path / "adapter_model.safetensors", str(worker.device)), described)


def saved(path, model, **config):
    """An adapter of random values, as PEFT saves it, and what a sync says of it beside that."""
    trainer = Trainer(model, **config)
    trainer.randomise(2, generate=False)
    trainer.model.save_pretrained(path)
    described = LoraSource(trainer.model).snapshot().manifest.attributes
    (path / "attributes.json").write_text(json.dumps(described))


def saved_for_each_expert(path):
    """One of every expert's own projections, which PEFT makes for models that keep experts
    apart."""
    generator = torch.Generator().manual_seed(1)
    wire, modules = {}, {}
    sizes = {"gate_proj": (128, 64), "up_proj": (128, 64), "down_proj": (64, 128)}
    for layer, expert, leaf in itertools.product(range(2), range(4), sizes):
        module = f"model.layers.{layer}.mlp.experts.{expert}.{leaf}"
        modules[module] = 12
        inputs, outputs = sizes[leaf]
        for matrix, shape in (("A", (12, inputs)), ("B", (outputs, 12))):
            name = f"base_model.model.{module}.lora_{matrix}.weight"
            wire[name] = torch.randn(shape, generator=generator)
    path.mkdir()
    save_file(wire, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 12, "lora_alpha": 36, "target_modules": list(sizes)}
    (path / "adapter_config.json").write_text(json.dumps(config))
    (path / "attributes.json").write_text(json.dumps(attributes(3.0, modules=modules)))


def compared(engine, path, ranks, reached, **request):
    """Where the slots of an adapter that vLLM's loader has read and of the same one that was
    delivered differ, for each rank."""
    add, call = engine.llm.llm_engine.add_lora, engine.llm.collective_rpc
    add(engine.request(f"from {path.name}", 1, str(path), **request))
    add(engine.request("policy", 2))
    call(deliver_in_worker, args=(path, "policy"))
    found = call(slots_that_differ, args=(1, 2, reached))
    engine.llm.llm_engine.remove_lora(1)
    assert len(found) == ranks
    return found


# The CPU build can't compute with adapters of experts, for which vLLM has kernels of Triton only,
# nor with stages. So what is compared is what vLLM's own loader makes of the same adapter.
@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "fully_sharded_loras": True},
        {"tensor_parallel_size": 2, "enable_expert_parallel": True},
    ],
    ids=["tensor parallel", "fully sharded", "expert parallel"],
)
def test_slots_of_experts_are_as_the_loader_fills_them(tmp_path, start, options):
    engine = start(qwen3_moe(), max_loras=2, **options)
    saved_for_each_expert(tmp_path / "adapter")
    assert compared(engine, tmp_path / "adapter", 2, "experts") == [([], 2)] * 2


def test_slots_of_experts_take_parameters_of_all_of_them(tmp_path, start):
    engine = start(qwen3_moe(), max_loras=2, enable_mixed_moe_lora_format=True)
    saved_for_each_expert(tmp_path / "apart")
    assert compared(engine, tmp_path / "apart", 1, "experts") == [([], 2)]
    parameters = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    path = tmp_path / "whole"
    saved(path, qwen3_moe(), target_modules=["q_proj"], target_parameters=parameters)
    assert compared(engine, path, 1, "experts", is_3d_lora_weight=True) == [([], 2)]


def test_each_stage_takes_its_layers(tmp_path, start):
    engine = start(llama(), max_loras=2, pipeline_parallel_size=2)
    saved(tmp_path / "adapter", llama())
    assert compared(engine, tmp_path / "adapter", 2, "proj") == [([], 4)] * 2


@pytest.mark.parametrize("fully_sharded", [False, True], ids=["sliced", "fully sharded"])
def test_slots_of_two_projections_in_one_are_as_the_loader_fills_them(
    tmp_path, start, fully_sharded
):
    options = {"tensor_parallel_size": 2, "fully_sharded_loras": fully_sharded}
    engine = start(granite(), max_loras=2, **options)
    # Of a rank that gives every rank rows of A, where these are divided too.
    targets = ["input_linear", "output_linear"]
    saved(tmp_path / "adapter", granite(), r=12, target_modules=targets)
    assert compared(engine, tmp_path / "adapter", 2, "input_linear") == [([], 2)] * 2


def receive_in_worker(worker, address, name):
    """Runs in each worker: take part in one sync."""
    with Session.connect(address, device=worker.device, settings=QUICK) as session:
        target = adapter_target(worker.get_model(), worker.vllm_config, worker.device, name)
        result = WeightReceiver(target, session).receive(20)
        return None if result is None else result.version


def synced_by_workers(engine, source, name, version):
    """One sync into every worker of an engine; the versions that they show."""
    with (
        Session.listen("127.0.0.1:0", receivers=2, device=TRAINER, settings=QUICK) as session,
        ThreadPoolExecutor(1) as pool,
    ):
        versions = pool.submit(
            engine.llm.collective_rpc, receive_in_worker, args=(session.address, name)
        )
        LoraSender(source, session).sync(version)
        return versions.result(60)


@pytest.mark.parametrize(
    "options",
    [
        {"tensor_parallel_size": 2},
        {"tensor_parallel_size": 2, "fully_sharded_loras": True},
    ],
    ids=["sliced", "fully sharded"],
)
def test_each_rank_takes_its_slices(start, options):
    base = llama()
    engine = start(base, max_loras=1, max_cpu_loras=2, **options)
    trainer = Trainer(base)
    mine, other = engine.request("policy", 1), engine.request("other", 2)
    agree(engine.generate(mine), engine.base)
    for seed in (1, 2):
        expected = trainer.randomise(seed)
        assert synced_by_workers(engine, LoraSource(trainer.model), "policy", seed) == [seed, seed]
        agree(engine.generate(mine), expected)
        engine.generate(other)
        agree(engine.generate(mine), expected)
