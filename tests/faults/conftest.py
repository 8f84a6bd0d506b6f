"""The fixture that tests with virtual nodes share: see `tests/core/conftest.py`."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.core.training import World


@pytest.fixture
def world(memory_mount: Path, tmp_path: Path) -> World:
    """Virtual nodes: memory on a shared-memory mount, disk on a disk."""
    return World(memory_mount, tmp_path)
