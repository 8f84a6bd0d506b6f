"""Another number of ranks than saved, and shards that only parity gives back: rebuilt first, then put together."""

from __future__ import annotations

from typing import Any

import pytest

from resilience.explain import explain_paths
from tests.core.elastic import elastic, sharded
from tests.core.test_elastic import NODES, assert_same_state, resumed_at_6, saved_at_6
from tests.core.test_parity import flip, parity_files
from tests.core.training import RUN, Plan, Ran, World

RS: dict[str, Any] = {"checkpoint": {"replication": True, "replication_factor": 4}, "resiliency": {"redundancy": "rs"}}


def saved(world: World, make: Any = elastic, kind: str = "disk") -> tuple[Plan, list[Ran]]:
    again, before = saved_at_6(world, make, kind=kind, **RS)
    for node in NODES:
        assert list(world.copies(node, kind)[6].values()) == ["primary"]
    return again, before


@pytest.mark.parametrize(
    ("make", "kind", "lost", "nodes"),
    [
        (elastic, "disk", "cd", ("a", "b")),
        pytest.param(sharded, "local", "bd", ("e", "c", "a"), marks=pytest.mark.long),
        pytest.param(elastic, "local", "ad", ("b", "c", "e", "f", "g"), marks=pytest.mark.long),
    ],
)
def test_fewer_or_more_ranks_go_on_from_what_is_rebuilt(
    world: World, make: Any, kind: str, lost: str, nodes: tuple[str, ...]
) -> None:
    again, before = saved(world, make, kind)
    for node in lost:
        world.lose(node)
    base = world.disk if kind == "disk" else world.memory
    said = explain_paths([base / node for node in nodes], None, None, RUN, len(nodes))
    after = resumed_at_6(world, again, *nodes)
    assert_same_state(before, after)
    assert said == {"iteration": 6, "generation": 1, "tier": "local"}
    assert after[0].resumed.rebuilt == 2
    assert after[0].resumed.retrieved_bytes > 0


@pytest.mark.long
def test_more_shards_are_rebuilt_than_there_are_ranks_one_after_the_other(world: World) -> None:
    """One rank is left, on a node that sees what two nodes wrote."""
    again, before = saved(world, kind="local")
    world.lose("c")
    world.lose("d")
    (world.memory / "b" / "run" / "b").rename(world.memory / "a" / "run" / "b")
    after = resumed_at_6(world, again, "a")
    assert_same_state(before, after)
    assert after[0].resumed.rebuilt == 2


@pytest.mark.long
def test_bad_parity_is_struck_off_there_too(world: World) -> None:
    again, before = saved(world)
    world.lose("d")
    (bad,) = parity_files(world, "a", "disk")[6]
    flip(bad)
    after = resumed_at_6(world, again, "a", "b", "c")
    assert_same_state(before, after)
    assert after[0].resumed.rebuilt == 1
