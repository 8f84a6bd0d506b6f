"""`resilience explain`: what a start would resume from and why, decided by the functions that the restore uses."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from resilience.cli_sources import add_sources, at_least_one, sources_of
from resilience.errors import SourceUnavailableError
from resilience.explain import Explanation, decision_json, explain

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument(
        "--world-size", type=at_least_one, metavar="N", help="ranks of the start (default: as in the newest save)"
    )
    parser.add_argument("--ckpt-step", type=int, metavar="K", help="as with `ckpt_step: K` in the configuration")
    parser.add_argument(
        "--no-elastic", action="store_true", help="as with `elastic: false`: saves of another world size do not count"
    )
    add_sources(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Explain; status 1 if there is nothing to resume from. Raises SourceUnavailableError if that cannot be told."""
    sources = sources_of(args)
    found = explain(
        sources, run_id=sources.only_run(), world_size=args.world_size, ckpt_step=args.ckpt_step,
        elastic=not args.no_elastic,
    )  # fmt: skip
    error = found.plan.decision.error
    if error is not None and error[0] == "SourceUnavailable":
        raise SourceUnavailableError(error[1], advice=error[2])
    document = as_json(found)
    document["notes"] += sources.not_authenticated(sources.node_inventories(found.run_id))
    return (0 if found.chosen else 1), document | {"authenticated": sources.seal.keyed}


def as_json(found: Explanation) -> dict[str, Any]:
    """The interface's keys, then what it rests on."""
    decision = found.plan.decision
    return {
        "decision": decision_json(found.chosen),
        "reason": decision.reason,
        "advice": decision.error[2] if decision.error else "",
        "fresh": decision.fresh,
        "passed_over": [vars(each) for each in decision.passed_over],
        "retrieval": [
            {
                "owner": fetch.owner,
                "from_node": fetch.from_node,
                "to_node": fetch.to_node,
                "to_rank": fetch.to_rank,
                "bytes": fetch.nbytes,
            }
            for fetch in (*found.plan.retrieval.fetches, *found.plan.retrieval.spread)
        ]
        + [
            {
                "owner": rebuild.owner,
                "from_node": node,
                "to_node": rebuild.node,
                "to_rank": rebuild.rank,
                "bytes": nbytes,
            }
            for rebuild in found.plan.retrieval.rebuilds
            for node, nbytes in rebuild.travelling().items()
        ],
        "rebuilt": [rebuild.owner for rebuild in found.plan.retrieval.rebuilds],
        "saved_by": found.chosen.world_size if found.chosen else None,
        "shown": [
            {"owner": shown.owner, "node": shown.node, "rank": shown.rank, "bytes": shown.nbytes}
            for shown in (found.plan.assembly.shown if found.plan.assembly else ())
        ],
        "own_copies": len(found.plan.retrieval.local),
        "bad_copies": [
            {
                "where": bad.strike.where,
                "tier": bad.strike.tier,
                "iteration": bad.strike.save.iteration,
                "owner": bad.strike.owner,
                "parity": bad.strike.parity,
                "reason": bad.reason,
            }
            for bad in found.bad_copies
        ],
        "run_id": found.run_id or None,
        "world_size": len(found.nodes),
        "nodes": list(found.nodes),
        "verified_bytes": found.verified_bytes,
        "unknown": list(decision.unknown),
        "notes": list(found.plan.notes),
    }


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    decision = document["decision"]
    if decision:
        where = f"generation {decision['generation']}, {decision['tier']}"
        say(console, f"A start would resume from iteration {decision['iteration']} ({where}):", "bold")
    elif document["fresh"]:
        say(console, "A start would begin afresh:", "bold")
    else:
        say(console, "A start would stop:", "bold red")
    say(console, f"  {document['reason']}")
    if document["advice"]:
        say(console, f"  {document['advice']}")
    if decision:
        say(console, f"  {size(document['verified_bytes'])} were read and verified for this answer.")
    if document["shown"]:
        said = f"{document['saved_by']} ranks took it, {document['world_size']} would put it together"
        say(console, f"  {said}: each fetches the parts that it needs and its node lacks.")
    for heading, key, columns in (
        ("Passed over", "passed_over", ("iteration", "generation", "tier", "reason")),
        ("Bad copies", "bad_copies", ("iteration", "owner", "where", "tier", "reason")),
        ("Shards that would travel", "retrieval", ("owner", "from_node", "to_node", "to_rank", "bytes")),
        ("Shards that would be put together", "shown", ("owner", "node", "rank", "bytes")),
    ):
        if document[key]:
            say(console, f"\n{heading}", "bold")
            rows = [[row[column] for column in columns] for row in document[key]]
            table(console, columns, rows, right="iteration generation owner to_rank rank bytes")
    for line in (*document["unknown"], *document["notes"]):
        say(console, f"note: {line}", "yellow")
