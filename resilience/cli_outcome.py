"""`resilience outcome`: how a run ended, for the script that decides whether to start it again.

The exit status is the answer: 0 finished, 75 stopped on request, 1 failed, 3 still running.
"""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any, Final

from resilience.cli_sources import add_sources, sources_of
from resilience.errors import CommandError
from resilience.planning.history import read_history
from resilience.planning.inventory import AttemptLog
from resilience.stores.discovery import Sources
from resilience.stores.lock import ALL_RANKS, DirectoryLock

if TYPE_CHECKING:
    from rich.console import Console

_STATUS: Final = {"finished": 0, "stopped": 75, "failed": 1, "running": 3}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    add_sources(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Read the newest attempt's log. CommandError (status 2) where no attempt of the run is in sight."""
    sources = sources_of(args)
    run_id = sources.only_run()
    inventories = sources.readable(run_id)
    attempts = read_history(inventories, run_id).attempts
    held = live_directory(sources, run_id)
    if not attempts and not held:
        raise CommandError(
            f"No attempt of {'run ' + repr(run_id) if run_id else 'any run'} is in sight.",
            advice="Give the directories that the job was given: --local DIR, --save DIR.",
            status=2,
        )
    newest = attempts[-1] if attempts else None
    outcome, reason = judge(newest, held, sees_nodes=any(node.run_id == run_id for node in sources.nodes))
    return _STATUS[outcome], {
        "outcome": outcome,
        "iteration": iteration_of(newest),
        "run_id": run_id,
        "attempt": newest.attempt if newest else None,
        "generation": newest.generation if newest else None,
        "attempts": len(attempts),
        "reason": reason,
    }


def live_directory(sources: Sources, run_id: str) -> str:
    """A node directory of the run that a live process holds; "" if there is none in sight."""
    for node in sources.nodes:
        if node.run_id == run_id and DirectoryLock(node.path, ALL_RANKS).holder() is not None:
            return str(node.path)
    return ""


def judge(newest: AttemptLog | None, held: str, *, sees_nodes: bool) -> tuple[str, str]:
    if held:
        return "running", f"a live process holds {held}"
    assert newest is not None, "without a log and a live lock there is no answer"
    name = newest.name
    if newest.end:
        return newest.end, f"attempt {name} noted its end: {newest.end}"
    if sees_nodes:
        return "failed", f"attempt {name} noted no end, and no process holds its directory: it was killed"
    return "failed", f"attempt {name} noted no end (from shared storage alone a job that still runs looks the same)"


def iteration_of(newest: AttemptLog | None) -> int:
    """Where the run stands: at the noted end, else at the newest save that it is known to have completed."""
    if newest is not None and newest.end_iteration is not None:
        return newest.end_iteration
    known = [save for save in (newest.completed, newest.base) if save is not None] if newest else []
    return max((save.iteration for save in known), default=0)


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say

    say(console, f"{document['outcome']} at iteration {document['iteration']} (run {document['run_id']}).", "bold")
    say(console, f"  {document['reason']}")
