"""Builders for planning tests: nodes that hold copies, shared folders, attempt logs; nothing but values."""

from __future__ import annotations

from collections.abc import Sequence

from resilience.planning.election import Decision, ElectionPolicy, Strike, elect
from resilience.planning.inventory import AttemptLog, Inventory, NodeSave, Role, SaveId, SharedSave, Tier

RUN = "run-1"
PERSISTENT: Tier = "persistent"


def save(iteration: int, generation: int = 1, attempt: str = "") -> SaveId:
    return SaveId(iteration, generation, attempt or f"{generation:032x}")


def digest_of(owner: int, which: SaveId) -> str:
    return f"xxh3-128-32m:{which.attempt}-{which.iteration}-{owner}"


def node_save(
    node: str,
    which: SaveId,
    owners: Sequence[int],
    *,
    world: int,
    own: Sequence[int] = (),
    tier: Tier = "in_memory",
    run: str = RUN,
    certified: bool = False,
    digests: dict[int, str] | None = None,
    nbytes: int = 100,
) -> NodeSave:
    """`own`: owners whose primary this is; the others are replicas."""
    roles: tuple[Role, ...] = tuple("primary" if owner in own else "replica" for owner in owners)
    return NodeSave(
        node,
        tier,
        run,
        which,
        world,
        tuple(owners),
        tuple((digests or {}).get(owner, digest_of(owner, which)) for owner in owners),
        (nbytes,) * len(owners),
        roles,
        certified,
    )


def pair(which: SaveId, *, world: int = 2, tier: Tier = "in_memory", certified: bool = True) -> tuple[NodeSave, ...]:
    """A save that is complete twice over: every node (one rank each) holds its own shard and its neighbour's."""
    return tuple(
        node_save(
            f"n{rank}",
            which,
            sorted({rank, (rank - 1) % world}),
            own=(rank,),
            world=world,
            tier=tier,
            certified=certified,
        )
        for rank in range(world)
    )


def sources(
    *node_saves: NodeSave,
    shared: Sequence[SharedSave] = (),
    attempts: Sequence[AttemptLog] = (),
    certificates: Sequence[SaveId] = (),
    unknown: Sequence[str] = (),
    empty: Sequence[str] = (),
) -> list[Inventory]:
    """One inventory per node directory and per shared source; logs and certificates are on the first of them."""
    names = list(dict.fromkeys([each.node_id for each in node_saves] + list(empty)))
    found = [Inventory(name, tuple(each for each in node_saves if each.node_id == name)) for name in names]
    for name in dict.fromkeys(each.source for each in shared):
        found.append(Inventory(name, shared_saves=tuple(each for each in shared if each.source == name)))
    found += [Inventory(name, unknown="Input/output error") for name in unknown]
    told = Inventory("teller", attempts=tuple(attempts), certificates=tuple(certificates))
    return [*found, told]


def folder(
    which: SaveId,
    *,
    run: str | None = RUN,
    source: str = "save",
    world: int | None = 2,
    tier: Tier = PERSISTENT,
    **more: object,
) -> SharedSave:
    return SharedSave(tier, run, which, world, 200, source, **more)  # type: ignore[arg-type]


def log(
    generation: int,
    base: SaveId | None = None,
    completed: SaveId | None = None,
    *,
    fork: tuple[int, str] | None = None,
    end: str = "",
    attempt: str = "",
) -> AttemptLog:
    return AttemptLog(RUN, attempt or f"{generation:032x}", generation, base, fork, completed, end)


def decide(
    inventories: Sequence[Inventory],
    *,
    world: int = 2,
    strikes: Sequence[Strike] = (),
    policy: ElectionPolicy | None = None,
) -> Decision:
    return elect(
        inventories, run_id=RUN, world_size=world, strikes=frozenset(strikes), policy=policy or ElectionPolicy()
    )


def chosen(decision: Decision) -> tuple[int, int, str]:
    """Iteration, generation and tier, as `explain` prints them."""
    assert decision.chosen is not None, decision
    return decision.chosen.save.iteration, decision.chosen.save.generation, decision.chosen.tier
