"""`python -m resilience.drill.simulator`: many histories, or one again; exit status 1 if a promise was broken."""

from __future__ import annotations

import argparse
import sys

from resilience.drill.simulator.cluster import execute
from resilience.drill.simulator.fuzz import explain_failure, fuzz
from resilience.drill.simulator.history import FAULTS, FaultKind, draw_history


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m resilience.drill.simulator", description=__doc__)
    parser.add_argument("--histories", type=int, help="how many (default: 100, or what --seconds allow)")
    parser.add_argument("--seconds", type=float, help="for how long")
    parser.add_argument("--seed", type=int, default=0, help="the first seed; the others follow it (default: 0)")
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    parser.add_argument("--focus", default="", help="only faults of these kinds, separated by commas")
    parser.add_argument("--replay", action="store_true", help="execute the history of --seed alone and tell it")
    given = parser.parse_args(arguments)
    focus = tuple(kind for kind in FAULTS if kind in given.focus.split(","))
    if given.replay:
        return _replay(given.seed, focus)
    count = given.histories if given.histories is not None or given.seconds is not None else 100
    tally = fuzz(given.seed, count, seconds=given.seconds, workers=given.workers, focus=focus)
    print("\n".join(tally.lines()))
    if not tally.broken:
        return 0
    small, outcome = explain_failure(draw_history(min(each.seed for each in tally.broken), focus))
    print("\nthe first of them, made small:", *small.lines(), *outcome.story, str(outcome.violation), sep="\n")
    print(
        f"\nagain: python -m resilience.drill.simulator --replay --seed {small.seed}"
        + (f" --focus {given.focus}" if focus else "")
    )
    return 1


def _replay(seed: int, focus: tuple[FaultKind, ...]) -> int:
    history = draw_history(seed, focus)
    outcome = execute(history)
    print(*history.lines(), *outcome.story, f"trace {outcome.trace}", sep="\n")
    print(outcome.violation or "all promises were kept")
    return int(outcome.violation is not None)


if __name__ == "__main__":
    sys.exit(main())
