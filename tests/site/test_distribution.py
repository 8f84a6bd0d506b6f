"""The distributions, from a source archive to a drilled job in an environment that has nothing else."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

_BOUND_S = 900


def run(where: Path, *words: str) -> str:
    """In an environment without the checkout in sight."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith(("PYTHON", "VIRTUAL_ENV"))}
    done = subprocess.run(
        words, cwd=where, env={**plain, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=_BOUND_S
    )
    assert done.returncode == 0, f"{words}:\n{done.stdout[-4000:]}{done.stderr[-4000:]}"
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(2 * _BOUND_S)
def test_what_is_built_installs_into_a_clean_environment_and_survives_a_drill(repository: Path, tmp_path: Path) -> None:
    source = tmp_path / "checkout"
    tracked = run(repository, "git", "ls-files", "-z").split("\0")
    for name in filter(None, tracked):
        target = source / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(repository / name, target, follow_symlinks=False)
    run(source, sys.executable, "-m", "build", "--outdir", str(tmp_path / "dist"), ".")  # the wheel from the archive
    (archive,), (wheel,) = (list((tmp_path / "dist").glob(pattern)) for pattern in ("*.tar.gz", "*.whl"))
    with tarfile.open(archive) as opened:
        names = {name.split("/", 1)[1] for name in opened.getnames() if "/" in name}
    assert {"LICENSE", "README.md", "pyproject.toml", "resilience/py.typed", "resilience/examples/gpt.py"} <= names
    assert "resilience/snapshot/streaming.c" in names

    place = tmp_path / "clean"
    run(tmp_path, sys.executable, "-m", "venv", str(place))
    pip = (str(place / "bin" / "python"), "-m", "pip", "install", "-q", "--disable-pip-version-check")
    run(tmp_path, *pip, "-c", str(repository / "constraints.txt"), str(wheel))
    python = str(place / "bin" / "python")
    where = run(tmp_path, python, "-W", "error", "-c", "import resilience; print(resilience.__file__)").strip()
    assert where.startswith(str(place)), "not the checkout's"
    compiled = run(tmp_path, python, "-c", "from resilience.snapshot.streaming import STREAMING as s; print(s)")
    assert ("much=None" in compiled) == (shutil.which("cc") is None), compiled
    for extra in ("zarr", "lightning", "transformers", "fastcrc", "safetensors", "sphinx"):
        missing = f"import importlib.util, sys; sys.exit(importlib.util.find_spec({extra!r}) is not None)"
        run(tmp_path, python, "-c", missing)
    command = str(place / "bin" / "resilience")
    assert "0.1.0" in run(tmp_path, command, "--version")
    drill = (command, "drill", "--nodes", "2", "--spares", "1", "--train-iters", "14", "--fault", "lose:node=1@8")
    assert "passed" in run(tmp_path, *drill)
