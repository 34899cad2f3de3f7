"""What isn't sent whole: refused before anything is touched, or as good as a whole model."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from transformers import Qwen2Config, Qwen2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from packedcomm import FullWeightSender
from packedcomm.errors import ManifestError, TensorError
from tests.helpers.interrupted import Interrupted
from tests.helpers.vllm_adapters import COMMON, GPUS, TRAINER, generated, llama, qwen3_moe
from tests.helpers.vllm_engines import SyncedEngine, agree, changed, tensors_of, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]


def qwen2():
    """With biases."""
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**COMMON)).to(TRAINER)


def tied():
    """The output layer has the embeddings."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**COMMON | {"tie_word_embeddings": True})).to(TRAINER)


def grouped():
    """Keys and values are smaller than the queries together."""
    torch.manual_seed(0)
    heads = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32}
    return Qwen3ForCausalLM(Qwen3Config(**COMMON | heads)).to(TRAINER)


MODELS = {"qwen3_moe": qwen3_moe, "grouped": grouped, "llama": llama, "qwen2": qwen2, "tied": tied}


@pytest.fixture(scope="module")
def engines(tmp_path_factory):
    """In this order, see `test_engine`."""
    started = {
        name: SyncedEngine(model(), tmp_path_factory.mktemp(name)) for name, model in MODELS.items()
    }
    yield started
    for each in started.values():
        each.close()


class Case:
    """A model that has been synced, and its tensors as files have them."""

    def __init__(self, engine, name, path):
        from safetensors.torch import load_file

        self.engine, self.model = engine, changed(MODELS[name](), 1)
        self.model.save_pretrained(path)
        self.tensors = load_file(path / "model.safetensors", str(TRAINER))
        self.expected = generated(self.model)

    def holds(self, changes=None):
        """Whether the engine answers as the model with some other tensors."""
        model = changed(self.model, 1)
        model.load_state_dict(self.model.state_dict() | (changes or {}))
        agree(self.engine.generate(), generated(model))


@pytest.fixture
def case(engines, request, tmp_path):
    name = request.param
    case = Case(engines[name], name, tmp_path)
    with trainer_of(engines[name].llm) as (session, updater):
        case.update = lambda tensors, **options: updater.update(
            FullWeightSender(tensors, session), **options
        )
        case.send = lambda source: updater.update(FullWeightSender(source, session))
        case.update(case.tensors)
        case.holds()
        yield case


LAYER = "model.layers.1"


def without(tensors, *parts):
    kept = {name: t for name, t in tensors.items() if not any(part in name for part in parts)}
    assert len(kept) < len(tensors)
    return kept


MISSING = [
    ("llama", [f"{LAYER}.mlp.gate_proj"], f"{LAYER}.mlp.gate_up_proj.weight (a part of it)"),
    ("llama", [f"{LAYER}.self_attn.v_proj"], f"{LAYER}.self_attn.qkv_proj.weight (a part of it)"),
    ("llama", ["q_proj", "k_proj"], f"{LAYER}.self_attn.qkv_proj.weight (a part of it)"),
    ("grouped", ["k_proj", "v_proj"], f"{LAYER}.self_attn.qkv_proj.weight (a part of it)"),
    ("grouped", [f"{LAYER}.self_attn.v_proj"], f"{LAYER}.self_attn.qkv_proj.weight (a part of it)"),
    ("llama", ["q_proj", "k_proj", "v_proj"], f"{LAYER}.self_attn.qkv_proj.weight"),
    ("llama", [f"{LAYER}.mlp.down_proj"], f"{LAYER}.mlp.down_proj.weight"),
    ("llama", ["model.embed_tokens"], "model.embed_tokens.weight"),
    ("llama", ["lm_head"], "lm_head.weight"),
    (
        "qwen2",
        [f"{LAYER}.self_attn.k_proj.bias"],
        f"{LAYER}.self_attn.qkv_proj.bias (a part of it)",
    ),
    ("qwen2", ["k_proj.bias", "v_proj.bias", "q_proj.bias"], f"{LAYER}.self_attn.qkv_proj.bias"),
    ("qwen2", [f"{LAYER}.self_attn.o_proj"], f"{LAYER}.self_attn.o_proj.weight"),
    ("qwen3_moe", [f"{LAYER}.mlp.experts.2."], "w13_weight (a part of it)"),
    ("qwen3_moe", [f"{LAYER}.mlp.experts.3.down_proj"], "w2_weight (a part of it)"),
    ("qwen3_moe", [f"{LAYER}.mlp.experts.0.up_proj"], "w13_weight (a part of it)"),
    ("qwen3_moe", ["mlp.gate."], f"{LAYER}.mlp.gate.weight"),
]


@pytest.mark.parametrize(
    ("case", "parts", "text"), MISSING, indirect=["case"], ids=[f"{m[0]} {m[1]}" for m in MISSING]
)
def test_a_model_without_something_is_refused(case, parts, text):
    with pytest.raises(ManifestError, match="not sent") as caught:
        case.update(without(case.tensors, *parts))
    assert text in str(caught.value)
    case.holds()
    case.update(case.tensors)
    case.holds()


PARTS = [
    ("grouped", ["self_attn.q_proj"], "self_attn.qkv_proj.weight (a part of it)"),
    ("llama", ["self_attn.q_proj"], "self_attn.qkv_proj.weight (a part of it)"),
    ("llama", ["self_attn.k_proj", "self_attn.v_proj"], "qkv_proj.weight (a part of it)"),
    ("llama", ["mlp.up_proj"], "mlp.gate_up_proj.weight (a part of it)"),
    ("qwen2", ["self_attn.k_proj.bias"], "self_attn.qkv_proj.weight"),
    ("qwen2", ["q_proj.weight", "k_proj.weight", "v_proj.weight"], "self_attn.qkv_proj.bias"),
    ("qwen3_moe", ["mlp.experts.2."], "w13_weight (a part of it)"),
    ("qwen3_moe", ["down_proj"], "w13_weight"),
]


@pytest.mark.parametrize(
    ("case", "parts", "text"), PARTS, indirect=["case"], ids=[f"{m[0]} {m[1]}" for m in PARTS]
)
def test_a_part_of_a_layer_is_refused(case, parts, text):
    some = {n: t * 1.5 for n, t in case.tensors.items() if any(f".1.{p}" in n for p in parts)}
    some = some or {
        n: t * 1.5
        for n, t in case.tensors.items()
        if n.startswith(LAYER) and any(part in n for part in parts)
    }
    with pytest.raises(ManifestError, match="layers that are sent are not sent") as caught:
        case.update(some, partial=True)
    assert text in str(caught.value)
    case.holds()
    case.update(case.tensors)
    case.holds()


WHOLE = [
    ("llama", ["q_proj", "k_proj", "v_proj"]),
    ("llama", ["gate_proj", "up_proj"]),
    ("llama", ["o_proj"]),
    ("llama", ["norm"]),
    ("llama", ["lm_head"]),
    ("qwen2", ["q_proj", "k_proj", "v_proj"]),
    ("qwen3_moe", ["self_attn.o_proj"]),
    ("qwen3_moe", ["mlp.gate."]),
]


@pytest.mark.parametrize(
    ("case", "parts"), WHOLE, indirect=["case"], ids=[f"{w[0]} {w[1]}" for w in WHOLE]
)
def test_whole_layers_may_be_sent_alone(case, parts):
    some = {
        name: tensor * 1.25
        for name, tensor in case.tensors.items()
        if any(part in name for part in parts)
    }
    # Recorded, proved, and as later ones.
    for turn in range(3):
        for tensor in some.values():
            tensor.mul_(1 + turn / 16)
        case.update(some, partial=True)
        case.holds(some)
    case.update(case.tensors)
    case.holds()


@pytest.mark.parametrize("case", ["qwen3_moe"], indirect=True)
def test_all_experts_of_a_layer_may_be_sent_alone(case):
    # As transformers has them in memory.
    model = changed(case.model, 7)
    some = {n: t for n, t in tensors_of(model).items() if f"{LAYER}.mlp.experts" in n}
    case.update(some, partial=True)
    case.holds(some)
    case.update(case.tensors)
    case.holds()


@pytest.mark.parametrize("case", ["llama"], indirect=True)
@pytest.mark.parametrize(
    ("spoil", "text"),
    [
        (lambda t: t.to(torch.int32), "int32 into float32"),
        (lambda t: t[:-1], "model.norm.weight"),
        (lambda t: t[None], "model.norm.weight"),
    ],
    ids=["integers", "shorter", "another dimension"],
)
def test_the_tensor_that_doesnt_fit_is_named(case, spoil, text):
    with pytest.raises(ManifestError) as caught:
        case.update(case.tensors | {"model.norm.weight": spoil(case.tensors["model.norm.weight"])})
    assert text in str(caught.value)
    assert "model.norm.weight" in str(caught.value)
    case.holds()


@pytest.mark.parametrize("case", ["tied"], indirect=True)
def test_tied_embeddings_are_the_output_layers_too(case):
    for turn in range(4):
        case.tensors["model.embed_tokens.weight"].mul_(1 + turn / 8)
        case.update(case.tensors)
        case.holds(
            dict.fromkeys(
                ("model.embed_tokens.weight", "lm_head.weight"),
                case.tensors["model.embed_tokens.weight"],
            )
        )
    with pytest.raises(ManifestError, match=r"not sent: model\.embed_tokens\.weight"):
        case.update(without(case.tensors, "embed_tokens"))


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_other_floating_point_numbers_are_cast(case):
    halves = {name: tensor.to(torch.bfloat16) for name, tensor in case.tensors.items()}
    for _ in range(3):
        case.update(halves)
        case.holds({name: tensor.float() for name, tensor in halves.items()})


@pytest.mark.parametrize("case", ["llama"], indirect=True)
def test_a_loader_that_looks_at_values_is_said_not_to_be_tried(case):
    model = case.engine.model
    load = model.load_weights

    def looking(weights):
        return load((name, t) for name, t in weights if bool((t == 0).all()) or True)

    model.load_weights = looking
    try:
        # Another manifest than the one that was tried.
        tensors = dict(reversed(case.tensors.items()))
        update = case.update(tensors)
    finally:
        del model.load_weights
    assert "not tried before: " in update.result.notes[1]
    assert next(iter(tensors)) in update.result.notes[1]
    case.holds()
    assert not any("tried" in note for note in case.update(case.tensors).result.notes)


@pytest.mark.parametrize("case", ["qwen2"], indirect=True)
def test_biases_belong_to_their_layers(case, monkeypatch):
    # Norms are replayed on CPUs, too.
    monkeypatch.setattr("packedcomm.engines.vllm.weights._MOST_BY_LOADER", 1.0)
    for seed in range(1, 5):
        model = changed(case.model, seed)
        update = case.update(tensors_of(model))
        agree(case.engine.generate(), generated(model))
    assert update.result.notes[0].endswith("replayed")
    (status,) = case.engine.statuses()
    assert "" not in status["by_loader"]


@pytest.mark.parametrize("case", ["qwen2"], indirect=True)
def test_a_layer_that_isnt_complete_keeps_its_bias(case):
    layer = case.engine.model.get_submodule(f"{LAYER}.self_attn.qkv_proj")
    before = layer.bias.detach().clone()
    tensors = {name: tensor * 1.5 for name, tensor in case.tensors.items()}
    first = {n: t for n, t in tensors.items() if n.startswith(LAYER) and n.endswith(".bias")}
    missing = f"{LAYER}.self_attn.v_proj.weight"
    last = {missing: tensors.pop(missing)}
    source = Interrupted(first | tensors | last)

    def fail():
        raise TensorError("no more")

    source.when(len(tensors), fail)
    with pytest.raises(TensorError, match="no more"):
        case.send(source)
    # On GPUs the host is ahead of the wire: layers may get what was cut off on its way.
    assert case.engine.statuses()[0]["state"] == "torn"
    assert GPUS or torch.equal(layer.bias, before)
    case.update(case.tensors)
    case.holds()
