"""Which directories of saves a person means: `--local`, `--save`, `--global-dir` and `--run-id` become stores to read.

A local directory may be given as `<dir>` (all runs and nodes in it), `<dir>/<run>` or `<dir>/<run>/<node>`; what it is,
is told by what lies in it. A directory that is not there and one that cannot be read are different answers: nobody may
take the second for an empty one.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from resilience.errors import CommandError, SourceUnavailableError, StoreError
from resilience.planning.inventory import Inventory
from resilience.stores.authentication import UNSEALED, Seal
from resilience.stores.digest import STRONG, algorithm_of
from resilience.stores.filesystem import FileSystem
from resilience.stores.node_names import ARENAS, save_folders
from resilience.stores.node_reader import NodeReader
from resilience.stores.records import is_name
from resilience.stores.shared_inventory import ForeignProblem, Source
from resilience.stores.shared_store import SharedStore

__all__ = ["NodeDirectory", "Sources", "default_memory_dir", "find_sources"]


@dataclass(frozen=True, order=True)
class NodeDirectory:
    """`<base>/<run_id>/<name>`: what one node keeps of one run. `name` is the node's id at the time.

    `seal`: with a key, what has no MAC of it counts as not there.
    """

    base: Path
    run_id: str
    name: str
    seal: Seal = field(default=UNSEALED, compare=False, repr=False)

    @property
    def path(self) -> Path:
        return self.base / self.run_id / self.name

    def reader(self, fs: FileSystem) -> NodeReader:
        return NodeReader(self.path, fs, self.seal)


@dataclass(frozen=True)
class Sources:
    """Everything that was asked for: node directories in order, and shared directories."""

    nodes: tuple[NodeDirectory, ...]
    shared: tuple[SharedStore, ...]
    run_id: str | None
    fs: FileSystem
    seal: Seal = UNSEALED

    def not_authenticated(self, inventories: Sequence[Inventory]) -> list[str]:
        """What to say where files were written under a key, and nobody gave it."""
        strong = any(
            algorithm_of(digest) == STRONG
            for each in inventories
            for held in each.node_saves
            for digest in held.digests
        )
        if self.seal.keyed or not strong:
            return []
        return ["These saves were written under a key. They are not authenticated here: give --secret-env NAME."]

    def node_inventories(self, run_id: str | None = None) -> list[Inventory]:
        """One per node directory; the source is the directory's name, as it was the node's."""
        wanted = [node for node in self.nodes if run_id in (None, node.run_id)]
        return [replace(node.reader(self.fs).inventory([node.name]), source=node.name) for node in wanted]

    def shared_inventories(self, run_id: str | None = None) -> list[Inventory]:
        """One per shared directory; with a run, as that run would see it."""
        return [store.inventory(run_id) for store in self.shared]

    def inventories(self, run_id: str | None = None) -> list[Inventory]:
        return [*self.node_inventories(run_id), *self.shared_inventories(run_id)]

    def readable(self, run_id: str | None = None) -> list[Inventory]:
        """All inventories, or SourceUnavailableError: what could not be looked at must not be reported as empty."""
        found = self.inventories(run_id)
        blind = [f"{each.source}: {each.unknown}" for each in found if each.unknown]
        if blind:
            raise SourceUnavailableError(
                f"Not every directory could be read: {'; '.join(blind)}", advice="Repair it, or leave it out."
            )
        return found

    def run_ids(self) -> tuple[str, ...]:
        """Runs that are in sight, by name."""
        if self.run_id is not None:
            return (self.run_id,)
        found = {node.run_id for node in self.nodes}
        for store in self.shared:
            found |= _runs_in(store.inventory(None))
        return tuple(sorted(found))

    def only_run(self) -> str:
        """The run that was asked for, or the only one in sight. CommandError (status 2) if there are several or none.

        Who owns `save` is the run that a start there would go on with.
        """
        if self.run_id is not None:
            return self.run_id
        for store in self.shared:
            if store.source == "save" and (owner := store.owner()) is not None:
                return owner.run_id
        found = self.run_ids()
        if len(found) > 1:
            raise CommandError(
                f"There are several runs here: {', '.join(found)}.", advice="Choose one with --run-id.", status=2
            )
        return found[0] if found else ""


def find_sources(
    fs: FileSystem,
    *,
    local: Sequence[str | os.PathLike[str]] = (),
    save: str | os.PathLike[str] | None = None,
    global_dir: str | os.PathLike[str] | None = None,
    run_id: str | None = None,
    foreign_problem: ForeignProblem | None = None,
    must_exist: bool = True,
    seal: Seal = UNSEALED,
) -> Sources:
    """Resolve what was given. CommandError: status 2 for a directory that is not there, 3 for an unreadable one.

    Without `must_exist` a directory that is not there counts as empty: a start would make it.
    """
    nodes: dict[NodeDirectory, None] = {}
    for given in local:
        directory = _directory(given, fs, "--local", must_exist)
        if directory is not None:
            nodes.update(dict.fromkeys(_read(directory, fs)))
    shared: list[SharedStore] = []
    places: tuple[tuple[Source, str | os.PathLike[str] | None, str], ...] = (
        ("save", save, "--save"),
        ("global", global_dir, "--global-dir"),
    )
    for source, given_root, option in places:
        root = None if given_root is None else _directory(given_root, fs, option, must_exist)
        if root is not None:
            judge = {"foreign_problem": foreign_problem} if foreign_problem else {}
            shared.append(SharedStore(root, fs, source=source, **judge))
    wanted = tuple(replace(node, seal=seal) for node in nodes if run_id in (None, node.run_id))
    return Sources(wanted, tuple(shared), run_id, fs, seal)


def default_memory_dir(env: Mapping[str, str]) -> Path:
    """Where jobs of this user keep node memory when nothing else is configured."""
    return Path(env.get("RESILIENCE_MEMORY_DIR") or f"/dev/shm/resilience-{os.geteuid()}")


def _directory(given: str | os.PathLike[str], fs: FileSystem, option: str, must_exist: bool) -> Path | None:
    """The directory itself: a person may give a link to it, stores follow none."""
    path = Path(given)
    try:
        real = path.resolve()
        found = fs.stat(real)
    except (OSError, RuntimeError) as error:
        raise CommandError(f"{option} {path} cannot be read: {error}") from error
    if found is None and not must_exist:
        return None
    if found is None or not found.is_dir:
        what = "is not there" if found is None else "is no directory"
        raise CommandError(f"{option} {path} {what}.", advice="Give a directory that exists.", status=2)
    return real


def _read(directory: Path, fs: FileSystem) -> list[NodeDirectory]:
    try:
        return list(_node_directories(directory, fs))
    except StoreError as error:
        raise CommandError(f"--local {directory} cannot be read: {error}", status=3) from error


def _node_directories(directory: Path, fs: FileSystem) -> Iterator[NodeDirectory]:
    if _is_node_directory(directory, fs):
        yield NodeDirectory(directory.parent.parent, directory.parent.name, directory.name)
        return
    names = _folders(directory, fs)
    nodes = [name for name in names if _is_node_directory(directory / name, fs)]
    if nodes:
        yield from (NodeDirectory(directory.parent, directory.name, name) for name in nodes)
        return
    for run in names:
        for node in _folders(directory / run, fs):
            if _is_node_directory(directory / run / node, fs):
                yield NodeDirectory(directory, run, node)


def _folders(directory: Path, fs: FileSystem) -> list[str]:
    names = [name for name in fs.list_dir(directory) if is_name(name)]
    return [name for name in names if (found := fs.stat(directory / name)) is not None and found.is_dir]


def _is_node_directory(path: Path, fs: FileSystem) -> bool:
    """Every node directory has a lock and buffers from its first start on; a copy of one may have saves only."""
    names = fs.list_dir(path)
    return "lock" in names or ARENAS in names or any(True for _ in save_folders(path, fs))


def _runs_in(inventory: Inventory) -> set[str]:
    """Runs that a shared directory's folders and logs name."""
    named = {save.run_id for save in inventory.shared_saves if save.run_id}
    return named | {log.run_id for log in inventory.attempts}
