"""Recordings of loaders: replayed they do what loaders do, bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import event, given, settings
from hypothesis import strategies as st

from packedcomm.engines.vllm.constants import Constants
from tests.helpers import loaders
from tests.helpers.loaders import Engine, Layer, assert_refused, assert_replayed, memory, one, sent
from tests.helpers.tensors import DTYPES, content

# What engines' loaders do.


@pytest.mark.parametrize("rank", [0, 1])
def test_merged_and_sliced_weights(rank):
    qkv = loaders.columns_in_rows(rank, 2, {"q": 8, "k": 4, "v": 4})
    bias = loaders.columns_in_rows(rank, 2, {"q": 8, "k": 4, "v": 4})
    engine = Engine(
        [
            Layer("l.qkv", {"weight": memory(8, 6)}, ["q", "k", "v"], qkv),
            Layer("l.qkv_bias", {"weight": memory(8)}, ["qb", "kb", "vb"], bias),
            Layer("l.o", {"weight": memory(6, 4)}, ["o"], loaders.slice_of_columns(rank, 2)),
            Layer("l.norm", {"weight": memory(6)}, ["n"], loaders.plainly),
        ]
    )
    manifest = sent(q=(8, 6), k=(4, 6), v=(4, 6), qb=(8,), kb=(4,), vb=(4,), o=(6, 8), n=(6,))
    assert_replayed(engine, manifest, parts=8)


def test_experts_of_this_rank_only():
    shapes = {}
    for number in range(4):
        shapes |= {f"e_in_{number}_in_gate": (3, 5), f"e_in_{number}_in_up": (3, 5)}
        shapes[f"e_in_{number}_in_down"] = (5, 3)
    manifest = sent(**shapes)
    live = {"w13": memory(2, 6, 5), "w2": memory(2, 5, 3)}
    engine = one(loaders.experts(2, 2), live, [spec.name for spec in manifest.specs])
    assert_replayed(engine, manifest, parts=6)


def test_experts_that_are_looked_up_in_a_table():
    table = torch.tensor([-1, 1, 0, -1])

    def fill(fresh, given):
        for number, tensor in enumerate(given.values()):
            local = table[number].item()
            if local != -1:
                fresh["w"][local].copy_(tensor)

    engine = one(fill, {"w": memory(2, 3)}, list("abcd"))
    engine.layers.append(Layer("m.map", {"table": table}, ["a"], lambda f, g: None, direct=True))
    engine.layers[1].given = []
    assert_replayed(engine, sent(a=(3,), b=(3,), c=(3,), d=(3,)), parts=2)


def test_fused_experts_are_turned():
    live = {"w13": memory(2, 8, 3), "w2": memory(2, 3, 4)}
    engine = one(loaders.fused_experts(1, 2), live, ["w13", "w2"])
    assert_replayed(engine, sent(w13=(4, 3, 8), w2=(4, 4, 3)))


@pytest.mark.parametrize("first", [0, 6])
def test_padded_vocabulary(first):
    engine = one(loaders.padded(6, first), {"weight": memory(6, 4)}, ["w"])
    assert_replayed(engine, sent(w=(10, 4)), parts=1)


def test_tied_weights_are_one_memory():
    weight = memory(6, 4)
    for order in (("head", "embed"), ("embed", "head")):
        layers = {
            "embed": Layer("embed", {"weight": weight}, ["w"], loaders.plainly),
            "head": Layer("head", {"weight": weight}, [], lambda f, g: None, direct=True),
        }
        engine = Engine([layers[name] for name in order])
        recording = assert_replayed(engine, sent(w=(6, 4)), parts=1)
        assert set(recording.layers) == {"embed"}


def test_one_tensor_for_two_layers():
    engine = Engine(
        [
            Layer("embed", {"weight": memory(6, 4)}, ["w"], loaders.plainly),
            Layer("head", {"weight": memory(6, 4)}, ["w"], loaders.plainly),
        ]
    )
    assert_replayed(engine, sent(w=(6, 4)), parts=2)


@pytest.mark.parametrize("dtype", [d for d in DTYPES if d.itemsize < 16])
def test_every_dtype_in_scalars_columns_and_nothing(dtype):
    kind = str(dtype).removeprefix("torch.")
    live = {"a": memory(4, 2, dtype=dtype), "b": memory(dtype=dtype), "c": memory(0, dtype=dtype)}

    def fill(fresh, given):
        fresh["a"].copy_(given["a"].t())
        fresh["b"].copy_(given["b"])
        fresh["c"].copy_(given["c"])

    assert_replayed(one(fill, live, ["a", "b", "c"]), sent(a=(2, 4, kind), b=(kind,), c=(0, kind)))


def test_one_cast_is_followed_and_two_are_not():
    manifest = sent(w=(4, 4))
    live = {"weight": memory(4, 4, dtype=torch.bfloat16)}
    assert_replayed(one(loaders.plainly, live, ["w"]), manifest)

    def twice(fresh, given):
        fresh["weight"].copy_(given["w"].to(torch.float16))

    assert_refused(one(twice, live, ["w"]), manifest, "cast twice")


def test_bits_under_another_name_are_refused():
    def fill(fresh, given):
        fresh["weight"].view(torch.uint8).copy_(given["w"].view(torch.uint8))

    live = {"weight": memory(4, 4, dtype=torch.float8_e4m3fn)}
    assert_refused(one(fill, live, ["w"]), sent(w=(4, 4, "float8_e4m3fn")), "read as")
    assert_refused(one(fill, {"weight": memory(4, 4)}, ["w"]), sent(w=(4, 4)), "read as")


def test_strided_parameters_with_an_offset():
    base = torch.zeros(3, 20)
    live = {"weight": base[:, 5:9].t()}
    assert_replayed(one(loaders.plainly, live, ["w"], direct=True), sent(w=(4, 3)), parts=1)


def test_parameters_that_share_a_storage():
    base = torch.zeros(2, 12)
    for a, b in ((base[0], base[1]), (base[:, :6], base[:, 6:])):
        layers = [
            Layer("l.a", {"weight": a}, ["a"], loaders.plainly, direct=True),
            Layer("l.b", {"weight": b}, ["b"], loaders.plainly, direct=True),
        ]
        shape = tuple(a.shape)
        assert_replayed(Engine(layers), sent(a=shape, b=shape), parts=2)


def test_a_buffer_that_is_a_view_of_a_parameter():
    weight = memory(6, 4)
    engine = one(loaders.plainly, {"weight": weight}, ["w"])
    engine.layers.append(Layer("m.cut", {"b": weight[2:4]}, [], lambda f, g: None, direct=True))
    assert_replayed(engine, sent(w=(6, 4)), parts=1)


def test_loaded_twice_the_last_counts():
    def fill(fresh, given):
        fresh["weight"].zero_()
        fresh["weight"].copy_(given["w"])
        fresh["weight"].copy_(given["w"])

    assert_replayed(one(fill, {"weight": memory(4)}, ["w"]), sent(w=(4,)), parts=1)


def test_inference_mode():
    def fill(fresh, given):
        with torch.inference_mode():
            turned = given["w"].t().contiguous().to(torch.float32).reshape(3, 4)
            fresh["weight"].copy_(turned)

    assert_replayed(one(fill, {"weight": memory(3, 4)}, ["w"]), sent(w=(4, 3)))


def test_received_tensors_in_any_strides():
    engine = one(loaders.plainly, {"weight": memory(3, 4)}, ["w"])
    manifest = sent(w=(3, 4))
    turned = torch.arange(12.0).reshape(4, 3).t()
    recording = loaders.record(engine, manifest, {"w": turned})
    received = loaders.payload(manifest, 3)
    loaders.replay(engine, recording, manifest, received)
    assert torch.equal(
        engine.live["m.layer.weight"].view(torch.int32), received["w"].view(torch.int32)
    )


ROUNDABOUT = st.lists(
    st.sampled_from(["turn", "clone", "halves", "gaps", "join", "pile", "zeros"]), max_size=5
)


@settings(max_examples=150, deadline=None)
@given(ROUNDABOUT, st.integers(0, 3), st.sampled_from([torch.float32, torch.bfloat16]))
def test_any_way_round_is_replayed_right_or_refused(ways, cut, dtype):
    def fill(fresh, given):
        value = given["w"]
        for way in ways:
            if way == "turn":
                value = value.t()
            elif way == "clone":
                value = value.clone(memory_format=torch.contiguous_format)
            elif way == "halves":
                low, high = value.tensor_split(2)
                value = torch.cat([high, low])
            elif way == "gaps":
                wide = torch.zeros(value.shape[0], value.shape[1] * 2)
                wide[:, ::2] = value
                value = wide[:, ::2]
            elif way == "join":
                value = torch.cat([value[:, cut:], value[:, :cut]], dim=1)
            elif way == "pile":
                value = torch.stack([value, value], dim=1)[:, 1]
            else:
                base = torch.zeros_like(value)
                base[cut:] = value[cut:]
                value = base
        fresh["weight"].zero_()
        fresh["weight"][: value.shape[0], : value.shape[1]].copy_(value)

    engine = one(fill, {"weight": memory(6, 6, dtype=dtype)}, ["w"])
    manifest = sent(w=(4, 5))
    recording = loaders.record(engine, manifest, collect=False)
    if recording.reasons:
        event("refused: " + recording.reasons["m.layer"])
        return
    event("replayed")
    received = loaders.payload(manifest, 3)
    loaders.replay(engine, recording, manifest, received)
    replayed = content(engine.live["m.layer.weight"])
    engine.load(received, loaders.Unwatched())
    assert replayed == content(engine.live["m.layer.weight"])


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_bias_that_is_loaded_outside_of_its_layer(when):
    """As vLLM does from 0.27 on; the layer copies it onto itself when it has everything."""
    live = {"weight": memory(4, 3), "bias": memory(4)}
    received = {}

    def load_bias(given):
        for at, name in enumerate(("qb", "kb")):
            live["bias"][2 * at : 2 * at + 2].copy_(given[name])
        received.clear()

    def prepare(given):
        received.update(given)
        if when == "before":
            load_bias(given)
        return given

    def fill(fresh, given):
        fresh["weight"].copy_(given["w"])
        fresh["bias"].copy_(fresh["bias"])

    layers = [Layer("m.qkv", live, ["w"], fill, direct=True)]
    if when == "after":
        layers.append(Layer("m.end", {}, [], lambda f, g: load_bias(received), direct=True))
    engine = Engine(layers, prepare)
    recording = assert_replayed(engine, sent(w=(4, 3), qb=(2,), kb=(2,)), parts=3)
    assert recording.fed["m.qkv"] == {"w", "qb", "kb"}


def test_constants_beside_what_is_received():
    padded = one(loaders.padded(6, 6), {"weight": memory(6, 4)}, ["w"])
    recording = assert_replayed(padded, sent(w=(10, 4)))
    live = padded.live
    assert recording.constants.names == {"m.layer.weight"}
    live["m.layer.weight"][:4] = 5.0
    assert recording.constants.held_in(live)
    live["m.layer.weight"][5, 3] = -0.0
    assert not recording.constants.held_in(live)

    def twice(fresh, given):
        fresh["weight"].zero_()
        fresh["weight"].copy_(given["w"])

    whole = one(twice, {"weight": memory(6, 4)}, ["w"])
    assert not assert_replayed(whole, sent(w=(6, 4))).constants.names


def test_constants_between_columns_are_not_compared():
    def fill(fresh, given):
        fresh["weight"].zero_()
        fresh["weight"][:, :3].copy_(given["w"])

    recording = assert_replayed(one(fill, {"weight": memory(6, 4)}, ["w"]), sent(w=(6, 3)))
    assert recording.constants.names == {"m.layer.weight"}
    assert not recording.constants.held_in({"m.layer.weight": memory(6, 4)})


@pytest.mark.parametrize(
    "other",
    [{}, {"s": torch.ones(2, 2)}, {"s": torch.ones(4, dtype=torch.int32)}],
    ids=["none", "shape", "dtype"],
)
def test_constants_are_not_held_in_other_tensors(other):
    constants = Constants({"s": [(0, 1), (3, 4)]}, {"s": torch.ones(4)})
    assert constants.held_in({"s": torch.tensor([1.0, 2.0, 3.0, 1.0])})
    assert not constants.held_in(other)


def test_constants_are_not_held_in_memory_that_was_emptied():
    live = {"s": torch.ones(4)}
    constants = Constants({"s": [(0, 1)]}, live)
    live["s"].untyped_storage().resize_(0)
    assert not constants.held_in(live)
    assert not Constants({"s": [(0, 1)]}, live).held_in(live)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.bool])
def test_constants_of_every_dtype_in_scalars_and_views(dtype):
    base = torch.ones(3, 4).to(dtype)
    live = {"scale": base[1, 2], "row": base[2]}
    constants = Constants({"scale": [(0, 1)], "row": [(1, 3)]}, live)
    base[:2] = 0
    base[1, 2] = base[2, 0] = base[2, 1]
    assert constants.held_in(live)
    base[2, 2] = 0
    assert not constants.held_in(live)
