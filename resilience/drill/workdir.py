"""The directory a drill works in: taken over only when it is empty or was a drill's before."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from resilience.errors import ConfigError

#: Marks a directory as a drill's own, and holds the parameters of its reference run.
_MARKER = "drill.json"
_REMADE = ("nodes", "save", "global", "events", "fired", "samples.jsonl", "drill.jsonl", "report.html", "result.json")


def prepare(workdir: Path) -> None:
    """Make the directory, or clear a former drill's out of it; the reference run is kept. Raises `ConfigError`."""
    if workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir {workdir} is no directory.")
    if workdir.exists() and any(workdir.iterdir()) and not (workdir / _MARKER).is_file():
        raise ConfigError(
            f"--workdir {workdir} holds other files; a drill would write among them.",
            advice="Name an empty directory, or one that does not exist yet.",
        )
    workdir.mkdir(parents=True, exist_ok=True)
    (workdir / _MARKER).write_text(json.dumps({"made_by": "resilience drill"}) + "\n", encoding="utf-8")
    for name in _REMADE:
        path = workdir / name
        if path.is_symlink() or path.is_file():
            path.unlink()
        elif path.is_dir():
            shutil.rmtree(path)
    for name in ("nodes", "save", "events"):
        (workdir / name).mkdir(mode=0o700)
