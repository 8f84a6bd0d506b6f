"""A save by two ranks is killed at places spread over its whole life, one rank or both: a good one always loads."""

from __future__ import annotations

import functools
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from resilience.formats.load import load_checkpoint
from resilience.state.digest import state_digest
from tests.core.elastic import sharded
from tests.core.training import Act, Plan, Ran, Training, World, train
from tests.formats.fate import Fate, Place
from tests.ranks import killed, run_ranks, values

PLACES = 20
RANKS = 2
VICTIMS = ((0, 1), (0,), (1,))  # in turn: both at once, the one that publishes, the other
SAVE_AFTER, LAST = 6, 9
_UNSURE = 4  # places more or fewer from run to run: lanes go their own pace
_FAILED = {"PeerLostError", "SaveFailedError", "RuntimeError"}

KINDS: dict[str, dict[str, Any]] = {
    "torch_dist": {"checkpoint": {}},
    "in the background": {"checkpoint": {"async_save": True}},
    "zarr": {"checkpoint": {"ckpt_format": "zarr"}},
    "fsdp_dtensor": {"checkpoint": {"ckpt_format": "fsdp_dtensor"}, "make": sharded},
}


@dataclass(frozen=True)
class Doom:
    """At which place of whose life, and who dies of it. Without a place: count them."""

    rank: int
    place: Place | None
    victims: tuple[int, ...] = ()


def note_state(training: Training) -> None:
    training.notes.append(f"state {state_digest(training.trainer._state.collect())}")


def noted(ran: Ran) -> list[str]:
    return [note for note in ran.notes if isinstance(note, str) and note.startswith("state ")]


NOTES = tuple(Act(step, note_state) for step in (SAVE_AFTER // 2, SAVE_AFTER))


def doomed(rank: int, plan: Plan, doom: Doom) -> int:
    """Train; from the end of iteration 5 to that of 8 the disk is watched. How many places there were."""
    fate = Fate(f"{plan.disk}/save", doom.place if rank == doom.rank else None)
    pids = Path(plan.memory)
    (pids / f"pid-{rank}").write_text(str(os.getpid()))

    def arm(training: Training) -> None:
        fate.along = [int((pids / f"pid-{other}").read_text()) for other in doom.victims if other != rank]
        fate.watch()
        fate.armed = True

    def disarm(training: Training) -> None:
        fate.armed = False

    acts = (Act(SAVE_AFTER - 1, arm), Act(LAST - 1, disarm))
    Training(rank, replace(plan, acts=acts)).run()
    return fate.count


@functools.cache
def expected(kind: str, memory: str) -> tuple[dict[int, tuple[str, ...]], tuple[int, ...]]:
    """Digests of all ranks when these iterations are finished, in a run that nothing disturbs; and places by rank."""
    world = World(Path(memory, "memory"), Path(memory, "disk"))
    plan = plan_of(world, kind)
    told: list[Ran] = values(run_ranks(RANKS, train, replace(plan, acts=NOTES)))
    states = {step: tuple(noted(ran)[i] for ran in told) for i, step in enumerate((SAVE_AFTER // 2, SAVE_AFTER))}
    states[LAST] = tuple(ran.digest for ran in told)
    counted = World(Path(memory, "counted"), Path(memory, "counted disk"))
    return states, tuple(values(run_ranks(RANKS, doomed, plan_of(counted, kind), Doom(0, None))))


def plan_of(world: World, kind: str) -> Plan:
    world.memory.mkdir(parents=True, exist_ok=True)
    given = KINDS[kind]
    plan = world.plan(*"ab"[:RANKS], kind=None, save=True, steps=LAST, settle=(LAST - 1,), make=given.get("make"))
    options = {"save_interval": SAVE_AFTER // 2, **given["checkpoint"]}
    return replace(plan, checkpoint=options, resiliency={"keep_persistent": 1, "exchange_timeout_s": 10.0})


def dooms(places: tuple[int, ...], how_many: int) -> list[Doom]:
    """Spread over both ranks' lives in the save, with the victims in turn."""
    chosen = []
    for number in range(how_many):
        victims = VICTIMS[number % len(VICTIMS)]
        rank = victims[0]
        last = places[rank] - 1 - _UNSURE
        chosen.append(Doom(rank, Place(round(number * last / max(1, how_many - 1))), victims))
    return chosen


def check(world: World, kind: str, doom: Doom, states: dict[int, tuple[str, ...]]) -> int:
    """One killed save and the start after it. Which iteration that resumed from."""
    plan, where = plan_of(world, kind), f"{kind}, {doom}"
    outcomes = run_ranks(RANKS, doomed, plan, doom)
    for rank, outcome in enumerate(outcomes):
        if rank in doom.victims:
            assert killed(outcome), f"{where}: {outcome}"
        else:  # it notices, or had nothing more to ask of the dead one
            assert outcome.error in {*_FAILED, ""}, f"{where}: {outcome}"
    found = load_checkpoint(Path(plan.disk, "save"))  # nobody has healed anything yet
    assert found.folder.name in ("iter_0000003", "iter_0000006"), where
    assert len(found) > 0, where
    again: list[Ran] = values(run_ranks(RANKS, train, replace(plan, seed=1, acts=NOTES)))
    step = again[0].resumed.iteration if again[0].resumed is not None else 0
    assert step in (SAVE_AFTER // 2, SAVE_AFTER), where
    assert tuple(noted(ran)[0] for ran in again) == states[step], f"{where}: the state of iteration {step}, to the bit"
    assert tuple(ran.digest for ran in again) == states[LAST], f"{where}: the run ends as the undisturbed one"
    left = [path.name for path in Path(plan.disk, "save").iterdir() if path.name.startswith((".saving", ".aside"))]
    assert left == [], where
    return step


@pytest.mark.long
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("kind", KINDS)
def test_a_pairs_save_is_killed_at_twenty_places_and_a_good_one_always_loads(kind: str, memory_mount: Path) -> None:
    states, places = expected(kind, str(memory_mount))
    assert min(places) > 2 * _UNSURE, places
    resumed = []
    for number, doom in enumerate(dooms(places, PLACES)):
        world = World(memory_mount / f"m{number}", memory_mount / f"d{number}")
        resumed.append(check(world, kind, doom, states))
    assert {SAVE_AFTER // 2, SAVE_AFTER} == set(resumed), "before it counts the older one, and then the new one"


@pytest.mark.parametrize("kind", ["in the background", "zarr"])
def test_a_pairs_save_that_is_killed_in_the_middle_leaves_the_one_before(kind: str, memory_mount: Path) -> None:
    """The quick sibling of the test above, at one place."""
    states, places = expected(kind, str(memory_mount))
    doom = Doom(1, Place(places[1] // 2), (0, 1))
    assert check(World(memory_mount / "m", memory_mount / "d"), kind, doom, states) in states
