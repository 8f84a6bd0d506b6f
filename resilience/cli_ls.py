"""`resilience ls`: which saves there are, newest first."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from resilience.cli_sources import add_sources, sources_of
from resilience.planning.catalog import CatalogEntry, catalog

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    add_sources(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """List. Raises SourceUnavailableError if a directory cannot be read."""
    sources = sources_of(args)
    inventories = sources.readable(sources.run_id)
    entries = [entry for entry in catalog(inventories) if sources.run_id in (None, entry.run_id)]
    notes = [note for each in inventories for note in each.notes] + sources.not_authenticated(inventories)
    return 0, {"saves": [as_json(entry) for entry in entries], "authenticated": sources.seal.keyed, "notes": notes}


def as_json(entry: CatalogEntry) -> dict[str, Any]:
    """One save with the interface's keys."""
    return {
        "iteration": entry.save.iteration,
        "generation": entry.save.generation,
        "attempt": entry.save.attempt,
        "tier": entry.tier,
        "run_id": entry.run_id,
        "world_size": entry.world_size,
        "owners_present": entry.owners_present,
        "copies": entry.copies,
        "bytes": entry.nbytes,
        "held_bytes": entry.held_bytes,
        "rebuildable": entry.rebuildable,
        "parity": entry.parity,
        "complete": entry.complete,
        "abandoned": bool(entry.abandoned),
        "where": list(entry.where),
        "reason": entry.problem or entry.abandoned,
    }


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    saves = document["saves"]
    if not saves:
        say(console, "There are no saves here.")
    else:
        table(
            console,
            ("iteration", "attempt", "tier", "run", "owners", "copies", "size", "state"),
            [
                (
                    save["iteration"],
                    f"g{save['generation']:04d}-{save['attempt'][:8]}" if save["attempt"] else "-",
                    save["tier"],
                    save["run_id"],
                    f"{_or_unknown(save['owners_present'])}/{_or_unknown(save['world_size'])}",
                    save["copies"],
                    size(save["bytes"]),
                    _state(save),
                )
                for save in saves
            ],
            right="iteration owners copies size",
        )
    for note in document["notes"]:
        say(console, f"note: {note}", "yellow")


def _or_unknown(number: int | None) -> str:
    return "?" if number is None else str(number)


def _state(save: dict[str, Any]) -> str:
    if save["abandoned"]:
        return str(save["reason"])
    if save["complete"] and save["rebuildable"]:
        return f"complete, {save['rebuildable']} to be rebuilt from parity"
    if save["complete"]:
        return f"complete, but {save['reason']}" if save["reason"] else "complete"
    return f"not usable: {save['reason']}" if save["reason"] else "incomplete"
