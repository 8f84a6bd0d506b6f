"""The package's face: what importing it costs, what it exports, and that the configuration page says what code says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import resilience
from resilience.config import CheckpointConfig, ResiliencyConfig, load_config
from resilience.config.setting import settings_of
from resilience.errors import ConfigError


def test_the_configuration_page_is_up_to_date(repository: Path) -> None:
    command = [sys.executable, "docs/generate_configuration.py", "--check"]
    ran = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr


def test_every_setting_has_a_meaning_and_every_measured_one_a_unit() -> None:
    for entry in [*settings_of(CheckpointConfig), *settings_of(ResiliencyConfig)]:
        assert entry.meaning.endswith("."), entry.key
        assert "|" not in entry.meaning, f"{entry.key}: a bar would end the table's cell"
        assert entry.unit or entry.kind not in (int, float), entry.key


def test_importing_the_package_and_its_configuration_loads_no_torch() -> None:
    code = (
        "import sys, resilience; resilience.load_config(env={}); print('torch' in sys.modules, resilience.__version__)"
    )
    ran = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=200)
    assert ran.stdout.split() == ["False", "0.1.0"], ran.stderr


def test_the_package_exports_its_public_names_lazily() -> None:
    assert resilience.CheckpointConfig is CheckpointConfig
    assert resilience.load_config is load_config
    assert resilience.errors.ConfigError is ConfigError
    assert set(resilience.__all__) <= set(dir(resilience))
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        resilience.Nothing  # noqa: B018
