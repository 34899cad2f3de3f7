"""What replaying a loader would do wrong: its layers are refused with a reason."""

from __future__ import annotations

import ctypes
import weakref

import pytest
import torch

from packedcomm.engines.vllm.recorded import Proof
from packedcomm.engines.vllm.recording import Recorder
from tests.helpers import loaders
from tests.helpers.loaders import Engine, Layer, assert_refused, assert_replayed, memory, one, sent

# What replaying would do wrong.

HELD = {}

# As compiled extensions register functions, which the dispatcher then doesn't show.
LIBRARY = torch.library.Library("packedcomm_tests", "DEF")
LIBRARY.define("take(Tensor weight) -> int")
LIBRARY.impl("take", lambda weight: 1, "CompositeImplicitAutograd")
EXTENSION = torch.ops.packedcomm_tests


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
    "constant from a tensor": (lambda p, w: p.fill_(w[0, 0]), "no box"),
    "item": (lambda p, w: p.fill_(w[0, 0].item()), "reads values"),
    "float": (lambda p, w: (p.copy_(w), HELD.update(x=float(w[1, 1]))), "reads values"),
    "comparison": (lambda p, w: (p.copy_(w), HELD.update(x=torch.equal(p, w))), "reads values"),
    "list": (lambda p, w: (p.copy_(w), HELD.update(x=w.tolist())), "tolist"),
    "array": (lambda p, w: (p.copy_(w), HELD.update(x=w.numpy().copy())), "numpy"),
    "address": (
        lambda p, w: ctypes.memmove(p.data_ptr(), w.data_ptr(), w.nbytes),
        "data_ptr",
    ),
    "an extension": (lambda p, w: (p.copy_(w), HELD.update(x=EXTENSION.take(w))), "take"),
    "an extension's overload": (lambda p, w: (p.copy_(w), EXTENSION.take.default(w)), "take"),
    "written behind": (lambda p, w: p.numpy().__setitem__(0, 3.0), "unknown contents"),
    "repeated": (lambda p, w: p.copy_(w[:1]), "no box"),
    "partly": (lambda p, w: p[:2].copy_(w[:2]), "unknown contents"),
    "random": (lambda p, w: (p.copy_(w), p[0].uniform_()), "uniform_"),
    "kept": (lambda p, w: (p.copy_(w), HELD.update(x=w.abs().max())), "kept beside"),
    "kept itself": (lambda p, w: (p.copy_(w), HELD.update(x=w)), "w itself is kept"),
    "a view is kept": (lambda p, w: (p.copy_(w), HELD.update(x=w[1:, 2])), "w itself is kept"),
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


def test_what_is_kept_by_no_layer_leaves_the_whole_model_to_the_loader():
    engine = one(loaders.plainly, {"weight": memory(4)}, ["w"])
    engine.prepare = lambda received: {"w": received["w"], "kept": HELD.update(x=received["x"])}
    assert_refused(engine, sent(w=(4,), x=(2,)), "x itself is kept", "")
    engine.prepare = lambda received: {"w": received["w"]}
    assert_replayed(engine, sent(w=(4,), x=(2,)), parts=1)


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


@pytest.mark.parametrize(
    ("sent_as", "held_as"),
    [("float8_e4m3fn", "bfloat16"), ("bfloat16", "float8_e4m3fn"), ("int64", "int32")],
)
def test_casts_that_the_copy_engine_cant_do(sent_as, held_as):
    live = {"weight": memory(4, dtype=getattr(torch, held_as))}
    engine = one(loaders.plainly, live, ["w"])
    assert_refused(engine, sent(w=(4, sent_as)), f"cast from {sent_as} to {held_as}")
