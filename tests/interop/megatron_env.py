"""An environment for the real Megatron Core, apart from ours: `.venv-megatron`, which borrows torch from this one.

Without Megatron Core's own dependencies (a CPU needs none but psutil), so that nothing large is fetched.
"""

from __future__ import annotations

import site
import subprocess
import sys
import venv
from pathlib import Path
from typing import Final

__all__ = ["WITHOUT", "megatron_python"]

_PACKAGES: Final = ("megatron-core==0.16.1", "psutil==7.2.2")
_PROBE: Final = "import torch, psutil, megatron.core.dist_checkpointing"
_LIMIT_S: Final = 600


#: Set to 1 where Megatron Core cannot be installed: what it shows is then left out, and that is said.
WITHOUT: Final = "RESILIENCE_WITHOUT_MEGATRON"


def megatron_python(home: Path) -> tuple[str, str]:
    """`(interpreter, "")`, made and filled if need be; `("", reason)` if it cannot be had."""
    python = home / "bin" / "python"
    if python.exists() and not _problem([str(python), "-c", _PROBE]):
        return str(python), ""
    try:
        venv.create(home, clear=True, with_pip=False)
        packages = next(home.glob("lib/python*/site-packages"))
        (packages / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    except OSError as error:
        return "", f"{home} could not be made: {error}"
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", *_PACKAGES]
    problem = _problem(install) or _problem([str(python), "-c", _PROBE])
    return ("", f"{', '.join(_PACKAGES)} could not be installed: {problem}") if problem else (str(python), "")


def _problem(command: list[str]) -> str:
    """The last line that a failing command says; "" if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
