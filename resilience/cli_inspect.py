"""`resilience inspect`: what a save holds, item by item. Reads headers and metadata, no tensor."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from resilience.cli_sources import add_sources, sources_of
from resilience.contents import Contents, folder_contents, shard_contents
from resilience.errors import CheckpointNotFoundError, CommandError
from resilience.formats.directory import MARKER
from resilience.formats.registry import format_name
from resilience.planning.catalog import CatalogEntry, catalog
from resilience.stores.discovery import Sources
from resilience.stores.filesystem import FileSystem, PosixFileSystem
from resilience.stores.node_reader import CopyLocation

if TYPE_CHECKING:
    from rich.console import Console


def arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options on a parser (of this command only)."""
    parser.add_argument(
        "what",
        metavar="PATH|ITERATION",
        help="a shard file, an iter_* folder (of a node or of persistent checkpoints), or an iteration to look for",
    )
    add_sources(parser)


def run(args: argparse.Namespace) -> tuple[int, dict[str, Any]]:
    """Inspect. CheckpointNotFoundError (status 2) if nothing is there, CorruptCopyError (3) if it cannot be read."""
    path = Path(args.what)
    if args.what.isdecimal() and not path.exists():
        found = _iteration(int(args.what), sources_of(args))
    elif path.exists():
        found = _path(path.resolve(), PosixFileSystem())
    else:
        raise CommandError(f"{path} is not there.", advice="Give a path that exists, or an iteration.", status=2)
    return 0, {"items": found.items, "records": found.records, "bytes": found.nbytes}


def _path(path: Path, fs: FileSystem) -> Contents:
    if path.is_file():
        return shard_contents([path.with_suffix(".safetensors")], fs)
    if format_name(path, fs) is not None:
        return folder_contents(path, fs)
    shards = _shards_in(path, fs)
    if shards:
        return shard_contents(shards, fs)
    attempts = [path / name for name in fs.list_dir(path) if _shards_in(path / name, fs)]
    if attempts:
        return shard_contents(_shards_in(attempts[-1], fs), fs)  # the newest generation
    raise CheckpointNotFoundError(f"{path} holds no shard and no {MARKER}.", advice="Give an iter_* folder.")


def _shards_in(folder: Path, fs: FileSystem) -> list[Path]:
    """Shards that a record vouches for."""
    names = set(fs.list_dir(folder))
    shards = sorted(name for name in names if name.startswith("rank_") and name.endswith(".safetensors"))
    return [folder / name for name in shards if name.removesuffix(".safetensors") + ".json" in names]


def _iteration(iteration: int, sources: Sources) -> Contents:
    """The newest save of that iteration: all copies of it in sight, or its folder."""
    entries = [e for e in catalog(sources.readable(sources.run_id)) if sources.run_id in (None, e.run_id)]
    named = [entry for entry in entries if entry.save.iteration == iteration]
    if not named:
        there = ", ".join(str(each) for each in sorted({entry.save.iteration for entry in entries}))
        raise CheckpointNotFoundError(f"There is no save of iteration {iteration} here (there: {there or 'none'}).")
    best = next((entry for entry in named if entry.complete), named[0])
    if best.on_nodes:
        return shard_contents(_copies(best, sources), sources.fs)
    store = next(store for store in sources.shared if store.source == best.where[0])
    return folder_contents(store.folder_of(best.save), sources.fs)


def _copies(entry: CatalogEntry, sources: Sources) -> list[Path]:
    found: list[Path] = []
    for node in sources.nodes:
        if node.run_id == entry.run_id:
            survey = node.reader(sources.fs).survey()
            found += [c.path for _, c in survey if isinstance(c, CopyLocation) and c.record.save == entry.save]
    return found


def show(document: dict[str, Any], console: Console) -> None:
    from resilience.cli_tables import say, size, table

    rows = [
        (
            item["key"],
            item["kind"],
            item["dtype"],
            _shape(item["global_shape"]) if item["global_shape"] is not None else item.get("value"),
            len(item["chunks"]),
        )
        for item in document["items"]
    ]
    table(console, ("item", "kind", "dtype", "shape or value", "chunks"), rows, right="chunks")
    say(console, "")
    for record in document["records"]:
        what = ", ".join(f"{key} {value}" for key, value in record.items() if key in _SHOWN and value is not None)
        say(console, f"{record['path']}: {what}")
    say(console, f"{len(rows)} items, {size(document['bytes'])}.")


def _shape(shape: list[int]) -> str:
    return "×".join(map(str, shape)) or "scalar"


_SHOWN = ("role", "owner", "tier", "node_id", "bytes", "digest", "run_id", "generation", "format", "world_size")
