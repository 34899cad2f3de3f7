"""Sync a model's weights from a trainer to a server, each in a process of its own.

    python examples/minimal.py

On a machine with two GPUs the weights go over NCCL, otherwise over Gloo. Both processes share a
secret: PACKEDCOMM_SECRET, or what PACKEDCOMM_SECRET_FILE holds, or one that is made and printed.
"""

import torch
import torch.multiprocessing as mp
from torch import nn

from packedcomm import (
    FullWeightSender,
    Session,
    Settings,
    TensorTarget,
    WeightReceiver,
    generate_secret,
)


def make_model(device):
    return nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Linear(256, 8)).to(device)


def train(addresses, secret, device):
    model = make_model(device)
    with Session.listen("127.0.0.1:0", receivers=1, secret=secret, device=device) as session:
        addresses.put(session.address)
        sender = FullWeightSender(model, session, verify=True)
        for step in range(3):
            with torch.no_grad():
                model[0].weight += 0.1  # a training step
            # One text each: both processes print to the same place.
            print(f"sent      {sender.sync(version=step).as_dict()}", flush=True)


def serve(addresses, secret, device):
    model = make_model(device)
    with Session.connect(addresses.get(timeout=60), secret=secret, device=device) as session:
        receiver = WeightReceiver(TensorTarget(model), session)
        while result := receiver.receive():
            print(f"received  {result.version} {model[0].weight.sum().item()}", flush=True)


if __name__ == "__main__":
    gpus = torch.cuda.device_count() >= 2
    context = mp.get_context("spawn")
    addresses = context.Queue()
    # The secret that everything which takes part must have.
    secret = Settings.from_environment().secret
    if not secret:
        secret = generate_secret()
        print("secret of this run:", secret, flush=True)
    server = context.Process(target=serve, args=(addresses, secret, "cuda:1" if gpus else "cpu"))
    server.start()
    train(addresses, secret, "cuda:0" if gpus else "cpu")
    server.join(60)
    raise SystemExit(server.exitcode)
