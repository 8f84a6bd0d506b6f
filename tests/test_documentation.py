"""Does the documentation speak of what is there, and does its first script run?"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience import errors
from resilience.cli import COMMANDS


def pages(repository: Path) -> list[Path]:
    written = [page for page in repository.glob("docs/**/*.md") if "_site" not in page.parts]
    return [repository / "README.md", repository / "examples" / "README.md", *sorted(written)]


def prose(page: Path) -> str:
    return re.sub(r"```.*?```|`[^`\n]*`", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)


def anchors(page: Path) -> Iterator[str]:
    for heading in re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE):
        yield re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.strip().lower()))


def test_every_link_leads_to_a_page_and_a_heading_that_are_there(repository: Path) -> None:
    nowhere = []
    for page in pages(repository):
        for link, anchor in re.findall(r"\]\(([^)#\s]*)(?:#([^)\s]*))?\)", prose(page)):
            target = page.parent / link if link else page
            if "://" not in link and (not target.exists() or (anchor and anchor not in anchors(target))):
                nowhere.append(f"{page.name}: {link}#{anchor}")
    assert nowhere == []


def test_every_file_and_test_that_is_named_exists(repository: Path) -> None:
    tests = "".join(path.read_text(encoding="utf-8") for path in repository.glob("tests/**/*.py"))
    missing = []
    for page in pages(repository):
        text = page.read_text(encoding="utf-8")
        files = re.findall(r"`((?:resilience|tests|examples|docs|benchmarks)/[\w./]+)`", text)
        missing += [f"{page.name}: {name}" for name in files if not (repository / name).exists()]
        missing += [f"{page.name}: {name}" for name in re.findall(r"`(test_\w+)`", text) if f"def {name}(" not in tests]
        several = [name for name in re.findall(r"`(test_\w+)`", text) if tests.count(f"def {name}(") > 1]
        missing += [f"{page.name}: {name} is the name of several" for name in several]
    assert missing == []


def test_what_is_there_is_not_called_missing(repository: Path) -> None:
    """Commands come and go quicker than the pages that list them."""
    readme = (repository / "README.md").read_text(encoding="utf-8")
    architecture = (repository / "docs" / "architecture.md").read_text(encoding="utf-8")
    _, _, not_there = architecture.partition("## Not in this version")
    for command in COMMANDS:
        assert f"`{command.name}`" in readme, "the list of commands in the README"
        assert f"to {command.name}" not in not_there


def test_every_error_is_explained(repository: Path) -> None:
    text = (repository / "docs" / "troubleshooting.md").read_text(encoding="utf-8")
    assert [name for name in errors.__all__ if f"**`{name}`**" not in text and name != "ResilienceError"] == []


def test_every_command_has_a_section(repository: Path) -> None:
    headings = set(anchors(repository / "docs" / "command-line.md"))
    assert {command.name for command in COMMANDS} <= headings


@pytest.mark.timeout(400)
def test_the_first_script_resumes_to_the_bit_when_it_is_killed(repository: Path, tmp_path: Path) -> None:
    text = (repository / "docs" / "getting-started.md").read_text(encoding="utf-8")
    script = next(block for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL))
    assert "train_iters=10_000" in script
    assert "/dev/shm/first-run" in script
    script = script.replace("train_iters=10_000", "train_iters=1200")
    assert "        loss.backward()\n" in script

    def start(where: Path, in_each_step: str = "") -> subprocess.Popen[str]:
        where.mkdir(exist_ok=True)
        here = script.replace("/dev/shm/first-run", str(where / "local"))
        here = here.replace("        loss.backward()\n", f"        loss.backward()\n{in_each_step}")
        (where / "train.py").write_text(here, encoding="utf-8")
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.Popen(
            [sys.executable, "train.py"], cwd=where, env=environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip

    undisturbed = start(tmp_path / "undisturbed").communicate(timeout=100)[0]
    killed = start(tmp_path / "killed", "        __import__('time').sleep(0.1)\n")  # it is not to end before that
    until = time.monotonic() + 100
    while not list(tmp_path.glob("killed/local/*/*/iter_*/*/complete.json")) and time.monotonic() < until:
        time.sleep(0.005)
    killed.send_signal(signal.SIGKILL)
    killed.communicate(timeout=60)
    again, told = start(tmp_path / "killed").communicate(timeout=100)
    assert killed.returncode == -signal.SIGKILL, "it ended before it was killed"
    assert "resumed at iteration" in told
    assert again == undisturbed != ""
