"""The promise of `docs/events.md`: what the code tells is written there, and what was promised once stays."""

from __future__ import annotations

import re
from pathlib import Path

from resilience.observe.events import SCHEMA_VERSION

#: Version 1 as it was first promised. Entries are only added; whoever must remove or rename one raises the version.
PROMISED = {
    "start": {"run_id", "generation", "world_size", "local_rank"},
    "fresh": {"reason"},
    "resume": {"iteration", "generation", "tier", "seconds", "retrieved_bytes", "own_copies", "replica_copies",
               "rebuilt", "passed_over", "reason"},
    "step": {"iteration"},
    "memory": {"what"},
    "snapshot": {"iteration", "kind", "tiers", "stall_s", "bytes"},
    "committed": {"iteration", "tier", "seconds"},
    "protected": {"iteration", "tier", "seconds", "sent_bytes", "spared_bytes"},
    "complete": {"iteration", "generation", "tier"},
    "replicated": {"iteration", "generation", "tier"},
    "save_failed": {"iteration", "tier", "error"},
    "save_skipped": {"iteration", "reason"},
    "pruned": {"iteration", "generation", "tier"},
    "unequal_items": {"keys"},
    "replication_down": {"error", "iteration", "peer", "peer_node", "received_bytes", "expected_bytes", "sent_bytes",
                         "offered_bytes"},
    "epoch": {"epoch"},
    "caution": {"kind", "iteration", "what", "advice"},
    "caution_over": {"kind", "iteration"},
    "metrics_failed": {"outlet", "error"},
    "stop_requested": {"by"},
    "stopped": {"iteration", "code"},
    "finished": {"iteration"},
    "hang": {"seconds"},
    "exception": {"error"},
    "warning": {"what", "advice"},
    "hold": {"iteration"},
    "digest": {"digest"},
}  # fmt: skip


def documented(repository: Path) -> dict[str, set[str]]:
    """By event: the fields that its row names."""
    found: dict[str, set[str]] = {}
    for line in (repository / "docs" / "events.md").read_text(encoding="utf-8").splitlines():
        cells = line.split(" | ")
        if line.startswith("| `") and len(cells) == 3:
            for event in re.findall(r"`(\w+)`", cells[0]):
                found[event] = set(re.findall(r"`(\w+)`", cells[2]))
    return found


def test_every_event_that_a_job_tells_is_documented(repository: Path) -> None:
    package = repository / "resilience"
    sources = [path for path in package.rglob("*.py") if "drill" not in path.parts and not path.name.startswith("cli")]
    sources.append(package / "drill" / "rehearsal.py")
    told = {
        name
        for path in sources
        for name in re.findall(r"(?:tell|emit|feed)\(\s*\"(\w+)\"", path.read_text(encoding="utf-8"))
    }
    assert {"snapshot", "warning", "caution", "step"} <= told, "the pattern finds them"
    assert told - set(documented(repository)) == set()


def test_what_the_schema_s_version_promised_is_still_told(repository: Path) -> None:
    rows = documented(repository)
    assert SCHEMA_VERSION == 1, "a new version needs a promise of its own"
    assert {event: fields - rows.get(event, set()) for event, fields in PROMISED.items() if fields - rows[event]} == {}
