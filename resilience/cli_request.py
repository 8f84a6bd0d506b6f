"""`resilience request save|stop`: ask a running job on this node from outside; it acts at its next boundary."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from resilience.cli_sources import add_sources, sources_of
from resilience.errors import CommandError
from resilience.requests import leave_request
from resilience.stores.discovery import NodeDirectory
from resilience.stores.lock import ALL_RANKS, DirectoryLock

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument("what", choices=("save", "stop"), help="take a save now, or save and end in order")
    add_sources(parser, shared=False)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Leave the request with every run that is live here. CommandError (status 3) if none is."""
    sources = sources_of(args)
    live: dict[str, tuple[NodeDirectory, int]] = {}
    for node in sources.nodes:
        pid = DirectoryLock(node.path, ALL_RANKS).holder()
        if pid is not None:
            live.setdefault(node.run_id, (node, pid))  # a run needs to be asked only once
    if not live:
        seen = ": no live process holds " + ", ".join(str(node.path) for node in sources.nodes) if sources.nodes else ""
        raise CommandError(f"No job is running here{seen}.", advice="Give the job's own directory with --local DIR.")
    for node, _ in live.values():
        leave_request(node.path, args.what, sources.fs)
    asked = [
        {"run_id": node.run_id, "node": node.name, "pid": pid or None, "directory": str(node.path)}
        for node, pid in live.values()
    ]
    return 0, {"requested": args.what, "asked": asked}


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say

    for job in document["asked"]:
        what = "to save" if document["requested"] == "save" else "to save and stop"
        say(console, f"Run {job['run_id']} on {job['node']} was asked {what}; it acts at its next boundary.")
