"""The examples run as a new user would run them, and end well."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def _run(command: list[str], deadline_s: float = 150, **variables: str) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT), **variables}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=deadline_s,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_minimal_example_syncs_three_versions():
    out = _run([sys.executable, "examples/minimal.py"])
    assert [out.count(f"received  {version} ") for version in range(3)] == [1, 1, 1]
    assert out.count("'verified': True") == 3
    assert out.count("secret of this run: ") == 1


def test_a_secret_of_the_environment_is_used_and_not_printed():
    secret = "a secret that the launcher was given"
    out = _run([sys.executable, "examples/minimal.py"], PACKEDCOMM_SECRET=secret)
    assert out.count("received ") == 3
    assert "secret" not in out


def test_the_lora_example_answers_as_the_merged_model():
    pytest.importorskip("peft")
    out = _run([sys.executable, "examples/lora.py"])
    assert out.count("logits differ by") == 4
    assert out.count("12 of 12 tensors changed") == 3


def test_the_sharded_example_answers_as_the_trainers():
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    out = _run([*launcher, "--nproc-per-node", "4", "examples/sharded_trainer.py"])
    assert out.count("logits differ by") == 6
    assert out.count("sent 21 tensors") == 3
