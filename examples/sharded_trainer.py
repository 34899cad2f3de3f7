"""Two FSDP2 trainer ranks send their weights to two tensor-parallel server ranks.

    torchrun --nproc-per-node 4 examples/sharded_trainer.py

Ranks 0 and 1 train a small Llama with every parameter sharded over both. Ranks 2 and 3 serve it,
each with its half of every head and of every MLP. A sync gathers one parameter at a time, rank 0
sends it, and each server rank takes its slices straight into place. After each sync the servers'
logits are compared with the trainers'. With four GPUs everything goes over NCCL, otherwise over
Gloo.
"""

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from transformers import LlamaConfig, LlamaForCausalLM

from packedcomm import (
    DTensorSource,
    FullWeightSender,
    FusedTarget,
    ModelGeometry,
    Session,
    Settings,
    StagedTarget,
    WeightReceiver,
    generate_secret,
)

STEPS = 3
CONFIG = LlamaConfig(
    vocab_size=130,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
TOKENS = torch.arange(2 * 16).view(2, 16)


def train(mesh, session, device):
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(device)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    # Every trainer rank takes part in the gathers; the first one has the session and sends.
    sender = FullWeightSender(DTensorSource(model, group=mesh.get_group()), session, verify=True)
    for step in range(STEPS):
        tokens = TOKENS.to(device)
        loss = model(tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        result = sender.sync(version=step)
        with torch.no_grad():
            logits = model(tokens).logits
        dist.broadcast(logits, src=0)
        if session is not None:
            print(
                f"step {step}: loss {loss.item():.3f}, sent {result.tensors} tensors, "
                f"{result.bytes} bytes in {result.seconds['total'] * 1e3:.1f} ms",
                flush=True,
            )


def serve(mesh, session, device):
    torch.manual_seed(1)
    model = LlamaForCausalLM(CONFIG).to(device).requires_grad_(False)
    for layer in model.model.layers:
        columns = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj")
        plan = dict.fromkeys((*columns, "mlp.up_proj"), ColwiseParallel())
        plan |= dict.fromkeys(("self_attn.o_proj", "mlp.down_proj"), RowwiseParallel())
        parallelize_module(layer, mesh, plan)
    local = {
        name: parameter.to_local() if isinstance(parameter, DTensor) else parameter
        for name, parameter in model.named_parameters()
    }
    geometry = ModelGeometry(
        num_heads=CONFIG.num_attention_heads,
        num_kv_heads=CONFIG.num_key_value_heads,
        head_size=CONFIG.hidden_size // CONFIG.num_attention_heads,
        tp_rank=mesh.get_local_rank(),
        tp_size=mesh.size(),
    )
    receiver = WeightReceiver(StagedTarget(FusedTarget(local, geometry)), session)
    for _ in range(STEPS):
        result = receiver.receive()
        logits = model(TOKENS.to(device)).logits
        expected = torch.empty_like(logits)
        dist.broadcast(expected, src=0)
        difference = (logits - expected).abs().max().item()
        print(
            f"        rank {dist.get_rank()}, version {result.version}: "
            f"logits differ by {difference:.1e}",
            flush=True,
        )
        if difference > 1e-4:
            raise SystemExit("the server doesn't answer as the trainer's model")
    receiver.receive()  # the sender closes


def main():
    gpus = torch.cuda.device_count() >= 4
    dist.init_process_group("nccl" if gpus else "gloo")
    rank = dist.get_rank()
    device = f"cuda:{rank}" if gpus else "cpu"
    if gpus:
        torch.cuda.set_device(rank)
    roles = init_device_mesh("cuda" if gpus else "cpu", (2, 2), mesh_dim_names=("role", "rank"))
    mesh = roles["rank"]
    meeting = [None, None]
    listening = None
    if rank == 0:
        # torchrun hands the environment to every rank, but it need not hold a secret.
        secret = Settings.from_environment().secret
        if not secret:
            secret = generate_secret()
            print("secret of this run:", secret, flush=True)
        listening = Session.listen("127.0.0.1:0", receivers=2, secret=secret, device=device)
        meeting = [listening.address, secret]
    dist.broadcast_object_list(meeting, src=0)
    if rank == 0:
        with listening as session:
            train(mesh, session, device)
    elif rank == 1:
        train(mesh, None, device)
    else:
        with Session.connect(meeting[0], secret=meeting[1], device=device) as session:
            serve(mesh, session, device)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
