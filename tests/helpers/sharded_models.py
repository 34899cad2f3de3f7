"""A small model of odd dimensions, and the ways in which trainers shard it over processes."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

__all__ = ["HEADS", "KV_HEADS", "Model", "full_tensors", "join", "shard", "train"]

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 6


class Block(nn.Module):
    def __init__(self, hidden=11, inner=13):
        super().__init__()
        self.q_proj = nn.Linear(hidden, HEADS * HEAD_SIZE)
        self.k_proj = nn.Linear(hidden, KV_HEADS * HEAD_SIZE, bias=False)
        self.up = nn.Linear(hidden, inner)
        self.down = nn.Linear(inner, hidden)
        self.norm = nn.LayerNorm(hidden)

    def forward(self, x):
        return self.norm(x + self.down(self.up(x).relu()) + self.q_proj(x).sum() * 0)


class Model(nn.Module):
    """Odd dimensions, so that shards are uneven and some are empty; a tied head."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.embed = nn.Embedding(17, 11)
        self.layers = nn.ModuleList(Block() for _ in range(2))
        self.head = nn.Linear(11, 17, bias=False)
        self.head.weight = self.embed.weight
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("steps", torch.tensor(5))

    def forward(self, tokens):
        x = self.embed(tokens) * self.scale
        for layer in self.layers:
            x = layer(x)
        return self.head(x)


TP_PLAN = {
    "layers.*.q_proj": ColwiseParallel(),
    "layers.*.up": ColwiseParallel(),
    "layers.*.down": RowwiseParallel(),
}


def join(rank, world_size, store, backend="gloo"):
    """Set up torch.distributed's default group, through a file that is new for each test."""
    if "nccl" in backend:
        torch.cuda.set_device(rank)
    dist.init_process_group(
        backend, init_method=f"file://{store}", rank=rank, world_size=world_size
    )


def shard(model, kind, world_size, device="cpu"):
    """The model sharded in one of the ways that trainers use."""
    if kind == "tp":
        parallelize_module(model, init_device_mesh(device, (world_size,)), TP_PLAN)
        return model
    policy = {"offload_policy": CPUOffloadPolicy(pin_memory=False)} if kind == "offload" else {}
    if kind == "fsdp_tp":
        mesh = init_device_mesh(device, (world_size // 2, 2), mesh_dim_names=("dp", "tp"))
        parallelize_module(model, mesh["tp"], TP_PLAN)
        policy["mesh"] = mesh["dp"]
    elif kind == "hsdp":
        policy["mesh"] = init_device_mesh(
            device, (2, world_size // 2), mesh_dim_names=("replicate", "shard")
        )
    else:
        policy["mesh"] = init_device_mesh(device, (world_size,))
    for layer in model.layers:
        fully_shard(layer, **policy)
    return fully_shard(model, **policy)


def full_tensors(model):
    """The independent reference: torch gathers each tensor by itself."""
    return {
        name: t.full_tensor() if isinstance(t, DTensor) else t
        for name, t in model.state_dict().items()
    }


def train(model):
    """Other values in every shard, in place, as an optimizer leaves them."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(-1.5)
