"""Updates of a real vLLM engine: its own NCCL backend and packedcomm, in one run, on two GPUs.

    python -m benchmarks.vllm_update --model llama-3-8b --out FOLDER

A trainer process on GPU 1 holds random bfloat16 tensors by Hugging Face's names; the engine is on
GPU 0 and starts with dummy weights. Each update brings other values; digests of all parameters are
compared with the trainer's. Times are of the whole update: start, update and finish. Both backends
use the same engine, one after the other. With `--lora` a second engine is started, whose running
adapter is updated.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import UTC, datetime
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.machine import describe_machine
from benchmarks.vllm_models import (
    MODELS,
    adapter_digests,
    engine_digests,
    shapes,
    write_config,
)

_SILENCE_S = 180
_PROMPT = [1, 5, 9, 7, 300, 4242]
RANK = 16
SCALING = 2.0
_ADAPTER = "policy"


class Trainer:
    """The trainer's process; each method is a command that the main process sends."""

    def __init__(self, config: dict[str, Any], device: torch.device) -> None:
        self.config = config
        self.device = device
        self.held = {
            name: torch.empty(shape, dtype=torch.bfloat16, device=device)
            for name, shape in shapes(config).items()
        }
        self.group: Any = None
        self.session: Any = None
        self.sender: Any = None

    @torch.no_grad()
    def fill(self, seed: int) -> None:
        """Other values; norms near one, so that nothing overflows."""
        generator = torch.Generator(device=self.device).manual_seed(seed)
        for tensor in self.held.values():
            mean = 1.0 if tensor.dim() == 1 else 0.0
            tensor.normal_(mean, 0.02, generator=generator)
        torch.cuda.synchronize(self.device)

    def digests(self) -> dict[str, list[int]]:
        """What the engine must hold."""
        return engine_digests(self.held)

    def stock_init(self, port: int) -> None:
        """Join vLLM's own communicator."""
        from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferEngine

        self.group = NCCLWeightTransferEngine.trainer_init(
            {"master_address": "127.0.0.1", "master_port": port, "world_size": 2}
        )

    def stock_send(self) -> float:
        """Send by vLLM's own packed broadcast; seconds."""
        from vllm.distributed.weight_transfer.nccl_engine import (
            NCCLTrainerSendWeightsArgs,
            NCCLWeightTransferEngine,
        )

        begin = time.perf_counter()
        NCCLWeightTransferEngine.trainer_send_weights(
            iter(self.held.items()), NCCLTrainerSendWeightsArgs(group=self.group, packed=True)
        )
        torch.cuda.synchronize(self.device)
        return time.perf_counter() - begin

    def listen(self) -> str:
        """Open a session; returns its address."""
        from packedcomm import FullWeightSender, Session

        self.session = Session.listen("127.0.0.1:0", receivers=1, device=self.device)
        self.sender = FullWeightSender(self.held, self.session)
        return str(self.session.address)

    def listen_lora(self) -> str:
        """Open a session for a PEFT model's adapter; returns its address."""
        from peft import LoraConfig, get_peft_model
        from transformers import AutoConfig, AutoModelForCausalLM

        from packedcomm import LoraSender, Session

        config = AutoConfig.for_model(**self.config)
        with torch.device("meta"):
            base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            model = get_peft_model(
                base,
                LoraConfig(
                    r=RANK, lora_alpha=int(SCALING * RANK), target_modules="all-linear", bias="none"
                ),
                autocast_adapter_dtype=False,
            )
        self.held = {}
        model.to(torch.bfloat16).to_empty(device=self.device)
        self.session = Session.listen("127.0.0.1:0", receivers=1, device=self.device)
        self.sender = LoraSender(model, self.session)
        self.held = {
            name.replace(".default", ""): parameter.data
            for name, parameter in model.named_parameters()
            if "lora_" in name
        }
        return str(self.session.address)

    def size(self) -> dict[str, int]:
        """How much is sent, for the record."""
        return {
            "tensors": len(self.held),
            "bytes": sum(tensor.nbytes for tensor in self.held.values()),
        }

    def adapter_digests(self) -> dict[str, list[int]]:
        """What the engine's slot must hold."""
        return adapter_digests(self.held, SCALING)

    def sync(self) -> dict[str, float]:
        """One sync; seconds by stage."""
        return dict(self.sender.sync().seconds)

    def close(self) -> None:
        """End the session."""
        if self.session is not None:
            self.session.close()


def _serve(connection: Connection, config: dict[str, Any], device: int) -> None:
    torch.cuda.set_device(device)
    trainer = Trainer(config, torch.device("cuda", device))
    connection.send(("up", None))
    while True:
        command, arguments = connection.recv()
        if command == "quit":
            trainer.close()
            return
        try:
            connection.send((command, getattr(trainer, command)(*arguments)))
        except Exception as error:  # noqa: BLE001 - it is the main process's
            connection.send((command, error))


class Run:
    """One engine and one trainer."""

    def __init__(self, name: str, out: Path | None, options: dict[str, Any]) -> None:
        self.config = MODELS[name]
        self.record: dict[str, Any] = {
            "program": "benchmarks.vllm_update",
            "model": name,
            "time": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        self.out = out
        context = torch.multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs, self.config, 1), daemon=True)
        self.process.start()
        from vllm import LLM, SamplingParams

        begin = time.perf_counter()
        # Goes with this.
        self._folder = tempfile.TemporaryDirectory()
        folder = write_config(name, Path(self._folder.name))
        self.llm: Any = LLM(
            model=str(folder),
            skip_tokenizer_init=True,
            load_format="dummy",
            enforce_eager=True,
            dtype="bfloat16",
            max_model_len=512,
            max_num_seqs=4,
            max_num_batched_tokens=512,
            kv_cache_memory_bytes=1 << 30,
            gpu_memory_utilization=0.85,
            enable_prefix_caching=False,
            worker_extension_cls="benchmarks.vllm_worker.Extension",
            **options,
        )
        self.sampling: Any = SamplingParams(
            max_tokens=12, temperature=0.0, detokenize=False, ignore_eos=True
        )
        self.say("engine", seconds=round(time.perf_counter() - begin, 1))
        self.answer("up")

    def say(self, about: str, /, **values: Any) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {about}", json.dumps(values), flush=True)

    def save(self) -> None:
        import vllm

        self.record["machine"] = describe_machine("cuda") | {"vllm": vllm.__version__}
        if self.out is not None:
            path = self.out / f"vllm-update-{self.record['model']}.json"
            path.write_text(json.dumps(self.record, indent=1) + "\n")

    def tell(self, command: str, *arguments: Any) -> None:
        self.connection.send((command, arguments))

    def answer(self, command: str) -> Any:
        if not self.connection.poll(_SILENCE_S):
            raise TimeoutError(f"the trainer is silent: {command}")
        told, found = self.connection.recv()
        if isinstance(found, Exception):
            raise found
        assert told == command, (told, command)
        return found

    def ask(self, command: str, *arguments: Any) -> Any:
        self.tell(command, *arguments)
        return self.answer(command)

    def worker(self, method: str, *arguments: Any) -> Any:
        return self.llm.collective_rpc(method, args=arguments)[0]

    def tokens(self, **options: Any) -> list[int]:
        prompt = [{"prompt_token_ids": _PROMPT}]
        found = self.llm.generate(prompt, self.sampling, use_tqdm=False, **options)
        return list(found[0].outputs[0].token_ids)

    def update(self, command: str, body: dict[str, Any]) -> dict[str, Any]:
        """One whole update, timed."""
        before = json.loads(self.worker("pc_memory"))["allocated"]
        begin = time.perf_counter()
        self.llm.start_weight_update()
        started = time.perf_counter()
        self.tell(command)
        self.llm.update_weights({"update_info": body})
        updated = time.perf_counter()
        self.llm.finish_weight_update()
        end = time.perf_counter()
        sent = self.answer(command)
        peak = json.loads(self.worker("pc_memory"))["peak"]
        return {
            "seconds": end - begin,
            "start": started - begin,
            "update": updated - started,
            "finish": end - updated,
            "sent": sent,
            "extra_bytes": peak - before,
        }

    def rounds(
        self, way: str, command: str, body: dict[str, Any], count: int, skip: int, **options: Any
    ) -> None:
        """Updates with other values each; the first ones are checked, and counted apart."""
        found = []
        for turn in range(skip + count):
            self.ask("fill", 100 + turn)
            found.append(self.update(command, body))
            self.say(way, turn=turn, **found[-1])
            if turn < skip or turn == skip + count - 1:
                self.check(f"{way} {turn}")
        later = found[skip:]
        self.record[way] = {
            "first": found[:skip],
            "rounds": later,
            "median_s": statistics.median(each["seconds"] for each in later),
            "extra_bytes": max(each["extra_bytes"] for each in later),
            "tokens": self.tokens(**options),
        }
        self.save()

    def check(self, what: str) -> None:
        if "adapter" in what:
            expected = self.ask("adapter_digests")
            held = json.loads(self.worker("pc_adapter_digests", RANK))
        else:
            expected, held = self.ask("digests"), json.loads(self.worker("pc_digests"))
        wrong = [name for name in {*expected, *held} if expected.get(name) != held.get(name)]
        self.record.setdefault("checks", {})[what] = {
            "parameters": len(held),
            "wrong": sorted(wrong)[:8],
        }
        self.say("check", what=what, parameters=len(held), wrong=sorted(wrong)[:8])
        if wrong:
            self.save()
            raise AssertionError(f"{what}: {len(wrong)} of {len(held)} parameters are wrong")

    def end(self) -> None:
        self.save()
        self.tell("quit")
        self.process.join(10)


def _full(name: str, out: Path | None, rounds: int) -> None:
    from vllm.config import WeightTransferConfig

    run = Run(name, out, {"weight_transfer_config": WeightTransferConfig(backend="nccl")})
    names = shapes(run.config)
    body = {
        "names": list(names),
        "dtype_names": ["bfloat16"] * len(names),
        "shapes": [list(shape) for shape in names.values()],
        "packed": True,
    }
    port = 29731
    run.tell("stock_init", port)
    run.llm.init_weight_transfer_engine(
        {
            "init_info": {
                "master_address": "127.0.0.1",
                "master_port": port,
                "rank_offset": 1,
                "world_size": 2,
            }
        }
    )
    run.answer("stock_init")
    run.record |= run.ask("size")
    run.rounds("stock", "stock_send", body, rounds, 1)
    run.say("engine of the workers", name=run.worker("pc_use", "packedcomm"))
    address = run.ask("listen")
    run.llm.init_weight_transfer_engine({"init_info": {"address": address}})
    run.rounds("packedcomm", "sync", {}, rounds, 3)
    run.record["status"] = json.loads(run.worker("pc_status"))
    run.say("status", **run.record["status"])
    same = run.record["stock"]["tokens"], run.record["packedcomm"]["tokens"]
    run.say("tokens", stock=same[0], packedcomm=same[1])
    run.end()


def _lora(name: str, out: Path | None, rounds: int) -> None:
    from vllm.lora.request import LoRARequest

    options = {"enable_lora": True, "max_loras": 1, "max_lora_rank": RANK}
    run = Run(name, out, {"weight_transfer_config": {"backend": "packedcomm"}} | options)
    run.record["model"] = f"{name}-lora-r{RANK}"
    request = LoRARequest(_ADAPTER, 1, f"packedcomm:{_ADAPTER}")
    base = run.tokens()
    run.llm.llm_engine.add_lora(request)
    address = run.ask("listen_lora")
    run.record |= run.ask("size")
    run.llm.init_weight_transfer_engine({"init_info": {"address": address}})
    body = {"kind": "adapter", "adapter": _ADAPTER}
    run.rounds("adapter", "sync", body, rounds, 1, lora_request=request)
    run.record["tokens_without"] = [base, run.tokens()]
    run.say("tokens", base=run.record["tokens_without"], adapter=run.record["adapter"]["tokens"])
    run.end()


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.vllm_update", description=__doc__.splitlines()[0]
    )
    parser.add_argument("--model", choices=sorted(MODELS), default="llama-3-8b")
    parser.add_argument("--lora", action="store_true", help="update a running adapter instead")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for the JSON")
    arguments = parser.parse_args(argv)
    os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    run = _lora if arguments.lora else _full
    run(arguments.model, arguments.out, arguments.rounds)
    # vLLM's own end takes long, and says nothing of the measurement.
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
