"""Torn weights: whole again when all of their memory is written, under whatever names."""

from __future__ import annotations

import pytest
import torch

from packedcomm import (
    FullWeightSender,
    FusedTarget,
    LoraSlotTarget,
    ModuleSource,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from packedcomm.manifest import Manifest
from packedcomm.planning.engine_layouts import ModelGeometry
from packedcomm.session.messages import Staged
from tests.helpers.in_process import Round, sessions
from tests.helpers.lora import LIMIT, attributes, pair, stacked


class Described(ModuleSource):
    """Tensors, and what a manifest says of them."""

    def __init__(self, tensors, attributes):
        super().__init__(tensors)
        self.attributes = attributes

    def snapshot(self):
        whole = super().snapshot()
        manifest = Manifest(whole.manifest.specs, self.attributes)
        return type(whole)(manifest, whole.parts, whole.left_out)


class Torn:
    """A receiver of which a sync has failed when all was written."""

    def __init__(self, session, end, target, source, *, before=()):
        self.session = session
        self.receiver = WeightReceiver(target, end)
        for other in before:
            assert self.sync(other) == ("committed", 0)
        assert self.sync(source) == ("committed", 0)
        reply = end.reply

        def failing(message):
            if isinstance(message, Staged):
                end.reply = reply
                raise ZeroDivisionError("half-way")
            reply(message)

        end.reply = failing
        assert self.sync(source) == ("torn", None)

    def sync(self, source):
        Round(FullWeightSender(source, self.session).sync, [self.receiver])
        status = self.receiver.status()
        assert status.ready is (status.version is not None)
        return status.state, status.version


def ones(*names, size=4):
    return {name: torch.ones(size) for name in names}


@pytest.mark.fault(19)
def test_a_fused_parameter_is_whole_again_when_it_is_sent_as_one():
    live = {"m.gate_up_proj.weight": torch.zeros(8, 4)}
    apart = {f"m.{name}_proj.weight": torch.ones(4, 4) for name in ("gate", "up")}
    with sessions(1) as (session, (end,)):
        torn = Torn(session, end, FusedTarget(live, ModelGeometry(2, 2, 2)), apart)
        fused = {"m.gate_up_proj.weight": torch.full((8, 4), 5.0)}
        assert torn.sync(fused) == ("committed", 0)
        assert bool((live["m.gate_up_proj.weight"] == 5.0).all())


@pytest.mark.fault(19)
@pytest.mark.parametrize("staged", [False, True])
def test_a_lora_slot_is_whole_again_with_an_adapter_of_fewer_modules(staged):
    module = "model.layers.0.self_attn"
    shapes = [(LIMIT, 6, 8, LIMIT)] * 3
    target = LoraSlotTarget({f"{module}.qkv_proj": stacked(*shapes)}, 1)

    def adapter(names):
        wire = {}
        for name in names:
            wire |= pair(f"{module}.{name}_proj", 5, 6, 8)
        return Described(wire, attributes(modules={f"{module}.{n}_proj": 5 for n in names}))

    with sessions(1) as (session, (end,)):
        torn = Torn(session, end, target, adapter("qkv"))
        torn.receiver._following._target = StagedTarget(target) if staged else target
        # The slot's matrices for k are zeroed.
        assert torn.sync(adapter("qv")) == ("committed", 0)


@pytest.mark.fault(19)
def test_what_does_not_cover_the_torn_memory_leaves_it_torn():
    memory = torch.zeros(4, 6)
    names = {"all": memory, "left": memory[:, :3], "right": memory[:, 3:]}

    def some(*of):
        return TensorTarget({name: names[name] for name in of}, partial=True)

    def sent(*of):
        return {name: torch.ones(names[name].shape) for name in of}

    with sessions(1) as (session, (end,)):
        torn = Torn(session, end, some("all"), sent("all"))
        for of, state in (("left", "torn"), ("left", "torn"), ("right", "committed")):
            torn.receiver._following._target = some(of)
            assert torn.sync(sent(of))[0] == state


@pytest.mark.fault(19)
def test_names_that_are_sent_again_are_whole_where_their_memory_was_replaced():
    module = torch.nn.Linear(4, 4)
    sent = {name: torch.ones(p.shape) for name, p in module.named_parameters()}
    with sessions(1) as (session, (end,)):
        torn = Torn(session, end, TensorTarget(module), sent)
        module.weight.data = torch.zeros(4, 4)
        assert torn.sync(sent) == ("committed", 0)


class Taking:
    """A callback that may say that it has been given everything."""

    whole = False

    def __call__(self, version, items):
        pass


@pytest.mark.fault(19)
def test_a_callback_is_whole_again_when_it_has_been_given_everything():
    with sessions(1) as (session, (end,)):
        taking = Taking()
        torn = Torn(session, end, taking, ones("q", "k"))
        # However much it is, under other names it may be something else.
        assert torn.sync(ones("q")) == ("torn", None)
        assert torn.sync(ones("fused", size=100)) == ("torn", None)
        taking.whole = True
        assert torn.sync(ones("fused")) == ("committed", 0)


@pytest.mark.fault(19)
def test_memory_in_too_many_pieces_is_torn_by_its_names(monkeypatch):
    monkeypatch.setattr("packedcomm.byte_ranges._MOST_RUNS", 4)
    memory = torch.zeros(8, 6)
    with sessions(1) as (session, (end,)):
        torn = Torn(session, end, TensorTarget({"w": memory[:, :3]}), {"w": torch.ones(8, 3)})
        torn.receiver._following._target = TensorTarget({"all": memory})
        assert torn.sync({"all": torch.ones(8, 6)})[0] == "torn"
        torn.receiver._following._target = TensorTarget({"w": memory[:, :3]})
        assert torn.sync({"w": torch.ones(8, 3)})[0] == "committed"


@pytest.mark.fault(19)
def test_a_callback_that_gets_layer_by_layer_stays_torn_until_that_layer_comes():
    with sessions(1) as (session, (end,)):
        torn = Torn(session, end, lambda version, items: None, ones("a"), before=[ones("b")])
        assert torn.sync(ones("b")) == ("torn", None)
        assert torn.sync(ones("a")) == ("committed", 0)
