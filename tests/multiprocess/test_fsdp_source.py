"""Sources of trainers that are sharded over processes: FSDP2, tensor parallelism, both, LoRA."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from packedcomm.errors import LayoutError, ManifestError, SessionStateError, TensorError
from packedcomm.sources import (
    Cast,
    DTensorSource,
    Filter,
    LoraSource,
    ModuleSource,
    Rename,
    RotaryPermutation,
    gathering,
    holds_dtensors,
)
from packedcomm.sources.placements import shard_boxes
from tests.helpers.operations import raised
from tests.helpers.ranks import run_ranks
from tests.helpers.sharded_models import HEADS, KV_HEADS, Model, full_tensors, join, shard, train
from tests.helpers.source_parts import everything


def _same(found, expected):
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype
        assert torch.equal(found[name], tensor), name
    return len(found)


def _every_tensor_arrives(rank, world_size, store, kind, backend="gloo"):
    join(rank, world_size, store, backend)
    device = "cuda" if "nccl" in backend else "cpu"
    whole = Model().to(device)
    model = shard(Model().to(device), kind, world_size, device)
    source = DTensorSource(model, buffers=True)
    assert source.leader is (rank == 0)
    assert holds_dtensors(model)
    counts = []
    for _ in range(2):
        # torch can't gather on the GPU what is offloaded from it.
        full = whole.state_dict() if kind == "offload" else full_tensors(model)
        expected = {name: tensor.cpu() for name, tensor in full.items()}
        found = everything(source)
        # A tied name is sent once, and comes last in the reference's order.
        if rank == 0:
            counts.append(_same({name: found[name] for name in expected}, expected))
        train(model)
        train(whole)
    snapshot = source.snapshot()
    assert snapshot.parts is None
    assert source.snapshot() is snapshot
    manifest = snapshot.manifest
    tied = manifest.attributes["tied"]
    dist.destroy_process_group()
    return counts, manifest.digest, tied


@pytest.mark.parametrize(
    ("kind", "world_size"),
    [("fsdp", 3), ("tp", 2), ("fsdp_tp", 4), ("hsdp", 4), ("offload", 2)],
)
def test_every_tensor_of_a_sharded_trainer_arrives_at_the_leader(kind, world_size, tmp_path):
    _check_arrivals(world_size, tmp_path, kind, "gloo")


@pytest.mark.parametrize("backend", ["nccl", "cpu:gloo,cuda:nccl"])
@pytest.mark.parametrize(
    ("kind", "world_size"),
    [
        pytest.param("fsdp", 2, marks=pytest.mark.gpu(2)),
        pytest.param("tp", 2, marks=pytest.mark.gpu(2)),
        pytest.param("offload", 2, marks=pytest.mark.gpu(2)),
        pytest.param("fsdp_tp", 4, marks=pytest.mark.gpu(4)),
        pytest.param("hsdp", 4, marks=pytest.mark.gpu(4)),
    ],
)
def test_every_tensor_arrives_from_gpus(kind, world_size, backend, tmp_path):
    _check_arrivals(world_size, tmp_path, kind, backend)


def _check_arrivals(world_size, tmp_path, kind, backend):
    results = run_ranks(_every_tensor_arrives, world_size, str(tmp_path / "store"), kind, backend)
    assert results[0][0] == [len(Model().state_dict())] * 2
    # The digest is that of the whole model: sharding is no part of the manifest.
    whole = ModuleSource(Model(), buffers=True).snapshot().manifest
    assert {digest for _, digest, _ in results} == {whole.digest}
    assert results[1][2] == {"head.weight": "embed.weight"}


def _transforms(rank, world_size, store):
    join(rank, world_size, store)
    torch.manual_seed(0)
    model = shard(Model(), "fsdp_tp", world_size)
    transforms = [
        RotaryPermutation(HEADS, KV_HEADS),
        Cast("bfloat16", only="*_proj*"),
        Cast("float64", only="*.norm.*"),
        Filter(lambda name: not name.startswith("layers.1.")),
        Rename({"scale": "factor"}),
    ]
    full = full_tensors(model)
    whole = {name: full[name] for name, _ in model.named_parameters(remove_duplicate=False)}
    expected = everything(ModuleSource(whole, transforms=transforms))
    found = everything(DTensorSource(model, transforms=transforms))
    count = _same(found, expected) if rank == 0 else None
    sent = gathering._ROUND_BYTES
    # Rounds of one tensor give the same.
    gathering._ROUND_BYTES = 1
    again = everything(DTensorSource(model, transforms=transforms))
    gathering._ROUND_BYTES = sent
    if rank == 0:
        _same(again, expected)
    dist.destroy_process_group()
    return count


def test_transforms_of_shards_are_those_of_whole_tensors(tmp_path):
    results = run_ranks(_transforms, 4, str(tmp_path / "store"))
    assert results[0] == 12


def _traffic(rank, world_size, store, cast):
    """Bytes that each rank sends, and what is left of gathered memory."""
    join(rank, world_size, store)
    mesh = init_device_mesh("cpu", (world_size,))
    model = fully_shard(nn.Linear(64, 64, bias=False), mesh=mesh)
    source = DTensorSource(model, transforms=[Cast("bfloat16")] if cast else [])
    snapshot = source.snapshot()
    sent = []
    real = source._exchange.send

    def send(tensor, tag):
        sent.append(tensor.nbytes)
        return real(tensor, tag)

    source._exchange.send = send
    alive = []
    for parts in source.gather(snapshot):
        alive = [weakref.ref(part.tensor) for part in parts]
    parts = None
    gc.collect()
    dist.destroy_process_group()
    return sent, [ref() is None for ref in alive]


@pytest.mark.parametrize("cast", [False, True])
def test_shards_travel_once_and_cast_where_that_is_smaller(cast, tmp_path):
    results = run_ranks(_traffic, 2, str(tmp_path / "store"), cast)
    assert results[0] == ([], [True, True])
    assert results[1] == ([64 * 32 * (2 if cast else 4)], [])


def _after_forward(rank, world_size, store):
    """FSDP2 leaves the root's parameters unsharded after a forward pass without a backward one."""
    join(rank, world_size, store)
    model = Model()
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    del expected["steps"]
    shard(model, "fsdp", world_size)
    source = DTensorSource(model)
    first = source.snapshot()
    with torch.no_grad():
        model(torch.arange(5))
    assert not isinstance(model.scale, DTensor)
    found = everything(source)
    if rank == 0:
        _same({name: found[name] for name in expected}, expected)
    assert source.snapshot() is first
    dist.destroy_process_group()


def test_parameters_that_a_forward_pass_left_unsharded_are_resharded(tmp_path):
    run_ranks(_after_forward, 2, str(tmp_path / "store"))


def _disagree(rank, world_size, store):
    join(rank, world_size, store)
    tensors = {"a": torch.zeros(2 + rank), "b": torch.zeros(1)}
    source = DTensorSource(tensors)
    seen = [raised(source.snapshot)[:2]]
    # They can agree later.
    tensors["a"] = torch.zeros(5)
    seen.append(len(source.snapshot().manifest))
    # One alone fails.
    tensors["b"] = torch.zeros(1, device="meta" if rank == 1 else "cpu")
    seen.append(raised(source.snapshot)[:2])
    tensors["b"] = torch.zeros(1)
    assert source.snapshot().parts is not None
    dist.destroy_process_group()
    return seen


def test_processes_with_different_tensors_are_told_on_all_of_them(tmp_path):
    first, second = run_ranks(_disagree, 2, str(tmp_path / "store"))
    for seen in (first, second):
        assert seen[0][0] is ManifestError
        assert "ranks 0 have digest" in seen[0][1]
        assert "ranks 1 have digest" in seen[0][1]
        assert seen[1] == 2
        assert seen[2][0] is TensorError
        assert "rank 1 of the source: tensor 'b': is on the meta device" in seen[2][1]


def _share(rank, world_size, store):
    join(rank, world_size, store)
    source = DTensorSource({"a": torch.zeros(1)})
    texts = [None, "", "receiver 3: out of memory €", "x" * 70_000]
    shared = [source.share(text if rank == 0 else "ignored") for text in texts]
    dist.destroy_process_group()
    return shared == texts


def test_the_leaders_failure_reaches_every_process(tmp_path):
    assert run_ranks(_share, 3, str(tmp_path / "store")) == [True] * 3


def _stop_early(rank, world_size, store):
    join(rank, world_size, store)
    gathering._ROUND_BYTES = 100
    model = shard(Model(), "fsdp", world_size)
    source = DTensorSource(model)
    snapshot = source.snapshot()
    gathered = source.gather(snapshot)
    if rank == 0:
        next(gathered)
        gathered.close()
    else:
        assert list(gathered) == [()] * len(snapshot.manifest)
    text = source.share("stopped")
    found = everything(source)
    if rank == 0:
        expected = _full_parameters(model)
        _same({name: found[name] for name in expected}, expected)
    else:
        _full_parameters(model)
    stale = raised(lambda: next(DTensorSource(model).gather(snapshot)))[0]
    dist.destroy_process_group()
    return text, stale


def _full_parameters(model):
    return {name: t for name, t in full_tensors(model).items() if name != "steps"}


def test_a_leader_that_stops_early_lets_the_others_end(tmp_path):
    results = run_ranks(_stop_early, 2, str(tmp_path / "store"))
    assert results == [("stopped", SessionStateError)] * 2


def _replaced(rank, world_size, store):
    join(rank, world_size, store)
    model = shard(Model(), "tp", world_size)
    source = DTensorSource(model)
    snapshots = [source.snapshot()]
    weight = model.layers[0].up.weight
    # Only one process's memory moves: no collective may be missing on the others.
    if rank == 1:
        weight._local_tensor.data = weight._local_tensor.clone()
    snapshots.append(source.snapshot())
    model.extra = nn.Parameter(torch.ones(2))
    snapshots.append(source.snapshot())
    found = everything(source)
    dist.destroy_process_group()
    if rank == 0:
        assert found["extra"].tolist() == [1.0, 1.0]
    return (
        snapshots[0] is snapshots[1],
        snapshots[0].manifest is snapshots[1].manifest,
        len(snapshots[2].manifest) - len(snapshots[1].manifest),
    )


def test_replaced_memory_and_added_parameters_are_noticed(tmp_path):
    results = run_ranks(_replaced, 2, str(tmp_path / "store"))
    assert results == [(True, True, 1), (False, True, 1)]


def _subgroup(rank, world_size, store):
    """Two trainers in one job, each a group of its own whose first rank leads."""
    join(rank, world_size, store)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replica", "shard"))
    group = mesh.get_group("shard")
    torch.manual_seed(rank // 2)
    value = torch.rand(7, 3)
    tensors = {
        "w": distribute_tensor(value, mesh["shard"], [Shard(1)]),
        "same": distribute_tensor(torch.arange(3.0), mesh["shard"], [Replicate()]),
    }
    source = DTensorSource(tensors, group=group)
    found = everything(source)
    if source.leader:
        assert torch.equal(found["w"], value)
        assert found["same"].tolist() == [0.0, 1.0, 2.0]
    outside = raised(
        DTensorSource(
            {"w": distribute_tensor(value, mesh, [Shard(0), Shard(1)])}, group=group
        ).snapshot
    )
    # With the default group only the first mesh has the leader: the other's shards stay.
    first = everything(DTensorSource({"w": tensors["w"]})) if rank < 2 else None
    if rank >= 2:
        everything(DTensorSource({"w": tensors["w"]}))
    if rank == 0:
        assert torch.equal(first["w"], value)
    dist.destroy_process_group()
    return source.leader, outside[0]


def test_a_group_of_some_processes_is_a_source_of_its_own(tmp_path):
    results = run_ranks(_subgroup, 4, str(tmp_path / "store"))
    assert results == [(True, LayoutError), (False, LayoutError)] * 2


def _sharded_lora(rank, world_size, store):
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    join(rank, world_size, store)
    torch.manual_seed(1)
    model = get_peft_model(
        Model(), LoraConfig(target_modules=["q_proj", "up"], r=3, init_lora_weights=False)
    )
    expected = get_peft_model_state_dict(model)
    expected = {name: tensor.clone() for name, tensor in expected.items()}
    mesh = init_device_mesh("cpu", (world_size,))
    for layer in model.base_model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    source = LoraSource(model, fold_scaling=True, transforms=[Cast("bfloat16")])
    found = everything(source)
    assert source.leader is (rank == 0)
    if rank == 0:
        scaling = 8 / 3
        wanted = {
            name: (tensor * scaling if "lora_B" in name else tensor).bfloat16()
            for name, tensor in expected.items()
        }
        _same(found, wanted)
    dist.destroy_process_group()
    return len(found)


def test_a_sharded_adapter_is_gathered(tmp_path):
    assert run_ranks(_sharded_lora, 2, str(tmp_path / "store")) == [8, 0]


def _boxes_against_torch(rank, world_size, store):
    """What torch itself puts on this rank, for all placements of odd shapes on a 2 x 2 mesh."""
    join(rank, world_size, store)
    mesh = init_device_mesh("cpu", (2, 2))
    coordinate = tuple(mesh.get_coordinate())
    choices = [Replicate(), Shard(0), Shard(1)]
    values, tensors = {}, {}
    for shape in [(1, 3), (5, 7), (3, 2), (9, 1)]:
        value = torch.arange(float(shape[0] * shape[1])).reshape(shape)
        for placements in [(a, b) for a in choices for b in choices]:
            tensor = distribute_tensor(value, mesh, placements)
            offset, size = shard_boxes(shape, (2, 2), tensor.placements)[coordinate]
            box = tuple(slice(o, o + n) for o, n in zip(offset, size, strict=True))
            assert torch.equal(value[box], tensor.to_local()), (shape, placements)
            name = f"{shape} {placements}"
            values[name], tensors[name] = value, tensor
    found = everything(DTensorSource(tensors))
    checked = _same(found, values) if rank == 0 else 0
    # Partial sums have no boxes: torch reduces them.
    partial = DTensor.from_local(
        value[: 3 - rank % 2], mesh, [Partial(), Shard(0)], shape=(5, 1), stride=(1, 1)
    )
    found = everything(DTensorSource({"a": torch.ones(1), "w": partial}))
    assert rank or torch.equal(found["w"], 2 * torch.cat([value[:3], value[:2]]))
    dist.destroy_process_group()
    return checked


def test_boxes_are_those_that_torch_gives_each_rank(tmp_path):
    assert run_ranks(_boxes_against_torch, 4, str(tmp_path / "store")) == [36, 0, 0, 0]


def test_without_process_groups_it_is_a_source_of_one_process():
    model = Model()
    source = DTensorSource(model)
    assert source.leader
    assert source.share("text") == "text"
    assert source.snapshot().manifest == ModuleSource(model).snapshot().manifest
    assert not holds_dtensors(model)
    _same(everything(source), everything(ModuleSource(model)))
