"""A node whose mount is full when the job starts: it loads what others hold, trains, and is filled later."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import pytest

import resilience.controller
from tests.core.test_failing_saves import FullMount
from tests.core.training import Act, Training, World, die, reference
from tests.ranks import killed, values


class FullForAll(FullMount):
    """Not even a note of the start has room; folders and empty files do, as on a disk without a free block."""

    full = True

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        if content:
            self._refuse(path)
        super().write_atomic(path, content, durable=durable)


def full_on(node: str, training: Training) -> None:
    """Of this process, which is about to end."""
    if training.node == node:
        resilience.controller.PosixFileSystem = FullForAll  # type: ignore[misc]


def full_everywhere(training: Training) -> None:
    full_on(training.node, training)


def free_up(training: Training) -> None:
    if training.node == "c":
        training.trainer._controller._fs.full = False


@pytest.mark.parametrize("kind", ["local", "disk"])
@pytest.mark.parametrize("nodes", [("a", "b"), ("a", "a", "b", "b")])
def test_a_full_node_takes_the_place_of_a_lost_one_and_training_goes_on(
    world: World, kind: str, nodes: tuple[str, ...]
) -> None:
    plan = world.plan(*nodes, kind=kind, settle=(6,), acts=(Act(8, die),))
    assert all(map(killed, world.run(plan)))
    world.lose("b")
    moved = tuple("c" if node == "b" else node for node in nodes)
    again = replace(
        plan, nodes=moved, make=functools.partial(full_on, "c"), seed=1, settle=(9,), acts=(Act(9, free_up),), steps=13
    )
    results = values(world.run(again))
    assert {ran.resumed.iteration for ran in results} == {6}
    assert tuple(ran.digest for ran in results) == reference(len(nodes), steps=13)
    told = [each["what"] for each in world.events("warning")]
    assert any("loaded and not kept on c" in what for what in told)
    assert any("c has no note of this start" in what for what in told)
    assert world.events("save_failed", iteration=9), "it had no room yet"
    assert set(world.copies("c", kind)) == {12}
    assert set(world.copies("c", kind)[12]) == set(range(len(nodes))), "what it keeps of others, too"
    store = world.store("c", kind)
    assert {log.generation for log in store.reader.inventory().attempts} == {2}, "its note came before its first copy"


def test_where_no_node_has_room_for_a_note_of_the_start_none_is_made(world: World) -> None:
    outcomes = world.run(world.plan("a", "b", make=full_everywhere))
    assert [outcome.error for outcome in outcomes] == ["StoreError"] * 2
    assert all("note of this start" in outcome.message for outcome in outcomes)
