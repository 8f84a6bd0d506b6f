"""`resilience report`: one HTML page made of a run's events."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.errors import CommandError
from resilience.observe.events import event_files
from resilience.observe.phrases import plural
from resilience.observe.report import write_report

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument(
        "events",
        nargs="+",
        type=Path,
        metavar="EVENTS",
        help="events directory, *.jsonl file, or a drill's work directory",
    )
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="run.html", help="the page to write")


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Write the page. Returns exit status and JSON document; 1 where the events tell of no training.

    Raises `CommandError`: status 2 for a path that is not there or holds no events, 3 for one that cannot be read.
    """
    missing = [path for path in args.events if not path.exists()]
    if missing:
        raise CommandError(f"{missing[0]} is not there.", advice="Give an events directory or its files.", status=2)
    if not event_files(args.events):
        raise CommandError(
            f"{args.events[0]} holds no *.jsonl file.",
            advice="Give the directory set in `resiliency.events`.",
            status=2,
        )
    try:
        written = write_report(args.events, args.output)
    except OSError as error:
        raise CommandError(f"The report could not be made: {error}.", status=3) from error
    document = {
        "report": str(args.output),
        "run_id": written.run_id,
        "iterations": written.reached,
        "attempts": len(written.attempts),
        "interruptions": len(written.interruptions),
        "lost_iterations": sum(interruption.lost for interruption in written.interruptions),
        "goodput": round(written.goodput, 4),
    }
    return (0 if written.attempts else 1), document


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say

    lost = plural(document["lost_iterations"], "iteration")
    say(
        console,
        f"{document['report']}: {plural(document['iterations'], 'iteration')}, "
        f"{plural(document['interruptions'], 'interruption')}, {lost} lost, goodput {100 * document['goodput']:.1f} %.",
    )
