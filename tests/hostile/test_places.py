"""Links, pipes, folders, sockets, other people's files where one of ours belongs: told, never followed or waited for.

And no name that a file tells leads anywhere else.
"""

from __future__ import annotations

import os
import shutil
import socket
import stat
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.errors import ResilienceError, UnsafePathError
from resilience.formats.loader_files import encode_loader, loader_file, read_loader
from resilience.formats.proof import folder_damage
from resilience.formats.protocol import Target
from resilience.formats.registry import foreign_problem, open_checkpoint
from resilience.observe.events import EventLog, EventTail, read_events
from resilience.planning.inventory import AttemptLog
from resilience.requests import leave_request, take_request
from resilience.runtime.clock import SystemClock
from resilience.stores.lock import ALL_RANKS, DirectoryLock
from resilience.stores.node_reader import CopyLocation
from resilience.stores.node_store import NodeStore
from resilience.stores.proof import CopyGoneError, prove_copy
from resilience.stores.records import seal_json, unseal_json
from resilience.stores.shared_store import SharedStore
from resilience.stores.trackers import TEXT_TRACKER, TRAIN_STATE_TRACKER
from tests.cli.stores import FS, RUN, World, attempt_id, save_id
from tests.formats.worlds import rows, save, whole
from tests.hostile.child import Notebook, in_a_child
from tests.hostile.summary import PROPERTY

STRANGER = 54321
Intruder = Callable[[Path, Path], None]


def _link(path: Path, elsewhere: Path) -> None:
    elsewhere.write_bytes(path.read_bytes() if path.is_file() else b"")
    _gone(path)
    path.symlink_to(elsewhere)


def _link_into_nothing(path: Path, elsewhere: Path) -> None:
    _gone(path)
    path.symlink_to(elsewhere / "nothing" / "there")


def _link_to_itself(path: Path, elsewhere: Path) -> None:
    _gone(path)
    path.symlink_to(path)


def _pipe(path: Path, elsewhere: Path) -> None:
    _gone(path)
    os.mkfifo(path)


def _folder(path: Path, elsewhere: Path) -> None:
    _gone(path)
    path.mkdir()
    (path / "inside").write_bytes(b"x")


def _socket(path: Path, elsewhere: Path) -> None:
    _gone(path)
    with socket.socket(socket.AF_UNIX) as bound:
        here = os.getcwd()
        os.chdir(path.parent)  # its name has little room
        try:
            bound.bind(path.name)
        finally:
            os.chdir(here)


def _device(path: Path, elsewhere: Path) -> None:
    """An endless file of zeros."""
    _gone(path)
    os.mknod(path, stat.S_IFCHR | 0o600, os.makedev(1, 5))


def _of_a_stranger(path: Path, elsewhere: Path) -> None:
    os.chown(path, STRANGER, STRANGER)


def _unreadable(path: Path, elsewhere: Path) -> None:
    path.chmod(0)


def _gone(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)


INTRUDERS: dict[str, Intruder] = {
    "a link": _link,
    "a link into nothing": _link_into_nothing,
    "a link to itself": _link_to_itself,
    "a pipe": _pipe,
    "a folder": _folder,
    "a socket": _socket,
    "a device": _device,
    "a stranger's file": _of_a_stranger,
    "a file without any mode": _unreadable,
}
#: What even root sees to be no file of ours. (An unreadable one root reads, as it may.)
NOT_OURS = sorted(INTRUDERS.keys() - {"a file without any mode"})


@dataclass(frozen=True)
class Place:
    """A file in a tree that `make` builds below a directory, and what looks at it."""

    name: str
    file: Callable[[Path], Path]
    look: Callable[[Path], Any]


def _node(root: Path) -> NodeStore:
    return NodeStore(root / "node0", RUN, "node0", "local", FS)


def _only(root: Path, pattern: str) -> Path:
    return sorted(root.rglob(pattern))[0]


def _look_at_node(root: Path) -> None:
    """As a start does, and as `verify --deep` does."""
    store = _node(root)
    store.remover.sweep()
    found = store.reader.inventory()
    assert len(found.node_saves) + len(found.attempts) + len(found.notes) + bool(found.unknown) > 0
    for _, content in store.reader.survey():
        if isinstance(content, CopyLocation):
            try:
                prove_copy(content, FS)
            except CopyGoneError:
                continue
    take_request([store], FS)
    lock = DirectoryLock(store.root, ALL_RANKS)
    try:
        lock.acquire()
    finally:
        lock.release()


def _look_at_shared(root: Path) -> None:
    store = SharedStore(root / "save", FS, source="save", foreign_problem=foreign_problem)
    store.inventory(RUN)
    store.after_heal()
    store.owner()


def _look_at_folder(form: str) -> Callable[[Path], None]:
    def look(root: Path) -> None:
        folder = root / form / "iter_0000007"
        list(folder_damage(folder, FS, deep=True))
        read_loader(folder, FS, 0, 1)
        reader = open_checkpoint(folder, FS)
        try:
            reader.verify()
            _ = reader.common
            reader.rank_state(0)
            reader.read([Target("model/0/w", torch.zeros(6, 4), (0, 0), (6, 4))])
        finally:
            reader.close()

    return look


def _look_at_events(root: Path) -> None:
    read_events([root / "events"])
    EventTail(root / "events").poll()
    log = EventLog(root / "events", "a", 1, SystemClock(), say=lambda sentence: None)
    log.emit("step", iteration=1)
    log.close()


def _build(root: Path) -> None:
    world = World(root, ranks=2)
    world.save(7)
    world.log(1, completed=save_id(7))
    leave_request(world.store("node0").root, "save", FS)
    for form in ("torch_dist", "zarr"):
        tensor = torch.arange(24.0).reshape(6, 4)
        files = {0: {loader_file(0): encode_loader({"position": 3})}}
        whole_tensor = [rows("model/0/w", tensor, 0, 6)]
        save(root / form / "iter_0000007", lambda rank, chunks=whole_tensor: chunks, form=form, files=files)  # type: ignore[misc]
    shared = root / "save"
    save(shared / "iter_0000007", lambda rank: [whole("model/0/w", torch.zeros(3))], run_id=RUN)
    store = SharedStore(shared, FS, source="save")
    store.take_ownership(RUN, attempt_id(1), 1)
    store.write_attempt_log(AttemptLog(RUN, attempt_id(1), 1))
    shutil.copy(shared / "iter_0000007" / "train_state.pt", shared / TRAIN_STATE_TRACKER)
    (shared / TEXT_TRACKER).write_text("7")
    (root / "events").mkdir()
    log = EventLog(root / "events", "a", 1, SystemClock(), say=lambda sentence: None)
    log.emit("start", run_id=RUN)
    log.close()


def _in_node(pattern: str) -> Callable[[Path], Path]:
    return lambda root: _only(root / "node0", pattern)


def _in_folder(form: str, name: str) -> Callable[[Path], Path]:
    return lambda root: _only(root / form / "iter_0000007", name)


PLACES = [
    *(
        Place(f"node: {what}", _in_node(pattern), _look_at_node)
        for what, pattern in {
            "record": "rank_00000-of-00002.json",
            "shard": "rank_00000-of-00002.safetensors",
            "certificate": "complete.json",
            "attempt log": "g0001-*.json",
            "lock": "lock",
            "request": "request-save",
            "folder of a save": "iter_0000007",
        }.items()
    ),
    *(
        Place(f"{form}: {name}", _in_folder(form, name), _look_at_folder(form))
        for form, names in {
            "torch_dist": [
                ".metadata",
                "__0_0.distcp",
                "common.pt",
                "metadata.json",
                "integrity.json",
                "train_state.pt",
                "resilience.json",
                "integrity_nested.json",
                "train_dataloader_dprank000.pt",
                "dataloader_state",
            ],
            "zarr": ["zarr.json", "0", "shard_0_1.pt", "tensors.zarr"],
        }.items()
        for name in names
    ),
    *(
        Place(f"save: {name}", lambda root, name=name: root / "save" / name, _look_at_shared)  # type: ignore[misc]
        for name in (
            "resilience.json",
            TRAIN_STATE_TRACKER,
            TEXT_TRACKER,
            "iter_0000007",
            "iter_0000007/resilience.json",
            "attempts",
        )
    ),
    Place("events: of this node", lambda root: root / "events" / "a.jsonl", _look_at_events),
]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and gives files away")
def test_whatever_lies_where_a_file_of_ours_belongs_is_told_and_neither_followed_nor_waited_for(
    tmp_path: Path, record_property: Callable[[str, Any], None]
) -> None:
    template = tmp_path / "template"
    _build(template)
    cases = [(place, name) for place in PLACES for name in INTRUDERS]

    def work(notebook: Notebook) -> None:
        for number, (place, name) in enumerate(cases):
            notebook.begin(f"{name} as {place.name}".encode())
            root = tmp_path / str(number)
            shutil.copytree(template, root, symlinks=True)
            INTRUDERS[name](place.file(root), tmp_path / "elsewhere")
            try:
                place.look(root)
            except (ResilienceError, FileNotFoundError):
                continue
            finally:
                shutil.rmtree(root)

    outcome = in_a_child(work)
    record_property(PROPERTY, outcome.inputs)
    assert not outcome.problem, outcome.problem
    assert outcome.inputs == len(cases)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and gives files away")
@pytest.mark.parametrize("intruder", NOT_OURS)
@pytest.mark.parametrize("what", ["record", "shard"])
def test_a_copy_of_which_one_file_is_not_ours_is_no_copy(tmp_path: Path, intruder: str, what: str) -> None:
    _build(tmp_path)
    pattern = "rank_00000-of-00002." + {"record": "json", "shard": "safetensors"}[what]
    INTRUDERS[intruder](_only(tmp_path / "node0", pattern), tmp_path / "elsewhere")
    store = _node(tmp_path)
    held = [owner for each in store.reader.inventory().node_saves for owner in each.owners]
    proved = []
    for _, content in store.reader.survey():
        try:
            if isinstance(content, CopyLocation):
                prove_copy(content, FS)
                proved.append(content.record.owner)
        except (ResilienceError, CopyGoneError):
            continue
    assert proved == [1]
    assert what == "shard" or held == [1]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root makes devices and gives files away")
@pytest.mark.parametrize("intruder", ["a pipe", "a device", "a link", "a stranger's file"])
def test_a_lock_that_is_not_ours_is_refused(tmp_path: Path, intruder: str) -> None:
    (tmp_path / "lock").touch(0o600)
    INTRUDERS[intruder](tmp_path / "lock", tmp_path / "elsewhere")
    with pytest.raises(UnsafePathError):
        DirectoryLock(tmp_path, 0).acquire()


@pytest.mark.parametrize("intruder", ["a pipe", "a link", "a folder"])
def test_events_are_given_up_and_training_goes_on_where_their_file_is_none(tmp_path: Path, intruder: str) -> None:
    """Opening a pipe to write would wait for a reader for ever: in the training thread, at the very start."""
    (tmp_path / "a.jsonl").touch()
    elsewhere = tmp_path / "elsewhere"
    INTRUDERS[intruder](tmp_path / "a.jsonl", elsewhere)
    said: list[str] = []
    log = EventLog(tmp_path, "a", 1, SystemClock(), say=said.append)
    log.emit("step", iteration=1)
    assert log.failures == 1
    assert "training goes on without them" in said[0]
    assert intruder != "a link" or elsewhere.read_bytes() == b"", "what the link leads to is as it was"
    (tmp_path / "b.jsonl").write_text("")
    assert read_events([tmp_path]) == [], "nor does a report wait for it"


@pytest.mark.parametrize("mode", [0o777, 0o770, 0o722])
def test_a_directory_that_others_may_write_to_is_no_place_for_copies(tmp_path: Path, mode: int) -> None:
    root = tmp_path / "node0" / RUN / "node0"
    root.mkdir(parents=True)
    root.chmod(mode)
    with pytest.raises(UnsafePathError, match="others may swap files"):
        NodeStore(tmp_path / "node0", RUN, "node0", "local", FS).prepare()


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "/etc", "a\0b", "", "x" * 129, ".hidden", "a\nb", "\u202eb"])
def test_no_name_of_a_run_or_a_node_in_a_record_is_used_as_a_path(tmp_path: Path, name: str) -> None:
    """Sealed by somebody who knows how; what it names is neither made, read nor removed."""
    _build(tmp_path)
    record = _only(tmp_path / "node0", "rank_00000-of-00002.json")
    fields = unseal_json(record.read_bytes(), "it")
    fields.pop("schema_version")
    for field in ("run_id", "node_id"):
        record.write_bytes(seal_json({**fields, field: name}))
        store = _node(tmp_path)
        assert [each.owners for each in store.reader.inventory().node_saves] == [(1,)]
        assert any(f"field '{field}'" in note for note in store.reader.inventory().notes)
