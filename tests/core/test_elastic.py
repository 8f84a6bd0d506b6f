"""Saves on nodes go on with another number of ranks, on real ranks: everything that was saved is there, and told."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from resilience import assembly
from resilience.explain import Explanation, decision_json, explain
from resilience.formats import shards_reader
from resilience.formats.registry import foreign_problem
from resilience.replication import assembling
from resilience.stores import digest
from resilience.stores.discovery import find_sources
from resilience.stores.filesystem import PosixFileSystem
from tests.core.elastic import SAMPLES, divided, elastic, note_whole, put_together, seen, sharded
from tests.core.training import RUN, Act, Plan, Ran, Training, World, die
from tests.ranks import killed, values

NODES = ("a", "b", "c", "d")
WAYS = [elastic, sharded, divided]


def saved_at_6(world: World, make: Callable[[Training], None] = elastic, **fields: Any) -> tuple[Plan, list[Ran]]:
    """Four ranks that hold what they noted when iteration 6 was finished and saved. The plan for the next attempt."""
    plan = world.plan(*NODES, every=3, settle=(6,), make=make, **fields)
    before = values(world.run(replace(plan, steps=7, acts=(Act(6, note_whole),))))
    return replace(plan, settle=(), seed=1), before


def resumed_at_6(world: World, plan: Plan, *nodes: str) -> list[Ran]:
    """Ranks on these nodes, as they are when they have resumed."""
    ran = values(world.run(replace(plan, nodes=nodes, steps=7, acts=(Act(6, note_whole),))))
    assert {each.resumed.iteration for each in ran} == {6}
    return ran


def assert_same_state(before: Sequence[Ran], after: Sequence[Ran]) -> None:
    was, now = put_together(before), put_together(after)
    assert was.keys() == now.keys()
    assert [key for key in was if not torch.equal(was[key], now[key])] == []


def explained(world: World, nodes: Sequence[str], kind: str = "local") -> Explanation:
    base = world.disk if kind == "disk" else world.memory
    sources = find_sources(
        PosixFileSystem(), local=[base / node for node in nodes], save=None, global_dir=None, run_id=RUN,
        foreign_problem=foreign_problem, must_exist=False,
    )  # fmt: skip
    return explain(sources, run_id=RUN, world_size=len(nodes))


# -- what comes back --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [elastic, *(pytest.param(way, marks=pytest.mark.long) for way in WAYS[1:])])
def test_training_goes_on_with_fewer_ranks_from_what_the_survivors_hold(
    world: World, make: Callable[[Training], None]
) -> None:
    again, before = saved_at_6(world, make)
    world.lose("d")
    said = decision_json(explained(world, NODES[:3]).chosen)
    after = resumed_at_6(world, again, *NODES[:3])
    assert_same_state(before, after)
    assert said == {"iteration": 6, "generation": 1, "tier": "local"}
    assert any("saved by 4 ranks" in note for note in after[0].resumed.notes)


@pytest.mark.long
@pytest.mark.parametrize("make", WAYS)
@pytest.mark.parametrize(
    "kind", ["local", *(pytest.param(kind, marks=pytest.mark.exhaustive) for kind in ("disk", "in_memory"))]
)
@pytest.mark.parametrize("algorithm", ["fully_parallel", "atomic"])
@pytest.mark.parametrize("nodes", [("a",), ("b", "a"), ("e", "c", "a", "b", "f")], ids=len)
def test_any_number_of_ranks_puts_the_state_together(
    world: World, make: Callable[[Training], None], kind: str, algorithm: str, nodes: tuple[str, ...]
) -> None:
    """Also where nodes are new, where ranks moved, and where all but the replicas of half of the shards are gone."""
    algo = {"non_persistent_local_ckpt_algo": algorithm}
    if len(nodes) == 1:
        algo["replication_factor"] = 4
    again, before = saved_at_6(world, make, kind=kind, checkpoint=algo)
    for node in NODES:
        if node not in nodes and (len(nodes) != 2 or node == "d"):
            world.lose(node)
    if len(nodes) == 2:
        nodes = (*nodes, "c")
    after = resumed_at_6(world, again, *nodes)
    assert_same_state(before, after)


@pytest.mark.long
def test_a_node_that_has_nothing_joins_and_several_ranks_share_what_comes_to_their_node(world: World) -> None:
    plan = world.plan("a", "a", "b", "b", every=3, settle=(6,), make=sharded, checkpoint={"replication_jump": 2})
    before = values(world.run(replace(plan, steps=7, acts=(Act(6, note_whole),))))
    again = replace(plan, settle=(), seed=1, checkpoint={})
    after = resumed_at_6(world, again, "c", "c", "c", "b", "a", "c")
    assert_same_state(before, after)
    shard = len(world.shard("a", 6, 0).read_bytes())
    fetched = sum(ran.resumed.retrieved_bytes for ran in after[:1])
    assert fetched <= 4 * shard + 4096, "node c got each shard at most once, for its four ranks"


@pytest.mark.long
def test_only_segments_that_are_needed_travel(world: World) -> None:
    again, before = saved_at_6(world, small_segments)
    after = resumed_at_6(world, again, "b", "c", "new")
    assert_same_state(before, after)
    shard = len(world.shard("b", 6, 1).read_bytes())
    fetched = sum(ran.resumed.retrieved_bytes for ran in after)
    assert shard > 10 * _SEGMENT
    assert 0 < fetched <= 8 * 3 * _SEGMENT, "of four shards to the new node, of two to each of the others; none whole"


_SEGMENT = 4096


def small_segments(training: Training) -> None:
    """FSDP2, with digests over so many bytes that even these small shards have several segments."""
    for module in (digest, assembling, shards_reader):
        module.SEGMENT_BYTES = _SEGMENT  # type: ignore[attr-defined]
    sharded(training)


@pytest.mark.long
def test_a_node_without_room_for_what_it_needs_refuses_before_anything_is_fetched(world: World) -> None:
    again, _ = saved_at_6(world)
    outcomes = world.run(replace(again, nodes=("a", "new", "c"), make=without_room))
    assert outcomes[1].error == "MemoryBudgetError"
    assert "bytes of shards of iteration 6 are fetched for this load, then freed" in outcomes[1].message
    assert {outcomes[0].error, outcomes[2].error} == {"LayoutMismatchError"}
    assert not list((world.memory / "new").rglob("landing*"))


def without_room(training: Training) -> None:
    elastic(training)
    if training.node == "new":
        assembly.available_bytes = lambda *_: {"memory": 1000, "shared_memory": 10**9, "disk": None}  # type: ignore[assignment]


# -- from four to three to two and to four again ----------------------------------------------------------------------


@pytest.mark.parametrize("make", [elastic, *(pytest.param(way, marks=pytest.mark.long) for way in WAYS[1:])])
def test_nodes_shrink_and_grow_again_and_no_sample_is_lost_or_doubled(
    world: World, make: Callable[[Training], None]
) -> None:
    crews = [(("a", "b", "c", "d"), 8, "d"), (("a", "b", "c"), 14, "a"), (("c", "b"), 20, None), (NODES, 30, None)]
    saw: list[int] = []
    base = 0
    for number, (nodes, until, lost) in enumerate(crews):
        settle = until // 3 * 3
        acts = (Act(settle, note_whole), Act(until, die)) if until < 30 else ()
        plan = world.plan(
            *nodes, every=3, settle=(settle,), make=watched(make, world), acts=acts, steps=30, seed=number
        )
        outcomes = world.run(plan)
        if until < 30:
            assert all(killed(outcome) for outcome in outcomes), outcomes
        else:
            assert {ran.resumed.iteration for ran in values(outcomes)} == {base}
            settle = 30
        saw += numbers_seen(world, number, base, settle)
        base = settle
        if lost is not None:
            world.lose(lost)
    # six steps with four ranks, six with three, six with two, twelve with four, two samples each: a whole epoch
    assert Counter(saw) == Counter(range(SAMPLES)), "each sample once"
    assert sorted(event["iteration"] for event in world.events("resume", rank=0)) == [6, 12, 18]


def watched(make: Callable[[Training], None], world: World) -> Callable[[Training], None]:
    return Watched(make, str(world.disk))


class Watched:
    """Writes every batch to a file as soon as its step is taken: a rank that is killed tells nothing."""

    def __init__(self, make: Callable[[Training], None], folder: str) -> None:
        self.make, self.folder = make, folder

    def __call__(self, training: Training) -> None:
        self.make(training)
        step = training.step

        def noted(batch: Any) -> None:
            step(batch)
            with open(f"{self.folder}/seen-{training.plan.seed}-{training.rank}", "a", encoding="ascii") as stream:
                stream.write(f"{training.trainer.iteration + 1} {' '.join(map(str, batch.tolist()))}\n")

        training.step = noted  # type: ignore[method-assign]


def numbers_seen(world: World, attempt: int, above: int, until: int) -> list[int]:
    """Of the steps that count: the others were lost and done again."""
    found: list[int] = []
    for path in sorted(world.disk.glob(f"seen-{attempt}-*")):
        for line in path.read_text(encoding="ascii").splitlines():
            iteration, *numbers = map(int, line.split())
            found += numbers if above < iteration <= until else []
    return found


# -- what is bad on the way -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [elastic, pytest.param(sharded, marks=pytest.mark.long)])
def test_bad_copies_are_struck_off_and_the_others_used(world: World, make: Callable[[Training], None]) -> None:
    again, before = saved_at_6(world, make)
    world.lose("d")  # rank 3's shard is left as a replica, rank 2's without one
    for node, owner in (("a", 0), ("b", 1)):
        world.damage(node, 6, owner)
    after = resumed_at_6(world, again, *NODES[:3])
    assert_same_state(before, after)
    assert len(world.events("warning", rank=0)) > 0
    struck = [event for event in world.events("warning") if "struck off" in event["what"]]
    assert {event["node"] for event in struck} == {"a", "b"}


@pytest.mark.long
def test_a_copy_that_nobody_showed_is_proved_before_its_bytes_count(world: World) -> None:
    """What a node reads of its own is hashed first, what it is sent as it arrives."""
    again, before = saved_at_6(world)
    nodes = (*NODES, "new", "newer", "newest")
    assembly = explained(world, nodes).plan.assembly
    assert assembly is not None
    for shown in assembly.shown:
        (other,) = (node for node in NODES if node != shown.node and shown.owner in world.copies(node)[6])
        world.damage(other, 6, shown.owner)
    after = resumed_at_6(world, again, *nodes)
    assert_same_state(before, after)
    told = [event["what"] for event in world.events("warning")]
    assert any("a copy is bad and struck off" in what for what in told)


@pytest.mark.long
def test_with_all_copies_of_a_shard_bad_the_older_save_is_taken_and_the_reason_told(world: World) -> None:
    again, _ = saved_at_6(world)
    holders = [node for node in NODES if 1 in world.copies(node)[6]]
    assert len(holders) == 2
    for node in holders:
        world.damage(node, 6, 1)
    ran = values(world.run(replace(again, nodes=NODES[:3], steps=4)))
    assert {each.resumed.iteration for each in ran} == {3}
    (passed_over,) = ran[0].resumed.passed_over
    assert passed_over.iteration == 6
    assert "2 copies failed to read or verify" in passed_over.reason


@pytest.mark.long
def test_nothing_live_changes_where_nothing_can_be_loaded(world: World) -> None:
    again, _ = saved_at_6(world)
    for node in NODES:
        for iteration, owners in world.copies(node).items():
            for owner in owners:
                world.damage(node, iteration, owner)
    outcomes = world.run(replace(again, nodes=NODES[:3], make=unchanged))
    assert {outcome.error for outcome in outcomes} == {"NoUsableSaveError"}
    assert len(list(world.disk.glob("unchanged-*"))) == 3


def unchanged(training: Training) -> None:
    """A start that fails leaves the model as it was made."""
    elastic(training)
    start = training.start
    before = {name: tensor.clone() for name, tensor in training.model.state_dict().items()}

    def fails() -> Any:
        try:
            return start()
        except BaseException:
            now = training.model.state_dict()
            if all(torch.equal(now[name], tensor) for name, tensor in before.items()):
                open(f"{training.plan.disk}/unchanged-{training.rank}", "w", encoding="ascii").close()
            raise

    training.start = fails  # type: ignore[method-assign]


# -- what becomes of the old world's copies ---------------------------------------------------------------------------


def test_the_old_world_s_save_stays_until_the_new_one_has_a_protected_save(world: World) -> None:
    again, before = saved_at_6(world)
    world.lose("d")
    three = replace(again, nodes=NODES[:3], steps=12, acts=(Act(7, die),))
    assert all(killed(outcome) for outcome in world.run(three))  # before it saved anything
    assert {6} <= world.copies("a").keys()
    after = resumed_at_6(world, replace(again, seed=2), "a", "c")
    assert_same_state(before, after)
    ended = values(world.run(replace(again, nodes=NODES[:3], steps=12, settle=(9, 11), seed=3)))
    assert {ran.resumed.iteration for ran in ended} == {6}
    for node in NODES[:3]:
        held = {each.save.iteration: each.world_size for each in world.store(node).reader.inventory().node_saves}
        assert held == {9: 3, 12: 3}, "what four ranks left is gone, and only that"


@pytest.mark.long
def test_copies_are_fewer_where_there_are_fewer_domains_and_that_is_said(world: World) -> None:
    again, _ = saved_at_6(world, checkpoint={"replication_factor": 3})
    values(world.run(replace(again, nodes=("a", "c"), steps=10, settle=(9,))))
    assert any("2 of 3 copies" in event["what"] for event in world.events("warning"))
    assert {9} <= world.copies("a").keys()
    assert world.copies("a")[9] == {0: "primary", 1: "replica"}


# -- random numbers and the place in the data -------------------------------------------------------------------------


@pytest.mark.long
def test_random_numbers_follow_from_the_save_and_that_is_told(world: World) -> None:
    again, _ = saved_at_6(world)
    first = resumed_at_6(world, again, *NODES[:3])
    second = resumed_at_6(world, again, *NODES[:3])
    assert [ran.digest for ran in first] == [ran.digest for ran in second], "the same start again, the same numbers"
    assert any("random numbers" in note for note in first[0].resumed.notes)
    other = resumed_at_6(world, replace(again, seed=5), *NODES[:3])
    assert [ran.digest for ran in first] != [ran.digest for ran in other], "what they were seeded with here counts"


def test_a_place_in_the_data_that_cannot_be_handed_on_is_refused_in_words(world: World) -> None:
    again, _ = saved_at_6(world, of_its_own)
    outcomes = world.run(replace(again, nodes=NODES[:3]))
    assert {outcome.error for outcome in outcomes} == {"LayoutMismatchError"}
    assert "its place was shared by 4 data-parallel ranks, here by 3: only of a DataLoader" in outcomes[0].message
    assert {6} <= world.copies("a").keys(), "nothing was given up"


def of_its_own(training: Training) -> None:
    """A loader of which nobody knows how it shares its samples."""
    elastic(training)
    training.loader = [torch.tensor([number, number + 1]) for number in range(0, 80, 2)]


@pytest.mark.long
def test_the_place_goes_on_behind_what_all_ranks_had_seen(world: World) -> None:
    again, before = saved_at_6(world)
    after = resumed_at_6(world, again, *NODES[:3])
    had, then = seen(before, 6), seen(after, 7)
    assert (len(had), len(then)) == (6 * 4 * 2, 3 * 2)
    assert not set(had) & set(then)
