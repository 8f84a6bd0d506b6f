"""Environments of their own for others' packages, which ours must not have: they warn, pin, or replace what we use.

Each borrows torch from the environment that runs, through a path file, so that both sides of a comparison run the same
torch and nothing large is fetched.
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

__all__ = ["python_with"]

_INSTALL_LIMIT_S: Final = 600


@contextmanager
def _made_by_one(home: Path) -> Iterator[None]:
    """While an environment is made, or looked at: tests that need the same one run in several processes."""
    with home.with_name(f"{home.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # which goes with the file, however this ends
        yield


def python_with(home: Path, packages: Sequence[str], probe: str, pip_options: Sequence[str] = ()) -> tuple[str, str]:
    """`(interpreter, "")` of the environment at `home`, made and filled if need be; `("", reason)` if it cannot be had.

    `packages`: name==version each, installed without what they depend on, beside what is there. `probe`: a program that
    ends well if and only if they are there and can be used.
    """
    try:
        with _made_by_one(home):
            python = _borrowing_python(home)
            reason = _install(python, packages, probe, pip_options)
    except OSError as error:
        return "", f"{home} could not be made: {error}"
    return ("", f"{packages[0]} could not be installed: {reason}") if reason else (python, "")


def _borrowing_python(home: Path) -> str:
    """Made anew if it is not there or finds no torch (any more)."""
    python = home / "bin" / "python"
    finds_torch = "import importlib.util; assert importlib.util.find_spec('torch')"
    if not python.exists() or _problem([str(python), "-c", finds_torch]):
        venv.create(home, clear=True, with_pip=False)
        inside = next(home.glob("lib/python*/site-packages"))
        (inside / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return str(python)


def _install(python: str, packages: Sequence[str], probe: str, pip_options: Sequence[str]) -> str:
    if not _problem([python, "-c", probe]):
        return ""
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", *pip_options, *packages]
    return _problem(pip) or _problem([python, "-c", probe])


def _problem(command: list[str]) -> str:
    """Of what a failing command says, the line that tells most; "" if it succeeds."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_INSTALL_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    if done.returncode == 0:
        return ""
    lines = [line.strip() for line in done.stderr.strip().splitlines()] or ["no message"]
    return next((line for line in lines if line.startswith("fatal:")), lines[-1])  # git's, below a build's own
