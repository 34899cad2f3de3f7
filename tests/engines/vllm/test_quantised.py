"""Engines whose layers are quantised."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from safetensors.torch import save_file

from packedcomm import FullWeightSender
from packedcomm.errors import ManifestError
from tests.helpers.vllm_adapters import GPUS, OPTIONS, llama
from tests.helpers.vllm_engines import SyncedEngine, agree, changed, trainer_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]

_INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": _INT8 | {"strategy": "channel", "dynamic": False},
            "input_activations": _INT8 | {"strategy": "token", "dynamic": True},
        }
    },
}


def int8(model):
    """The model's tensors as a checkpoint in INT8 has them."""
    found = {}
    for name, tensor in model.state_dict().items():
        found[name] = tensor.cpu()
        if "proj" in name:
            scale = tensor.abs().amax(1, keepdim=True) / 127
            found[name] = (tensor / scale).round().to(torch.int8).cpu()
            found[f"{name}_scale"] = scale.cpu()
    return found


class Int8Engine(SyncedEngine):
    """An engine with a checkpoint in INT8."""

    def __init__(self, model, path):
        from vllm import LLM

        model.config.quantization_config = INT8
        model.config.save_pretrained(path)
        assert json.loads((path / "config.json").read_text())["quantization_config"] == INT8
        save_file(int8(model), path / "model.safetensors", metadata={"format": "pt"})
        self.llm = LLM(
            model=str(path),
            weight_transfer_config={"backend": "packedcomm"},
            dtype="float32",
            **OPTIONS,
        )


@pytest.mark.skipif(GPUS > 0, reason="of the CPU build")
def test_what_cannot_be_loaded_twice_is_refused(tmp_path):
    model = llama()
    engine = Int8Engine(model, tmp_path)
    before = engine.generate()
    assert all(log_probabilities.isfinite().all() for _, log_probabilities in before)
    with trainer_of(engine.llm) as (session, updater):
        for _ in range(2):
            with pytest.raises(ManifestError, match="quantised"):
                updater.update(FullWeightSender(int8(changed(llama(), 1)), session))
            agree(engine.generate(), before)
    engine.close()


@pytest.mark.gpu(2)
def test_weights_are_quantised_as_they_are_loaded(tmp_path):
    models = [changed(llama(), seed).to(torch.bfloat16) for seed in (1, 2)]
    options = {"quantization": "fp8", "dtype": "bfloat16"}

    def started(number):
        return SyncedEngine(models[number], tmp_path / str(number), **options)

    engine = started(0)
    others = [engine, started(1)]
    expected = [each.generate() for each in others]
    assert expected[0][0][0] != expected[1][0][0]
    with trainer_of(engine.llm) as (session, updater):
        for turn in range(5):
            number = (turn + 1) % 2
            updater.update(FullWeightSender(models[number], session), turn)
            for (tokens, found), (wanted, theirs) in zip(
                engine.generate(), expected[number], strict=True
            ):
                assert tokens == wanted
                assert (found - theirs).abs().max() < 0.01
    for each in others:
        each.close()
