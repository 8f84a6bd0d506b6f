"""What is known of the saves that exist: the values that election and retrieval decide on.

One `NodeSave` stands for all copies of one save on one node (parallel tuples, not an object per copy), so that
16,384 ranks × 3 saves stay a few thousand objects.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

Tier = Literal["in_memory", "local", "global", "persistent"]
Role = Literal["primary", "replica", "parity"]

#: Cheapest first: where equal saves exist in several tiers, the first one is resumed from.
TIERS: tuple[Tier, ...] = ("in_memory", "local", "global", "persistent")


def attempt_name(generation: int, attempt: str) -> str:
    """`g0002-3f9ac01b`: generation and the first 8 digits of the attempt."""
    return f"g{generation:04d}-{attempt[:8]}"


@dataclass(frozen=True, order=True)
class SaveId:
    """Identity of a save: `(attempt, iteration)`; the generation is there to order attempts.

    Sorts by iteration, then generation, then attempt: the order of election.
    """

    iteration: int
    generation: int
    attempt: str

    @property
    def folder(self) -> str:
        """Where the iteration's folder has this save: the name of its attempt."""
        return attempt_name(self.generation, self.attempt)


@dataclass(frozen=True, order=True)
class ParityName:
    """A parity file's name: its clique, called after the lowest rank, and the place of the member whose it is."""

    clique: int
    index: int


#: What a rank keeps for a save, as a name: the shard of an owner, or parity.
Kept = int | ParityName


def named(kept: Kept) -> str:
    """For people."""
    if isinstance(kept, ParityName):
        return f"member {kept.index}'s parity of the clique of rank {kept.clique}"
    return f"rank {kept}'s shard"


@dataclass(frozen=True)
class ParityCover:
    """What the parity of one clique was made of: its members' ranks ascending, their shards' sizes and digests.

    `parities`: 1 for xor, 2 for rs; see `planning/erasure.py`.
    """

    parities: int
    members: tuple[int, ...]
    nbytes: tuple[int, ...]
    digests: tuple[str, ...]


@dataclass(frozen=True)
class ParityCopy:
    """The parity that one member of a clique keeps; `index` is its place among the members."""

    cover: ParityCover
    index: int
    nbytes: int
    digest: str

    @property
    def keeper(self) -> int:
        """The rank that made it."""
        return self.cover.members[self.index]

    @property
    def name(self) -> ParityName:
        return ParityName(self.cover.members[0], self.index)


@dataclass(frozen=True)
class NodeSave:
    """All copies of one save that one node holds in one tier.

    `owners`, `digests`, `nbytes` and `roles` run in parallel, one entry per copy, owners ascending.
    """

    node_id: str
    tier: Tier
    run_id: str
    save: SaveId
    world_size: int
    owners: tuple[int, ...]
    digests: tuple[str, ...]
    nbytes: tuple[int, ...]
    roles: tuple[Role, ...]
    certified: bool = False  # a certificate of this save lies beside the copies
    split: bool = False  # what data parallelism replicates is split over the group: a rank needs its group's shards
    parity: tuple[ParityCopy, ...] = ()  # not among `owners`: of it shards can be rebuilt, it is none

    @property
    def held_bytes(self) -> int:
        """Of all files."""
        return sum(self.nbytes) + sum(each.nbytes for each in self.parity)


@dataclass(frozen=True)
class SharedSave:
    """One checkpoint folder on shared storage (tier `global` or `persistent`).

    Only committed folders are listed (`iter_*`; never a `.saving-*` in the making): one of this run is proof that the
    run once completed that save. `problem` says why it cannot be used (torn, incomplete); empty: usable as far as was
    looked. `source` tells where it was found: "save", "load", "global" or "pretrained". `tracker` is the iteration
    that the directory's tracker names (None: no tracker): newer folders are passed over, unless `ckpt_step` asks for
    one of them.
    """

    tier: Tier
    run_id: str | None
    save: SaveId
    world_size: int | None
    nbytes: int
    source: str
    problem: str = ""
    tracker: int | None = None


@dataclass(frozen=True)
class AttemptLog:
    """What one start of the run left behind about itself; kept for the run's life.

    `base` is the save it resumed from (None: a fresh start). `completed` is the newest save that it completed,
    `end` is "finished", "stopped", "failed" or "" (unknown: killed, or still running).
    """

    run_id: str
    attempt: str
    generation: int
    base: SaveId | None = None
    fork: tuple[int, str] | None = None
    completed: SaveId | None = None
    end: str = ""
    end_iteration: int | None = None

    @property
    def name(self) -> str:
        """What its log and the folders of its saves are called."""
        return attempt_name(self.generation, self.attempt)


@dataclass(frozen=True)
class Inventory:
    """What one source answered: its records, or why they are unknown ("could not look" is never "empty")."""

    source: str  # a node id, or "save", "load", "global"
    node_saves: tuple[NodeSave, ...] = ()
    shared_saves: tuple[SharedSave, ...] = ()
    attempts: tuple[AttemptLog, ...] = ()
    certificates: tuple[SaveId, ...] = ()
    unknown: str = ""
    notes: tuple[str, ...] = ()  # copies that were seen and not counted, each with its reason
    unauthentic: int = 0  # of `notes`: how many are of files without a MAC of this job's key
    foreign_runs: tuple[str, ...] = field(default=())  # other runs seen in the same directory, for the log only
