"""Engines that are called without HTTP, the text of errors, and the stock backend over Gloo."""

from __future__ import annotations

import pickle
import threading
import time

import pytest
import torch

from packedcomm import FullWeightSender, GlooCommunicator, Listener, Session
from packedcomm.communicators.listener import Address
from packedcomm.communicators.vllm_bootstrap import exchange_unique_id
from packedcomm.engines.vllm import stock
from packedcomm.engines.vllm.client import EngineUpdater, HttpEngine, LocalEngine, RayEngine
from packedcomm.engines.vllm.markers import marked, unmarked
from packedcomm.engines.vllm.stock import StockReceiver, StockSender, StockWire
from packedcomm.errors import (
    ArgumentError,
    ContextLost,
    ManifestError,
    PeerLost,
    RemoteError,
    SessionStateError,
    VersionMismatch,
)
from tests.helpers.sessions import QUICK
from tests.helpers.vllm_server import VllmServer


def weights(value: float = 1.0) -> dict[str, torch.Tensor]:
    return {"a.weight": torch.full((33, 7), value), "b.bias": torch.full((5,), -value)}


@pytest.fixture
def server():
    with VllmServer(weights()) as started:
        yield started


class Llm:
    """Takes what vLLM's LLM takes, of a version that knows weight versions."""

    llm_engine = None

    def __init__(self, server: VllmServer) -> None:
        self._server = server

    def init_weight_transfer_engine(self, request):
        self._server._init_weight_transfer_engine({"init_info": request["init_info"]})

    def start_weight_update(self):
        self._server._start_weight_update(None)

    def update_weights(self, request):
        self._server._update_weights({"update_info": request["update_info"]})

    def finish_weight_update(self, weight_version=None):
        self._server._finish_weight_update({"weight_version": weight_version})

    def get_world_size(self):
        return 1


class DraftLlm(Llm):
    """The same with a draft model."""

    def start_draft_weight_update(self):
        self._server._start_draft_weight_update(None)


class OldLlm(Llm):
    """The same before 0.27."""

    def finish_weight_update(self):
        self._server._finish_weight_update(None)


class Resetting(Llm):
    """The same with caches; that of the encoder is its engine's."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(server)
        self.reset: list[str] = []
        self.resets = True
        self.llm_engine = self

    def reset_prefix_cache(self, reset_running_requests=False, reset_connector=False):
        self.reset += ["prefix", "connector"] if reset_connector else ["prefix"]
        return self.resets

    def reset_mm_cache(self):
        self.reset.append("mm")

    def reset_encoder_cache(self):
        self.reset.append("encoder")


class PausingActor(Resetting):
    """Has the methods of an AsyncLLM, which goes on taking requests."""

    def __init__(self, server: VllmServer) -> None:
        super().__init__(server)
        self.paused = self.asleep = False

    def pause_generation(self, mode, clear_cache):
        self.paused = True

    def resume_generation(self):
        self.paused = False


class WakingActor(PausingActor):
    """The same with memory that sleeps."""

    def wake_up(self, tags=None):
        assert tags == ["scheduling"]
        self.paused = self.asleep


class Actor:
    """A Ray handle of an object: `.method.remote(...)`, whose arguments are pickled."""

    def __init__(self, target) -> None:
        self._target = target

    def __getattr__(self, name):
        method = getattr(self._target, name)

        class Method:
            @staticmethod
            def remote(*arguments, **options):
                arguments, options = pickle.loads(pickle.dumps((arguments, options)))
                return lambda: method(*arguments, **options)

        return Method


def as_actor(llm):
    return RayEngine(Actor(llm), lambda references: [r() for r in references])


@pytest.mark.parametrize(
    ("engine", "version"),
    [
        (LocalEngine, "0"),
        (lambda llm: llm, "0"),
        (lambda llm: LocalEngine(OldLlm(llm._server)), None),
        (as_actor, None),
    ],
    ids=["local", "bare", "old", "ray"],
)
def test_engines_without_http(server, engine, version):
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(engine(Llm(server)), session)
        assert updater.connect() == 1
        updater.update(FullWeightSender(weights(2.0), session))
    assert all(torch.equal(server.workers[0][n], t) for n, t in weights(2.0).items())
    assert server.version == version


@pytest.mark.parametrize(
    ("kind", "engine", "mode", "reset"),
    [
        (Resetting, LocalEngine, "wait", ["prefix", "connector", "mm", "encoder"]),
        (Resetting, LocalEngine, None, ["prefix", "connector", "mm", "encoder"]),
        (Resetting, as_actor, "wait", 2 * ["prefix", "connector", "mm", "encoder"]),
        (PausingActor, as_actor, "wait", []),
        (PausingActor, as_actor, "keep", ["prefix", "connector", "encoder"]),
    ],
    ids=["local", "local, paused", "actor", "async actor", "async actor, kept"],
)
def test_what_an_old_encoder_has_computed_is_forgotten_too(server, kind, engine, mode, reset):
    llm = kind(server)
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(engine(llm), session, pause_mode=mode)
        updater.connect()
        updater.update(FullWeightSender(weights(2.0), session))
        assert llm.reset == reset
        EngineUpdater(engine(llm), session, pause_mode=mode, flush=False).update(
            FullWeightSender(weights(3.0), session)
        )
    assert llm.reset == reset


class Narrow(Resetting):
    """Knows nothing of connectors."""

    def reset_prefix_cache(self, reset_running_requests=False):
        return super().reset_prefix_cache(reset_running_requests)


@pytest.mark.parametrize("engine", [LocalEngine, as_actor])
def test_a_cache_without_connectors_is_reset_too(server, engine):
    llm = Narrow(server)
    engine(llm).reset_prefix_cache()
    assert llm.reset == ["prefix", "mm", "encoder"]


class Narrowest(Resetting):
    """Takes nothing."""

    def reset_prefix_cache(self):
        return super().reset_prefix_cache()


def test_an_actors_own_cache_is_reset_too(server):
    llm = Narrowest(server)
    as_actor(llm).reset_prefix_cache()
    assert llm.reset == ["prefix", "mm", "encoder"]


class Asked(Resetting):
    """Another client asks it something in the middle of each update; it caches what that needs."""

    cached = None

    def update_weights(self, request):
        self.cached = "of the old weights"
        return super().update_weights(request)

    def reset_prefix_cache(self, *arguments):
        self.cached = None
        return super().reset_prefix_cache(*arguments)


@pytest.mark.parametrize("fails", [False, True])
def test_what_an_actor_has_cached_in_an_update_is_forgotten_too(server, fails):
    llm = Asked(server)
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(as_actor(llm), session)
        updater.connect()
        if fails:
            with pytest.raises(ManifestError):
                updater.update(FullWeightSender({"none": torch.ones(2)}, session))
        else:
            updater.update(FullWeightSender(weights(2.0), session))
    assert llm.cached is None


@pytest.mark.parametrize("engine", [LocalEngine, as_actor])
def test_a_cache_that_cant_be_reset_is_an_error(server, engine):
    llm = Resetting(server)
    llm.resets = False
    with pytest.raises(RemoteError, match="could not be reset"):
        engine(llm).reset_prefix_cache()


class OwnWakingActor(PausingActor):
    """Has a `wake_up` of its own."""

    def wake_up(self):
        raise AssertionError("all of it would be woken up")


@pytest.mark.parametrize("kind", [PausingActor, WakingActor, OwnWakingActor])
def test_an_actor_of_which_a_part_is_asleep_stays_paused(server, kind):
    actor = kind(server)
    actor.asleep = kind is WakingActor
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(as_actor(actor), session)
        updater.connect()
        updater.update(FullWeightSender(weights(2.0), session))
        assert actor.paused is actor.asleep
        actor.asleep = False
        updater.update(FullWeightSender(weights(3.0), session))
        assert not actor.paused


@pytest.mark.parametrize(
    "engine",
    [
        lambda server: HttpEngine(server.url, timeout_s=20),
        lambda server: LocalEngine(DraftLlm(server)),
        lambda server: as_actor(DraftLlm(server)),
    ],
    ids=["http", "local", "ray"],
)
def test_draft_models_are_updated_and_the_models_version_stays(server, engine):
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(engine(server), session)
        updater.connect()
        updater.update(FullWeightSender(weights(2.0), session))
        updater.update(FullWeightSender(weights(3.0), session), draft=True)
        assert server.version is None
        updater.update(FullWeightSender(weights(4.0), session))
    for held, value in ((server.workers, 4.0), (server.drafts, 3.0)):
        assert all(torch.equal(held[0][n], t) for n, t in weights(value).items())


def test_draft_models_that_an_engine_cant_update_are_refused_before_it_pauses(server):
    class Without(HttpEngine):
        start_draft_weight_update = property()

    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(Without(server.url), session)
        updater.connect()
        server.came.clear()
        sender = FullWeightSender(weights(2.0), session)
        with pytest.raises(ArgumentError, match="start_draft_weight_update"):
            updater.update(sender, draft=True)
        with pytest.raises(ArgumentError, match="'policy'"):
            updater.update(sender, draft=True, adapter="policy")
        assert "pause" not in server.came
        updater.update(sender)
    assert all(torch.equal(server.workers[0][n], t) for n, t in weights(2.0).items())


def test_an_engine_that_fails_after_the_commit_says_so(server):
    receive = server._update_weights

    def fail(body):
        receive(body)
        raise RuntimeError("too late")

    server._update_weights = fail
    with Session.listen("127.0.0.1:0", receivers=1, device="cpu", settings=QUICK) as session:
        updater = EngineUpdater(HttpEngine(server.url, timeout_s=20), session)
        updater.connect()
        with pytest.raises(RemoteError, match="too late") as caught:
            updater.update(FullWeightSender(weights(2.0), session))
    assert any("committed" in note for note in caught.value.__notes__)
    assert all(torch.equal(server.workers[0][n], t) for n, t in weights(2.0).items())


def test_markers_survive_what_vllm_does_to_text():
    for error in (ManifestError("no 'a'\nno 'b'"), RemoteError("[x] y"), PeerLost("")):
        again = unmarked(f"Call to collective_rpc method failed: {marked(error)}")
        assert (type(again), str(again)) == (type(error), str(error))
    other = unmarked(marked(KeyError("q")))
    assert (type(other), str(other)) == (RemoteError, "KeyError: 'q'")
    assert type(unmarked("[packedcomm:listed] text")) is RemoteError
    lost = unmarked(marked(ContextLost("it must end")))
    assert (type(lost), str(lost)) == (PeerLost, "ContextLost: it must end")
    assert unmarked("[packedcomm] text") is None


class StockEngine:
    """Two workers of a stock engine, of which this process has both."""

    def __init__(self, version: str, target: list[dict[str, torch.Tensor]]) -> None:
        self.version = version
        self.target = target
        self.infos: list[dict] = []
        self.receivers: list[StockReceiver] = []

    def get_version(self):
        return self.version

    def get_world_size(self):
        return len(self.target)

    def init_weight_transfer_engine(self, init_info):
        self.infos.append(init_info)
        address = f"{init_info['master_address']}:{init_info['master_port']}"
        self.receivers = [None] * len(self.target)

        def join(index):
            group = GlooCommunicator.connect(
                address, init_info["rank_offset"] + index, init_info["world_size"]
            )
            self.receivers[index] = StockReceiver(group, init_info)

        in_threads(join, len(self.target))

    def start_weight_update(self): ...

    def update_weights(self, update_info):
        self.infos.append(update_info)

        def receive(index):
            self.receivers[index].receive(update_info, lambda items: self.load(index, items))

        in_threads(receive, len(self.target))

    def load(self, index, items):
        for name, tensor in items:
            self.target[index][name].copy_(tensor)

    def finish_weight_update(self): ...

    def close(self):
        for receiver in self.receivers:
            receiver.close()


def in_threads(call, count):
    threads = [threading.Thread(target=call, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)


class Library:
    version = (2, 29, 7)


@pytest.fixture
def over_gloo(monkeypatch):
    """The stock sender's group, without GPUs."""

    def from_vllm(host, port, rank, world_size, *, timeout_s, listener, **options):
        return GlooCommunicator.connect(listener, rank, world_size, timeout_s=timeout_s)

    monkeypatch.setattr(stock.NcclCommunicator, "from_vllm", staticmethod(from_vllm))
    monkeypatch.setattr(stock, "find_nccl", lambda settings: Library)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("version", ["0.27.1", "0.28.0", "0.33.0"])
def test_the_stock_backend_both_ways(over_gloo, version, packed):
    target = [{name: torch.zeros_like(t) for name, t in weights().items()} for _ in range(2)]
    engine = StockEngine(version, target)
    wire = StockWire(packed=packed, buffer_size_bytes=64)
    with StockSender(engine, "127.0.0.1:0", device="cpu", wire=wire, settings=QUICK) as sender:
        sender.connect()
        for value in (1.0, 2.0):
            sender.send(weights(value))
            for held in target:
                assert all(torch.equal(held[name], t) for name, t in weights(value).items())
    engine.close()
    init, update = engine.infos[0], engine.infos[-1]
    assert (init["rank_offset"], init["world_size"]) == (1, 3)
    assert update["dtype_names"] == ["float32", "float32"]
    assert ("packed" in init) is (version != "0.27.1")
    assert ("packed" in update) is (version == "0.27.1")


def test_a_stock_engine_that_refuses_ends_the_transfer(over_gloo):
    engine = StockEngine("0.32.0", [weights()])
    with StockSender(engine, "127.0.0.1:0", device="cpu", settings=QUICK) as sender:
        sender.connect()

        def refuse(update_info):
            raise RuntimeError("[packedcomm:ManifestError] no such name")

        engine.update_weights = refuse
        with pytest.raises(ManifestError, match="^no such name"):
            sender.send({"big": torch.zeros(1 << 22)})
        assert sender.group is None
    engine.close()


def test_a_stock_engine_that_refuses_leaves_the_port_free(over_gloo, monkeypatch):
    """vLLM's bootstrap is the real one here, until all workers would have come."""
    join_over_gloo = stock.NcclCommunicator.from_vllm

    def meet_first(host, port, rank, world_size, *, timeout_s, listener, check, **options):
        deadline = time.monotonic() + timeout_s
        address = Address(host, port)
        with exchange_unique_id(address, rank, world_size, deadline, bytes, listener, check):
            raise AssertionError("nobody comes")

    with Listener.bind("127.0.0.1:0") as listener:
        address = listener.address
    engine = StockEngine("0.32.0", [weights()])
    join = engine.init_weight_transfer_engine

    def refuse(init_info):
        raise RuntimeError("[packedcomm:SessionStateError] not now")

    with StockSender(engine, address, device="cpu", settings=QUICK) as sender:
        engine.init_weight_transfer_engine = refuse
        monkeypatch.setattr(stock.NcclCommunicator, "from_vllm", staticmethod(meet_first))
        for _ in range(2):
            started = time.monotonic()
            with pytest.raises(SessionStateError, match="^not now"):
                sender.connect()
            assert time.monotonic() - started < 2.0
            assert sender.group is None
        engine.init_weight_transfer_engine = join
        monkeypatch.setattr(stock.NcclCommunicator, "from_vllm", staticmethod(join_over_gloo))
        sender.connect()
        sender.send(weights(2.0))
    engine.close()
    assert torch.equal(engine.target[0]["a.weight"], weights(2.0)["a.weight"])


def test_an_nccl_that_does_not_fit_is_named_before_anything_is_called(over_gloo, monkeypatch):
    engine = StockEngine("0.30.0", [weights()])
    monkeypatch.setattr(Library, "version", (2, 28, 9))
    for options in ({}, {"vllm_version": "0.29.0", "nccl_version": "2.27.5"}):
        with pytest.raises(VersionMismatch, match=r"2\.28\.9"):
            StockSender(engine, "127.0.0.1:0", device="cpu", **options).connect()
    for engine.version in (None, "0.1.dev1+g12ab"):
        with pytest.raises(ArgumentError, match="give vllm_version"):
            StockSender(engine, "127.0.0.1:0", device="cpu").connect()
    assert engine.infos == []
