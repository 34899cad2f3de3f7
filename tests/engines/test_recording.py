"""Recordings of loaders: replayed they do what the loader does, or are refused with a reason."""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from packedcomm.engines.vllm.recorded import Proof
from packedcomm.engines.vllm.recording import Recorder
from packedcomm.manifest import Manifest, TensorSpec
from tests.helpers import loaders
from tests.helpers.loaders import Engine, Layer
from tests.helpers.tensors import DTYPES, content


def sent(**shapes):
    """A manifest of float32 tensors, or of others where a shape comes with a dtype."""
    specs = []
    for name, shape in shapes.items():
        dtype = "float32"
        if shape and isinstance(shape[-1], str):
            *shape, dtype = shape
        specs.append(TensorSpec(name.replace("_in_", "."), dtype, tuple(shape)))
    return Manifest(specs)


def memory(*shape, dtype=torch.float32):
    return torch.zeros(shape, dtype=dtype)


def one(fill, live, names, **options):
    return Engine([Layer("m.layer", live, names, fill, **options)])


def assert_replayed(engine, manifest, parts=None):
    recording = loaders.record(engine, manifest)
    assert recording.reasons == {}
    loaders.prove(engine, recording, manifest)
    assert recording.proved
    assert recording.reasons == {}
    received = loaders.payload(manifest, 3)
    loaders.replay(engine, recording, manifest, received)
    replayed = {name: content(tensor) for name, tensor in engine.live.items()}
    for tensor in engine.live.values():
        if tensor.is_floating_point() and tensor.dim() and tensor.is_contiguous():
            tensor.view(torch.uint8).fill_(1)
    engine.load(received, loaders.Unwatched())
    assert replayed == {name: content(tensor) for name, tensor in engine.live.items()}
    if parts is not None:
        assert sum(len(entries) for entries in recording.entries.values()) == parts
    return recording


def assert_refused(engine, manifest, reason, layer="m.layer"):
    recording = loaders.record(engine, manifest)
    assert reason in recording.reasons.get(layer, ""), recording.reasons
    assert not any(e.layer == layer for es in recording.entries.values() for e in es)
    if layer and "" not in recording.reasons:
        assert recording.by_loader >= recording.fed[layer]
    return recording


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
    recording = loaders.record(engine, manifest)
    if recording.reasons:
        return
    received = loaders.payload(manifest, 3)
    loaders.replay(engine, recording, manifest, received)
    replayed = content(engine.live["m.layer.weight"])
    engine.load(received, loaders.Unwatched())
    assert replayed == content(engine.live["m.layer.weight"])


# What replaying would do wrong.

HELD = {}


def computed(how):
    def fill(fresh, given):
        how(fresh["weight"], given["w"])

    return fill


REFUSED = {
    "arithmetic": (lambda p, w: p.copy_(w * 2), "mul"),
    "in place": (lambda p, w: (p.copy_(w), p.mul_(2)), "mul_"),
    "one element": (lambda p, w: (p.copy_(w), p[0, 0].add_(1)), "add_"),
    "out": (lambda p, w: torch.add(w, w, out=p), "add"),
    "out, after a copy": (lambda p, w: (p.copy_(w), torch.neg(w, out=p)), "neg"),
    "all at once": (lambda p, w: (p.copy_(w), torch._foreach_mul_([p], 2.0)), "_foreach_mul_"),
    "where": (lambda p, w: p.copy_(torch.where(w > 0, w, w)), "where"),
    "index": (lambda p, w: p.copy_(w[torch.tensor([3, 2, 1, 0])]), "index"),
    "scatter": (
        lambda p, w: (p.zero_(), p.scatter_(0, torch.zeros(4, 4, dtype=torch.int64), w)),
        "scatter_",
    ),
    "index_put": (lambda p, w: (p.copy_(w), p.index_put_((torch.tensor([0]),), w[1])), "index_put"),
    "flip": (lambda p, w: p.copy_(w.flip(0)), "flip"),
    "constant from a tensor": (lambda p, w: p.fill_(w[0, 0]), "other strides"),
    "item": (lambda p, w: p.fill_(w[0, 0].item()), "reads values"),
    "float": (lambda p, w: (p.copy_(w), HELD.update(x=float(w[1, 1]))), "reads values"),
    "comparison": (lambda p, w: (p.copy_(w), HELD.update(x=torch.equal(p, w))), "reads values"),
    "list": (lambda p, w: (p.copy_(w), HELD.update(x=w.tolist())), "tolist"),
    "array": (lambda p, w: (p.copy_(w), HELD.update(x=w.numpy().copy())), "numpy"),
    "address": (
        lambda p, w: ctypes.memmove(p.data_ptr(), w.data_ptr(), w.nbytes),
        "data_ptr",
    ),
    "written behind": (lambda p, w: p.numpy().__setitem__(0, 3.0), "unknown contents"),
    "repeated": (lambda p, w: p.copy_(w[:1]), "other strides"),
    "partly": (lambda p, w: p[:2].copy_(w[:2]), "unknown contents"),
    "random": (lambda p, w: (p.copy_(w), p[0].uniform_()), "uniform_"),
    "kept": (lambda p, w: (p.copy_(w), HELD.update(x=w.abs().max())), "kept beside"),
    "kept copy": (lambda p, w: (p.copy_(w), HELD.update(x=p.clone())), "kept beside"),
    "kept in old memory": (
        lambda p, w: (p.copy_(w), torch.abs(w, out=HELD.setdefault("m", memory(4, 4)))),
        "kept beside",
    ),
    "added to old memory": (
        lambda p, w: (p.copy_(w), HELD.setdefault("n", memory(4, 4)).add_(w)),
        "kept beside",
    ),
    "overwritten in part": (lambda p, w: (p.copy_(w), p[0].zero_()), "only in part"),
    "gaps over zeros": (
        lambda p, w: (p.zero_(), p[:2].copy_(half_known(w))),
        "unknown contents",
    ),
    "not used": (lambda p, w: (p.zero_(), w.sum()), "doesn't end up"),
}


def half_known(w):
    between = torch.empty(2, 4)
    between[0] = w[0]
    return between


@pytest.mark.parametrize("how", REFUSED)
def test_refused(how):
    HELD.clear()
    fill, reason = REFUSED[how]
    engine = one(computed(fill), {"weight": memory(4, 4)}, ["w"])
    assert_refused(engine, sent(w=(4, 4)), reason)


def test_what_the_loader_does_to_received_tensors():
    engine = one(computed(lambda p, w: p.copy_(w.mul_(2))), {"weight": memory(4)}, ["w"])
    assert_refused(engine, sent(w=(4,)), "changes what it is given", "")


def test_complex_conjugates():
    live = {"weight": memory(4, dtype=torch.complex64)}
    engine = one(computed(lambda p, w: p.copy_(w.conj())), live, ["w"])
    assert_refused(engine, sent(w=(4, "complex64")), "sign")


def test_a_layer_that_is_given_up_gets_what_was_made_for_it_beforehand():
    engine = one(loaders.plainly, {"weight": memory(4)}, ["w"])
    engine.prepare = lambda received: {"w": received["a"] + received["b"]}
    recording = assert_refused(engine, sent(a=(4,), b=(4,)), "add")
    assert recording.by_loader == {"a", "b"}


def test_layers_that_are_given_unknown_memory():
    engine = one(loaders.plainly, {"weight": memory(4)}, ["w"])

    def prepare(received):
        made = torch.empty(4)
        ctypes.memmove(made.data_ptr(), received["w"].data_ptr(), 16)
        return {"w": made}

    engine.prepare = prepare
    assert_refused(engine, sent(w=(4,)), "", "")


def test_what_attention_absorbs_in_the_end():
    up = memory(4, 4)
    absorbed = {}

    def finish(live, given):
        absorbed["w"] = up.t() * 1

    engine = Engine(
        [
            Layer("m.up", {"weight": up}, ["w"], loaders.plainly),
            Layer("m.attention", {}, [], finish, direct=True),
        ]
    )
    assert_refused(engine, sent(w=(4, 4)), "kept beside", "")
    # A view is no state of its own.
    engine.layers[1].fill = lambda live, given: absorbed.update(w=up.t())
    assert_replayed(engine, sent(w=(4, 4)), parts=1)
    # Into a buffer, computed or just copied: reloading `up` alone would leave it behind.
    buffer = memory(4, 4)
    for finish in (lambda f, g: f["b"].copy_(up.t()), lambda f, g: f["b"].copy_(up.abs())):
        engine.layers[1] = Layer("m.attention", {"b": buffer}, [], finish, direct=True)
        assert_refused(engine, sent(w=(4, 4)), "by another layer or by none", "")
    # The same every time.
    engine.layers[1].fill = lambda f, g: f["b"].fill_(1)
    assert_replayed(engine, sent(w=(4, 4)), parts=1)


def test_weights_of_the_update_before():
    first, second = memory(4), memory(4)

    def early(fresh, given):
        fresh["weight"].copy_(given["a"])
        HELD["x"] = second.sum().item()

    engine = Engine(
        [
            Layer("m.a", {"weight": first}, ["a"], early),
            Layer("m.b", {"weight": second}, ["b"], loaders.plainly),
        ]
    )
    assert_refused(engine, sent(a=(4,), b=(4,)), "update before", "m.a")

    def copied(fresh, given):
        fresh["weight"].copy_(second)
        given["a"].sum()

    engine.layers[0].fill = copied
    assert_refused(engine, sent(a=(4,), b=(4,)), "before it was written", "m.a")


def test_a_parameter_that_is_given_other_memory():
    parameter = torch.nn.Parameter(memory(4))
    live = {"weight": parameter}

    def fill(live, given):
        parameter.data = given["w"].clone()

    engine = one(fill, live, ["w"], direct=True)
    recording = loaders.record(engine, sent(w=(4,)))
    assert "m.layer" in recording.reasons


def test_a_write_across_parameters():
    base = torch.zeros(8)

    def fill(live, given):
        base.copy_(given["w"])

    layers = [
        Layer("m.layer", {"weight": base[:4], "bias": base[4:]}, ["w"], fill, direct=True),
    ]
    assert_refused(Engine(layers), sent(w=(8,)), "together with other memory")
    base = torch.zeros(12)

    def beside(live, given):
        live["weight"].copy_(given["w"])
        base[:8].mul_(2)

    engine = one(beside, {"weight": base[4:8]}, ["w"], direct=True)
    assert_refused(engine, sent(w=(4,)), "mul_")


def test_operations_of_others():
    with torch.library._scoped_library("packedcomm_test", "DEF") as library:
        library.define("turned(Tensor x) -> Tensor")
        library.define("put(Tensor x, *, Tensor(a!) out) -> ()")
        library.impl("turned", lambda x: x.flip(0), "CPU")
        library.impl("put", lambda x, out: (out.copy_(x.flip(0)), None)[1], "CPU")
        ops = torch.ops.packedcomm_test
        live = {"weight": memory(4)}
        engine = one(computed(lambda p, w: p.copy_(ops.turned(w))), live, ["w"])
        assert_refused(engine, sent(w=(4,)), "turned")
        engine = one(computed(lambda p, w: (p.copy_(w), ops.put(w, out=p))), live, ["w"])
        assert_refused(engine, sent(w=(4,)), "put")


def test_freed_memory_is_not_mistaken():
    """Temporaries whose addresses are used again, by larger ones and by smaller ones."""

    def fill(fresh, given):
        for size in (64, 16, 64, 4, 32):
            torch.zeros(size, 4).sum()
            between = torch.empty(size, 4)
            between[:4] = given["w"]
            fresh["weight"].copy_(between[:4])
            del between

    assert_replayed(one(fill, {"weight": memory(4, 4)}, ["w"]), sent(w=(4, 4)), parts=1)


def test_the_second_update_shows_what_the_first_one_hides():
    turn = iter([False, True])

    def fill(fresh, given):
        fresh["weight"].copy_(given["w"].flip(0) if next(turn) else given["w"])

    engine = one(fill, {"weight": memory(4)}, ["w"])
    manifest = sent(w=(4,))
    recording = loaders.record(engine, manifest)
    assert recording.reasons == {}
    loaders.prove(engine, recording, manifest)
    assert "other bytes" in recording.reasons["m.layer"]
    assert recording.entries == {}
    assert recording.by_loader == {"w"}


def test_nothing_is_kept_alive():
    live = {"a.weight": memory(4)}
    recorder = Recorder(live)
    tensor = torch.ones(4)
    recorder.receive("w", tensor)
    with recorder:
        recorder.enter_layer("a", [tensor])
        live["a.weight"].copy_(tensor.clone())
        recorder.leave_layer()
    gone = weakref.ref(tensor)
    del tensor
    assert gone() is None
    engine = one(loaders.plainly, {"weight": memory(4)}, ["w"])
    recording = loaders.record(engine, sent(w=(4,)))
    proof = Proof(recording, engine.live)
    tensor = torch.zeros(4)
    proof.receive("w", tensor)
    proof.receive("not known", tensor)
    gone = weakref.ref(tensor)
    del tensor
    proof.enter_layer("m.layer", [])
    assert gone() is not None
    proof.leave_layer()
    assert gone() is None
