"""Reinforcement learning in small: vLLM generates, transformers learns, packedcomm syncs.

    python examples/vllm_engine.py --mode full    # every weight, after every step
    python examples/vllm_engine.py --mode lora    # only an adapter, which never touches a disk

A tiny random Llama learns to say even tokens. In each step vLLM samples several answers to each
prompt, an answer's advantage is how much better it is than its group (GRPO), the trainer takes one
step of policy gradient, and the weights go into the running engine. At every version two things are
checked: vLLM's greedy answers are those of the trainer's model, token by token, and so are the
log-probabilities that vLLM reports with its samples, which importance ratios rely on.

Engine and trainer share this process: both are on the CPU or, where there are two GPUs, the engine
has the first one and the trainer the second. There vLLM computes with less precision, so that two
tokens may be equally likely. Needs vllm, transformers and peft.
"""

import argparse
import contextlib
import os
import tempfile
import time

# vLLM reads these when it is imported. With the first it runs in this process and not in a child.
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM
from vllm import LLM, SamplingParams
from vllm.lora.request import LoRARequest

from packedcomm import FullWeightSender, LoraSender, Session, Settings, generate_secret
from packedcomm.engines.vllm.client import EngineUpdater, LocalEngine

STEPS = 10
SAMPLES = 16  # answers to each prompt
PROMPTS = torch.randint(256, (4, 8), generator=torch.Generator().manual_seed(1))
ANSWER = 12  # tokens
RANK = 8
GPUS = torch.cuda.device_count() >= 2
# How far apart log-probabilities may be, by mode: on GPUs vLLM multiplies float32 matrices as of
# tf32, and its kernels for adapters take float16.
NEAR = {"full": 0.03, "lora": 0.1} if GPUS else {"full": 1e-3, "lora": 1e-3}


def make_model():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        initializer_range=0.08,  # the usual 0.02 makes all tokens nearly as likely
    )
    return LlamaForCausalLM(config)


def reward(answers):
    """Of each answer, [answers, tokens] -> [answers]: the share of its tokens that are even."""
    return (answers % 2 == 0).float().mean(-1)


class Engine:
    """vLLM's end: samples, and greedy answers."""

    def __init__(self, folder, lora):
        # There is nothing at that path: what the adapter is comes with its first sync.
        self.adapter = LoRARequest("policy", 1, lora_path="packedcomm:policy") if lora else None
        options = {"enable_lora": True, "max_lora_rank": RANK} if lora else {}
        self.llm = LLM(
            model=folder,
            # In full mode the engine starts with weights of its own, so that only a sync helps.
            load_format="auto" if lora else "dummy",
            weight_transfer_config={"backend": "packedcomm"},
            skip_tokenizer_init=True,
            enforce_eager=True,
            dtype="float16" if lora and GPUS else "float32",
            max_model_len=64,
            gpu_memory_utilization=0.3,
            **options,
        )
        if lora:
            self.llm.llm_engine.add_lora(self.adapter)

    def sample(self):
        """Answers [prompts * samples, tokens], grouped by prompt, and their log-probabilities."""
        outputs = self._generate(n=SAMPLES, temperature=1.0, logprobs=0)
        samples = [sample for output in outputs for sample in output.outputs]
        answers = torch.tensor([sample.token_ids for sample in samples])
        scores = [
            [at[token].logprob for token, at in zip(s.token_ids, s.logprobs, strict=True)]
            for s in samples
        ]
        return answers, torch.tensor(scores)

    def greedy(self):
        """The likeliest answer to each prompt, [prompts, tokens]."""
        outputs = self._generate(temperature=0.0)
        return torch.tensor([output.outputs[0].token_ids for output in outputs])

    def _generate(self, **sampling):
        sampling = SamplingParams(max_tokens=ANSWER, ignore_eos=True, detokenize=False, **sampling)
        prompts = [{"prompt_token_ids": prompt} for prompt in PROMPTS.tolist()]
        return self.llm.generate(prompts, sampling, use_tqdm=False, lora_request=self.adapter)

    def way(self):
        """How the worker has carried out the last update of the model's own weights."""
        engines = self.llm.collective_rpc(lambda worker: worker.weight_transfer_engine.status())
        return engines[0]["way"]


class Trainer:
    """The policy and its optimizer."""

    def __init__(self, model, device, lora):
        if lora:
            adapter = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear")
            model = get_peft_model(model, adapter)
        self.model = model.to(device).eval()  # there is no dropout to train with
        self.device = device
        trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=2e-2 if lora else 4e-3)

    def step(self, answers, sampled_scores):
        """One step of policy gradient; returns the mean reward, and by how much the engine's
        log-probabilities differ from those of the policy that it was given."""
        rewards = reward(answers)
        groups = rewards.view(len(PROMPTS), SAMPLES)
        spread = groups.std(dim=1, keepdim=True) + 1e-4
        advantages = ((groups - groups.mean(dim=1, keepdim=True)) / spread).flatten()

        scores = self.scores(answers)
        ratios = (scores - sampled_scores.to(self.device)).exp()
        loss = -(ratios * advantages.to(self.device)[:, None]).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        off = (scores.detach().cpu() - sampled_scores).abs().max()
        return rewards.mean().item(), off.item()

    def scores(self, answers):
        """Log-probabilities of the answers' tokens."""
        return self._all_scores(answers).gather(-1, answers.to(self.device)[..., None]).squeeze(-1)

    def _all_scores(self, answers):
        prompts = PROMPTS.repeat_interleave(len(answers) // len(PROMPTS), dim=0)
        tokens = torch.cat([prompts, answers], dim=1).to(self.device)
        return self.model(input_ids=tokens).logits[:, -ANSWER - 1 : -1].log_softmax(-1)

    @torch.no_grad()
    def agrees(self, answers, near):
        """Whether the engine's greedy answers are the policy's; on GPUs also where a token is as
        likely as the likeliest, so nearly."""
        if not GPUS:
            return torch.equal(answers, self.greedy())
        best = self._all_scores(answers).amax(-1)
        return bool((best - self.scores(answers) <= near).all())

    def greedy(self):
        """As `Engine.greedy`."""
        prompts = PROMPTS.to(self.device)
        tokens = self.model.generate(
            input_ids=prompts,
            attention_mask=torch.ones_like(prompts),
            max_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        return tokens[:, -ANSWER:].cpu()


def main(mode):
    lora = mode == "lora"
    if not Settings.from_environment().secret:
        # Workers take it from the environment, never from a request.
        os.environ["PACKEDCOMM_SECRET"] = generate_secret()
    # The engine has the first GPU.
    device = "cuda:1" if GPUS else "cpu"
    model = make_model()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        model.save_pretrained(folder)
        engine = Engine(folder, lora)
        stack.callback(engine.llm.llm_engine.engine_core.shutdown)
        trainer = Trainer(model, device, lora)

        session = stack.enter_context(
            Session.listen(
                "127.0.0.1:0", receivers=1, device=device, settings=Settings.from_environment()
            )
        )
        updater = EngineUpdater(LocalEngine(engine.llm), session)
        updater.connect()
        sender = (LoraSender if lora else FullWeightSender)(trainer.model, session)

        def sync(version):
            update = updater.update(sender, version, adapter="policy" if lora else "")
            if not trainer.agrees(engine.greedy(), NEAR[mode]):
                raise SystemExit(f"version {version}: vLLM doesn't answer as the trainer's model")
            way = "" if lora else f" ({engine.way()})"
            return (
                f"version {update.result.version}: {update.result.bytes} bytes in "
                f"{1e3 * update.seconds['total']:.1f} ms{way}"
            )

        print(f"start: {sync(0)}", flush=True)
        for step in range(1, STEPS + 1):
            begun = time.perf_counter()
            mean, off = trainer.step(*engine.sample())
            if off > NEAR[mode]:
                raise SystemExit(f"step {step}: vLLM's log-probabilities are off by {off:.1e}")
            synced = sync(step)
            print(
                f"step {step}: reward {mean:.2f}, log-probabilities off by {off:.0e}; {synced}; "
                f"{time.perf_counter() - begun:.2f} s in all",
                flush=True,
            )
        print(f"in the end: reward {reward(engine.sample()[0]).mean():.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--mode", choices=["full", "lora"], default="full")
    main(parser.parse_args().mode)
