"""Saves on nodes go on with another number of ranks, on real ranks: everything that was saved is there, and told."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from tests.core.elastic import divided, elastic, note_whole, put_together, sharded
from tests.core.training import Act, Training, World
from tests.ranks import values

NODES = ("a", "b", "c", "d")


@pytest.mark.parametrize("make", [elastic, sharded, divided])
def test_training_goes_on_with_fewer_ranks_from_what_the_survivors_hold(
    world: World, make: Callable[[Training], None]
) -> None:
    plan = world.plan(*NODES, every=3, settle=(6,), make=make, acts=(Act(6, note_whole),))
    before = values(world.run(replace(plan, steps=7)))
    world.lose("d")
    again = replace(plan, nodes=NODES[:3], steps=7, seed=1, settle=(), acts=())
    after = values(world.run(replace(again, acts=(Act(6, note_whole),))))
    assert {ran.resumed.iteration for ran in after} == {6}
    was, now = put_together(before), put_together(after)
    assert was.keys() == now.keys()
    assert [key for key in was if not torch.equal(was[key], now[key])] == []
