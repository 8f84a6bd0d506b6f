"""A cluster of any size as inventories: 8 ranks per node, two copies, three saves."""

from __future__ import annotations

from resilience.planning.inventory import Inventory, NodeSave, SaveId

RANKS_PER_NODE = 8


def cluster(ranks: int, *, saves: int = 3, lost_nodes: int = 2) -> tuple[list[Inventory], list[str]]:
    """Inventories after the loss of some nodes (one of each pair) and the node of each rank, spares in their place."""
    node_count = ranks // RANKS_PER_NODE
    inventories = []
    names = [f"node{i:05d}" for i in range(node_count)]
    for i in range(node_count):
        partner = i ^ 1
        pair = sorted([i, partner])
        owners = tuple(n * RANKS_PER_NODE + r for n in pair for r in range(RANKS_PER_NODE))
        roles = tuple("primary" if owner // RANKS_PER_NODE == i else "replica" for owner in owners)
        node_saves = tuple(
            NodeSave(
                names[i],
                "in_memory",
                "run",
                SaveId(10 * (k + 1), 1, "a" * 32),
                ranks,
                owners,
                tuple(f"xxh3-128-32m:{k:08x}{owner:024x}" for owner in owners),
                (1 << 20,) * len(owners),
                roles,  # type: ignore[arg-type]
                True,
            )
            for k in range(saves)
        )
        inventories.append(Inventory(names[i], node_saves))
    for lost in range(lost_nodes):
        names[lost * 4] = f"spare{lost}"
        inventories[lost * 4] = Inventory(f"spare{lost}")
    nodes = [names[rank // RANKS_PER_NODE] for rank in range(ranks)]
    return inventories, nodes
