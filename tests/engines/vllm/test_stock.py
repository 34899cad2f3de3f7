"""Both ends of vLLM's own NCCL backend: its real communicator, packing and engine."""

from __future__ import annotations

import queue
import threading
from concurrent.futures import Future

import pytest
import torch

pytest.importorskip("vllm", reason="needs vLLM")

from packedcomm import TensorTarget
from packedcomm.engines.vllm.stock import StockReceiver, StockSender, StockWire
from packedcomm.errors import ManifestError, SessionStateError, VersionMismatch
from tests.helpers.sessions import QUICK
from tests.helpers.vllm_adapters import ENGINE, GPUS, TRAINER, generated, llama
from tests.helpers.vllm_engines import SyncedEngine, agree, changed, free_port, tensors_of

pytestmark = [
    pytest.mark.filterwarnings("default"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.skipif(GPUS < 2, reason="needs two GPUs"),
]

# Several chunks of a few tensors each, and one tensor that is larger than a chunk.
SMALL = StockWire(packed=True, buffer_size_bytes=1 << 16)
WIRES = [SMALL, StockWire(packed=True), StockWire(packed=False)]
WIRE_IDS = ["small chunks", "packed", "one by one"]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    engine = SyncedEngine(llama(), tmp_path_factory.mktemp("stock"), backend="nccl")
    yield engine
    engine.close()


@pytest.mark.parametrize("wire", WIRES, ids=WIRE_IDS)
def test_the_stock_engine_takes_what_is_sent(engine, wire):
    with StockSender(
        engine.llm, "127.0.0.1:0", device=TRAINER, wire=wire, workers=[1], settings=QUICK
    ) as sender:
        sender.connect()
        for seed in (1, 2, 3):
            model = changed(llama(), seed)
            sender.send(tensors_of(model))
            agree(engine.generate(), generated(model))
        # Again, as after a failure.
        sender.connect()
        model = changed(llama(), 4)
        sender.send(tensors_of(model))
        agree(engine.generate(), generated(model))


def test_another_nccl_is_refused(engine):
    sender = StockSender(engine.llm, "127.0.0.1:0", device=TRAINER, nccl_version="2.11.4")
    with pytest.raises(VersionMismatch, match=r"2\.11\.4"):
        sender.connect()


class StockTrainer:
    """vLLM's own trainer, on a thread of its own. One that is stuck in NCCL mustn't hold up the end
    of the tests."""

    def __init__(self, port):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self._info = {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
        # What it tells its workers.
        self.info = self._info | {"rank_offset": 1}
        self._engine = NCCLWeightTransferEngine
        self._tasks = queue.SimpleQueue()
        threading.Thread(target=self._work, daemon=True).start()
        self.group = self._submit(self._connect)

    def _work(self):
        torch.cuda.set_device(TRAINER)
        while (task := self._tasks.get()) is not None:
            future, call, arguments = task
            try:
                future.set_result(call(*arguments))
            except Exception as error:  # noqa: BLE001 - the test's
                future.set_exception(error)

    def _submit(self, call, *arguments):
        future = Future()
        self._tasks.put((future, call, arguments))
        return future

    def close(self):
        self._tasks.put(None)

    def _connect(self):
        return self._engine.trainer_init(self._info)

    def send(self, tensors, wire):
        return self._submit(self._send, tensors, wire)

    def _send(self, tensors, wire):
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerSendWeightsArgs

        arguments = NCCLTrainerSendWeightsArgs(group=self.group.result(), **wire.as_dict())
        self._engine.trainer_send_weights(iter(tensors.items()), arguments)
        torch.cuda.synchronize(TRAINER)


@pytest.fixture
def ends():
    trainer = StockTrainer(free_port())
    receiver = StockReceiver.connect(trainer.info, 1, device=ENGINE, settings=QUICK)
    trainer.group.result(30)
    yield trainer, receiver
    receiver.close()
    trainer.close()


def described(tensors, wire):
    return {
        "names": list(tensors),
        "dtype_names": [str(t.dtype).removeprefix("torch.") for t in tensors.values()],
        "shapes": [list(t.shape) for t in tensors.values()],
        **wire.as_dict(),
    }


@pytest.mark.parametrize("wire", WIRES, ids=WIRE_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stock_trainer_is_received(ends, wire, dtype):
    trainer, receiver = ends
    for seed in (1, 2):
        tensors = {n: t.to(dtype) for n, t in tensors_of(changed(llama(), seed)).items()}
        live = {name: torch.zeros_like(t, device=ENGINE) for name, t in tensors.items()}
        sent = trainer.send(tensors, wire)
        receiver.receive(described(tensors, wire), TensorTarget(live))
        sent.result(30)
        torch.cuda.synchronize(ENGINE)
        for name, tensor in tensors.items():
            assert torch.equal(live[name].cpu(), tensor.cpu()), name
        # Tensors may be kept.
        chunks = []
        sent = trainer.send(tensors, wire)
        receiver.receive(described(tensors, wire), chunks.append)
        sent.result(30)
        torch.cuda.synchronize(ENGINE)
        shown = dict(item for chunk in chunks for item in chunk)
        assert list(shown) == list(tensors)
        for name, tensor in tensors.items():
            assert torch.equal(shown[name].cpu(), tensor.cpu()), name


def test_a_target_that_doesnt_fit_ends_the_group_before_the_data(ends):
    receiver = ends[1]
    tensors = tensors_of(changed(llama(), 1))
    live = {name: torch.zeros_like(t, device=ENGINE) for name, t in list(tensors.items())[1:]}
    with pytest.raises(ManifestError, match=next(iter(tensors))):
        receiver.receive(described(tensors, SMALL), TensorTarget(live))
    torch.cuda.synchronize(ENGINE)
    assert not any(tensor.any() for tensor in live.values())
    # A trainer that has begun must not be read from the middle.
    with pytest.raises(SessionStateError, match="ManifestError"):
        receiver.receive(described(tensors, SMALL), None)
