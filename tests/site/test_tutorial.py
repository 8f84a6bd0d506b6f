"""Does the tutorial do what it says, and is the site made without a warning?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.site.test_examples import blocks

_BOUND_S = 280
SCRIPTS = ("bare.py", "train.py", "ranks.py")


@pytest.fixture
def folder(repository: Path, tmp_path: Path, memory_mount: Path) -> Path:
    """An empty folder with what the tutorial has one write into it; its node directory is one of the test's own."""
    page = repository / "docs" / "tutorial.md"
    scripts = blocks(page, "python")
    assert len(scripts) == len(SCRIPTS)
    for name, script in zip(SCRIPTS, scripts, strict=True):
        (tmp_path / name).write_text(script, encoding="utf-8")
    (settings,) = blocks(page, "yaml")
    assert "/dev/shm/tutorial" in settings
    (tmp_path / "run.yaml").write_text(settings.replace("/dev/shm/tutorial", str(memory_mount)), encoding="utf-8")
    return tmp_path


def environment(repository: Path) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(repository)}


def run(folder: Path, repository: Path, *words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words],
        cwd=folder,
        env=environment(repository),
        capture_output=True,
        text=True,
        timeout=_BOUND_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
@pytest.mark.timeout(600)
def test_three_lines_change_no_bit_and_a_killed_run_ends_with_the_same_sum(folder: Path, repository: Path) -> None:
    bare = run(folder, repository, "bare.py")
    assert "the weights sum up to" in bare
    assert run(folder, repository, "train.py") == bare
    assert "persistent" in run(folder, repository, "-m", "resilience.cli", "ls", "--save", "ckpt")

    run(folder, repository, "-c", "import shutil; shutil.rmtree('ckpt')")
    slow = (
        (folder / "train.py")
        .read_text()
        .replace("        loss.backward()\n", "        loss.backward()\n        SLOW\n")
    )
    (folder / "slow.py").write_text(slow.replace("SLOW", "__import__('time').sleep(0.02)"))  # it is not to end before
    training = subprocess.Popen([sys.executable, "slow.py"], cwd=folder, env=environment(repository))
    memory = Path(re.findall(r"local_ckpt_dir: (.*)", (folder / "run.yaml").read_text())[0])
    until = time.monotonic() + _BOUND_S
    while not list(memory.glob("*/*/iter_*/*/complete.json")) and time.monotonic() < until:
        time.sleep(0.01)
    training.send_signal(signal.SIGKILL)
    assert training.wait() == -signal.SIGKILL
    explained = run(folder, repository, "-m", "resilience.cli", "explain", "--local", str(memory), "--save", "ckpt")
    assert "A start would resume from iteration" in explained
    assert run(folder, repository, "train.py") == bare


@pytest.mark.long
@pytest.mark.drill
@pytest.mark.timeout(600)
def test_the_tutorials_job_loses_a_node_and_ends_in_the_same_bits(folder: Path, repository: Path) -> None:
    text = (repository / "docs" / "tutorial.md").read_text(encoding="utf-8")
    (line,) = re.findall(r"^    resilience (drill .* -- ranks.py)$", text, flags=re.MULTILINE)
    told = run(folder, repository, "-m", "resilience.cli", *line.split())
    assert "passed" in told
    resumed = re.search(r"iteration (\d+) \(local\)", told)
    assert resumed is not None, told
    assert 60 <= int(resumed[1]) <= 75, "75 as the page says; less where its save was still under way"
    assert (folder / "drill-out" / "report.html").is_file()


@pytest.mark.long
@pytest.mark.timeout(600)
def test_the_site_is_made_without_a_warning(repository: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html", "docs", str(tmp_path / "site")]
    done = subprocess.run(
        command, cwd=repository, env=environment(repository), capture_output=True, text=True, timeout=_BOUND_S
    )
    assert done.returncode == 0, done.stderr
    page = (tmp_path / "site" / "api.html").read_text(encoding="utf-8")
    for name in ("ResilientTrainer", "ResiliencyController", "load_checkpoint", "NoUsableSaveError"):
        assert name in page
