"""`resilience verify`: is every copy what its record says, and every checkpoint folder whole? `--deep` reads it all."""

from __future__ import annotations

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.cli_sources import add_sources, sources_of
from resilience.errors import CorruptCopyError, ResilienceError, SourceUnavailableError, UnsafePathError
from resilience.formats.proof import folder_damage
from resilience.stores.discovery import NodeDirectory, Sources
from resilience.stores.filesystem import FileSystem
from resilience.stores.node_reader import CopyLocation
from resilience.stores.proof import CopyGoneError, prove_copy, prove_header
from resilience.stores.shared_store import SharedStore

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Damage:
    """One thing that is wrong; the keys of the interface's `damaged`."""

    path: str
    iteration: int | None
    owner: int | None
    node: str | None
    reason: str


@dataclass
class _Found:
    checked: int = 0
    read_bytes: int = 0
    damaged: list[Damage] = field(default_factory=list)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument("--deep", action="store_true", help="read and hash every byte, not only records and headers")
    add_sources(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Look at everything; status 1 if something is damaged. What a live job deletes meanwhile is no damage."""
    sources = sources_of(args)
    found = _Found()
    for node in sources.nodes:
        _verify_node(node, sources.fs, found, deep=args.deep)
    for store in sources.shared:
        _verify_shared(store, sources, found, deep=args.deep)
    document = {
        "ok": not found.damaged,
        "checked": found.checked,
        "read_bytes": found.read_bytes,
        "deep": bool(args.deep),
        "authenticated": sources.seal.keyed,
        "notes": sources.not_authenticated(sources.node_inventories()),
        "damaged": [vars(damage) for damage in found.damaged],
    }
    return (1 if found.damaged else 0), document


def _verify_node(node: NodeDirectory, fs: FileSystem, found: _Found, *, deep: bool) -> None:
    for path, content in node.reader(fs).survey():
        reason: str | None = ""
        if isinstance(content, ResilienceError):
            reason = str(content)
        elif isinstance(content, CopyLocation):
            reason = _damage_of(content, fs, deep=deep)
            found.read_bytes += content.record.nbytes if deep and reason is not None else 0
        if reason is None:
            continue  # gone meanwhile
        found.checked += 1
        if reason:
            shard = path.with_suffix(".safetensors")  # most reasons are about the bytes, not about their record
            at_fault = shard if str(shard) in reason else path
            found.damaged.append(Damage(str(at_fault), *_named(path), node.name, reason))


def _damage_of(copy: CopyLocation, fs: FileSystem, *, deep: bool) -> str | None:
    """What is wrong with a copy, "" if nothing, None if it is not there any more."""
    try:
        prove_copy(copy, fs) if deep else prove_header(copy, fs)
    except CopyGoneError:
        return None
    except (CorruptCopyError, UnsafePathError) as error:
        return str(error)
    return ""


def _named(path: Path) -> tuple[int | None, int | None]:
    """Iteration and owner (of parity: none) as the path says: the record itself cannot be believed."""
    iteration = path.parent.parent.name.removeprefix("iter_")
    owner = path.stem.removeprefix("rank_").partition("-of-")[0]
    return (int(iteration) if iteration.isdecimal() else None), (int(owner) if owner.isdecimal() else None)


def _verify_shared(store: SharedStore, sources: Sources, found: _Found, *, deep: bool) -> None:
    inventory = store.inventory(None)
    if inventory.unknown:
        raise SourceUnavailableError(f"{store.root} could not be read: {inventory.unknown}")
    for save in inventory.shared_saves:
        if sources.run_id not in (None, save.run_id):
            continue
        folder = store.folder_of(save.save)
        damages = list(folder_damage(folder, sources.fs, deep=deep))
        there = sources.fs.stat(folder)
        if there is None:
            continue  # pruned meanwhile
        found.checked += 1
        found.read_bytes += save.nbytes if deep else 0
        found.damaged += [Damage(str(path), save.save.iteration, None, None, reason) for path, reason in damages]


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    if document["damaged"]:
        columns = ("iteration", "owner", "node", "reason")
        rows = [
            (damage["iteration"], damage["owner"], damage["node"], _with_path(damage)) for damage in document["damaged"]
        ]
        table(console, columns, rows, right="iteration owner")
    how = f"{size(document['read_bytes'])} read and hashed" if document["deep"] else "records, headers and sizes only"
    verdict = f"{len(document['damaged'])} damaged" if document["damaged"] else "no damage found"
    say(console, f"{document['checked']} checked ({how}): {verdict}.", "red" if document["damaged"] else "")
    for note in document["notes"]:
        say(console, f"note: {note}", "yellow")


def _with_path(damage: dict[str, Any]) -> str:
    return damage["reason"] if damage["path"] in damage["reason"] else f"{damage['path']}: {damage['reason']}"
