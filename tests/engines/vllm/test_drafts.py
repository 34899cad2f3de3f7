"""Draft models for speculative decoding in the real engine: those with weights of their own, and
EAGLE's, which share the embeddings and the output layer of the model."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from safetensors.torch import save_file

from packedcomm import FullWeightSender
from packedcomm.errors import ManifestError
from tests.helpers.vllm_adapters import COMMON, GPUS, TRAINER, generated, llama
from tests.helpers.vllm_engines import SyncedEngine, agree, changed, tensors_of, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

WAYS = ["recorded", "proved"] + ["replayed" if GPUS > 1 else "loaded"] * 2


def speculative(folder, method):
    return {"model": str(folder), "method": method, "num_speculative_tokens": 3}


def way_of(update):
    return update.result.notes[0].removeprefix("receiver rank 1: ")


class Drafted(SyncedEngine):
    """An engine that tells how many of its draft model's tokens were taken."""

    def __init__(self, model, draft, path):
        draft.save_pretrained(path / "draft")
        super().__init__(
            model,
            path / "model",
            speculative_config=speculative(path / "draft", "draft_model"),
            disable_log_stats=False,
        )
        self._seen = self._counts()

    def _counts(self):
        found = {metric.name: metric for metric in self.llm.get_metrics()}
        kinds = ("accepted_tokens", "drafts")
        return [found[f"vllm:spec_decode_num_{kind}"].value for kind in kinds]

    def taken(self):
        """Tokens of the draft model that were right since the last call, per step."""
        before, self._seen = self._seen, self._counts()
        accepted, drafts = (new - old for new, old in zip(self._seen, before, strict=True))
        return accepted / drafts


@pytest.fixture(scope="module")
def drafted(tmp_path_factory):
    engine = Drafted(changed(llama(), 1), changed(llama(), 2), tmp_path_factory.mktemp("drafted"))
    yield engine
    engine.close()


def test_the_draft_model_follows_the_trainer_and_the_model_stays(drafted):
    first, second = changed(llama(), 1), changed(llama(), 3)
    expected = {id(model): generated(model) for model in (first, second)}
    agree(drafted.generate(), expected[id(first)])
    assert drafted.taken() < 1
    with trainer_of(drafted.llm) as (session, updater):
        drafts = FullWeightSender(tensors_of(first), session)
        for way in WAYS:
            update = updater.update(drafts, draft=True)
            assert way_of(update) == way
            agree(drafted.generate(), expected[id(first)])
            # A step's last tokens may be more than are asked for.
            assert drafted.taken() > 2
        # Now the model goes away from it.
        models = FullWeightSender(tensors_of(second), session)
        for way in WAYS:
            update = updater.update(models)
            assert way_of(update) == way
            agree(drafted.generate(), expected[id(second)])
            assert drafted.taken() < 1
        drafts = FullWeightSender(tensors_of(second), session)
        update = updater.update(drafts, draft=True)
        assert way_of(update) == WAYS[-1]
        agree(drafted.generate(), expected[id(second)])
        assert drafted.taken() > 2


def test_a_draft_model_without_something_is_refused_and_the_model_updated_after_it(drafted):
    model = changed(llama(), 4)
    tensors = tensors_of(model)
    missing = {name: t for name, t in tensors.items() if "layers.1.mlp.up_proj" not in name}
    with trainer_of(drafted.llm) as (session, updater):
        with pytest.raises(ManifestError, match=r"layers\.1\.mlp\.gate_up_proj"):
            updater.update(FullWeightSender(missing, session), draft=True)
        updater.update(FullWeightSender(tensors, session))
        agree(drafted.generate(), generated(model))
        assert drafted.taken() < 1
        updater.update(FullWeightSender(tensors, session), draft=True)
        agree(drafted.generate(), generated(model))
        assert drafted.taken() > 2


def test_an_update_after_a_draft_models_that_never_ended_is_the_models(drafted):
    """As on those of several workers that haven't raised."""
    worker, model = drafted.worker, changed(llama(), 5)
    worker.start_draft_weight_update()
    with trainer_of(drafted.llm) as (session, updater):
        updater.update(FullWeightSender(tensors_of(model), session))
        agree(drafted.generate(), generated(model))
        assert drafted.taken() < 1
        worker.start_weight_update()
        updater.update(FullWeightSender(tensors_of(model), session), draft=True)
        agree(drafted.generate(), generated(model))
        assert drafted.taken() > 2


def eagle_tensors(seed):
    """Of one layer, under EAGLE's names: without embeddings, output layer and first norm."""
    model = changed(llama(), seed)
    size = COMMON["hidden_size"]
    generator = torch.Generator().manual_seed(seed)
    fc = torch.empty(size, 2 * size).normal_(0, 0.08, generator=generator)
    layer = {
        f"layers.0.{name}": parameter.data
        for name, parameter in model.model.layers[0].named_parameters()
        if not name.startswith("input_layernorm")
    }
    return {"fc.weight": fc.to(TRAINER), **layer}


def held(worker):
    """Runs in the worker: what its draft model holds by itself, as far as CPUs don't repack it."""
    model = worker.get_draft_model()
    return {
        name: parameter.detach().cpu()
        for name, parameter in model.named_parameters()
        if parameter.numel() and ("norm" in name or parameter.is_cuda)
    }


@pytest.fixture(scope="module")
def eagle(tmp_path_factory):
    path = tmp_path_factory.mktemp("eagle")
    folder = path / "head"
    folder.mkdir()
    save_file({name: t.cpu() for name, t in eagle_tensors(1).items()}, folder / "model.safetensors")
    config = llama().config.to_dict() | {
        "architectures": ["LlamaForCausalLM"],
        "num_hidden_layers": 1,
    }
    (folder / "config.json").write_text(json.dumps(config))
    engine = SyncedEngine(
        changed(llama(), 1), path / "model", speculative_config=speculative(folder, "eagle")
    )
    yield engine
    engine.close()


def test_what_a_draft_model_shares_need_not_be_sent(eagle):
    expected = generated(changed(llama(), 1))
    agree(eagle.generate(), expected)
    with trainer_of(eagle.llm) as (session, updater):
        for seed, way in zip((2, 3, 4, 5), WAYS, strict=True):
            tensors = eagle_tensors(seed)
            update = updater.update(FullWeightSender(tensors, session), draft=True)
            assert way_of(update) == way
            (found,) = eagle.llm.collective_rpc(held)
            name = "layers.0.post_attention_layernorm.weight"
            assert torch.equal(found[f"model.{name}"], tensors[name].cpu())
            if GPUS > 1:
                rows = [tensors[f"layers.0.mlp.{part}_proj.weight"] for part in ("gate", "up")]
                fused = found["model.layers.0.mlp.gate_up_proj.weight"]
                assert torch.equal(fused, torch.cat(rows).cpu())
                assert torch.equal(found["model.fc.weight"], tensors["fc.weight"].cpu())
            # The embeddings that it shares are as they were.
            agree(eagle.generate(), expected)
        without = {name: t for name, t in eagle_tensors(6).items() if name != "fc.weight"}
        with pytest.raises(ManifestError, match=r"fc\.weight"):
            updater.update(FullWeightSender(without, session), draft=True)
        # The model itself has to have all.
        model = changed(llama(), 7)
        whole = tensors_of(model)
        without = {name: t for name, t in whole.items() if "embed_tokens" not in name}
        with pytest.raises(ManifestError, match="embed_tokens"):
            updater.update(FullWeightSender(without, session))
        updater.update(FullWeightSender(whole, session))
        agree(eagle.generate(), generated(model))
