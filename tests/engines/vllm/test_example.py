"""The example of a training loop, as a user runs it."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="needs vLLM")

from tests.helpers import vllm_adapters  # noqa: F401  (the settings, also of what is run)

EXAMPLE = Path(__file__).parents[3] / "examples" / "vllm_engine.py"
STEP = re.compile(r"step \d+: reward (\d\.\d+), .*version (\d+): ([\d,]+) bytes")


@pytest.mark.parametrize("mode", ["full", "lora"])
def test_the_policy_learns_and_the_engine_answers_as_it_at_every_version(mode):
    # It ends with an error where answers or log-probabilities differ.
    done = subprocess.run(
        [sys.executable, str(EXAMPLE), "--mode", mode],
        capture_output=True,
        text=True,
        timeout=150,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    steps = STEP.findall(done.stdout)
    assert [int(version) for _, version, _ in steps] == list(range(1, 11))
    assert len({size for _, _, size in steps}) == 1
    (last,) = re.findall(r"in the end: reward (\d\.\d+)", done.stdout)
    assert float(steps[0][0]) < 0.6
    assert float(last) > 0.7
