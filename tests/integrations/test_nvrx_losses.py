"""What NVRx's local checkpoints do not survive, and ours must: lost nodes, bad bytes, mixed attempts, moved ranks."""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open

from resilience.integrations.nvrx import (
    CliqueReplicationStrategy,
    LazyCliqueReplicationStrategy,
    LocalCheckpointError,
    LocalCheckpointManager,
    parse_group_sequence,
)
from tests.integrations.local_checkpoints import expected, names, said, settled, state_of
from tests.ranks import killed, run_ranks, values

Manager = LocalCheckpointManager


def of(rank: int, root: Path, *, node: int | None = None, clique: bool = True, **options: Any) -> Manager:
    strategy = CliqueReplicationStrategy.from_replication_params(1, 2) if clique else None
    return Manager(root / f"node{rank if node is None else node}", "run", strategy, **options)


def shard(root: Path, node: int, iteration: int, owner: int, folder: int | None = None) -> Path:
    directory = root / f"node{node}" / "run" / str(node if folder is None else folder)
    return directory / f"iter_{iteration:07d}_{owner}_local.pt"


def flip(path: Path, where: int = -3) -> None:
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)


def damage(root: Path, what: str) -> None:
    """Of rank 1's node, or of rank 1's shard there."""
    own = shard(root, 1, 2, 1)
    if what == "lost":
        shutil.rmtree(root / "node1")
    elif what == "flipped":
        flip(own, own.stat().st_size // 2)
    elif what == "empty":
        own.write_bytes(b"")
    elif what == "truncated":
        os.truncate(own, own.stat().st_size - 1)
    elif what == "gone":
        own.unlink()
    elif what == "fifo":
        own.unlink()
        os.mkfifo(own)
    elif what == "record":
        flip(root / "node1" / "run" / ".records" / "1" / "iter_0000002.json", 30)


def _loses(rank: int, root: str, what: str) -> Any:
    place = Path(root)
    with_two = of(rank, place)
    for iteration in (1, 2):
        with_two.save(state_of(rank, iteration), iteration)
    with_two.close()
    dist.barrier()
    if rank == 0:
        damage(place, what)
    dist.barrier()
    manager = of(rank, place)
    found = manager.find_latest()
    state, ckpt_id = manager.load()
    again, _ = manager.load()
    assert manager._world().background.wait(30.0)
    here = names(manager)
    dist.barrier()
    # the node that lost something lost the other one now: what came back must be enough
    if rank == 0:
        shutil.rmtree(place / "node0")
    dist.barrier()
    manager.latest_iteration = -1
    refound = manager.find_latest()
    restate, _ = manager.load()
    told = [said(each) == expected(rank, 2) for each in (state, again, restate)]
    manager.save(state_of(rank, 3), 3)
    return found, list(ckpt_id), here, refound, told, manager.find_latest()


@pytest.mark.parametrize("what", ["lost", "flipped", "empty", "truncated", "gone", "fifo", "record"])
def test_a_copy_that_is_lost_or_bad_comes_from_the_clique_and_is_kept_again(tmp_path: Path, what: str) -> None:
    for rank, told in enumerate(values(run_ranks(2, _loses, str(tmp_path), what))):
        found, ckpt_id, here, refound, good, newest = told
        assert (found, ckpt_id, refound, newest) == (2, [2, rank, "run"], 2, 3)
        assert here == ["iter_0000002_0_local.pt", "iter_0000002_1_local.pt"]
        assert good == [True, True, True]


def _falls_back(rank: int, root: str) -> Any:
    place = Path(root)
    manager = of(rank, place, clique=False, keep=2)
    for iteration in (1, 2, 3):
        manager.save(state_of(rank, iteration), iteration)
    kept = names(manager)
    manager.close()
    dist.barrier()
    if rank == 0:
        flip(shard(place, 1, 3, 1), 5000)
    dist.barrier()
    restarted = of(rank, place, clique=False, keep=2)
    found = restarted.find_latest()
    state, _ = restarted.load()
    restarted.save(state_of(rank, 3), 3)
    return kept, found, said(state) == expected(rank, 2), restarted.find_latest(), names(restarted)


def test_with_two_kept_a_damaged_newest_one_costs_an_interval_and_not_the_run(tmp_path: Path) -> None:
    for rank, (kept, found, good, newest, after) in enumerate(values(run_ranks(2, _falls_back, str(tmp_path)))):
        both = [f"iter_{iteration:07d}_{rank}_local.pt" for iteration in (2, 3)]
        assert (kept, found, good, newest, after) == (both, 2, True, 3, both)


def _mixes(rank: int, root: str) -> Any:
    """Rank 1's shard of the first attempt at iteration 2, rank 0's of the second."""
    place, aside = Path(root), Path(root) / "aside"
    for attempt in (1, 2):
        manager = of(rank, place, clique=False)
        manager.save(state_of(10 * attempt + rank, 2), 2)
        manager.close()
        dist.barrier()
        if rank == 0 and attempt == 1:
            shutil.copytree(place / "node1", aside)
        elif rank == 0:
            shutil.rmtree(place / "node1")
            shutil.copytree(aside, place / "node1")
        dist.barrier()
        if attempt == 1:
            shutil.rmtree(place / f"node{rank}")
            dist.barrier()
    return of(rank, place, clique=False).find_latest()


def test_shards_of_two_attempts_at_one_iteration_are_no_checkpoint(tmp_path: Path) -> None:
    assert values(run_ranks(2, _mixes, str(tmp_path))) == [-1, -1]


def _moves(rank: int, root: str, shift: int) -> Any:
    place = Path(root)
    manager = of(rank, place)
    manager.save(state_of(rank, 5), 5)
    manager.close()
    dist.barrier()
    moved = of(rank, place, node=(rank + shift) % 4)
    assert moved.find_latest() == 5
    good = said(moved.load()[0]) == expected(rank, 5)
    moved.save(state_of(rank, 6), 6)
    dist.barrier()
    assert moved._world().background.wait(30.0)
    dist.barrier()
    left = sorted(path.name for path in (place / f"node{(rank + shift) % 4}" / "run").rglob("iter_*.pt"))
    return good, moved.find_latest(), left


@pytest.mark.parametrize("shift", [1, 2])
def test_nodes_that_come_back_with_other_ranks_find_everything(tmp_path: Path, shift: int) -> None:
    for rank, (good, newest, left) in enumerate(values(run_ranks(4, _moves, str(tmp_path), shift))):
        clique = (rank - rank % 2, rank - rank % 2 + 1)
        assert (good, newest) == (True, 6)
        assert left == sorted(f"iter_0000006_{owner}_local.pt" for owner in clique)  # of older ranks nothing stays


def _other_groups(rank: int, root: str) -> Any:
    place = Path(root)
    Manager(place / f"node{rank}", "run", CliqueReplicationStrategy.from_replication_params(1, 2)).save(
        state_of(rank, 5), 5
    )
    dist.barrier()
    if rank == 0:
        shutil.rmtree(place / "node1")
    dist.barrier()
    manager = Manager(place / f"node{rank}", "run", CliqueReplicationStrategy.from_replication_params(2, 2))
    assert manager.find_latest() == 5
    good = said(manager.load()[0]) == expected(rank, 5)
    assert manager._world().background.wait(30.0)
    return good, names(manager)


def test_other_groups_than_those_of_the_save_still_find_its_copies(tmp_path: Path) -> None:
    for rank, (good, here) in enumerate(values(run_ranks(4, _other_groups, str(tmp_path)))):
        assert good
        assert {f"iter_0000005_{owner}_local.pt" for owner in (rank, (rank + 2) % 4)} <= set(here)


def _saves(rank: int, root: str) -> None:
    of(rank, Path(root), clique=False).save(state_of(rank, 5), 5)


def _other_world(rank: int, root: str) -> Any:
    said_: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said_.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("resilience.integrations.nvrx").addHandler(handler)
    return of(rank, Path(root), clique=False).find_latest(), said_


def test_another_world_size_is_passed_over_and_says_why(tmp_path: Path) -> None:
    values(run_ranks(4, _saves, str(tmp_path)))
    first, second = values(run_ranks(2, _other_world, str(tmp_path)))
    assert (first[0], second[0]) == (-1, -1)
    assert first[1] == ["passed over: iteration 5: it was saved by 4 ranks, and this job has 2"]


def _crashes(rank: int, root: str) -> Any:
    """What a crash in the middle of a save leaves: files without a record, unfinished ones, spare memory."""
    place = Path(root)
    manager = of(rank, place)
    manager.save(state_of(rank, 4), 4)
    manager.close()
    here = Path(manager.local_ckpt_dir)
    shutil.copy(shard(place, rank, 4, rank), here / f"iter_0000005_{rank}_local.pt")
    shutil.copy(shard(place, rank, 4, rank), here / f"iter_0000003_{rank}_local.pt")
    (here / f"iter_0000005_{rank}_local.dirty.pt").write_bytes(b"NVRx's own")
    (here / f"iter_0000006_{rank}_local.ab12.dirty.pt").write_bytes(b"ours")
    spare = place / f"node{rank}" / "run" / ".spare" / str(rank)
    spare.mkdir(parents=True)
    (spare / "0-ab").write_bytes(bytes(100))
    dist.barrier()
    restarted = of(rank, place)
    found = restarted.find_latest()
    swept = not spare.exists() and not list(here.glob("*dirty*"))
    restarted.save(state_of(rank, 5), 5)
    assert not (here / f"iter_0000003_{rank}_local.pt").exists()  # it never counted
    return found, swept, restarted.find_latest(), said(restarted.load()[0]) == expected(rank, 5)


def test_what_a_crash_leaves_is_swept_and_never_counted(tmp_path: Path) -> None:
    assert values(run_ranks(2, _crashes, str(tmp_path))) == [(4, True, 5, True)] * 2


def _shares(rank: int, root: str) -> Any:
    """One directory on shared storage, seen by two hosts: neither may tidy up what the other is writing."""
    socket.gethostname = lambda: f"host{rank}"
    manager = of(rank, Path(root), node=0)
    manager.save(state_of(rank, 1), 1)
    writing = Path(manager.local_ckpt_dir) / f"iter_0000009_{rank}_local.ab.dirty.pt"
    writing.write_bytes(b"on its way")
    dist.barrier()
    manager.save(state_of(rank, 2), 2)
    dist.barrier()
    manager.close()
    dist.barrier()
    there = writing.exists()
    restarted = of(rank, Path(root), node=0)
    return there, restarted.find_latest(), said(restarted.load()[0]) == expected(rank, 2)


def test_hosts_that_share_a_directory_leave_each_others_files_alone(tmp_path: Path) -> None:
    assert values(run_ranks(2, _shares, str(tmp_path))) == [(True, 2, True)] * 2


class Stranger:
    """Of no module that anybody trusts."""


class Loud:
    def __reduce__(self) -> Any:
        return os.system, ("touch /dev/shm/resilience-was-here",)


def _refuses(rank: int, root: str) -> Any:
    """Only rank 1 has it: both must raise, and nothing be left."""
    manager = of(rank, Path(root))
    told = []
    for iteration, stranger in enumerate((Stranger(), Loud(), lambda: 0, torch.zeros(2, 2).to_sparse()), 1):
        state = state_of(rank, iteration)
        if rank == 1:
            state.state_dict["extra"] = stranger
        try:
            manager.save(state, iteration)
            told.append("")
        except LocalCheckpointError as error:
            told.append(str(error))
    empty = names(manager)
    trusting = of(rank, Path(root), trusted_classes=[Stranger])
    state = state_of(rank, 7)
    state.state_dict["extra"] = Stranger()
    trusting.save(state, 7)
    trusting.find_latest()
    kind = type(trusting.load()[0].state_dict["extra"])
    trusting.close()
    doubting = of(rank, Path(root))
    doubting.find_latest()
    try:
        doubting.load()
        told.append("")
    except LocalCheckpointError as error:
        told.append(str(error))
    return told, empty, kind is Stranger


def test_a_state_that_could_not_be_loaded_or_trusted_is_refused_on_all_ranks(tmp_path: Path) -> None:
    mark = Path("/dev/shm/resilience-was-here")
    for told, empty, trusted in values(run_ranks(2, _refuses, str(tmp_path))):
        assert "test_nvrx_losses.Stranger, which is not trusted" in told[0]
        assert 'trusted_classes=["' in told[0]
        assert "system, which is not trusted" in told[1]
        assert "cannot be pickled" in told[2]
        assert "torch.sparse_coo" in told[3]
        assert all("rank 1: " in each for each in told[:4])
        assert "Stranger, which is not trusted" in told[4]
        assert (empty, trusted) == ([], True)
    assert not mark.exists()


def _dies(rank: int, root: str) -> Any:
    manager = of(rank, Path(root), timeout_s=10.0)
    manager.save(state_of(rank, 1), 1)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    try:
        manager.save(state_of(rank, 2), 2)
        told = ""
    except LocalCheckpointError as error:
        told = str(error)
    return told, names(manager)


def test_a_rank_that_dies_ends_the_save_of_the_others_in_words(tmp_path: Path) -> None:
    alive, dead = run_ranks(2, _dies, str(tmp_path), until=[0])
    assert killed(dead) or dead.error
    told, here = values([alive])[0]
    assert "iteration 2 could not be saved" in told
    assert here == ["iter_0000001_0_local.pt", "iter_0000001_1_local.pt"]


def _cheap(rank: int, root: str) -> Any:
    """An asynchronous save returns before its bytes are with the peer; two may be under way; memory is used again."""
    manager = of(rank, Path(root))
    requests = [manager.save(state_of(rank, iteration, 40), iteration, is_async=True) for iteration in (1, 2)]
    for request in requests:
        assert request is not None
        request.add_finalize_fn(lambda: None)
        request.execute_sync()
    spares = Path(manager.local_ckpt_dir).parent / ".spare" / str(rank)
    assert settled(lambda: spares.is_dir() and len(list(spares.iterdir())) == 2)
    inodes = {path.stat().st_ino for path in spares.iterdir()}
    manager.save(state_of(rank, 3, 40), 3)
    reused = {path.stat().st_ino for path in Path(manager.local_ckpt_dir).iterdir()} == inodes
    with safe_open(shard(Path(root), rank, 3, 1 - rank), "pt") as file:
        keys = len(list(file.keys()))
    manager.find_latest()
    good = said(manager.load()[0]) == expected_of(rank, 3)
    manager.close()
    return reused, keys, good, spares.exists()


def expected_of(rank: int, iteration: int) -> list[float]:
    return said(state_of(rank, iteration, 40))


def test_files_of_removed_checkpoints_are_written_again_and_go_with_the_process(tmp_path: Path) -> None:
    assert values(run_ranks(2, _cheap, str(tmp_path))) == [(True, 42, True, False)] * 2


def _begins_again(rank: int, root: str) -> Any:
    """As after a restart within the process: torch.distributed anew, and the ranks are others."""
    manager = Manager(Path(root) / f"node{rank}", "run", LazyCliqueReplicationStrategy(1, 2), timeout_s=10.0)
    manager.save(state_of(rank, 5), 5)
    dist.destroy_process_group()
    dist.init_process_group("gloo", rank=1 - rank, world_size=2, init_method=f"file://{root}/again")
    found = manager.find_latest()
    good = said(manager.load()[0]) == expected(1 - rank, 5)
    manager.save(state_of(1 - rank, 6), 6)
    return found, good, manager.find_latest(), manager.rank


def test_a_manager_goes_on_where_torch_distributed_begins_again_with_other_ranks(tmp_path: Path) -> None:
    outcomes = values(run_ranks(2, _begins_again, str(tmp_path)))
    assert outcomes == [(5, True, 6, 1 - rank) for rank in range(2)]


def _alone(rank: int, root: str) -> Any:
    manager = Manager(root)
    manager.save(state_of(0, 1), 1)
    restarted = Manager(root)
    return (
        restarted.find_latest(),
        said(restarted.load()[0]) == expected(0, 1),
        str(restarted.local_ckpt_dir) == root + "/0",
    )


def test_it_works_in_a_process_without_torch_distributed(tmp_path: Path) -> None:
    assert values(run_ranks(1, _alone, str(tmp_path), distributed=False)) == [(1, True, True)]


@pytest.mark.parametrize(
    ("jump", "factor", "world", "groups"),
    [
        (1, 2, 8, [(0, 1), (2, 3), (4, 5), (6, 7)]),
        (2, 4, 8, [(0, 2, 4, 6), (1, 3, 5, 7)]),
        (4, 2, 16, [(0, 4), (1, 5), (2, 6), (3, 7), (8, 12), (9, 13), (10, 14), (11, 15)]),
        (1, 2, 5, [(0, 1), (2, 3, 4)]),
    ],
)
def test_groups_are_the_documented_ones_and_larger_where_they_do_not_fit(
    jump: int, factor: int, world: int, groups: list[tuple[int, ...]]
) -> None:
    assert parse_group_sequence(jump, factor, world) == groups


@pytest.mark.parametrize(("jump", "factor", "world", "says"), [(0, 2, 8, "at least 1"), (4, 2, 6, "Jumps up to 3 fit")])
def test_groups_that_cannot_be_formed_are_refused_in_words(jump: int, factor: int, world: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        parse_group_sequence(jump, factor, world)
