"""The memory a node needs is one sum, and a node that cannot hold it is told so with the sum spelled out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from resilience.errors import MemoryBudgetError
from resilience.planning.memory import MemoryBudget, arenas_per_rank, budget, check, optimizer_bytes

GIB = 1 << 30


def node(file_is_arena: bool = True, **changed: int) -> MemoryBudget:
    return budget(
        own_bytes=(GIB, GIB),
        replica_bytes=(GIB, GIB),
        keep_last=2,
        interval=50,
        file_is_arena=file_is_arena,
        buffer_bytes=GIB // 4,
        **changed,
    )


def test_arenas_are_those_kept_and_one_in_work_and_one_more_for_short_intervals() -> None:
    assert [arenas_per_rank(keep, 50, True) for keep in (1, 2, 3)] == [3, 3, 4]
    assert arenas_per_rank(2, 3, True) == 4
    assert arenas_per_rank(2, 4, True) == 3
    assert [arenas_per_rank(2, interval, False) for interval in (50, 3)] == [2, 2]


def test_arenas_and_slots_are_counted_for_every_copy_where_the_file_is_the_arena() -> None:
    made = node()
    assert dict(made.needs) == {"memory": 12 * GIB + GIB // 4, "shared_memory": 12 * GIB, "disk": 0}


def test_on_a_disk_memory_holds_two_arenas_and_a_slot_and_the_disk_the_copies() -> None:
    made = node(file_is_arena=False)
    assert dict(made.needs) == {"memory": 6 * GIB + GIB // 4, "shared_memory": 6 * GIB, "disk": 12 * GIB}


def test_without_saves_on_nodes_there_are_two_arenas_and_nothing_kept() -> None:
    made = node(file_is_arena=False, on_nodes=False)
    assert dict(made.needs) == {"memory": 6 * GIB + GIB // 4 - 2 * GIB, "shared_memory": 4 * GIB, "disk": 0}


def test_a_restart_takes_the_room_of_arenas_that_are_free_then_and_more_only_beyond() -> None:
    """Kept are two saves of 4 GiB; the third one's room is free."""
    assert node(needed_bytes=8 * GIB).needs == node().needs
    assert dict(node(needed_bytes=9 * GIB).needs)["shared_memory"] == 13 * GIB
    assert "fetched at a restart" in str(node(needed_bytes=9 * GIB))
    on_disk = node(file_is_arena=False, needed_bytes=9 * GIB)
    assert dict(on_disk.needs) == {"memory": 6 * GIB + GIB // 4, "shared_memory": 6 * GIB, "disk": 13 * GIB}


def test_what_a_load_from_shared_storage_stages_counts_beyond_the_same_room() -> None:
    assert node(staged_bytes=4 * GIB).needs == node().needs
    assert dict(node(staged_bytes=5 * GIB).needs)["memory"] == 13 * GIB + GIB // 4
    assert dict(node(staged_bytes=5 * GIB).needs)["shared_memory"] == 12 * GIB


def test_an_estimated_sum_says_so() -> None:
    assert str(node(estimated=True)).startswith("12.2 GiB per node (estimated) = 3 arenas")


def test_an_optimizer_that_has_no_state_yet_is_estimated_by_its_kind() -> None:
    assert optimizer_bytes("AdamW", 100) == 200
    assert optimizer_bytes("FusedAdam", 100, amsgrad=True) == 300
    assert optimizer_bytes("SGD", 100) == 0
    assert optimizer_bytes("SGD", 100, momentum=True) == 100
    assert optimizer_bytes("Adam8bit", 100) == 0, "the least that is needed: nobody is refused by a guess"


def test_files_of_this_run_that_lie_there_already_are_recycled_and_cost_nothing_more() -> None:
    assert dict(node(present_bytes=8 * GIB).needs)["shared_memory"] == 4 * GIB
    assert dict(node(present_bytes=99 * GIB).needs)["shared_memory"] == 0


def test_a_node_that_is_too_small_is_refused_with_the_sum() -> None:
    with pytest.raises(MemoryBudgetError, match=r"12\.0 GiB of shared memory needed, 8\.0 GiB free") as error:
        check(node(), {"memory": None, "shared_memory": 8 * GIB, "disk": 0})
    assert "3 arenas of 2 ranks 6.0 GiB" in str(error.value)
    assert "3 slots for 2 replicas 6.0 GiB" in str(error.value)


def test_a_disk_that_was_filled_since_the_first_start_is_told_of_and_memory_still_refused() -> None:
    on_a_disk = node(file_is_arena=False)
    room = dict.fromkeys(("memory", "shared_memory", "disk"), 99 * GIB)
    assert check(on_a_disk, room, again=True) == ""
    assert "of disk needed, 0 B free" in check(on_a_disk, room | {"disk": 0}, again=True)
    for full in ({"disk": 0}, {"shared_memory": 0}, {"disk": 0, "shared_memory": 0}):
        with pytest.raises(MemoryBudgetError):
            check(on_a_disk, room | full, again="disk" not in full or len(full) > 1)


def test_what_is_not_known_is_not_compared() -> None:
    with pytest.raises(MemoryBudgetError):
        check(node(), {"memory": None, "shared_memory": 0})
    check(node(), {"memory": None, "shared_memory": None})
    check(node(), {"memory": None})


@given(
    st.lists(st.integers(0, GIB), max_size=4),
    st.lists(st.integers(0, GIB), max_size=4),
    st.integers(1, 5),
    st.none() | st.integers(1, 100),
    st.booleans(),
    *[st.integers(0, 4 * GIB)] * 4,
)
def test_exactly_what_is_needed_fits_and_one_byte_less_does_not(
    own: list[int],
    replicas: list[int],
    keep: int,
    interval: int | None,
    file_is_arena: bool,
    buffers: int,
    needed: int,
    staged: int,
    present: int,
) -> None:
    made = budget(
        own_bytes=own,
        replica_bytes=replicas,
        keep_last=keep,
        interval=interval,
        file_is_arena=file_is_arena,
        buffer_bytes=buffers,
        needed_bytes=needed,
        staged_bytes=staged,
        present_bytes=present,
    )
    assert all(need >= 0 for _, need in made.needs)
    check(made, dict(made.needs))
    for place, need in made.needs:
        if need:
            with pytest.raises(MemoryBudgetError):
                check(made, {place: need - 1})
