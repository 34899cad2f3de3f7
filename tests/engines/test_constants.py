"""Constants of loaders, where several manifests come in turns: updates are replayed as long as they
are in place, and else the loader makes them anew."""

from __future__ import annotations

from itertools import count

import pytest
import torch

from packedcomm.engines.vllm.weights import ModelWeights
from packedcomm.manifest import Manifest, TensorSpec
from tests.helpers import loaders
from tests.helpers.loaders import Engine, Layer, Reloading

SEEDS = count(1)


class Model(ModelWeights):
    """Two norms, a vocabulary with padding, and attention, whose scale is 1 if it isn't sent."""

    def __init__(self):
        module = torch.nn.Module()
        shapes = {"a": (3,), "b": (3,), "vocabulary": (6, 4), "attention": (1,)}
        for name, shape in shapes.items():
            layer = torch.nn.Module()
            layer.register_buffer("weight", torch.full(shape, 7.0))
            module.add_module(name, layer)
        super().__init__(module, None, None, torch.device("cpu"))
        self.live = dict(module.named_buffers())
        self.fills = {"vocabulary": loaders.padded(6, 0)}
        self.scale = 1.0
        """What the loader sets attention's to."""
        self.fails = False
        """Whether updates end before any data."""

    def _check(self, manifest):
        pass

    def reload(self, layers=None):
        names = [layers, self.sent][layers is None]
        built = [self.layer(name) for name in names if name in self.sent]
        if layers is None and "attention" not in self.sent:
            built.append(self.layer("attention", given=False))
        return Reloading(Engine(built))

    def layer(self, name, given=True):
        live = {"weight": self.live[f"{name}.weight"]}
        if not given:
            return Layer(name, live, [], lambda f, g: f["weight"].fill_(self.scale), direct=True)
        fill = self.fills.get(name, loaders.plainly)
        return Layer(name, live, [name], fill, direct=name == "attention")

    def update(self, *names, number=0, **values):
        """One whole update of some layers; the way that it took. What they hold then is compared
        with what the loader alone makes of it."""
        shapes = {name: (4, 4) if name == "vocabulary" else (3,) for name in names}
        shapes.update(dict.fromkeys(values, (1,)))
        self.sent = list(shapes)
        manifest = Manifest(
            [TensorSpec(name, "float32", shape) for name, shape in shapes.items()],
            attributes={"number": number},
        )
        received = loaders.payload(manifest, next(SEEDS))
        received.update({name: torch.tensor([value]) for name, value in values.items()})
        target = self.choose(manifest)
        if self.fails:
            return "failed"
        if callable(target):
            target(1, list(received.items()))
        else:
            loaders.fill(target, manifest, received)
            target.commit(manifest)
        found = {name: tensor.view(torch.int32).clone() for name, tensor in self.live.items()}
        loading = self.reload()
        loading.load(received.items())
        loading.end()
        for name, tensor in self.live.items():
            assert torch.equal(found[name], tensor.view(torch.int32)), (self.way, name)
            tensor.view(torch.int32).copy_(found[name])
        return self.way


@pytest.fixture
def model():
    return Model()


def in_turns(model, first, second, rounds):
    """The ways that updates of some layers and of others take."""
    ways = [(model.update(*first), model.update(*second, number=1)) for _ in range(rounds)]
    return [list(each) for each in zip(*ways, strict=True)]


WAYS = ["recorded", "proved", "replayed", "replayed"]


def test_two_manifests_in_turns_are_replayed(model):
    assert in_turns(model, ["a"], ["b"], 4) == [WAYS, WAYS]


def test_two_manifests_with_the_same_padding_are_replayed(model):
    assert in_turns(model, ["vocabulary", "a"], ["vocabulary", "b"], 4) == [WAYS, WAYS]


def test_four_manifests_are_replayed_one_after_the_other(model):
    for _ in range(2):
        for number in range(4):
            ways = [model.update("vocabulary", number=number) for _ in range(3)]
            assert ways in (WAYS[:3], ["replayed"] * 3)
    assert ways == ["replayed"] * 3


def test_constants_that_another_manifest_receives_are_made_anew(model):
    for _ in range(3):
        model.update("a")
        model.update("b", attention=3.0)
    for _ in range(2):
        assert model.update("a") == "loaded"
        assert model.update("a") == "replayed"
        assert model.update("b", attention=3.0) == "replayed"
    # It may bring what the loader would have made.
    model.update("b", attention=1.0)
    assert model.update("a") == "replayed"


def test_constants_that_the_loader_makes_others_of_for_another_manifest_are_made_anew(model):
    def update(name, scale):
        model.scale = scale
        return model.update(name)

    ways = [[update("a", 1.0), update("b", 2.0)] for _ in range(4)]
    assert ways[2:] == [["loaded", "loaded"]] * 2
    assert [update("b", 2.0), update("a", 1.0), update("a", 1.0)] == [
        "replayed",
        "loaded",
        "replayed",
    ]


def test_constants_are_made_anew_where_another_manifest_leaves_their_layer_to_the_loader(model):
    model.fills["attention"] = lambda fresh, given: fresh["weight"].copy_(given["attention"].abs())
    for _ in range(3):
        model.update("a")
    assert [model.update("b", "vocabulary", attention=1.0) for _ in range(3)] == WAYS[:3]
    # The scale is the same; what that loader did beside it isn't known.
    assert [model.update("a"), model.update("a")] == ["loaded", "replayed"]


def test_constants_are_made_anew_when_the_contents_were_lost(model):
    in_turns(model, ["a"], ["b"], 3)
    model.lose_contents()
    assert in_turns(model, ["a"], ["b"], 2) == [["loaded", "replayed"]] * 2


def test_constants_are_made_anew_after_an_update_that_was_never_recorded(model):
    for _ in range(3):
        model.update("a")
    model.fails = True
    model.update("b")
    model.fails = False
    assert [model.update("a"), model.update("a")] == ["loaded", "replayed"]


def test_constants_are_made_anew_after_a_manifest_that_was_forgotten(model):
    for _ in range(3):
        model.update("a")
    model.update("b")
    for digest in list(model._recordings)[1:]:
        del model._recordings[digest]
    assert [model.update("a"), model.update("a")] == ["loaded", "replayed"]


def test_manifests_without_constants_are_replayed_whatever_came_before(model):
    for _ in range(3):
        model.update("a", attention=2.0)
    model.update("b")
    model.lose_contents()
    assert model.update("a", attention=2.0) == "replayed"
