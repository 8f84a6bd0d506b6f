"""What nodes tell the leader arrives as it was."""

from __future__ import annotations

import dataclasses

from hypothesis import given
from hypothesis import strategies as st

from resilience.planning.inventory import AttemptLog, Inventory, NodeSave, SaveId, SharedSave
from resilience.planning.wire import inventories_from_json, inventories_to_json

TEXT = st.text(max_size=12)
SAVES = st.builds(SaveId, st.integers(0, 10**9), st.integers(1, 10**4), st.text("0123456789abcdef", max_size=32))
TIERS = st.sampled_from(["in_memory", "local", "global", "persistent"])


@st.composite
def node_saves(draw: st.DrawFn) -> NodeSave:
    owners = sorted(draw(st.sets(st.integers(0, 9), max_size=4)))
    each = {"min_size": len(owners), "max_size": len(owners)}
    return NodeSave(
        draw(TEXT), draw(TIERS), draw(TEXT), draw(SAVES), draw(st.integers(1, 10)), tuple(owners),
        tuple(draw(st.lists(TEXT, **each))), tuple(draw(st.lists(st.integers(0, 1 << 50), **each))),
        tuple(draw(st.lists(st.sampled_from(["primary", "replica"]), **each))), draw(st.booleans()),
        draw(st.booleans()),
    )  # fmt: skip


SHARED = st.builds(
    SharedSave, TIERS, st.none() | TEXT, SAVES, st.none() | st.integers(1, 9), st.integers(0, 1 << 50), TEXT, TEXT,
    st.none() | st.integers(0, 99),
)  # fmt: skip
LOGS = st.builds(
    AttemptLog, TEXT, TEXT, st.integers(1, 99), st.none() | SAVES, st.none() | st.tuples(st.integers(0, 99), TEXT),
    st.none() | SAVES, st.sampled_from(["", "finished", "stopped"]), st.none() | st.integers(0, 99),
)  # fmt: skip


def several(values: st.SearchStrategy[object]) -> st.SearchStrategy[tuple[object, ...]]:
    return st.lists(values, max_size=3).map(tuple)


INVENTORIES = st.builds(
    Inventory, source=TEXT, node_saves=several(node_saves()), shared_saves=several(SHARED), attempts=several(LOGS),
    certificates=several(SAVES), unknown=TEXT, notes=several(TEXT), foreign_runs=several(TEXT),
    unauthentic=st.integers(0, 9),
)  # fmt: skip


@given(st.lists(INVENTORIES, max_size=3))
def test_inventories_arrive_as_they_were_told(told: list[Inventory]) -> None:
    heard = inventories_from_json(inventories_to_json(told))
    assert heard == told
    for each in heard:
        assert all(type(getattr(each, field.name)) in (str, tuple, int) for field in dataclasses.fields(each))
