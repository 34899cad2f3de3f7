"""The marker `gpu(count)`: a test that needs GPUs says how many and is skipped, with the reason.
And what all tests have in common: a folder for temporary files, a resolver that gives up early, a
server that forks their processes, and a collector that doesn't look at modules."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from multiprocessing.util import Finalize

import pytest
import torch

from tests.helpers.processes import start_server

# Flight records of syncs that fail on purpose among others; processes inherit it.
_folder = tempfile.mkdtemp(prefix="packedcomm-tests-")
tempfile.tempdir = os.environ["TMPDIR"] = _folder

# torch's TCPStore asks for the name of every address that it connects to. Where nobody answers that
# takes 5 s and more, which no deadline of a test allows for; processes inherit this.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


@pytest.fixture(scope="session", autouse=True)
def _server(request: pytest.FixtureRequest) -> None:
    # A fixture, so that what its forks print is captured. The tests of the real vLLM have others.
    if not all("engines/vllm/" in item.nodeid for item in request.session.items):
        start_server()


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    if exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        # After multiprocessing has removed what it has there, at -100.
        Finalize(None, shutil.rmtree, [_folder, True], exitpriority=-200)
    elif (reporter := session.config.pluginmanager.get_plugin("terminalreporter")) is not None:
        reporter.write_line(f"what the tests have written stays in {_folder}")


def pytest_collection_finish() -> None:
    # Tests collect, and hundreds of thousands of objects of torch and transformers take 0.2 s.
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        for marker in item.iter_markers("gpu"):
            (needed,) = marker.args
            if found < needed:
                reason = f"needs {needed} GPU{'s' * (needed != 1)}, found {found}"
                item.add_marker(pytest.mark.skip(reason=reason))
