"""Tests of what happens on an accelerator: skipped, with the reason, where there is none."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if "tests/cuda/" in item.nodeid:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device, and there is none here"))
