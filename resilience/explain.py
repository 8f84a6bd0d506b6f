"""What a start would resume from, and why: the restore's own decision, made without changing anything.

The same functions decide (`planning.restore_plan`), and what would be loaded is hashed as the restore does: a copy that
does not verify is struck off and the election held again. Where ranks will run is not known yet; they are taken to be
where the newest save's were, and ranks whose node is out of sight on new, empty nodes.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from resilience.errors import ConfigError, ResilienceError, StoreError
from resilience.formats.proof import folder_damage
from resilience.formats.registry import foreign_problem
from resilience.planning.decision import Candidate, ElectionPolicy, Strike
from resilience.planning.history import abandonments, read_history
from resilience.planning.inventory import Inventory, Kept, NodeSave, ParityName, SaveId, Tier
from resilience.planning.rebuilding import Rebuild
from resilience.planning.restore_plan import Plan, plan_restore
from resilience.planning.topology import make_topology
from resilience.replication.rebuilt_digest import rebuilt_digest
from resilience.stores.discovery import NodeDirectory, Sources, find_sources
from resilience.stores.filesystem import FileSystem, PosixFileSystem
from resilience.stores.healed import healed
from resilience.stores.node_reader import CopyLocation, locate_copy
from resilience.stores.proof import CopyGoneError, header_of, prove_copy
from resilience.stores.shared_store import SharedStore

__all__ = ["BadCopy", "Explanation", "explain", "explain_paths"]

_FORK = "explain"  # no attempt log has this id, so that `ckpt_step` is taken for a new fork


@dataclass(frozen=True)
class BadCopy:
    """A copy that would have been loaded, and failed to verify."""

    strike: Strike
    reason: str


@dataclass(frozen=True)
class Explanation:
    """The outcome. `nodes` names the node that each rank was taken to run on."""

    run_id: str
    nodes: tuple[str, ...]
    plan: Plan
    bad_copies: tuple[BadCopy, ...]
    verified_bytes: int

    @property
    def chosen(self) -> Candidate | None:
        return self.plan.decision.chosen


def explain(
    sources: Sources,
    *,
    run_id: str,
    world_size: int | None = None,
    ckpt_step: int | None = None,
    elastic: bool = True,
) -> Explanation:
    """Decide as a start of `run_id` on these sources would. Reads every byte of what would be loaded.

    `world_size`: default that of the newest save; `elastic` as in the configuration.
    An unreadable source is treated as the restore treats it after its
    retries: the decision goes on only if it is safe. Raises ConfigError for a directory that belongs to another run.
    """
    views: dict[str, tuple[SharedStore, FileSystem]] = {}
    for store in sources.shared:
        views[store.source] = _as_started(store, run_id, sources.fs)
    inventories = sources.node_inventories(run_id)
    inventories += [store.inventory(run_id) for store, _ in views.values()]
    world = world_size if world_size is not None else _newest_world_size(inventories, run_id)
    place = _place_ranks(sources.nodes, inventories, run_id, world)
    seen = [replace(each, source=place.node_of.get(each.source, each.source)) for each in inventories]
    policy = ElectionPolicy(ckpt_step, _FORK, unknown_final=True, elastic=elastic)
    rounds = _Rounds(sources, views, seen, run_id, place.nodes, policy)
    plan = rounds.run()
    return Explanation(run_id, place.nodes, plan, tuple(rounds.bad), rounds.verified_bytes)


def _as_started(store: SharedStore, run_id: str, fs: FileSystem) -> tuple[SharedStore, FileSystem]:
    """A shared directory as the start would see it, after claiming and healing it."""
    try:
        owner = store.owner()
        if owner is not None and run_id and owner.run_id != run_id:
            raise ConfigError(f"{store.root} belongs to run {owner.run_id!r}: a start of run {run_id!r} is refused.")
        return healed(store, foreign_problem)
    except StoreError:
        return store, fs  # its inventory will say that it cannot be read


def explain_paths(
    local_dirs: Sequence[Path],
    save: Path | None,
    global_dir: Path | None,
    run_id: str | None,
    world_size: int | None = None,
) -> Mapping[str, Any] | None:
    """`{iteration, generation, tier}` of what a start would resume from; None: a fresh start.

    Directories that are not there are empty ones, since a start would make them. Raises the error that a start would.
    """
    sources = find_sources(
        PosixFileSystem(),
        local=local_dirs,
        save=save,
        global_dir=global_dir,
        run_id=run_id,
        foreign_problem=foreign_problem,
        must_exist=False,
    )
    found = explain(sources, run_id=sources.only_run(), world_size=world_size)
    found.plan.decision.raise_if_error()
    return decision_json(found.chosen)


def decision_json(chosen: Candidate | None) -> dict[str, Any] | None:
    """What was elected, with the interface's keys."""
    if chosen is None:
        return None
    return {"iteration": chosen.save.iteration, "generation": chosen.save.generation, "tier": chosen.tier}


class _Rounds:
    """Elect, verify what would be loaded, strike off what fails, elect again."""

    def __init__(
        self,
        sources: Sources,
        views: Mapping[str, tuple[SharedStore, FileSystem]],
        inventories: Sequence[Inventory],
        run_id: str,
        nodes: tuple[str, ...],
        policy: ElectionPolicy,
    ) -> None:
        self._sources = sources
        self._views = views
        self._inventories = inventories
        self._run_id = run_id
        self._nodes = nodes
        self._policy = policy
        self._topology = make_topology(len(nodes), nodes, jump=None, factor=1, domains=None, restart=True)
        self._groups: dict[SaveId, tuple[tuple[int, int], ...]] = {}
        self._proved: set[tuple[str, Tier, SaveId, Kept]] = set()
        self._rebuilt: set[tuple[SaveId, Rebuild]] = set()
        self.bad: list[BadCopy] = []
        self.verified_bytes = 0

    def run(self) -> Plan:
        while True:
            plan = self._plan()
            chosen = plan.decision.chosen
            if chosen is None:
                return plan
            if plan.split and chosen.save not in self._groups:
                self._groups[chosen.save] = self._read_groups(chosen.save, plan)
                continue
            failed = list(self._failures(chosen, plan))
            if not failed:
                return plan
            self.bad += failed

    def _plan(self) -> Plan:
        """With the data-parallel groups of the save at hand, once they are known; they decide only who reads what."""
        everyone_alike = ((0, 0),) * len(self._nodes)
        coordinates = everyone_alike
        for _ in range(2):
            plan = plan_restore(
                self._inventories,
                run_id=self._run_id,
                nodes=self._nodes,
                coordinates=coordinates,
                topology=self._topology,
                strikes=frozenset(bad.strike for bad in self.bad),
                policy=self._policy,
            )
            chosen = plan.decision.chosen
            known = self._groups.get(chosen.save, everyone_alike) if chosen else coordinates
            if known == coordinates:
                break
            coordinates = known
        return plan

    def _read_groups(self, save: SaveId, plan: Plan) -> tuple[tuple[int, int], ...]:
        """Which ranks share what data parallelism replicates, as the shards' headers say; unreadable ones say nothing.

        Ranks of one group get one coordinate: its lowest rank.
        """
        group_of: dict[int, int] = {}
        for kept, owner, node_dir, tier, _ in _copies_of(plan):
            if owner in group_of or isinstance(kept, ParityName):
                continue
            try:
                location = self._locate(save, owner, node_dir, tier, len(self._nodes))
                group = header_of(location, self._sources.fs).group
            except (ResilienceError, CopyGoneError, FileNotFoundError):
                continue
            for rank in group:
                group_of.setdefault(rank, min(group))
        return tuple((group_of.get(rank, rank), 0) for rank in range(len(self._nodes)))

    def _failures(self, chosen: Candidate, plan: Plan) -> Iterator[BadCopy]:
        if chosen.kind == "shared":
            yield from self._shared_failure(chosen)
            return
        size = chosen.world_size or len(self._nodes)
        bad = [each for copy in _copies_of(plan) if (each := self._bad_copy(chosen.save, size, *copy)) is not None]
        yield from bad
        for rebuild in () if bad else plan.retrieval.rebuilds:
            yield from self._bad_rebuild(chosen.save, size, rebuild)

    def _bad_copy(
        self, save: SaveId, world_size: int, kept: Kept, owner: int, node_dir: str, tier: Tier, nbytes: int
    ) -> BadCopy | None:
        """Hash a file, once. `owner`: whose shard it is or, of parity, who made it."""
        key = (node_dir, tier, save, kept)
        if key in self._proved:
            return None
        self._proved.add(key)
        strike = Strike(node_dir, tier, save, owner, isinstance(kept, ParityName))
        try:
            prove_copy(self._locate(save, kept, node_dir, tier, world_size), self._sources.fs)
        except (ResilienceError, FileNotFoundError) as error:
            return BadCopy(strike, str(error))
        except CopyGoneError:
            return BadCopy(strike, "it was deleted meanwhile")
        self.verified_bytes += nbytes
        return None

    def _bad_rebuild(self, save: SaveId, world_size: int, rebuild: Rebuild) -> Iterator[BadCopy]:
        """The parity from which a wrong shard would be made, although each file is what its record says."""
        if (save, rebuild) in self._rebuilt:
            return
        self._rebuilt.add((save, rebuild))
        fs, mapped = self._sources.fs, []
        try:
            for source in rebuild.sources:
                location = self._locate(save, source.kept, source.node_dir, source.tier, world_size)
                mapped.append(fs.open_mapping(location.path))
            found = rebuilt_digest(rebuild, lambda number, start, stop: mapped[number].view[start:stop])
        except (ResilienceError, OSError) as error:  # deleted meanwhile: each was read a moment ago
            found = str(error)
        finally:
            for each in mapped:
                each.close()
        if found == rebuild.digest:
            return
        for source in rebuild.sources:
            if source.parity:
                reason = f"rank {rebuild.owner}'s shard, rebuilt from it, has digest {found}, not {rebuild.digest}"
                yield BadCopy(Strike(source.node_dir, source.tier, save, source.owner, True), reason)

    def _shared_failure(self, chosen: Candidate) -> Iterator[BadCopy]:
        store, view = self._views[chosen.source]
        strike = Strike(chosen.source, chosen.tier, chosen.save)
        try:
            damage = next(folder_damage(store.folder_of(chosen.save), view, deep=True), None)
        except ResilienceError as error:
            yield BadCopy(strike, str(error))
            return
        if damage is not None:
            yield BadCopy(strike, f"{damage[0]}: {damage[1]}")
        else:
            self.verified_bytes += chosen.nbytes

    def _locate(self, save: SaveId, kept: Kept, node_dir: str, tier: Tier, world_size: int) -> CopyLocation:
        """As the restore finds it."""
        nodes = [each for each in self._sources.nodes if (each.name, each.run_id) == (node_dir, self._run_id)]
        return locate_copy([each.reader(self._sources.fs) for each in nodes], save, kept, world_size, node_dir, tier)


def _copies_of(plan: Plan) -> list[tuple[Kept, int, str, Tier, int]]:
    """`(name, owner, node_dir, tier, nbytes)` of every file that the restore would read, each once.

    Of a save of another world size: those that are looked at before it is known which bytes each rank needs.
    """
    if plan.assembly is not None:
        shown = plan.assembly.shown
        return [(each.owner, each.owner, each.node_dir, each.tier, each.nbytes) for each in shown]
    found: list[tuple[Kept, int, str, Tier, int]] = [
        (copy.owner, copy.owner, copy.node_dir, copy.tier, copy.nbytes) for copy in plan.retrieval.local
    ]
    found += [(fetch.owner, fetch.owner, fetch.from_dir, fetch.tier, fetch.nbytes) for fetch in plan.retrieval.fetches]
    found += [
        (source.kept, source.owner, source.node_dir, source.tier, source.nbytes)
        for rebuild in plan.retrieval.rebuilds
        for source in rebuild.sources
    ]
    return list(dict.fromkeys(found))


# --- where ranks run -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Placement:
    """`nodes`: of each rank. `node_of`: directory name → the node that sees that directory."""

    nodes: tuple[str, ...]
    node_of: Mapping[str, str]


def _newest_world_size(inventories: Sequence[Inventory], run_id: str) -> int:
    """Of the newest save that counts; 1 where there is none."""
    history = read_history(inventories, run_id)
    sizes = {held.save: held.world_size for each in inventories for held in each.node_saves if held.run_id == run_id}
    sizes |= {
        save.save: save.world_size
        for each in inventories
        for save in each.shared_saves
        if save.world_size is not None and save.run_id == run_id
    }
    left = abandonments(sizes, history.attempts)
    counted = [save for save in sizes if save not in left] or list(sizes)
    return sizes[max(counted)] if counted else 1


def _place_ranks(
    directories: Sequence[NodeDirectory], inventories: Sequence[Inventory], run_id: str, world_size: int
) -> _Placement:
    """Ranks run where the newest save of this world size has their primaries; then where a directory has no rank yet.

    The rest runs on new nodes, which hold nothing, as many on each as on the others.
    """
    names = list(dict.fromkeys(directory.name for directory in directories))
    home = _homes(inventories, run_id, world_size)
    lost = [rank for rank in range(world_size) if rank not in home]
    idle = [name for name in names if name not in home.values()]
    per_node = max([1, *(list(home.values()).count(name) for name in set(home.values()))])
    for index, rank in enumerate(lost):
        place = index // per_node
        home[rank] = idle[place] if place < len(idle) else f"new-{place - len(idle)}"
    nodes = tuple(home[rank] for rank in range(world_size))
    return _Placement(nodes, {name: _seen_from(name, nodes, directories) for name in names})


def _homes(inventories: Sequence[Inventory], run_id: str, world_size: int) -> dict[int, str]:
    held = [
        copies
        for each in inventories
        for copies in each.node_saves
        if copies.run_id == run_id and copies.world_size == world_size
    ]
    home: dict[int, str] = {}
    for copies in sorted(held, key=lambda copies: (copies.save, copies.node_id), reverse=True):
        for owner in _primaries(copies):
            home.setdefault(owner, copies.node_id)
    return home


def _primaries(copies: NodeSave) -> list[int]:
    return [owner for owner, role in zip(copies.owners, copies.roles, strict=True) if role == "primary"]


def _seen_from(name: str, nodes: Sequence[str], directories: Sequence[NodeDirectory]) -> str:
    """The node whose ranks read the directory `name`: its own, or the one beside it (host names change)."""
    if name in nodes:
        return name
    bases = {os.fspath(directory.base) for directory in directories if directory.name == name}
    beside = [each.name for each in directories if os.fspath(each.base) in bases and each.name in nodes]
    return beside[0] if beside else nodes[0]
