"""Real engines that are synced into, the models for them, and trainers that die.

To be imported before vllm, as `vllm_adapters`, which makes the settings.
"""

from __future__ import annotations

import copy
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from packedcomm import FullWeightSender, Session
from packedcomm.engines.vllm.client import EngineUpdater, HttpEngine
from tests.helpers.interrupted import Interrupted
from tests.helpers.sessions import QUICK
from tests.helpers.vllm_adapters import (
    ADAPTED,
    COMMON,
    OPTIONS,
    PROMPTS,
    TOKENS,
    TRAINER,
    Engine,
    differ,
    generated,
    llama,
)
from tests.helpers.vllm_adapters import agree as agree_in

# Chunks of some tensors each: a failure is in the middle of many.
SMALL = replace(QUICK, buffer_size_bytes=1 << 16)

# Seconds for whatever a process is waited for, but a server's start.
WAIT_S = 60
START_S = 150


def qwen3():
    torch.manual_seed(0)
    return Qwen3ForCausalLM(Qwen3Config(**COMMON)).to(TRAINER)


def changed(model, seed):
    """A copy with other weights."""
    generator = torch.Generator().manual_seed(seed)
    other = copy.deepcopy(model).eval()
    for parameter in other.parameters():
        mean, spread = (1.0, 0.2) if parameter.dim() == 1 else (0.0, 0.08)
        values = torch.empty(parameter.shape).normal_(mean, spread, generator=generator)
        parameter.data.copy_(values)
    return other


def two_models():
    """Two models of the kind that the engines have, and what they answer."""
    both = [changed(llama(), seed) for seed in (1, 2)]
    found = [(model, generated(model)) for model in both]
    assert differ(found[0][1], found[1][1])
    return found


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def tensors_of(model):
    return {name: parameter.data for name, parameter in model.named_parameters()}


def on_host(model):
    return {name: tensor.cpu() for name, tensor in tensors_of(model).items()}


def status_of(worker):
    """Runs in each worker."""
    return worker.weight_transfer_engine.status()


def agree(found, expected):
    """As for engines with adapters; those without are of float32."""
    agree_in(found, expected, torch.float32)


class SyncedEngine(Engine):
    """An engine with this backend and without adapters, unless otherwise is asked for."""

    def __init__(self, model, path, backend="packedcomm", **options):
        from vllm import LLM

        model.save_pretrained(path)
        defaults = {"dtype": "float32", **OPTIONS}
        self.llm = LLM(
            model=str(path),
            weight_transfer_config={"backend": backend},
            **defaults | options,
        )

    def statuses(self):
        return self.llm.collective_rpc(status_of)


@contextmanager
def trainer_of(engine, receivers=1, **settings):
    """A session, and an updater that has connected the engine to it."""
    with Session.listen(
        "127.0.0.1:0", receivers=receivers, device=TRAINER, settings=replace(SMALL, **settings)
    ) as session:
        updater = EngineUpdater(engine, session, timeout_s=20)
        assert updater.connect() == receivers
        yield session, updater


def _die(pipe, tensors, receivers, url, share):
    """A trainer's process: killed in its second sync, of other weights; the first one is whole."""
    # Memory that is passed to another process is shared with it.
    tensors = {name: tensor.to(TRAINER, copy=True) for name, tensor in tensors.items()}
    settings = replace(SMALL, secret=os.environ.get("PACKEDCOMM_SECRET", ""))
    with Session.listen(
        "127.0.0.1:0", receivers=receivers, device=TRAINER, settings=settings
    ) as session:
        pipe.send(session.address)
        source = Interrupted(tensors)
        sender = FullWeightSender(source, session)
        sync = sender.sync
        if url:
            updater = EngineUpdater(HttpEngine(url, timeout_s=WAIT_S), session)
            updater.connect()
            sync = lambda: updater.update(sender)  # noqa: E731
        sync()
        pipe.send("synced")

        def killed():
            time.sleep(0.3)  # what was sent has to be on its way
            os.kill(os.getpid(), signal.SIGKILL)

        for tensor in tensors.values():
            tensor.mul_(1.5)
        source.when(int(share * len(tensors)), killed)
        sync()


class DyingTrainer:
    """A process that is killed when a share of its second sync is sent. With a server's address it
    calls that server by itself."""

    def __init__(self, model, receivers=1, url=None, share=0.67):
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(
            target=_die, args=(theirs, on_host(model), receivers, url, share), daemon=True
        )
        self._process.start()
        theirs.close()

    def hear(self):
        """What it says next."""
        assert self._pipe.poll(WAIT_S), "the trainer says nothing"
        return self._pipe.recv()

    def gone(self):
        """Wait until it has been killed."""
        self._process.join(WAIT_S)
        assert self._process.exitcode == -signal.SIGKILL

    def close(self):
        if self._process.is_alive():
            self._process.kill()
        self._process.join(WAIT_S)


class Server:
    """A vLLM server in a process of its own; a context manager."""

    def __init__(self, model, path: Path, port: int, *options: str, **environment: str) -> None:
        model.save_pretrained(path)
        self.name = str(path)
        self.url = f"http://127.0.0.1:{port}"
        self._log = path.parent / "server.log"
        command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(path), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--weight-transfer-config", json.dumps({"backend": "packedcomm"})]
        # It has adapters.
        for name, value in ({"dtype": str(ADAPTED).removeprefix("torch.")} | OPTIONS).items():
            flag = "--" + name.replace("_", "-")
            command += [flag] if value is True else [flag, str(value)]
        command += options
        changes = {"VLLM_SERVER_DEV_MODE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | changes | environment,
                start_new_session=True,
            )

    def __enter__(self):
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self._process.poll() is None:
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return self
            except (urllib.error.URLError, OSError):
                time.sleep(0.2)
        self.__exit__()
        raise AssertionError(f"the server hasn't started:\n{self.log()}")

    def __exit__(self, *error):
        # Its workers are in a group of processes with it.
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(20)
            except (ProcessLookupError, subprocess.TimeoutExpired):
                continue
        if error and error[0] is not None:
            print(self.log(), file=sys.stderr)

    def log(self):
        return self._log.read_text(errors="replace")[-20_000:]

    def post(self, route, body):
        """The answer's JSON."""
        request = urllib.request.Request(
            self.url + route,
            json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )
        try:
            with urllib.request.urlopen(request, timeout=WAIT_S) as answer:
                return json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{route}: {error.code} {error.read().decode()}") from None

    def generate(self, model=None):
        """As `Engine.generate`."""
        result = []
        for prompt in PROMPTS:
            answer = self.post(
                "/v1/completions",
                {
                    "model": model or self.name,
                    "prompt": prompt,
                    "max_tokens": TOKENS,
                    "temperature": 0,
                    "ignore_eos": True,
                    "detokenize": False,
                    "return_token_ids": True,
                    "return_tokens_as_token_ids": True,
                    "logprobs": 1,
                },
            )
            (choice,) = answer["choices"]
            scores = choice["logprobs"]["token_logprobs"]
            result.append((choice["token_ids"], torch.tensor(scores)))
        return result
