"""The real engine with adapters, in this process, and PEFT models to compare it with: vLLM's CPU
build, or on the first GPU, with the trainer on the last one.

To be imported before vllm, which reads some of what is set here at once.
"""

from __future__ import annotations

import copy
import gc
import os

import pytest
import torch
import zmq

if torch.cuda.device_count() == 1:
    pytest.skip("on GPUs the trainer needs one of its own", allow_module_level=True)

# Before vLLM is imported, which reads some of it at once.
os.environ |= {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_ALLOW_INSECURE_SERIALIZATION": "1",
    "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_USE_FLASHINFER_SAMPLER": "0",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_HOST_IP": "127.0.0.1",
    "GLOO_SOCKET_IFNAME": "lo",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHINDUCTOR_CACHE_DIR": os.environ.get("TORCHINDUCTOR_CACHE_DIR", "/tmp/torchinductor_root"),
}

from peft import LoraConfig, get_peft_model
from transformers import (
    GptOssConfig,
    GptOssForCausalLM,
    GraniteMoeHybridConfig,
    GraniteMoeHybridForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from packedcomm import WeightReceiver
from packedcomm.engines.vllm.adapters import adapter_target, install_adapter_hook
from tests.helpers.in_process import Round

# Those of an engine with two workers are the first two.
GPUS = torch.cuda.device_count()
ENGINE = torch.device("cuda", 0) if GPUS > 1 else torch.device("cpu")
TRAINER = torch.device("cuda", GPUS - 1) if GPUS > 1 else torch.device("cpu")
# vLLM's kernels for adapters on GPUs take no float32.
ADAPTED = torch.float16 if GPUS > 1 else torch.float32
# Of every engine here.
OPTIONS = {
    "enforce_eager": True,
    "skip_tokenizer_init": True,
    "max_model_len": 64,
    "max_num_seqs": 4,
    "max_num_batched_tokens": 128,
    # Several share a GPU.
    **({"gpu_memory_utilization": 0.1, "kv_cache_memory_bytes": 1 << 26} if GPUS > 1 else {}),
}
# Log-probabilities differ by so much where nothing is wrong: by what float16 loses, and where
# matrices of float32 are multiplied as of tf32.
TOLERANCE = {torch.float16: 0.1, torch.float32: 0.03 if GPUS > 1 else 2e-4}
# Kept until the process ends.
_CONTEXTS = []
PROMPTS = ([1, 5, 9, 7, 300, 411], [3, 100, 200])
PROMPT_TOKENS = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
TOKENS = 8
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COMMON = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 256,
    "tie_word_embeddings": False,
    "initializer_range": 0.08,
}


def llama():
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**COMMON)).to(TRAINER)


def qwen3_moe(chosen=2):
    torch.manual_seed(0)
    experts = {"num_experts": 4, "num_experts_per_tok": chosen, "moe_intermediate_size": 64}
    config = Qwen3MoeConfig(**COMMON, **experts, norm_topk_prob=True)
    return Qwen3MoeForCausalLM(config).to(TRAINER)


def granite():
    """One whose `input_linear` is two projections in one."""
    torch.manual_seed(0)
    config = GraniteMoeHybridConfig(
        **{name: value for name, value in COMMON.items() if name != "head_dim"},
        shared_intermediate_size=256,
        num_local_experts=0,
        num_experts_per_tok=0,
        layer_types=["attention", "attention"],
        position_embedding_type="rope",
        # No layer is of this kind, but vLLM looks at its sizes.
        mamba_n_heads=8,
        mamba_d_head=32,
        mamba_n_groups=2,
    )
    return GraniteMoeHybridForCausalLM(config).to(TRAINER)


def gpt_oss():
    """One whose loader goes on at names that it doesn't know."""
    torch.manual_seed(0)
    config = GptOssConfig(
        **COMMON,
        num_local_experts=4,
        num_experts_per_tok=2,
        layer_types=["full_attention", "full_attention"],
    )
    return GptOssForCausalLM(config).to(TRAINER)


class Trainer:
    """A PEFT model whose adapter takes new random values at will."""

    def __init__(self, model, **config):
        config = {"r": 8, "lora_alpha": 24, "target_modules": LINEAR} | config
        self.model = get_peft_model(copy.deepcopy(model), LoraConfig(**config)).eval()

    def randomise(self, seed, generate=True):
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.model.named_parameters():
            if "lora_" in name:
                values = torch.empty(parameter.shape).normal_(0, 0.2, generator=generator)
                parameter.data.copy_(values)
        return generated(self.model) if generate else None


def generated(model, prompts=PROMPTS):
    """Greedy tokens for each prompt, and their log-probabilities."""
    result = []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=TRAINER)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=TOKENS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
        with torch.no_grad():
            logits = model(input_ids=out).logits[0, len(prompt) - 1 : -1].float()
        tokens = out[0, len(prompt) :]
        found = logits.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
        result.append((tokens.tolist(), found.cpu()))
    return result


def greedy():
    """How engines are asked."""
    from vllm import SamplingParams

    return SamplingParams(
        max_tokens=TOKENS, temperature=0.0, logprobs=1, ignore_eos=True, detokenize=False
    )


def answers(outputs):
    """What an engine has answered, as `generated` gives it."""
    result = []
    for output in (o.outputs[0] for o in outputs):
        tokens = list(output.token_ids)
        found = [at[t].logprob for t, at in zip(tokens, output.logprobs, strict=True)]
        result.append((tokens, torch.tensor(found)))
    return result


class Engine:
    """The engine, in this process unless told otherwise, with the hook installed here."""

    def __init__(self, model, path, **options):
        from vllm import LLM

        model.save_pretrained(path)
        install_adapter_hook()
        self.base = generated(model)
        self.llm = LLM(
            model=str(path),
            enable_prefix_caching=False,
            enable_lora=True,
            max_lora_rank=16,
            dtype=str(ADAPTED).removeprefix("torch."),
            **OPTIONS,
            **options,
        )

    def request(self, name, number, path=None, **options):
        from vllm.lora.request import LoRARequest

        path = path or f"packedcomm:{name}"
        return LoRARequest(lora_name=name, lora_int_id=number, lora_path=path, **options)

    def generate(self, request=None):
        outputs = self.llm.generate(PROMPT_TOKENS, greedy(), use_tqdm=False, lora_request=request)
        return answers(outputs)

    def close(self):
        # vLLM leaves the contexts of its queues to the garbage collector, which it calls here. Of a
        # cycle, such as an exception's frames make, it may end a context before its sockets, and
        # waits for them for ever.
        _CONTEXTS.extend(o for o in gc.get_objects() if issubclass(type(o), zmq.Context))
        self.llm.llm_engine.engine_core.shutdown()

    @property
    def worker(self):
        return self.llm.llm_engine.model_executor.driver_worker.worker

    @property
    def model(self):
        return self.worker.get_model()

    def slots(self):
        return list(self.model.lora_manager.lora_index_to_id)

    def target(self, name):
        return adapter_target(self.model, self.worker.vllm_config, ENGINE, name)

    def sync(self, sender, session, name):
        """One sync into the adapter; what the sender and the worker got of it."""
        receiver = WeightReceiver(self.target(name), session)
        done = Round(sender.sync, [receiver])
        return done.sent, done.received[0]


def agree(found, expected, dtype=ADAPTED):
    """The same tokens with the same log-probabilities, as far as the engine's dtype goes. On a GPU,
    up to a token that has another one as likely beside it."""
    for (tokens, scores), (expected_tokens, expected_scores) in zip(found, expected, strict=True):
        length = len(expected_tokens)
        if GPUS > 1 and tokens != expected_tokens:
            same = [a == b for a, b in zip(tokens, expected_tokens, strict=True)]
            length = same.index(False) + 1
        else:
            assert tokens == expected_tokens
        torch.testing.assert_close(
            scores[:length], expected_scores[:length], atol=TOLERANCE[dtype], rtol=0
        )


def differ(one, other):
    return [tokens for tokens, _ in one] != [tokens for tokens, _ in other]


def succeeded(outcome):
    sent, received = outcome
    assert not isinstance(sent, Exception), sent
    assert not isinstance(received, Exception), received
    return sent
