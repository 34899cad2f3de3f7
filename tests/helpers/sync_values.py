"""Syncs of which the values are looked at: cast, filtered, tied, staged, from host memory."""

from __future__ import annotations

import torch

from packedcomm import (
    Cast,
    Filter,
    FullWeightSender,
    Manifest,
    ModuleSource,
    StagedTarget,
    TensorTarget,
    WeightReceiver,
)
from tests.helpers.scenarios import device_of
from tests.helpers.syncs import Meeting


def cast_on_the_way(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """fp32 masters, large and small, sent as bfloat16; integers stay what they are."""
    device = device_of(backend, rank)
    torch.manual_seed(0)
    master = {
        "large": torch.randn(700, 1000).to(device),
        "column": torch.randn(64, 32).t().to(device),
        "small": torch.randn(17).to(device),
        "step": torch.arange(3, device=device),
    }
    expected = {n: t if n == "step" else t.to(torch.bfloat16) for n, t in master.items()}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            source = ModuleSource(master, transforms=[Cast("bfloat16")])
            result = FullWeightSender(source, session, verify=True).sync()
            assert result.bytes == 2 * (700_000 + 64 * 32 + 17) + 24
        else:
            received = {n: torch.zeros_like(t) for n, t in expected.items()}
            receiver = WeightReceiver(TensorTarget(received), session)
            assert receiver.receive() is not None
            for name, tensor in expected.items():
                assert torch.equal(received[name], tensor), name
            assert receiver.receive() is None


def filtered(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """Only the weights of a module are sent, not its biases."""
    device = device_of(backend, rank)
    model = torch.nn.Linear(3, 4, device=device)
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            source = ModuleSource(model, transforms=[Filter("*weight")])
            result = FullWeightSender(source, session).sync()
            assert (result.left_out, result.tensors) == (("bias",), 1)
        else:
            bias = model.bias.detach().clone()
            target = TensorTarget(model.state_dict(), partial=True)
            receiver = WeightReceiver(target, session)
            assert receiver.receive() is not None
            assert torch.equal(model.bias, bias)
            assert receiver.receive() is None


def tied_weights(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """A tied head is sent once; one receiver ties it too, then one that doesn't."""
    device = device_of(backend, rank)
    model = torch.nn.ModuleDict(
        {"embed": torch.nn.Embedding(10, 4), "head": torch.nn.Linear(4, 10, bias=False)}
    ).to(device)
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            model["head"].weight = model["embed"].weight
            with torch.no_grad():
                model["embed"].weight.copy_(torch.arange(40.0).view(10, 4))
            assert FullWeightSender(model, session).sync().tensors == 1
        else:
            receiver = WeightReceiver(TensorTarget(model.state_dict()), session)
            assert receiver.receive() is not None
            for name in ("embed", "head"):
                assert model[name].weight.flatten().tolist() == list(range(40))
            assert receiver.receive() is None


def staged_until_commit(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """A look at the destinations at the moment of the commit, and at the memory it takes."""
    device = device_of(backend, rank)
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            tensors = {"a": torch.ones(1000, device=device), "b": torch.ones(3, device=device)}
            FullWeightSender(tensors, session).sync()
            return
        live = {"a": torch.zeros(1000, device=device), "b": torch.zeros(3, device=device)}
        addresses = [t.data_ptr() for t in live.values()]
        seen = []

        class Watching(StagedTarget):
            def commit(self, manifest: Manifest) -> None:
                seen.append([t.sum().item() for t in live.values()])
                super().commit(manifest)

        target = Watching(TensorTarget(live))
        receiver = WeightReceiver(target, session)
        assert receiver.receive() is not None
        assert seen == [[0.0, 0.0]]
        assert [t.sum().item() for t in live.values()] == [1000.0, 3.0]
        assert addresses == [t.data_ptr() for t in live.values()]
        assert target.nbytes == 4000 + 16
        target.release()
        assert target.nbytes == 0
        assert receiver.receive() is None


def offloaded_source(rank: int, world_size: int, backend: str, meeting: Meeting) -> None:
    """Half of the sender's tensors are in host memory, some cast, some strided."""
    device = device_of(backend, rank)
    torch.manual_seed(0)
    tensors = {
        f"t{i}": torch.randn(shape).to(torch.float32)
        for i, shape in enumerate([(3,), (700, 900), (1 << 20,), (5, 7), (0,), (2000, 1000)])
    }
    tensors["column"] = torch.randn(64, 32).t()
    expected = {name: t.to(torch.bfloat16) for name, t in tensors.items()}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            here = {
                name: t if i % 2 else t.to(device) for i, (name, t) in enumerate(tensors.items())
            }
            source = ModuleSource(here, transforms=[Cast("bfloat16")])
            sender = FullWeightSender(source, session, verify=True)
            for _ in range(2):
                sender.sync()
                for name in here:
                    here[name].mul_(2)
            return
        received = {name: torch.zeros_like(t, device=device) for name, t in expected.items()}
        receiver = WeightReceiver(TensorTarget(received), session)
        for factor in (1, 2):
            assert receiver.receive() is not None
            for name, tensor in expected.items():
                assert torch.equal(received[name].cpu(), tensor * factor), name
        assert receiver.receive() is None


def rewritten_right_after_the_sync(
    rank: int, world_size: int, backend: str, meeting: Meeting
) -> None:
    """A slow kernel writes the weights before a sync, another one right after it."""
    device = device_of(backend, rank)
    weights = {"large": torch.zeros(1 << 24, device=device), "small": torch.zeros(9, device=device)}

    def write(value: float) -> None:
        if device.type == "cuda":
            torch.cuda._sleep(100_000_000)
        for tensor in weights.values():
            tensor.fill_(value)

    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(weights, session)
            for step in range(4):
                write(float(step))
                sender.sync()
                write(-1.0)
            return
        receiver = WeightReceiver(StagedTarget(TensorTarget(weights)), session)
        for step in range(4):
            assert receiver.receive() is not None
            assert all(bool((t == step).all()) for t in weights.values())
        assert receiver.receive() is None


def captured_weights(
    rank: int, world_size: int, backend: str, meeting: Meeting, *, staged: bool
) -> None:
    """A CUDA graph that was captured over the destinations sees every sync."""
    device = device_of(backend, rank)
    weights = {"large": torch.zeros(1 << 20, device=device), "small": torch.zeros(9, device=device)}
    with meeting.session(backend, rank, world_size) as session:
        if rank == 0:
            sender = FullWeightSender(weights, session, verify=True)
            for step in range(1, 5):
                for tensor in weights.values():
                    tensor.fill_(step)
                sender.sync()
            return
        target = TensorTarget(weights)
        receiver = WeightReceiver(StagedTarget(target) if staged else target, session)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(device), torch.cuda.graph(graph):
            answer = sum(tensor.sum() for tensor in weights.values())
        for step in range(1, 5):
            assert receiver.receive() is not None
            graph.replay()
            assert answer.item() == step * ((1 << 20) + 9)
