"""Every call by which a save, a deletion or a restore touches a disk fails in turn, in every way it can."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.faults.conversion import Conversion
from tests.faults.loop import Place, Tried, fault_loop
from tests.faults.operations import Restore, Save, small, small_and_sharded
from tests.faults.pair import PeerRestore, Replication
from tests.ranks import run_ranks, values

SAMPLE = 8  # calls of each operation in the quick tests: each kind of fault once
MORE = 12  # of the other operations in `make test-full`; `make test-exhaustive` tries all
BOUND_S = 3000.0  # of a whole loop


def loop(rank: int, operation: Any, home: Place, sample: int | None, part: tuple[int, int]) -> Tried:
    return fault_loop(rank, operation.ready(home), home, sample, part)


FORMATS = ("torch_dist", "zarr", "fsdp_dtensor")


def persistent(form: str) -> dict[str, Any]:
    return {
        "kind": None,
        "save": True,
        "make": small_and_sharded if form == "fsdp_dtensor" else small,
        "checkpoint": {"save_interval": 3, "ckpt_format": form},
        "resiliency": {"keep_persistent": 1},
    }


OPERATIONS: dict[str, Any] = {
    "save in memory": Save({"kind": "local"}, steps=9),
    "save on a disk": Save({"kind": "disk"}, steps=9),
    "delete in memory": Save({"kind": "local", "resiliency": {"keep_last": 1}}, steps=12, begins=6, ends=10),
    "delete on a disk": Save({"kind": "disk", "resiliency": {"keep_last": 1}}, steps=12, begins=6, ends=10),
    "restore from memory": Restore({"kind": "local"}, steps=6),
    "restore from a disk": Restore({"kind": "disk"}, steps=6),
    "replicate in memory": Replication({"kind": "local"}, victim=1),
    "replicate to a disk": Replication({"kind": "disk"}, victim=1),
    "restore from a peer": PeerRestore({"kind": "local"}, victim=1),
    "restore for a peer": PeerRestore({"kind": "local"}, victim=0),
    **{f"convert to {form}": Conversion(form) for form in ("zarr", "fsdp_dtensor")},
    **{f"persistent save, {form}": Save(persistent(form), 9, sharded=form == "fsdp_dtensor") for form in FORMATS},
    **{f"persistent restore, {form}": Restore(persistent(form), 6, sharded=form == "fsdp_dtensor") for form in FORMATS},
}


#: One of each family, for the quick tests.
QUICKLY = (
    "save in memory", "save on a disk", "delete in memory", "delete on a disk", "restore from memory",
    "replicate in memory", "restore from a peer", "convert to zarr", "persistent save, torch_dist",
    "persistent restore, torch_dist",
)  # fmt: skip


#: Two ranks wait for each other's bounds: their loops take the longest, and are cut into parts.
PARTS = {"replicate in memory": 4, "replicate to a disk": 4}


def tried(
    name: str,
    sample: int | None,
    tmp_path: Path,
    memory_mount: Path,
    record_property: Any,
    part: tuple[int, int] = (0, 1),
) -> Tried:
    # what waits for a real disk is tried on one where the disk decides what is done; else on a mount that is quick
    disk = tmp_path if "on a disk" in name or "from a disk" in name else memory_mount
    home = Place(str(memory_mount / "memory"), str(disk / "disk"))
    (found,) = values(run_ranks(1, loop, OPERATIONS[name], home, sample, part, distributed=False, timeout_s=BOUND_S))
    record_property("tried: fault points", found.points)
    assert not found.defects, "\n\n".join([f"{len(found.defects)} of {found.points}:", *found.defects[:5]])
    return found


@pytest.mark.parametrize("name", QUICKLY)
def test_faults_at_calls_spread_over_an_operation_cost_one_save_at_most_and_leave_nothing(
    name: str, tmp_path: Path, memory_mount: Path, record_property: Any
) -> None:
    assert tried(name, SAMPLE, tmp_path, memory_mount, record_property).points >= SAMPLE // 2


@pytest.mark.long
@pytest.mark.timeout(2 * BOUND_S)
@pytest.mark.parametrize("name", [name for name in OPERATIONS if name not in QUICKLY])
def test_faults_at_calls_of_every_other_operation_cost_one_save_at_most_and_leave_nothing(
    name: str, tmp_path: Path, memory_mount: Path, record_property: Any
) -> None:
    assert tried(name, MORE, tmp_path, memory_mount, record_property).points >= MORE // 2


@pytest.mark.long
@pytest.mark.exhaustive
@pytest.mark.timeout(2 * BOUND_S)
@pytest.mark.parametrize(
    ("name", "part"),
    [
        pytest.param(name, (part, PARTS.get(name, 1)), id=f"{name}, {part}" if name in PARTS else name)
        for name in OPERATIONS
        for part in range(PARTS.get(name, 1))
    ],
)
def test_every_fault_at_every_call_of_an_operation_costs_one_save_at_most_and_leaves_nothing(
    name: str, part: tuple[int, int], tmp_path: Path, memory_mount: Path, record_property: Any
) -> None:
    found = tried(name, None, tmp_path, memory_mount, record_property, part)
    assert found.points > 2 * found.calls / part[1] > 40 / part[1]
