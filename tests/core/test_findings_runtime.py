"""A start, the loop and the drain under what once broke them: forks, exits, damage, trouble of one rank alone."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

import resilience.formats.saver
from resilience.config import CheckpointConfig
from resilience.errors import CorruptCopyError, ResilienceError, SaveFailedError
from resilience.formats.extras import Extras
from resilience.formats.saver import DrainJob, DrainTarget, SharedSaver
from resilience.planning.decision import ElectionPolicy, Strike
from resilience.planning.inventory import AttemptLog, SaveId
from resilience.restore import Restorer
from resilience.restore_shared import SharedLoader
from resilience.restore_staging import Peers, Stager
from resilience.runtime.bounded_calls import BoundedCalls
from resilience.runtime.clock import SystemClock
from resilience.runtime.launcher_reports import LauncherReports, Unheard
from resilience.runtime.threads import SYSTEM_THREADS
from resilience.runtime.watchdog import Watchdog
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.trackers import TEXT_TRACKER, TRAIN_STATE_TRACKER, read_tracker, step_of
from resilience.trainer import ResilientTrainer
from tests.formats.worlds import RUN
from tests.stores.test_shared_store import FIRST, SECOND, THIRD, Crash, CrashingFileSystem, fill, owned, publish

FS = PosixFileSystem()


# -- signals ----------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def watching(asked: list[str]) -> Iterator[Watchdog]:
    watchdog = Watchdog(
        SystemClock(), term_grace_s=60.0, hang_timeout_s=None, stop_at=None,
        request=asked.append, look=lambda: "", tell=lambda *_, **__: None,
    )  # fmt: skip
    watchdog.start()
    try:
        yield watchdog
    finally:
        watchdog.close()


def test_term_to_a_forked_child_ends_the_child_and_leaves_the_parent_alone() -> None:
    asked: list[str] = []
    with watching(asked) as watchdog:
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.write(writer, b"x")
            time.sleep(60)
            os._exit(0)
        os.read(reader, 1)  # a signal to a child that has not begun would be its parent's
        os.close(reader)
        os.close(writer)
        os.kill(child, signal.SIGTERM)
        _, status = os.waitpid(child, 0)
        time.sleep(0.5)
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGTERM
        assert not asked
        assert not watchdog.terminated


def test_an_exit_in_a_users_own_handler_after_term_is_no_orderly_end() -> None:
    asked: list[str] = []
    before = signal.signal(signal.SIGTERM, lambda *_: exit_with_0())
    try:
        with watching(asked) as watchdog:
            trainer, told = trainer_with(watchdog)
            with pytest.raises(SystemExit), trainer:
                terminate_here()
        assert "left with 143" in told
    finally:
        signal.signal(signal.SIGTERM, before)


def terminate_here() -> None:
    os.kill(os.getpid(), signal.SIGTERM)
    threading.Event().wait(60)


def exit_with_0() -> None:
    raise SystemExit(0)


def trainer_with(watchdog: Any) -> tuple[ResilientTrainer, list[str]]:
    """A trainer of which only the loop and the end are real."""
    told: list[str] = []
    watchdog.exit_terminated = lambda: told.append("left with 143")
    trainer = ResilientTrainer.__new__(ResilientTrainer)
    trainer._hooks = []
    trainer._watchdog = watchdog
    trainer._finished = False
    trainer._has_loader = False
    trainer._rehearsal = None
    trainer._reports = LauncherReports(Unheard(), SystemClock(), lambda *_, **__: None)
    trainer._controller = SimpleNamespace(  # type: ignore[assignment]
        tell=lambda *_, **__: None,
        tell_exception=lambda _: None,
        close=lambda **_: None,
        iteration=0,
        clock=SystemClock(),
    )
    return trainer, told


def test_no_boundary_is_expected_after_a_break() -> None:
    calls: list[str] = []
    watchdog = SimpleNamespace(beat=lambda: calls.append("beat"), rest=lambda: calls.append("rest"))
    trainer, _ = trainer_with(watchdog)
    for _ in trainer.iterations(3):
        break
    assert calls == ["beat", "rest"]


# -- trackers ---------------------------------------------------------------------------------------------------------


def test_no_damaged_byte_of_a_tracker_raises_anything_but_damage(tmp_path: Path) -> None:
    file = io.BytesIO()
    torch.save({"step": torch.tensor(7, dtype=torch.int32)}, file)
    content = file.getvalue()
    (tmp_path / TEXT_TRACKER).write_text("7")
    assert step_of(content, "it") == 7
    refused = 0
    for position in range(len(content)):
        for flip in (0x01, 0x80, 0xFF):
            damaged = bytearray(content)
            damaged[position] ^= flip
            try:
                assert isinstance(step_of(bytes(damaged), "it"), int)
            except CorruptCopyError:
                refused += 1
    assert refused > len(content) // 2


@pytest.mark.parametrize(
    "error", [UnicodeDecodeError("utf-8", b"", 0, 1, ""), ValueError("negative seek"), MemoryError()]
)
def test_the_text_tracker_counts_where_the_other_one_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def broken(*_: Any) -> None:
        raise error

    (tmp_path / TRAIN_STATE_TRACKER).write_bytes(b"x")
    (tmp_path / TEXT_TRACKER).write_text("7")
    monkeypatch.setattr("resilience.stores.trackers.zipfile.ZipFile", broken)
    assert read_tracker(tmp_path, FS).names == 7


# -- the drain --------------------------------------------------------------------------------------------------------


class Alone:
    """A group of one that notes what it was asked to agree on."""

    rank = 0

    def __init__(self) -> None:
        self.maxima: list[list[int]] = []
        self.broadcasts: list[bytes | None] = []

    def maximum(self, values: list[int]) -> list[int]:
        self.maxima.append(values)
        return values

    def gather(self, content: bytes) -> list[bytes]:
        return [content]

    collect = gather

    def broadcast(self, content: bytes | None) -> bytes:
        self.broadcasts.append(content)
        assert content is not None
        return content


def test_any_error_of_the_leader_reaches_the_others() -> None:
    group = Alone()
    with pytest.raises(SaveFailedError, match="KeyError"):
        SharedSaver(None, group, FS)._leader(lambda: {}["gone"])  # type: ignore[arg-type]
    assert len(group.broadcasts) == 1


def test_a_rank_that_cannot_lay_out_its_chunks_says_so_in_the_agreement(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: Any) -> None:
        raise IndexError("no such view")

    monkeypatch.setattr(resilience.formats.saver, "share_of", broken)
    group = Alone()
    target: Any = DrainTarget(None, None, None)  # type: ignore[arg-type]
    job = DrainJob(SaveId(3, 1, "a" * 32), None, b"", {}, (target,), lambda *_: Extras())
    with pytest.raises(SaveFailedError, match="IndexError: no such view"):
        SharedSaver(None, group, FS).run(job)  # type: ignore[arg-type]
    assert group.maxima == [[1, 0]]


# -- the restore ------------------------------------------------------------------------------------------------------


def loader_at(root: Path, told: list[str]) -> SharedLoader:
    return SharedLoader(
        CheckpointConfig(save=str(root)), FS, 0, 1, False, lambda _, **fields: told.append(fields.get("what", "")),
        BoundedCalls(SYSTEM_THREADS, 60.0),
    )  # fmt: skip


def restorer(shared: Any, readers: tuple[Any, ...] = ()) -> Restorer:
    """The leader of a job of two ranks, of which the other has nothing to say."""
    job: Any = SimpleNamespace(
        rank=0,
        leads_node=True,
        nodes=("a", "b"),
        domains=("a", "b"),
        coordinates=((0, 0),) * 2,
        data_parallel=lambda: (0,),
    )
    group: Any = Alone()
    policy, topology = ElectionPolicy(), cast(Any, None)
    return Restorer(
        job, group, RUN, THIRD, readers, None, shared, topology, policy, SystemClock(),
        lambda *_, **__: None,
    )  # fmt: skip


def test_the_only_save_hidden_by_an_interrupted_commit_is_healed_and_elected(tmp_path: Path) -> None:
    first = owned(tmp_path)
    publish(first, 10)
    first.write_attempt_log(AttemptLog(RUN, FIRST, 1, completed=SaveId(10, 1, FIRST)))
    first.write_attempt_log(AttemptLog(RUN, SECOND, 2))
    dying = owned(tmp_path, SECOND, 2)
    fill(dying.begin(10, SECOND), 10, SECOND, 2)
    dying._fs = CrashingFileSystem(6, False, Crash)  # the old folder is aside, the new one not yet in place
    with pytest.raises(Crash):
        dying.commit(10, SECOND)
    shared = loader_at(tmp_path, [])
    healed = shared.inventories_after_heal(RUN)
    assert [save.save.iteration for each in healed for save in each.shared_saves if not save.problem] == [10]
    assert "iter_0000010" not in {path.name for path in tmp_path.iterdir()}, "looking changes nothing"

    plan = restorer(shared)._decide(frozenset())
    plan.decision.raise_if_error()
    assert plan.decision.chosen is not None
    assert plan.decision.chosen.save == SaveId(10, 2, SECOND)
    assert (tmp_path / "iter_0000010").is_dir()


def test_an_error_that_no_one_expected_in_a_look_at_the_directories_is_an_answer() -> None:
    def broken() -> None:
        raise IndexError("odd bytes")

    rank = restorer(None, (SimpleNamespace(inventory=broken),))
    with pytest.raises(ResilienceError, match="IndexError: odd bytes"):
        rank._decide(frozenset())


@pytest.mark.parametrize("kind", ["node", "shared"])
def test_one_nodes_trouble_to_read_proved_bytes_strikes_no_copy_off(kind: str) -> None:
    def unreadable(_: Any) -> None:
        raise OSError("Input/output error")

    save = SaveId(3, 1, FIRST)
    shared = SimpleNamespace(obtain=lambda *_: ([], unreadable))
    rank = restorer(shared)
    rank._steps = lambda *_: [lambda: ([], unreadable)]  # type: ignore[method-assign,assignment]
    chosen = SimpleNamespace(kind=kind, save=save, source="save", tier="persistent")
    plan: Any = SimpleNamespace(
        decision=SimpleNamespace(chosen=chosen),
        retrieval=SimpleNamespace(local=[SimpleNamespace(node_dir="a", tier="local")], fetches=[]),
        assembly=None,
    )
    if kind == "node":
        with pytest.raises(OSError, match="Input/output error"):
            rank._try(plan, None, 0, set())  # type: ignore[arg-type]
    else:
        assert rank._try(plan, None, 0, set()) == ({Strike("save", "persistent", save)}, None)  # type: ignore[arg-type]


@pytest.mark.parametrize("ours", [True, False])
def test_a_checkpoint_without_this_ranks_state_is_damage_or_told_of(tmp_path: Path, ours: bool) -> None:
    told: list[str] = []
    record = object() if ours else None
    reader: Any = SimpleNamespace(record=record, folder=tmp_path, rank_state=lambda _: None, index={}, common={})
    chosen: Any = SimpleNamespace(weights_only=False, tier="persistent", save=SaveId(3, 1, FIRST))
    stager = Stager(
        reader, chosen, CheckpointConfig(), lambda: None, 0, Peers(), FS,
        lambda _, **fields: told.append(fields.get("what", "")),
    )  # fmt: skip
    state: Any = SimpleNamespace(models=(), optimizers=(), schedulers=(), loader=SimpleNamespace(stateful=False))
    if ours:
        with pytest.raises(CorruptCopyError, match="no state of rank 0"):
            stager._without_rank_state(state, ("model", "optimizer"))
        assert not told
    else:
        assert stager._without_rank_state(state, ("model", "optimizer"))[1] == ("model",)
        assert "model are loaded, not optimizer" in told[0]
