"""No pickle is ever loaded: neither on import of any module, nor by a session that syncs."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "packedcomm"

# What may be absent, and what isn't imported then; anything else must import.
PROGRAM = """
import _pickle
import importlib
import multiprocessing
import pickle
import pkgutil
import sys

# Before: torch defines subclasses of Unpickler, and is not what is tested.
import torch
import torch.distributed.tensor

def refuse(*arguments, **options):
    raise AssertionError("a pickle was loaded")

class Refused:
    __init__ = refuse

for module in (pickle, _pickle):
    module.load = module.loads = refuse
    module.Unpickler = Refused
pickle._load = pickle._loads = refuse
pickle._Unpickler = Refused
torch.load = refuse

try:
    pickle.loads(pickle.dumps(1))
except AssertionError:
    pass
else:
    raise SystemExit("pickles are not refused")

import packedcomm

OPTIONAL = {"cupy", "pynvml", "transformers", "tokenizers", "peft", "vllm", "matplotlib"}
imported = []
for found in pkgutil.walk_packages(packedcomm.__path__, "packedcomm."):
    if found.name.endswith(".__main__"):
        continue  # runs the command line
    try:
        importlib.import_module(found.name)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] not in OPTIONAL:
            raise
        print("skipped", found.name, "without", error.name)
    else:
        imported.append(found.name)
print("imported", len(imported))

from packedcomm import FullWeightSender, StagedTarget, TensorTarget, WeightReceiver
from tests.helpers.in_process import Round, sessions

weights = {"a": torch.arange(1000.0), "b": torch.ones(3, 5, dtype=torch.bfloat16)}
with sessions(2) as (sender_end, receiver_ends):
    held = [{name: torch.zeros_like(w) for name, w in weights.items()} for _ in receiver_ends]
    receivers = [
        WeightReceiver(target, end)
        for target, end in zip(
            (TensorTarget(held[0]), StagedTarget(TensorTarget(held[1]))), receiver_ends, strict=True
        )
    ]
    sender = FullWeightSender(weights, sender_end, verify=True)
    for version in range(2):
        weights["a"] += 1
        done = Round(lambda: sender.sync(version=version), receivers)
        for outcome in (done.sent, *done.received):
            if isinstance(outcome, Exception):
                raise outcome
        assert done.sent.verified
    assert all(torch.equal(h[name], w) for h in held for name, w in weights.items())
print("synced")
"""


def test_nothing_that_is_imported_or_synced_loads_a_pickle():
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=150,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    modules = len([path for path in PACKAGE.rglob("*.py") if path.name != "__main__.py"])
    skipped = done.stdout.count("skipped ")
    # All but the package itself; the compiled extension counts too where it is a file.
    (imported,) = [int(line.split()[1]) for line in done.stdout.splitlines() if "imported" in line]
    assert imported + skipped >= modules - 1
    assert done.stdout.endswith("synced\n")


LOADERS = {"pickle", "_pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}


def problems(source: str) -> list[str]:
    """What in a module's text could load a pickle."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Import(names=names):
                found += [a.name for a in names if a.name.partition(".")[0] in LOADERS]
            case ast.ImportFrom(module=str(module)) if module.partition(".")[0] in LOADERS:
                found.append(module)
            case ast.Call(func=ast.Attribute(value=ast.Name(id="torch"), attr="load")):
                safe = [k.value for k in node.keywords if k.arg == "weights_only"]
                if not (safe and isinstance(safe[0], ast.Constant) and safe[0].value is True):
                    found.append("torch.load without weights_only=True")
            case ast.Call(func=ast.Attribute(attr=str(name))) if name in OBJECT_CALLS:
                found.append(name)
            case ast.keyword(arg="allow_pickle", value=value):
                if not (isinstance(value, ast.Constant) and value.value is False):
                    found.append("allow_pickle")
    return found


# What pickles in torch.distributed, multiprocessing and pyzmq.
OBJECT_CALLS = {
    "all_gather_object",
    "broadcast_object_list",
    "gather_object",
    "recv_object_list",
    "recv_pyobj",
    "scatter_object_list",
    "send_object_list",
    "send_pyobj",
}


def test_no_module_uses_what_loads_pickles():
    found = {
        str(path.relative_to(ROOT)): wrong
        for path in sorted(PACKAGE.rglob("*.py"))
        if (wrong := problems(path.read_text()))
    }
    assert not found


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from _pickle import loads",
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "socket.recv_pyobj()",
        "dist.broadcast_object_list([1])",
        "numpy.load('x', allow_pickle=True)",
    ],
)
def test_the_check_sees_each_of_them(source):
    assert len(problems(source)) == 1
    assert not problems("import torch\ntorch.load('x', weights_only=True)")


def test_ruffs_rules_of_security_are_on_for_the_whole_package():
    lint = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]["lint"]
    assert "S" in lint["select"]
    assert not [rule for rule in lint["ignore"] if rule.startswith(("S3", "S4")) or rule == "S"]
    for pattern, rules in lint["per-file-ignores"].items():
        assert not pattern.startswith("packedcomm") or not {r for r in rules if r.startswith("S")}
    for path in PACKAGE.rglob("*.py"):
        assert "noqa: S30" not in path.read_text(), path
