"""Environments for the real Megatron Core, apart from ours: `.venv-megatron`, which borrows torch from this one.

Without Megatron Core's own dependencies (a CPU needs none but psutil), so that nothing large is fetched.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

import pytest

from benchmarks.environments import python_with

__all__ = ["OTHER_VERSIONS", "VERSION", "megatron_python", "needed_python"]

VERSION: Final = "0.16.1"
#: The last one that pickled classes of its own into `.metadata`, and one that has no `common.pt` any more.
OTHER_VERSIONS: Final = ("0.15.3", "0.19.0")
#: Set to 1 where Megatron Core cannot be installed: what it shows is then left out, and that is said.
_WITHOUT: Final = "RESILIENCE_WITHOUT_MEGATRON"

_BESIDE: Final = "psutil==7.2.2"


def megatron_python(home: Path, version: str = VERSION) -> tuple[str, str]:
    """`(interpreter, "")`, made and filled if need be; `("", reason)` if it cannot be had."""
    probe = f"import torch, psutil, importlib.metadata as m; assert m.version('megatron-core') == '{version}'"
    # Newer versions ask for a newer Python than ours may be; what is used of them runs on both.
    return python_with(home, [f"megatron-core=={version}", _BESIDE], probe, ["--ignore-requires-python"])


def needed_python(repository: Path, version: str = VERSION) -> str:
    """Its interpreter. A test fails where it cannot be had: what nobody ran shows nothing."""
    name = ".venv-megatron" if version == VERSION else f".venv-megatron-{version}"
    python, problem = megatron_python(repository / name, version)
    if not python and os.environ.get(_WITHOUT) == "1":
        pytest.skip(f"{_WITHOUT}=1, and Megatron Core {version} cannot be had here: {problem}")
    assert python, f"Megatron Core {version} cannot be had here ({problem}); {_WITHOUT}=1 leaves out what it shows"
    return python
