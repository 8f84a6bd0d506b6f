"""`resilience prune`: delete saves that nobody needs, under the directories' locks."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.cli_sources import add_sources, at_least_one, sources_of
from resilience.errors import CommandError, ConfigError
from resilience.planning.catalog import CatalogEntry, catalog
from resilience.planning.history import abandonments, read_history
from resilience.planning.inventory import Inventory, SaveId
from resilience.planning.pruning import verdicts
from resilience.stores.discovery import NodeDirectory, Sources
from resilience.stores.filesystem import FileSystem
from resilience.stores.lock import ALL_RANKS, DirectoryLock
from resilience.stores.node_remover import NodeRemover, leftovers
from resilience.stores.shared_store import SharedStore

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    add = parser.add_argument
    add("--keep-last", type=at_least_one, metavar="N", help="complete non-persistent saves to keep (default: all)")
    add("--keep-persistent", type=at_least_one, metavar="N", help="persistent checkpoints to keep (default: all)")
    add("--forget", metavar="RUN_ID", help="delete all that the nodes hold of this run, its newest save too")
    add("--dry-run", action="store_true", help="only tell what would be deleted; takes no lock")
    add_sources(parser)


@dataclass
class _Work:
    """What was (or would be) done."""

    deleted: list[dict[str, Any]] = field(default_factory=list)
    kept: list[dict[str, Any]] = field(default_factory=list)
    bytes_freed: int = 0
    temporary_files: int = 0
    restraints: list[str] = field(default_factory=list)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Prune. Raises AnotherJobError (status 3) if a live job holds a directory, before anything is deleted."""
    sources = sources_of(args)
    work = _Work()
    with contextlib.ExitStack() as stack:
        if not args.dry_run:
            stack.enter_context(_locked(_touched(sources, args.forget)))
        if args.forget is not None:
            _forget(sources, args, work)
        else:
            _prune(sources, args, work)
    return 0, {
        "deleted": work.deleted,
        "kept": work.kept,
        "bytes_freed": work.bytes_freed,
        "temporary_files": work.temporary_files,
        "restraints": work.restraints,
        "dry_run": bool(args.dry_run),
    }


@contextlib.contextmanager
def _locked(nodes: Sequence[NodeDirectory]) -> Iterator[None]:
    """All of them, or none: half a pruning is worth less than an error."""
    with contextlib.ExitStack() as held:
        for node in nodes:
            lock = DirectoryLock(node.path, ALL_RANKS)
            lock.acquire()
            held.callback(lock.release)
        yield


def _touched(sources: Sources, forgotten: str | None) -> list[NodeDirectory]:
    return [node for node in sources.nodes if forgotten in (None, node.run_id)]


# --- pruning ---------------------------------------------------------------------------------------------------------


def _prune(sources: Sources, args: argparse.Namespace, work: _Work) -> None:
    inventories = sources.readable(sources.run_id)
    entries = catalog(inventories)
    for run_id in sources.run_ids():
        of_run = [entry for entry in entries if entry.run_id == run_id]
        history = read_history(inventories, run_id)
        found, restraint = verdicts(of_run, known_complete=sorted(history.completed), keep_last=args.keep_last)
        if restraint and found:
            work.restraints.append(f"run {run_id}: only abandoned saves and temporary files go: {restraint}")
        for verdict in found:
            if not verdict.delete:
                work.kept.append(_told(verdict.entry, verdict.reason))
                continue
            if not args.dry_run:
                _drop(sources, run_id, verdict.entry.save)
            work.deleted.append(_told(verdict.entry, verdict.reason))
            work.bytes_freed += verdict.entry.held_bytes
    for node in sources.nodes:
        _sweep(node, sources.fs, work, dry_run=args.dry_run)
    for store in sources.shared:
        _prune_shared(store, inventories, args, work)


def _drop(sources: Sources, run_id: str, save: SaveId) -> None:
    for node in sources.nodes:
        if node.run_id == run_id:
            NodeRemover(node.path, sources.fs).drop(save)


def _sweep(node: NodeDirectory, fs: FileSystem, work: _Work, *, dry_run: bool) -> None:
    """Temporary files, free buffers and shards without a record."""
    for path in list(leftovers(node.path, fs)):
        found = fs.stat(path)
        if found is None:
            continue
        if not dry_run:
            fs.unlink(path)
        work.temporary_files += 1
        work.bytes_freed += found.nbytes


def _prune_shared(store: SharedStore, inventories: Sequence[Inventory], args: argparse.Namespace, work: _Work) -> None:
    """Under the name of the attempt that owns the directory: a newer start that takes over meanwhile stops us."""
    owner = store.owner()
    if owner is None or args.run_id not in (None, owner.run_id):
        return
    saves = {save.save: save for each in inventories for save in each.shared_saves if save.source == store.source}
    history = read_history(inventories, owner.run_id)
    left = set(abandonments({*saves, *history.completed}, history.attempts))
    asked = args.keep_last if store.source == "global" else args.keep_persistent
    keep = asked if asked is not None else len(saves) + 1
    doomed = store.surplus(owner.run_id, keep, abandoned=left)
    if doomed and not args.dry_run:
        store.take_ownership(owner.run_id, owner.attempt, owner.generation)  # it has it: nothing changes hands
        doomed = store.prune(keep, abandoned=left)
    for save in doomed:
        reason = "abandoned" if save in left else f"not among the newest {keep}"
        work.deleted.append(_named(save, saves[save].tier, owner.run_id, saves[save].nbytes, reason))
        work.bytes_freed += saves[save].nbytes
    for save, found in saves.items():
        if found.run_id == owner.run_id and save not in doomed:
            work.kept.append(_named(save, found.tier, owner.run_id, found.nbytes, found.problem or "complete"))


# --- forgetting ------------------------------------------------------------------------------------------------------


def _forget(sources: Sources, args: argparse.Namespace, work: _Work) -> None:
    """Delete the run's node directories. Persistent checkpoints are nobody's leftovers and stay."""
    if sources.shared or args.keep_last is not None or args.keep_persistent is not None:
        raise ConfigError(
            "--forget deletes what nodes hold of a run and goes with --local only.",
            advice="Remove a directory of persistent checkpoints yourself, if that is what you want.",
        )
    nodes = _touched(sources, args.forget)
    if not nodes:
        raise CommandError(
            f"There is nothing of run {args.forget!r} here.", advice="`resilience ls` shows the runs.", status=2
        )
    for entry in catalog(sources.node_inventories(args.forget)):
        work.deleted.append(_told(entry, "the run is forgotten"))
    for node in nodes:
        work.bytes_freed += _bytes_below(node.path, sources.fs)
        if not args.dry_run:
            sources.fs.remove_tree(node.path)
            _remove_if_empty(node.path.parent, sources.fs)


def _bytes_below(path: Path, fs: FileSystem) -> int:
    total = 0
    for name in fs.list_dir(path):
        found = fs.stat(path / name)
        if found is not None:
            total += _bytes_below(path / name, fs) if found.is_dir else found.nbytes
    return total


def _remove_if_empty(path: Path, fs: FileSystem) -> None:
    if not fs.list_dir(path):
        fs.remove_tree(path)


# --- telling ---------------------------------------------------------------------------------------------------------


def _told(entry: CatalogEntry, reason: str) -> dict[str, Any]:
    return _named(entry.save, entry.tier, entry.run_id, entry.held_bytes, reason)


def _named(save: SaveId, tier: str, run_id: str | None, nbytes: int, reason: str) -> dict[str, Any]:
    return {
        "iteration": save.iteration,
        "generation": save.generation,
        "attempt": save.attempt,
        "tier": tier,
        "run_id": run_id,
        "bytes": nbytes,
        "reason": reason,
    }


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    columns = ("iteration", "tier", "run", "size", "reason")
    heading = "Would be deleted" if document["dry_run"] else "Deleted"
    for title, key in ((heading, "deleted"), ("Kept", "kept")):
        if document[key]:
            say(console, title, "bold")
            rows = [(s["iteration"], s["tier"], s["run_id"], size(s["bytes"]), s["reason"]) for s in document[key]]
            table(console, columns, rows, right="iteration size")
            say(console, "")
    for line in document["restraints"]:
        say(console, f"note: {line}", "yellow")
    freed = "would be freed" if document["dry_run"] else "freed"
    files = document["temporary_files"]
    also = f", {files} temporary file{'s' if files != 1 else ''} among it" if files else ""
    say(console, f"{size(document['bytes_freed'])} {freed}{also}.")
