"""Saves with parity while something goes wrong: a link breaks, a member has no room, is not healthy, or dies."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

import resilience.controller
from resilience.errors import StoreError
from resilience.replication.parity import ParityExchange
from resilience.stores.filesystem import MappedFile, PosixFileSystem
from tests.core.test_parity import NODES, parity_files, with_parity
from tests.core.test_replication import break_the_link
from tests.core.training import Act, Training, World, die, reference
from tests.ranks import killed, values


class NoRoomForParity(PosixFileSystem):
    """Shards fit, parity does not."""

    full = False

    def _refuse(self, path: Path) -> None:
        if self.full and ("parity_" in path.name or "clique" in path.name):
            refused = StoreError(f"cannot write {path}: no space is left.")
            refused.errno = errno.ENOSPC
            raise refused

    def create_mapping(self, path: Path, nbytes: int, *options: Any, **named: Any) -> MappedFile:
        self._refuse(path)
        return super().create_mapping(path, nbytes, *options, **named)

    def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
        self._refuse(path)
        super().write_file(path, chunks)

    def write_atomic(self, path: Path, content: bytes, *, durable: bool = True) -> None:
        self._refuse(path)
        super().write_atomic(path, content, durable=durable)


def on_a_mount_that_fills_up(training: Training) -> None:
    resilience.controller.PosixFileSystem = NoRoomForParity  # of this process, which is about to end


def fill_up(training: Training) -> None:
    training.trainer._controller._fs.full = True


def free_up(training: Training) -> None:
    training.trainer._controller._fs.full = False


@pytest.mark.parametrize("kind", ["local", pytest.param("disk", marks=pytest.mark.long)])
def test_a_member_without_room_for_parity_leaves_the_save_unprotected_and_all_goes_on(world: World, kind: str) -> None:
    """The save is complete all the same; and the save that is protected is not given up for it."""
    plan = with_parity(world, "rs", kind=kind)
    acts = (Act(4, fill_up, 1), Act(8, free_up, 1))
    results = values(world.run(replace(plan, settle=(4, 8), make=on_a_mount_that_fills_up, acts=acts)))
    assert tuple(ran.digest for ran in results) == reference(4)
    assert results[0].status["failed_saves"] == 0
    assert world.events("complete", iteration=6)
    assert not world.events("protected", iteration=6, rank=1)
    assert any("no space is left" in event["what"] for event in world.events("warning", rank=1))
    assert {9, 12} <= set(parity_files(world, "b", kind))
    assert 6 not in parity_files(world, "b", kind)


@pytest.mark.long
def test_parity_is_made_again_under_a_new_epoch_after_a_link_broke(world: World) -> None:
    plan = replace(with_parity(world, "xor"), steps=18, settle=(4, 6, 7, 8, 9, 12), acts=(Act(4, break_the_link, 2),))
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(4, 18)
    assert world.events("replication_down"), "it was noticed"
    assert {event["rank"] for event in world.events("epoch")} == {0, 1, 2, 3}
    assert results[0].status["failed_saves"] == 0
    for node in NODES:
        assert 6 not in parity_files(world, node)
        assert 18 in parity_files(world, node)


@pytest.mark.long
def test_a_save_that_one_member_voids_gets_no_parity_anywhere(world: World) -> None:
    results = values(world.run(replace(with_parity(world, "rs"), make=_unhealthy_at_six)))
    assert results[0].status["failed_saves"] == 1
    assert not world.events("complete", iteration=6)
    for node in NODES:
        assert set(parity_files(world, node)) == {9, 12}


def _unhealthy_at_six(training: Training) -> None:
    training.healthy = lambda: training.rank != 3 or training.trainer.iteration != 6


def _die_in_the_ring(training: Training) -> None:
    """Rank 2 hears what the others have, and is gone before its part of the sums."""
    if training.rank != 2:
        return
    run = ParityExchange._open

    def dying(self: ParityExchange, save: Any, arena: Any, digest: str) -> Any:
        heard = run(self, save, arena, digest)
        if save.iteration == 6:
            die(training)
        return heard

    ParityExchange._open = dying  # type: ignore[method-assign]


@pytest.mark.long
@pytest.mark.parametrize("scheme", ["xor", "rs"])
def test_a_member_that_dies_in_the_ring_leaves_no_parity_and_the_save_before_is_protected(
    world: World, scheme: str
) -> None:
    """All shards of 6 are there, so that it is resumed from; with the node gone too, only 3 has what rebuilds it."""
    plan = with_parity(world, scheme)
    plan = replace(plan, resiliency=plan.resiliency | {"exchange_timeout_s": 5.0})
    outcomes = world.run(replace(plan, settle=(5,), make=_die_in_the_ring))
    assert killed(outcomes[2])
    assert all(outcome.error for outcome in outcomes if not killed(outcome))
    assert not any(6 in parity_files(world, node) for node in NODES)
    world.lose("c")
    results = values(world.run(replace(plan, seed=1)))
    assert {ran.resumed.iteration for ran in results} == {3}
    assert results[0].resumed.rebuilt == 1
    assert tuple(ran.digest for ran in results) == reference(4)
