"""What ranks do with local checkpoints, by one interface that two packages implement: NVRx, and ours in its place.

    python -m tests.integrations.local_checkpoints nvrx|ours DIRECTORY CASE…

runs cases in an interpreter that has NVRx, and prints what each rank returned, as JSON. Each case takes the names of
the implementation, so that it cannot know more than a user of them.
"""

from __future__ import annotations

import filecmp
import json
import shutil
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist

from resilience.integrations import nvrx
from resilience.integrations.nvrx import BasicTensorAwareStateDict, TensorAwareStateDict
from tests.ranks import run_ranks, values

__all__ = ["CASES", "QUEUES", "implementation", "run_case"]


def implementation(name: str) -> SimpleNamespace:
    """The names that users of the interface import."""
    if name == "ours":
        return SimpleNamespace(**{each: getattr(nvrx, each) for each in nvrx.__all__})
    from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.base_manager import CheckpointingException
    from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.local_manager import LocalCheckpointManager
    from nvidia_resiliency_ext.checkpointing.local.replication.strategies import (
        CliqueReplicationStrategy,
        LazyCliqueReplicationStrategy,
    )

    torch.cuda.synchronize = lambda *_: None  # which its asynchronous saves call on CPUs too
    return SimpleNamespace(
        CheckpointingException=CheckpointingException,
        LocalCheckpointManager=LocalCheckpointManager,
        CliqueReplicationStrategy=CliqueReplicationStrategy,
        LazyCliqueReplicationStrategy=LazyCliqueReplicationStrategy,
    )


class Whole(TensorAwareStateDict):
    """A state that can only be moved and pickled, as NVRx's own tests have one."""

    def __init__(self, values: Iterable[float]) -> None:
        self.held = [torch.full((1000,), value) for value in values]
        self.moves: list[str] = []

    def pop_tensors(self) -> Any:
        raise NotImplementedError

    @property
    def tensors(self) -> Any:
        raise NotImplementedError

    @property
    def is_hollow(self) -> Any:
        raise NotImplementedError

    def insert_tensors(self, tensor_data: Any) -> Any:
        raise NotImplementedError

    def init_tensors(self) -> Any:
        raise NotImplementedError

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        self.held = [each.clone() for each in self.held]
        self.moves.append("cpu")

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        self.moves.append("back")


def state_of(rank: int, iteration: int, count: int = 3) -> Any:
    tensors = {f"w{index}": torch.full((64, 5), 100.0 * rank + iteration + index / 8) for index in range(count)}
    half = torch.arange(7, dtype=torch.bfloat16) * iteration
    return BasicTensorAwareStateDict({"model": tensors, "list": [half, {"step": iteration}], "rank": rank})


def said(state: Any) -> list[float]:
    return [float(each.double().sum()) for each in state.tensors] + [state.state_dict["rank"]]


def expected(rank: int, iteration: int) -> list[float]:
    return said(state_of(rank, iteration))


def names(manager: Any) -> list[str]:
    return sorted(path.name for path in Path(manager.local_ckpt_dir).rglob("*"))


def save(manager: Any, state: Any, iteration: int, *, is_async: bool) -> None:
    request = manager.save(state, iteration, is_async)
    if is_async:
        request.execute_sync()
    else:
        assert request is None


def settled(condition: Callable[[], bool]) -> bool:
    """Whether it holds soon: older files may be removed in the background."""
    deadline = time.monotonic() + 20.0
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    return condition()


def saves_and_loads(rank: int, api: SimpleNamespace, root: Path, is_async: bool) -> Any:
    manager = api.LocalCheckpointManager(root / "not" / "yet")
    assert not (root / "not").exists()
    dist.barrier()
    assert manager.find_latest() == -1
    assert Path(manager.local_ckpt_dir) == root / "not" / "yet" / str(rank)
    assert Path(manager.local_ckpt_dir).is_dir()
    save(manager, Whole([rank, 0.5]), 1, is_async=is_async)
    assert manager.find_latest() == 1
    state, ckpt_id = manager.load()
    assert ckpt_id == (1, rank, "")
    assert [float(each[0]) for each in state.held] == [rank, 0.5]
    assert state.moves[-1] == "back"
    again, _ = manager.load()  # Megatron-LM does
    assert torch.equal(again.held[0], state.held[0])
    path = manager._local_ckpt_path_from_id(manager._ckpt_id(1))
    assert (path.name, path.parent) == (f"iter_0000001_{rank}_local.pt", Path(manager.local_ckpt_dir))
    assert names(manager) == [path.name]
    other = Path(manager.local_ckpt_dir) / "layer_wise_optimizer_0.pt"
    other.write_bytes(b"another's")
    restarted = api.LocalCheckpointManager(root / "not" / "yet")
    assert restarted.find_latest() == 1
    assert float(restarted.load()[0].held[0][0]) == rank
    save(restarted, Whole([rank + 10]), 2, is_async=is_async)
    assert settled(lambda: names(restarted) == [f"iter_0000002_{rank}_local.pt", other.name])
    assert restarted.find_latest() == 2
    assert float(restarted.load()[0].held[0][0]) == rank + 10
    return other.read_bytes().decode()


def finds_nothing_where_a_file_is_missing(rank: int, api: SimpleNamespace, root: Path) -> Any:
    manager = api.LocalCheckpointManager(root)
    save(manager, state_of(rank, 1), 1, is_async=False)
    dist.barrier()
    path = manager._local_ckpt_path_from_id(manager._ckpt_id(1))
    aside = path.with_name("backup_" + path.name)
    if rank == 1:
        shutil.move(path, aside)
    dist.barrier()
    manager.latest_iteration = -1
    found = manager.find_latest()
    try:
        manager.load()
        raised = "nothing"
    except api.CheckpointingException:
        raised = "CheckpointingException"
    dist.barrier()
    save(manager, state_of(rank, 1), 1, is_async=False)
    same = rank != 1 or filecmp.cmp(path, aside, shallow=False)  # the same state gives the same bytes
    return found, raised, same, manager.find_latest()


def keeps_copies_of_the_clique(rank: int, api: SimpleNamespace, root: Path, lazy: bool) -> Any:
    kind = api.LazyCliqueReplicationStrategy if lazy else api.CliqueReplicationStrategy.from_replication_params
    manager = api.LocalCheckpointManager(root / f"node{rank}", "session", kind(1, 2))
    for iteration in (1, 2):
        save(manager, state_of(rank, iteration), iteration, is_async=iteration == 1)
    clique = (rank - rank % 2, rank - rank % 2 + 1)
    assert settled(lambda: names(manager) == [f"iter_0000002_{owner}_local.pt" for owner in clique])
    assert Path(manager.local_ckpt_dir) == root / f"node{rank}" / "session" / str(rank)
    assert manager.find_latest() == 2
    state, ckpt_id = manager.load()
    return said(state) == expected(rank, 2), list(ckpt_id)


def fails_everywhere_where_one_rank_writes_nothing(rank: int, api: SimpleNamespace, root: Path, is_async: bool) -> Any:
    kept = api.LocalCheckpointManager._save

    def silent(self: Any, *arguments: Any, **named: Any) -> Any:
        return None if self.rank == 1 else kept(self, *arguments, **named)

    api.LocalCheckpointManager._save = silent
    manager = api.LocalCheckpointManager(root)
    try:
        save(manager, state_of(rank, 1), 1, is_async=is_async)
        raised = ""
    except api.CheckpointingException as error:
        raised = str(error)
    empty = settled(lambda: names(manager) == [])
    api.LocalCheckpointManager._save = kept
    dist.barrier()
    found = manager.find_latest()
    save(manager, state_of(rank, 1), 1, is_async=is_async)
    return bool(raised), empty, found, manager.find_latest()


def names_are_parsed(rank: int, api: SimpleNamespace, root: Path) -> Any:
    manager = api.LocalCheckpointManager(root)
    name = manager._filename_from_template("0000123", "4")
    try:
        manager._ckpt_id(-1)
        raised = False
    except api.CheckpointingException:
        raised = True
    return name, list(manager._filename_to_id(name))[:2], raised


def goes_through_nvrx_queue(rank: int, api: SimpleNamespace, root: Path, persistent: bool) -> Any:
    """Its real queue runs our request in a process of its own: forked, or spawned once and given it as a pickle."""
    from multiprocessing import process

    from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncCallsQueue, AsyncRequest

    torch.cuda.synchronize = lambda *_: None
    torch.cuda.current_device = lambda: "cpu"  # where it reduces the numbers of its calls
    process.current_process()._config["daemon"] = False  # type: ignore[attr-defined]  # the queue starts processes
    manager = api.LocalCheckpointManager(root / f"node{rank}", "", api.LazyCliqueReplicationStrategy(1, 2))
    queue, called = AsyncCallsQueue(persistent=persistent), []
    for iteration in (1, 2):
        request = manager.save(state_of(rank, iteration), iteration, is_async=True)
        assert isinstance(request, AsyncRequest)
        request.add_finalize_fn(lambda iteration=iteration: called.append((iteration, manager.latest_iteration)))
        queue.schedule_async_request(request)
    done = queue.maybe_finalize_async_calls(blocking=True)
    left = queue.get_num_unfinalized_calls()
    queue.close()
    kept = settled(lambda: names(manager) == [f"iter_0000002_{owner}_local.pt" for owner in (0, 1)])
    assert manager.find_latest() == 2
    return len(done), left, called, kept, said(manager.load()[0]) == expected(rank, 2)


QUEUES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "queue-forked": (goes_through_nvrx_queue, (False,)),
    "queue-persistent": (goes_through_nvrx_queue, (True,)),
}
CASES: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "saves": (saves_and_loads, (False,)),
    "saves-async": (saves_and_loads, (True,)),
    "missing": (finds_nothing_where_a_file_is_missing, ()),
    "clique": (keeps_copies_of_the_clique, (False,)),
    "clique-lazy": (keeps_copies_of_the_clique, (True,)),
    "silent": (fails_everywhere_where_one_rank_writes_nothing, (False,)),
    "silent-async": (fails_everywhere_where_one_rank_writes_nothing, (True,)),
    "names": (names_are_parsed, ()),
}


def _case(rank: int, name: str, which: str, root: str) -> Any:
    work, arguments = {**CASES, **QUEUES}[which]
    return work(rank, implementation(name), Path(root), *arguments)


def run_case(name: str, which: str, ranks: int, root: Path) -> list[Any]:
    """What each rank returned."""
    root.mkdir(parents=True, exist_ok=True)
    return values(run_ranks(ranks, _case, name, which, str(root)))


if __name__ == "__main__":
    package, place, *asked = sys.argv[1:]
    print(json.dumps({which: run_case(package, which, 2, Path(place) / which) for which in asked}))
