"""Environments for the real Megatron Core, apart from ours: `.venv-megatron`, which borrows torch from this one.

Without Megatron Core's own dependencies (a CPU needs none but psutil), so that nothing large is fetched.
"""

from __future__ import annotations

import os
import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

import pytest

from benchmarks.nvrx_env import made_by_one

__all__ = ["OTHER_VERSIONS", "VERSION", "megatron_python", "needed_python"]

VERSION: Final = "0.16.1"
#: The last one that pickled classes of its own into `.metadata`, and one that has no `common.pt` any more.
OTHER_VERSIONS: Final = ("0.15.3", "0.19.0")
#: Set to 1 where Megatron Core cannot be installed: what it shows is then left out, and that is said.
_WITHOUT: Final = "RESILIENCE_WITHOUT_MEGATRON"

_BESIDE: Final = "psutil==7.2.2"
_LIMIT_S: Final = 600


def megatron_python(home: Path, version: str = VERSION) -> tuple[str, str]:
    """`(interpreter, "")`, made and filled if need be; `("", reason)` if it cannot be had."""
    try:
        with made_by_one(home):
            return _made(home, version)
    except OSError as error:
        return "", f"{home} could not be made: {error}"


def _made(home: Path, version: str) -> tuple[str, str]:
    python, packages = home / "bin" / "python", [f"megatron-core=={version}", _BESIDE]
    probe = f"import torch, psutil, importlib.metadata as m; assert m.version('megatron-core') == '{version}'"
    if python.exists() and not _problem([str(python), "-c", probe]):
        return str(python), ""
    venv.create(home, clear=True, with_pip=False)
    inside = next(home.glob("lib/python*/site-packages"))
    (inside / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps"]
    # Newer versions ask for a newer Python than ours may be; what is used of them runs on both.
    problem = _problem([*install, "--ignore-requires-python", *packages]) or _problem([str(python), "-c", probe])
    return ("", f"{', '.join(packages)} could not be installed: {problem}") if problem else (str(python), "")


def needed_python(repository: Path, version: str = VERSION) -> str:
    """Its interpreter. A test fails where it cannot be had: what nobody ran shows nothing."""
    name = ".venv-megatron" if version == VERSION else f".venv-megatron-{version}"
    python, problem = megatron_python(repository / name, version)
    if not python and os.environ.get(_WITHOUT) == "1":
        pytest.skip(f"{_WITHOUT}=1, and Megatron Core {version} cannot be had here: {problem}")
    assert python, f"Megatron Core {version} cannot be had here ({problem}); {_WITHOUT}=1 leaves out what it shows"
    return python


def _problem(command: list[str]) -> str:
    """The last line that a failing command says; "" if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
