"""The report in a real browser: no error, the key figures are seen, in light and in dark, at 2 and at 2,048 ranks.

Screenshots are kept in `test-artifacts/`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from resilience.observe.report import render
from resilience.observe.timeline import run_of
from tests.observe.test_report import a_run

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_BOUND_S = 120
_PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def browser(tmp_path: Path) -> list[str]:
    found = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if found is None:
        pytest.skip(f"none of {', '.join(BROWSERS)} is installed here")
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--hide-scrollbars"]
    options += ["--enable-logging=stderr", "--virtual-time-budget=2000", f"--user-data-dir={tmp_path / 'profile'}"]
    return [found, *options]


def look(browser: list[str], page: Path, *options: str) -> tuple[str, str]:
    """What it shows, and what it said in its console."""
    done = subprocess.run([*browser, *options, page.as_uri()], capture_output=True, text=True, timeout=_BOUND_S)
    assert done.returncode == 0, done.stderr
    console = [line for line in done.stderr.splitlines() if ":CONSOLE" in line]
    return done.stdout, "\n".join(console)


@pytest.mark.parametrize("ranks", [2, 2048])
def test_a_report_in_a_browser_shows_the_key_figures_and_no_error(
    ranks: int, browser: list[str], tmp_path: Path, repository: Path
) -> None:
    page = tmp_path / "run.html"
    page.write_text(render(run_of(a_run(ranks))), encoding="utf-8")
    assert page.stat().st_size < 60_000, "it does not grow with the number of ranks"
    shown, console = look(browser, page, "--dump-dom")
    assert console == ""
    text = re.sub(r"\s+", " ", re.sub(r"<style.*?</style>|<[^>]+>", " ", shown, flags=re.DOTALL))
    for words in (f"{ranks:,} processes", "Rehearsal passed", "2 iterations lost", "goodput", "node1 is lost"):
        assert words in text, words
    kept = repository / "test-artifacts"
    kept.mkdir(exist_ok=True)
    seen = {}
    for scheme, number in (("dark", 0), ("light", 1)):
        picture = kept / f"report-{ranks}-{scheme}.png"
        picture.unlink(missing_ok=True)
        scheme_option = f"--blink-settings=preferredColorScheme={number}"
        _, console = look(browser, page, scheme_option, "--window-size=1200,2600", f"--screenshot={picture}")
        assert console == ""
        seen[scheme] = picture.read_bytes()
        assert seen[scheme].startswith(_PNG)
    assert seen["dark"] != seen["light"], "it has a face for each"


def test_a_script_error_would_be_seen(browser: list[str], tmp_path: Path) -> None:
    page = tmp_path / "broken.html"
    page.write_text("<!doctype html><title>x</title><script>nothing.there()</script>", encoding="utf-8")
    _, console = look(browser, page, "--dump-dom")
    assert "ReferenceError" in console
