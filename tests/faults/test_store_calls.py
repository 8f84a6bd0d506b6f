"""Each method of the file system, call by call, in one forked process: every fault is a StoreError and leaves nothing.

EINTR is no error at all: the call is made again, and half a read or write is continued.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import gc
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resilience.errors import CorruptCopyError, ResilienceError, StoreError
from resilience.runtime.memory import available_bytes
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.lock import ALL_RANKS, DirectoryLock
from tests.faults.edge import FAULTS, Edge, applies
from tests.faults.leaks import Held
from tests.faults.loop import forked

FS = PosixFileSystem()
CONTENT = bytes(range(256)) * 40
LARGE = 3 << 20  # mapped at an aligned address


def tree(root: Path) -> None:
    (root / "tree" / "inner").mkdir(parents=True)
    (root / "tree" / "inner" / "file").write_bytes(b"x")
    (root / "file").write_bytes(CONTENT)
    (root / "large").write_bytes(bytes(LARGE))
    (root / "empty").mkdir()


def mapped(root: Path) -> bytes:
    mapping = FS.create_mapping(root / "new", LARGE)
    mapping.view[:4] = b"good"
    mapping.close()
    return (root / "new").read_bytes()[:4]


def opened(root: Path, *, writable: bool) -> int:
    mapping = FS.open_mapping(root / "large", writable=writable, populate=True)
    nbytes = len(mapping.view)
    mapping.close()
    return nbytes


def begun(root: Path) -> int:
    mapping = FS.begin_mapping(root / "new", LARGE)
    FS.reserve(mapping, LARGE, lambda: True)
    mapping.close()
    return FS.stat(root / "new").nbytes  # type: ignore[union-attr]


def locked(root: Path) -> int | None:
    lock = DirectoryLock(root, 3)
    lock.acquire()
    lock.release()
    return DirectoryLock(root, ALL_RANKS).holder()


def written(root: Path) -> bytes:
    FS.write_file(root / "new", iter([memoryview(CONTENT), memoryview(CONTENT)]))
    return (root / "new").read_bytes()


def replaced(root: Path) -> bytes:
    FS.write_atomic(root / "file", b"new")
    return (root / "file").read_bytes()


#: What it does in a directory like `tree`, and what comes of it.
METHODS: dict[str, tuple[Callable[[Path], Any], Any]] = {
    "make_dir": (lambda root: FS.make_dir(root / "a" / "b"), None),
    "list_dir": (lambda root: FS.list_dir(root / "tree"), ["inner"]),
    "stat": (lambda root: FS.stat(root / "file").nbytes, len(CONTENT)),  # type: ignore[union-attr]
    "read": (lambda root: FS.read(root / "file"), CONTENT),
    "write_atomic": (replaced, b"new"),
    "create_mapping": (mapped, b"good"),
    "begin_mapping, reserve": (begun, LARGE),
    "open_mapping": (lambda root: opened(root, writable=False), LARGE),
    "open_mapping, writable": (lambda root: opened(root, writable=True), LARGE),
    "write_file": (written, CONTENT + CONTENT),
    "rename": (lambda root: FS.rename(root / "file", root / "other"), None),
    "unlink": (lambda root: FS.unlink(root / "file"), True),
    "remove_dir": (lambda root: FS.remove_dir(root / "empty"), True),
    "remove_tree": (lambda root: FS.remove_tree(root / "tree"), None),
    "fsync_dir": (lambda root: FS.fsync_dir(root / "tree"), None),
    "is_memory_backed": (lambda root: FS.is_memory_backed(root / "tree"), True),
    "free_bytes": (lambda root: FS.free_bytes(root / "file") > 0, True),
    "lock": (locked, None),
}


def attack(home: Path, name: str) -> tuple[int, list[str]]:
    """Every fault at every call of a method: how many were tried, and what went wrong."""
    method, expected = METHODS[name]
    gc.freeze()  # else each look for leaks goes through all that pytest holds
    edge = Edge((str(home),)).install()
    points, defects = 0, []
    for fault in [each for each in FAULTS if each not in ("crash", "torn")]:
        at = 0
        while True:
            at += 1
            root = home / f"{points}-{fault}-{at}"
            tree(root)
            held = Held((str(root),))
            edge.seen, edge.struck, edge._at, edge._fault = [], "", at, fault
            problem, outcome = "", None
            edge.armed = True
            try:
                outcome = method(root)
            except (ResilienceError, FileNotFoundError) as error:
                problem = str(error)
            except Exception as error:  # noqa: BLE001 - that is what is looked for
                defects.append(f"{fault} at {edge.struck}: {error!r}")
            edge.armed = False
            where = f"{fault} at {edge.struck}"
            if not edge.struck and at > len(edge.seen):
                break
            points += bool(edge.struck)
            if not problem and outcome != expected and not defects:
                defects.append(f"{where}: {outcome!r} came of it")
            if problem and fault in ("EINTR", "half") and name != "remove_tree":  # `shutil` closes twice then
                defects.append(f"{where}: {problem}")
            defects += [f"{where}: {leak}" for leak in held.leaks()]
            beside = [path.name for path in root.iterdir() if path.name.startswith(".tmp-")]
            if beside and "unlink" not in edge.struck:
                defects.append(f"{where}: left {beside}")
    return points, defects


@pytest.mark.parametrize("name", METHODS)
def test_a_fault_at_any_call_of_a_method_is_a_store_error_and_leaves_nothing(
    name: str, memory_mount: Path, record_property: Any
) -> None:
    points, defects = forked(lambda: attack(memory_mount, name))
    record_property("tried: fault points", points)
    assert points
    assert not defects, "\n".join(defects[:20])


def test_a_lock_that_cannot_be_taken_for_want_of_locks_is_not_another_job(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "lockf", refuse)
    held = Held((str(tmp_path),))
    with pytest.raises(StoreError, match="No locks available"):
        DirectoryLock(tmp_path, 0).acquire()
    assert not held.leaks()
    monkeypatch.undo()
    lock = DirectoryLock(tmp_path, 0)
    lock.acquire()
    lock.release()


def test_a_file_that_could_not_even_be_opened_is_not_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"another's")

    def refuse(*_: Any, **__: Any) -> int:
        raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    with monkeypatch.context() as patched:
        patched.setattr(os, "open", refuse)
        with pytest.raises(StoreError, match="Too many open files"):
            FS.write_file(tmp_path / "file", iter([memoryview(b"ours")]))
    assert (tmp_path / "file").read_bytes() == b"another's"


def test_a_mount_that_does_not_say_how_much_room_it_has_refuses_no_job(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "statvfs", refuse)
    with pytest.raises(StoreError):
        FS.free_bytes(memory_mount)
    found = available_bytes(memory_mount, memory_mount, FS)
    assert (found["shared_memory"], found["disk"]) == (None, None)


def storm(root: Path) -> int:
    """Signals all the time, none of which may end or spoil a call. How many came."""
    came = 0

    def count(*_: Any) -> None:
        nonlocal came
        came += 1

    signal.signal(signal.SIGALRM, count)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for turn in range(60):
            FS.write_file(root / f"file{turn}", iter([memoryview(CONTENT * 20)] * 4))
            FS.write_atomic(root / "small", CONTENT)
            mapping = FS.create_mapping(root / "mapped", LARGE)
            mapping.close()
            assert FS.read(root / f"file{turn}", 1 << 30) == CONTENT * 80
            FS.unlink(root / "mapped")
            with contextlib.suppress(CorruptCopyError):
                FS.read(root / f"file{turn}", 10)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
    return came


def test_a_storm_of_signals_interrupts_no_write_and_no_reservation(tmp_path: Path) -> None:
    assert forked(lambda: storm(tmp_path)) > 20


_SMALL = """
import resource, sys
from pathlib import Path
resource.setrlimit(resource.RLIMIT_NOFILE, (24, 24))
held = []
from resilience.errors import StoreError
from resilience.stores.filesystem import PosixFileSystem
fs, root = PosixFileSystem(), Path(sys.argv[1])
try:
    while True:
        held.append(open(root / "file"))
except OSError:
    pass
for what in (lambda: fs.read(root / "file"), lambda: fs.write_atomic(root / "file", b"x"), lambda: fs.list_dir(root),
             lambda: fs.create_mapping(root / "new", 1 << 16), lambda: fs.fsync_dir(root)):
    try:
        what()
    except StoreError as error:
        print(error.errno)
held.clear()
print(fs.read(root / "file"), sorted(fs.list_dir(root)))
"""


def test_a_process_without_a_descriptor_left_hears_so_and_goes_on_when_it_has_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"as before")
    done = subprocess.run([sys.executable, "-c", _SMALL, tmp_path], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[:-1] == [str(errno.EMFILE)] * 5 + ["b'as before' ['file']"]


def test_the_harness_strikes_the_call_it_was_told_and_each_fault_looks_like_the_kernels(memory_mount: Path) -> None:
    """Else the loops would prove nothing."""

    def struck(fault: str, at: int) -> tuple[str, str]:
        edge = Edge((str(memory_mount),), at, fault).install()
        edge.armed = True
        outcome = "done"
        try:
            fd = os.open(memory_mount / f"f{fault}{at}", os.O_WRONLY | os.O_CREAT)
            outcome = str(os.write(fd, b"four"))
            os.close(fd)
        except OSError as error:
            outcome = errno.errorcode[error.errno or 0]
        return edge.struck.split(" ")[0], outcome

    assert forked(lambda: struck("ENOSPC", 1)) == ["create", "ENOSPC"]
    assert forked(lambda: struck("ENOSPC", 2)) == ["write", "ENOSPC"]
    assert forked(lambda: struck("half", 1)) == ["write", "2"]
    assert forked(lambda: struck("EIO", 3)) == ["close", "EIO"]
    assert forked(lambda: struck("lie", 2)) == ["write", "EIO"]
    assert (memory_mount / "flie2").read_bytes() == b"four"
    assert forked(lambda: struck("EIO", 4)) == ["", "4"], "nothing is left to strike"
    with pytest.raises(AssertionError, match="without a word"):
        forked(lambda: os._exit(0))
    with pytest.raises(KeyError):
        forked(lambda: struck("crash", 1))
    assert (memory_mount / "fcrash1").exists()
    assert not applies("crash", "lstat /x")
