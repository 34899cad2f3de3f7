"""Train a LoRA adapter with PEFT and serve it from another process, synced after every step.

    python examples/lora.py

The trainer's adapter goes into the server's live PEFT model, in place. After each sync the server's
logits are compared with those of the trainer's model with its adapter merged into the weights. On a
machine with two GPUs the adapter goes over NCCL, otherwise over Gloo.
"""

import copy

import torch
import torch.multiprocessing as mp
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from packedcomm import (
    AdapterTarget,
    LoraSender,
    Session,
    Settings,
    SyncPolicy,
    WeightReceiver,
    generate_secret,
)

STEPS = 3
PROMPT = torch.arange(24).view(2, 12)


def make_model(device):
    """The same small Llama in every process, with an adapter that isn't trained yet."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    adapter = LoraConfig(r=8, lora_alpha=16, target_modules=["q_proj", "v_proj", "down_proj"])
    return get_peft_model(LlamaForCausalLM(config), adapter).to(device)


@torch.no_grad()
def merged_logits(model, device):
    """What the model would answer with its adapter merged, which PEFT computes on a copy."""
    merged = copy.deepcopy(model).merge_and_unload().eval()
    return merged(PROMPT.to(device)).logits.cpu()


def train(addresses, expected, secret, device):
    model = make_model(device)
    optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-2)
    with Session.listen("127.0.0.1:0", receivers=1, secret=secret, device=device) as session:
        addresses.put(session.address)
        sender = LoraSender(model, session, policy=SyncPolicy(every=1, initial=True))
        sender.step(0)
        expected.put(merged_logits(model, device).numpy())
        for step in range(1, STEPS + 1):
            tokens = PROMPT.to(device)
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            result = sender.step(step)
            expected.put(merged_logits(model, device).numpy())
            print(
                f"step {step}: loss {loss.item():.3f}, {result.changed_tensors} of "
                f"{result.tensors} tensors changed, {result.bytes} bytes in "
                f"{result.seconds['total'] * 1e3:.1f} ms",
                flush=True,
            )


def serve(addresses, expected, secret, device):
    model = make_model(device).eval()
    with Session.connect(addresses.get(timeout=120), secret=secret, device=device) as session:
        receiver = WeightReceiver(AdapterTarget(model), session)
        while (result := receiver.receive()) is not None:
            with torch.no_grad():
                logits = model(PROMPT.to(device)).logits.cpu()
            difference = (logits - torch.from_numpy(expected.get(timeout=120))).abs().max().item()
            print(
                f"        version {result.version}: logits differ by {difference:.1e}", flush=True
            )
            if difference > 1e-4:
                raise SystemExit("the server doesn't answer as the trainer's merged model")


if __name__ == "__main__":
    gpus = torch.cuda.device_count() >= 2
    context = mp.get_context("spawn")
    addresses, expected = context.Queue(), context.Queue()
    # The secret that everything which takes part must have.
    secret = Settings.from_environment().secret
    if not secret:
        secret = generate_secret()
        print("secret of this run:", secret, flush=True)
    server = context.Process(
        target=serve, args=(addresses, expected, secret, "cuda:1" if gpus else "cpu")
    )
    server.start()
    train(addresses, expected, secret, "cuda:0" if gpus else "cpu")
    server.join(60)
    raise SystemExit(server.exitcode)
