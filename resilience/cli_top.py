"""`resilience top`: follow a running job from the events and the directories of any of its nodes.

Only looks. `--once`, a pipe or `--json` print one snapshot; on a terminal it is drawn again every second until q or
Ctrl-C.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import select
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from resilience.cli_ls import as_json
from resilience.cli_outcome import iteration_of, judge, live_directory
from resilience.cli_sources import add_sources, sources_of
from resilience.errors import CommandError
from resilience.observe.events import EventTail, event_files
from resilience.observe.job_view import Follower
from resilience.planning.catalog import catalog
from resilience.planning.history import read_history

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

_EVERY_S: Final = 1.0
_MOST_SAVES: Final = 6
_MOST_NODES: Final = 20
_LONGEST_NEWS: Final = 120
#: What the views of a job have alike, as far as directories of saves tell.
_UNKNOWN: Final[dict[str, Any]] = {
    "iterations_per_s": None, "world_size": None, "complete": None, "protected": None, "persistent": None,
    "resumed_from": None, "failures": None, "lost_iterations": None, "goodput": None, "saves": None, "stall": None,
    "cautions": [], "news": [], "nodes": [],
}  # fmt: skip


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument(
        "--events",
        action="append",
        default=[],
        type=Path,
        metavar="DIR",
        help="a directory set in `resiliency.events`, or a drill's work directory; repeatable",
    )
    parser.add_argument("--once", action="store_true", help="print one snapshot and end")
    add_sources(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Look once, or until the user leaves. Status 1 if the run failed or is not protected.

    CommandError (status 2) where there is nothing to look at.
    """
    scope = _Scope(args)
    document = scope.look()
    if not (args.once or args.json) and sys.stdout.isatty():
        return 0, _follow(scope, document)
    bad = document["state"] == "failed" or any(each["kind"] == "not_protected" for each in document["cautions"])
    return int(bad), document


class _Scope:
    """What was given to look at; each `look` takes in what is new."""

    def __init__(self, args: argparse.Namespace) -> None:
        self._args = args
        missing = [path for path in args.events if not path.is_dir()]
        if missing:
            raise CommandError(f"{missing[0]} is not there.", advice="Give the job's events directory.", status=2)
        self._tails = [EventTail(path) for path in args.events]
        self._follower = Follower(args.run_id)
        self._given = bool(args.local or args.save or args.global_dir)

    def look(self) -> dict[str, Any]:
        """CommandError where nothing tells of a run."""
        now = time.time()
        fresh = [event for tail in self._tails for event in tail.poll()]
        for event in sorted(fresh, key=lambda event: float(event["t"])):
            self._follower.take(event)
        view = self._follower.view
        told = view.as_json(now) if view is not None else None
        held = self._directories() if self._given or not self._tails else None
        if told is None and held is None:
            files = [file for path in self._args.events for file in event_files([path])]
            seen = f"none of {len(files)} files tells of a start" if files else "there is no *.jsonl file"
            raise CommandError(
                f"No run is in sight in {', '.join(map(str, self._args.events))}: {seen}.",
                advice="Give the directory set in `resiliency.events`, or --local DIR.",
                status=2,
            )
        document = (held or {}) | (told or {}) if told else {**_UNKNOWN, **(held or {})}
        if told and held and told["state"] not in ("finished", "stopped"):
            document |= {"state": held["state"], "reason": held["reason"]}  # a lock is surer than silence
        return {"reason": "", "held": [], **document}

    def _directories(self) -> dict[str, Any]:
        """As far as directories of saves and their locks tell."""
        sources = sources_of(self._args)
        view = self._follower.view
        run_id = view.run_id if view is not None else sources.only_run()
        inventories = sources.readable(run_id)
        attempts = read_history(inventories, run_id).attempts
        live = live_directory(sources, run_id)
        entries = [entry for entry in catalog(inventories) if entry.run_id == run_id]
        newest = attempts[-1] if attempts else None
        if newest is None and not live:
            raise CommandError(
                f"No attempt of {'run ' + repr(run_id) if run_id else 'any run'} is in sight.",
                advice="Give the directories that the job was given: --local DIR, --events DIR.",
                status=2,
            )
        state, reason = judge(newest, live, sees_nodes=any(node.run_id == run_id for node in sources.nodes))
        known = [entry.save.iteration for entry in entries if entry.complete and not entry.abandoned]
        return {
            "run_id": run_id,
            "state": state,
            "reason": reason,
            "attempt": newest.attempt if newest else None,
            "generation": newest.generation if newest else None,
            "attempts": len(attempts),
            "iteration": max([iteration_of(newest), *known]),
            "held": [as_json(entry) for entry in entries[:_MOST_SAVES]],
        }


def _follow(scope: _Scope, document: dict[str, Any]) -> dict[str, Any]:
    """Draw again and again; returns what was seen last. The terminal is left as it was."""
    from rich.live import Live

    from resilience.cli_tables import console_for

    live = Live(console=console_for(sys.stdout), screen=True, auto_refresh=False)
    with contextlib.suppress(KeyboardInterrupt), _keys() as key:  # Ctrl-C at any moment, the first and the last too
        try:
            live.start()
            live.update(picture(document), refresh=True)
            while key() not in ("q", "Q", "\x03"):
                try:
                    document = scope.look()
                except CommandError as error:  # a job that ends frees its directories: what was seen last stays
                    document = {**document, "reason": str(error)}
                live.update(picture(document), refresh=True)
        finally:
            live.stop()
    return document


class _Keys:
    """What was typed within a second."""

    def __init__(self, fd: int | None) -> None:
        self._fd = fd

    def __call__(self) -> str:
        if self._fd is None:
            time.sleep(_EVERY_S)
            return ""
        ready, _, _ = select.select([self._fd], [], [], _EVERY_S)
        return os.read(self._fd, 1).decode(errors="replace") or "q" if ready else ""  # at its end nobody can type q


@contextlib.contextmanager
def _keys() -> Iterator[_Keys]:
    """Single keys from the terminal, without their being shown; none where stdin is no terminal."""
    if not sys.stdin.isatty():
        yield _Keys(None)
        return
    import termios
    import tty

    fd = sys.stdin.fileno()
    before = termios.tcgetattr(fd)
    try:
        tty.setcbreak(fd)
        yield _Keys(fd)
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, before)


def show(document: dict[str, Any], console: Console) -> None:
    console.print(picture(document))


def picture(document: dict[str, Any]) -> RenderableType:
    """The snapshot for people."""
    from rich.console import Group
    from rich.text import Text

    from resilience.cli_tables import rows
    from resilience.observe.phrases import shortened

    style = {"running": "bold green", "finished": "bold", "stopped": "bold"}.get(document["state"], "bold red")
    head = Text(f"run {document['run_id']}: {document['state']}", style=style)
    if document["iteration"] is not None:
        head.append(f" at iteration {document['iteration']:,}")
    if document["reason"]:
        head.append(f"\n  {document['reason']}", style="dim")
    parts: list[RenderableType] = [head]
    parts += [Text(f"! {each['what']} {each['advice']}", style="bold red") for each in document["cautions"]]
    parts.append(rows(("", ""), _facts(document)))
    if document["nodes"]:
        parts.append(
            rows(("node", "ranks", "iteration", "seen"), _nodes(document["nodes"]), right="ranks iteration seen")
        )
    if document["held"]:
        saves = [(each["iteration"], each["tier"], "complete" if each["complete"] else each["reason"] or "incomplete")
                 for each in document["held"]]  # fmt: skip
        parts.append(rows(("save", "tier", "state"), saves, right="save"))
    for each in document["news"]:
        parts.append(Text(f"{_ago(each['age_s'])} ago: {shortened(each['text'], _LONGEST_NEWS)}", style="dim"))
    return Group(*parts)


def _facts(document: dict[str, Any]) -> list[tuple[str, str]]:
    """What is known, in words."""
    from resilience.observe.phrases import human_seconds, plural, tier_words

    facts: list[tuple[str, str]] = []
    if document["iterations_per_s"]:
        facts.append(("pace", f"{document['iterations_per_s']:.3g} iterations/s"))
    for kind, words in (
        ("complete", "newest save"),
        ("protected", "newest with replicas"),
        ("persistent", "newest checkpoint"),
    ):
        save = document[kind]
        if save is not None:
            facts.append(
                (words, f"iteration {save['iteration']:,}, {tier_words(save['tier'])}, {_ago(save['age_s'])} ago")
            )
    if document["resumed_from"]:
        resume = document["resumed_from"]
        facts.append(("resumed from", f"iteration {resume['iteration']:,}, {tier_words(resume['tier'])}"))
    if document["saves"] is not None:
        facts.append(("saves", ", ".join(f"{count} {kind}" for kind, count in document["saves"].items())))
    if document["stall"] and document["stall"]["median_s"] is not None:
        stall = document["stall"]
        facts.append(("stall", f"{human_seconds(stall['median_s'])}, at most {human_seconds(stall['worst_s'])}"))
    if document["goodput"] is not None:
        facts.append(("goodput", f"{100 * document['goodput']:.1f} %"))
    if document["failures"] is not None:
        lost = plural(document["lost_iterations"], "iteration")
        facts.append(("failures", f"{document['failures']} in {plural(document['attempts'], 'start')}, {lost} lost"))
    return facts


def _nodes(nodes: list[dict[str, Any]]) -> list[tuple[object, ...]]:
    """Those heard of least recently first: they are why somebody looks."""
    late = sorted(nodes, key=lambda node: -node["seen_s_ago"])
    told: list[tuple[object, ...]] = [
        (each["node"], each["ranks"], each["iteration"], f"{_ago(each['seen_s_ago'])} ago")
        for each in late[:_MOST_NODES]
    ]
    rest = late[_MOST_NODES:]
    if rest:
        told.append((f"{len(rest):,} others", sum(each["ranks"] for each in rest), "", "since"))
    return told


def _ago(seconds: float) -> str:
    from resilience.observe.phrases import human_seconds

    return human_seconds(max(0.0, round(seconds, 1)))
