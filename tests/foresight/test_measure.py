"""Measuring a node: it ends, leaves nothing, does no harm."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from resilience.errors import CommandError
from resilience.foresight import measure
from resilience.foresight.costs import ASSUMED
from resilience.foresight.measure import Measured, measure_node
from resilience.runtime.clock import SystemClock


def test_a_node_is_measured_in_bounded_time_and_nothing_is_left_of_it(tmp_path: Path, memory_mount: Path) -> None:
    clock = SystemClock()
    descriptors = len(os.listdir("/proc/self/fd"))
    found = measure_node(memory_mount, tmp_path, clock, seconds=0.05)
    assert all(10e6 < speed < 1e12 for speed in vars(found).values()), found
    assert found.mount < found.memory, "new pages cost more than warm ones"
    assert [*memory_mount.iterdir(), *tmp_path.iterdir()] == []
    assert len(os.listdir("/proc/self/fd")) == descriptors


def test_a_place_that_is_nearly_full_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "statvfs", lambda _: SimpleNamespace(f_bavail=100, f_frsize=4096))
    with pytest.raises(CommandError, match="409600 bytes free"):
        measure_node(tmp_path, tmp_path, SystemClock())
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_is_not_there_is_told(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="cannot be measured"):
        measure_node(tmp_path / "nowhere", tmp_path, SystemClock())


def test_a_write_that_fails_half_way_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(measure, "_write", fail)
    with pytest.raises(OSError, match="No space"):
        measure_node(tmp_path, tmp_path, SystemClock(), seconds=0.01)
    assert list(tmp_path.iterdir()) == []


def test_what_is_known_of_the_network_goes_before_what_loopback_says() -> None:
    measured = Measured(1.0, 2.0, 3.0, 4.0, 5.0)
    assert measured.bandwidths(None, None, ASSUMED).network == 5.0
    assert measured.bandwidths(7.0, 8.0, ASSUMED).network == 7.0
    assert measured.bandwidths(7.0, 8.0, ASSUMED).shared == 8.0
    assert measured.bandwidths(None, None, ASSUMED).shared == ASSUMED.shared
