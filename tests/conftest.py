"""The marker `gpu(count)`: a test that needs GPUs says how many and is skipped, with the reason.
And a resolver that gives up early."""

from __future__ import annotations

import os

import pytest
import torch

# torch's TCPStore asks for the name of every address that it connects to. Where nobody answers that
# takes 5 s and more, which no deadline of a test allows for; processes inherit this.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        for marker in item.iter_markers("gpu"):
            (needed,) = marker.args
            if found < needed:
                reason = f"needs {needed} GPU{'s' * (needed != 1)}, found {found}"
                item.add_marker(pytest.mark.skip(reason=reason))
