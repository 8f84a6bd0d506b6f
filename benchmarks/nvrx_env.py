"""The environment for NVRx, apart from ours: with it installed every `import torch` warns, and others' imports fail.

`.venv-nvrx` holds NVRx alone; torch comes from the environment that runs the benchmarks, through a path file, so that
both sides of the comparison run the same torch and nothing large is fetched.
"""

from __future__ import annotations

import fcntl
import site
import subprocess
import sys
import venv
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from benchmarks.crew import REPOSITORY

__all__ = ["NVRX", "made_by_one", "nvrx_python"]

NVRX: Final = "nvidia-resiliency-ext==0.4.1"
_INSTALL_LIMIT_S: Final = 600
_PROBE: Final = "import nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager"


def nvrx_python(home: Path = REPOSITORY / ".venv-nvrx", beside: Sequence[str] = ()) -> tuple[str, str]:
    """`(interpreter, "")`, made and filled if need be; `("", reason)` if it cannot be had.

    `beside`: what else is to be installed with it, each as name==version.
    """
    try:
        with made_by_one(home):
            return _made(home, beside)
    except OSError as error:
        return "", f"{home} could not be made: {error}"


@contextmanager
def made_by_one(home: Path) -> Iterator[None]:
    """While an environment is made, or looked at: tests that need the same one run in several processes."""
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which goes with the file, however this ends
        yield


def _made(home: Path, beside: Sequence[str]) -> tuple[str, str]:
    python = home / "bin" / "python"
    probe = "; ".join([_PROBE, *(f"import {each.partition('==')[0]}" for each in beside)])
    if python.exists() and not _problem([str(python), "-c", probe]):
        return str(python), ""
    venv.create(home, clear=True, with_pip=False)
    _borrow_torch(home)
    pip = [sys.executable, "-m", "pip", "--python", str(python), "install", "--quiet", "--no-deps", NVRX, *beside]
    problem = _problem(pip) or _problem([str(python), "-c", probe])
    return ("", f"{NVRX} could not be installed: {problem}") if problem else (str(python), "")


def _borrow_torch(home: Path) -> None:
    target = next(home.glob("lib/python*/site-packages"))
    (target / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")


def _problem(command: list[str]) -> str:
    """The last line that a failing command says; "" if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return "" if done.returncode == 0 else (done.stderr.strip().splitlines() or ["no message"])[-1]
