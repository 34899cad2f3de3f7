"""The marker `gpu(count)`: a test that needs GPUs says how many and is skipped, with the reason."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    found = torch.cuda.device_count()
    for item in items:
        for marker in item.iter_markers("gpu"):
            (needed,) = marker.args
            if found < needed:
                reason = f"needs {needed} GPU{'s' * (needed != 1)}, found {found}"
                item.add_marker(pytest.mark.skip(reason=reason))
