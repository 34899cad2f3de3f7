"""Which way an update of a model takes, and what is remembered for it."""

from __future__ import annotations

import types

import pytest
import torch

from packedcomm.engines.vllm.live import Links, live_tensors
from packedcomm.engines.vllm.recorded import Entry, Recording
from packedcomm.engines.vllm.weights import ModelWeights
from packedcomm.manifest import Manifest, TensorSpec
from tests.helpers import loaders
from tests.helpers.loaders import Engine, Layer, Reloading


def model() -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))


class Weights(ModelWeights):
    """Whose loader knows every manifest."""

    def _check(self, manifest):
        pass

    def update(self, manifest):
        """As an update goes; the way that it took."""
        chosen = self.choose(manifest)
        way = self.way
        if way == "recorded":
            name = manifest.specs[0].name
            entry = Entry((0,), (3,), (1,), name, 0)
            layer = name.rpartition(".")[0]
            self.keep(manifest, Recording({name: [entry]}, {layer: {name}}, {}))
        elif way == "proved":
            self._recordings[manifest.digest].proved = True
            self.keep(manifest, self._recordings[manifest.digest])
        if way != "replayed":
            self.loaded(manifest)
        else:
            assert chosen.place(manifest)
        return way


@pytest.fixture
def weights():
    return Weights(model(), None, None, torch.device("cpu"))


BIAS = Manifest([TensorSpec("0.bias", "float32", (3,))])
WAYS = ["recorded", "proved", "replayed"]


def manifests(count):
    """All into one parameter."""
    return [
        Manifest([TensorSpec("0.bias", "float32", (3,))], attributes={"number": number})
        for number in range(count)
    ]


def test_four_manifests_are_remembered_and_the_one_unused_longest_goes(weights):
    four = manifests(4)
    for manifest in four:
        assert [weights.update(manifest) for _ in range(2)] == WAYS[:2]
    assert [weights.update(manifest) for manifest in four] == ["replayed"] * 4
    weights.update(four[0])
    (other,) = manifests(5)[4:]
    assert weights.update(other) == "recorded"
    assert weights.update(four[0]) == "replayed"
    assert weights.update(four[1]) == "recorded"


def replace_parameter(module):
    module[0].bias = torch.nn.Parameter(module[0].bias.detach().clone())


def replace_memory(module):
    module[0].bias.data = module[0].bias.data.clone()


def replace_module(module):
    module[0] = torch.nn.Linear(2, 3)


@pytest.mark.parametrize("replace", [replace_parameter, replace_memory, replace_module])
def test_tensors_that_were_replaced_are_recorded_again(replace):
    module = model()
    weights = Weights(module, None, None, torch.device("cpu"))
    assert [weights.update(BIAS) for _ in range(3)] == WAYS
    module[1].weight = torch.nn.Parameter(torch.ones(3))
    assert weights.update(BIAS) == "replayed"
    replace(module)
    assert [weights.update(BIAS) for _ in range(3)] == WAYS


def test_what_was_tried_is_tried_again_when_the_model_is_another(monkeypatch):
    module = model()
    weights = ModelWeights(module, None, types.SimpleNamespace(), torch.device("cpu"))
    tried = []

    class Trial:
        def check(self, described, partial):
            tried.append(partial)
            return ""

    monkeypatch.setattr(ModelWeights, "reload", lambda self: Trial())

    def update():
        chosen = weights.choose(BIAS)
        if weights.way == "recorded":
            recording = Recording({"0.bias": [Entry((0,), (3,), (1,), "0.bias", 0)]}, {}, {})
            recording.proved = True
            weights.keep(BIAS, recording)
        return chosen

    for _ in range(3):
        update()
    # A loader may move what it loads into.
    replace_parameter(module)
    update()
    assert weights.way == "recorded"
    update()
    assert tried == [False]
    module[0] = torch.nn.Linear(2, 3, bias=False)
    module[0].bias = torch.nn.Parameter(torch.zeros(3, dtype=torch.float64))
    update()
    assert tried == [False, False]
    # A manifest of many is forgotten, not kept for ever.
    for manifest in manifests(80):
        weights.choose(manifest)
    assert len(weights._checked) < 80


def test_a_tensor_that_the_loader_keeps_is_told_from_others_that_came_with_it(monkeypatch):
    module = model()
    weights = Weights(module, None, None, torch.device("cpu"))
    kept = {}

    def keep(fresh, given):
        loaders.plainly(fresh, given)
        kept.update(given)

    layers = [
        Layer("0", {"bias": module[0].bias.data}, ["0.bias"], loaders.plainly),
        Layer("1", {"bias": module[1].bias.data}, ["1.bias"], keep),
    ]
    monkeypatch.setattr(Weights, "reload", lambda self: Reloading(Engine(layers)))
    manifest = Manifest([TensorSpec(f"{n}.bias", "float32", (3,)) for n in range(2)])
    chunk = torch.arange(6.0)
    weights.choose(manifest)(1, [("0.bias", chunk[:3]), ("1.bias", chunk[3:])])
    assert weights.reasons == {"1": "1.bias itself is kept beside the weights"}
    assert torch.equal(kept["1.bias"], chunk[3:])


def test_notes_are_of_the_present_manifest(weights):
    one, other = manifests(2)
    assert [weights.update(m) for m in (one, other)] == ["recorded"] * 2
    weights._recordings[one.digest].reasons["0"] = "it is rounded"
    weights.choose(one)
    assert any("it is rounded" in note for note in weights.notes)
    weights.choose(other)
    assert not any("it is rounded" in note for note in weights.notes)


def test_links_are_to_parameters_and_buffers():
    module = torch.nn.Sequential(model())
    links = Links(module, live_tensors(module))
    assert not links.changed
    module[0][1].running_mean = torch.zeros(3)
    assert links.changed
