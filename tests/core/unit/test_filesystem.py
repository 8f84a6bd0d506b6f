"""Promise 9: other users' files are not trusted. Also: space is reserved before it is mapped; a write is whole."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience.errors import CorruptCopyError, StoreError, UnsafePathError
from resilience.stores.filesystem import PosixFileSystem
from resilience.stores.node_store import NodeStore
from resilience.stores.pages import HUGE_BYTES, always

FS = PosixFileSystem()
NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can make files of another user")


def mode(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


@pytest.fixture(autouse=True)
def _open_umask() -> Iterator[None]:
    before = os.umask(0)
    yield
    os.umask(before)


def test_directories_are_for_us_alone_at_every_level(tmp_path: Path) -> None:
    FS.make_dir(tmp_path / "run" / "node" / "iter")
    assert {mode(tmp_path / "run"), mode(tmp_path / "run" / "node"), mode(tmp_path / "run" / "node" / "iter")} == {
        0o700
    }


def test_files_are_for_us_alone(tmp_path: Path) -> None:
    FS.write_atomic(tmp_path / "record", b"{}")
    FS.write_file(tmp_path / "shard", iter([memoryview(b"x")]))
    FS.create_mapping(tmp_path / "arena", 4096).close()
    assert {mode(path) for path in tmp_path.iterdir()} == {0o600}


def test_links_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "real").write_bytes(b"content")
    link = tmp_path / "link"
    link.symlink_to("real")
    for attempt in (FS.read, FS.open_mapping, lambda path: FS.open_mapping(path, writable=True)):
        with pytest.raises(UnsafePathError, match="link"):
            attempt(link)
    found = FS.stat(link)
    assert found is not None
    assert not found.is_file
    (tmp_path / "folder").mkdir()
    (tmp_path / "to-folder").symlink_to("folder")
    with pytest.raises(UnsafePathError):
        FS.make_dir(tmp_path / "to-folder")


def test_a_link_in_the_place_of_a_new_file_is_not_written_through(tmp_path: Path) -> None:
    (tmp_path / "victim").write_bytes(b"precious")
    (tmp_path / "arena").symlink_to("victim")
    with pytest.raises(StoreError):
        FS.create_mapping(tmp_path / "arena", 4096)
    with pytest.raises(StoreError):
        FS.write_file(tmp_path / "arena", iter([memoryview(b"x")]))
    FS.write_atomic(tmp_path / "arena", b"new")
    assert (tmp_path / "victim").read_bytes() == b"precious"
    assert not (tmp_path / "arena").is_symlink()


def test_a_tree_that_turned_into_a_link_is_unlinked_and_not_emptied(tmp_path: Path) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_bytes(b"x")
    (tmp_path / "tree").symlink_to("precious")
    FS.remove_tree(tmp_path / "tree")
    assert (tmp_path / "precious" / "file").exists()
    assert not (tmp_path / "tree").is_symlink()


def test_opening_a_fifo_neither_hangs_nor_succeeds(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    failed: list[Exception] = []

    def look() -> None:
        try:
            FS.read(tmp_path / "fifo")
        except UnsafePathError as error:
            failed.append(error)

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(5)
    assert not thread.is_alive()
    assert "no regular file" in str(failed[0])


@needs_root
def test_a_file_of_another_user_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "theirs"
    path.write_bytes(b"x")
    os.chown(path, NOBODY, NOBODY)
    for attempt in (FS.read, FS.open_mapping):
        with pytest.raises(UnsafePathError, match="of ours"):
            attempt(path)


@needs_root
@pytest.mark.parametrize("level", ["run", "node", ".arenas"])
def test_a_node_directory_of_another_user_is_refused_at_every_level(tmp_path: Path, level: str) -> None:
    store = NodeStore(tmp_path, "run", "node", "local", FS)
    store.prepare()
    theirs = {"run": store.root.parent, "node": store.root, ".arenas": store.arenas}[level]
    os.chown(theirs, NOBODY, NOBODY)
    with pytest.raises(UnsafePathError, match="belongs to uid"):
        store.prepare()


def test_a_file_that_is_longer_than_it_may_be_is_not_read(tmp_path: Path) -> None:
    (tmp_path / "long").write_bytes(b"x" * 11)
    with pytest.raises(CorruptCopyError, match="at most 10"):
        FS.read(tmp_path / "long", limit=10)
    assert FS.read(tmp_path / "long", limit=11) == b"x" * 11


def test_what_is_not_there_is_told_apart_from_what_cannot_be_read(tmp_path: Path) -> None:
    assert FS.list_dir(tmp_path / "nothing") == []
    assert FS.stat(tmp_path / "nothing") is None
    assert not FS.unlink(tmp_path / "nothing")
    assert not FS.remove_dir(tmp_path / "nothing")
    FS.remove_tree(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError):
        FS.read(tmp_path / "nothing")
    with pytest.raises(StoreError) as raised:
        FS.list_dir(tmp_path / ("x" * 300))
    assert raised.value.errno == errno.ENAMETOOLONG


def test_a_folder_that_is_not_empty_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "file").write_bytes(b"")
    assert not FS.remove_dir(tmp_path / "folder")
    (tmp_path / "folder" / "file").unlink()
    assert FS.remove_dir(tmp_path / "folder")


def test_a_write_that_fails_leaves_what_was_there_and_nothing_beside(tmp_path: Path) -> None:
    (tmp_path / "record").mkdir()  # a rename onto it fails, after everything was written
    with pytest.raises(StoreError):
        FS.write_atomic(tmp_path / "record", b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["record"]


def test_a_full_mount_is_told_before_a_byte_is_mapped_and_leaves_nothing(memory_mount: Path) -> None:
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", memory_mount], capture_output=True).returncode:
        pytest.skip("mounting needs root")
    try:
        with pytest.raises(StoreError, match=r"cannot reserve 2097152 bytes.*Free space") as raised:
            FS.create_mapping(memory_mount / "large", 2 << 20)
        assert raised.value.errno == errno.ENOSPC
        assert list(memory_mount.iterdir()) == []
        begun = FS.begin_mapping(memory_mount / "begun", 2 << 20)
        FS.reserve(begun, 512 << 10, always)
        begun.view[: 512 << 10] = bytes(512 << 10)
        with pytest.raises(StoreError) as raised:
            FS.reserve(begun, 2 << 20, always)
        assert raised.value.errno == errno.ENOSPC
        assert begun.reserved == 512 << 10, "no more than that may be touched"
        begun.close()
        FS.unlink(memory_mount / "begun")
        (memory_mount / "sparse").touch()
        os.truncate(memory_mount / "sparse", 2 << 20)
        with pytest.raises(StoreError):
            FS.open_mapping(memory_mount / "sparse", writable=True)
        assert FS.is_memory_backed(memory_mount)
        assert FS.free_bytes(memory_mount) <= 1 << 20
    finally:
        subprocess.run(["umount", memory_mount], check=True)


def test_a_mapping_follows_its_file_through_a_rename_and_a_private_one_never_changes_it(tmp_path: Path) -> None:
    mapped = FS.create_mapping(tmp_path / "arena", 4096)
    FS.rename(tmp_path / "arena", tmp_path / "shard")
    mapped.view[:3] = b"abc"
    private = FS.open_mapping(tmp_path / "shard")
    private.view[:3] = b"xyz"
    assert (tmp_path / "shard").read_bytes()[:3] == b"abc"
    private.close()
    mapped.close()
    mapped.close()


def test_a_file_put_into_huge_pages_keeps_its_bytes_and_is_mapped_in_them_by_whoever_comes_later(
    memory_mount: Path,
) -> None:
    mapped = FS.create_mapping(memory_mount / "arena", 2 * HUGE_BYTES + 5000)
    content = os.urandom(4096) * (mapped.nbytes // 4096 + 1)
    mapped.view[:] = content[: mapped.nbytes]
    mapped.enlarge_pages(lambda: False)
    assert mapped.huge_bytes is None, "to be tried again"
    mapped.enlarge_pages(always)
    if not mapped.huge_bytes:
        pytest.skip("this kernel puts no file of this mount into huge pages")
    assert mapped.huge_bytes == 2 * HUGE_BYTES
    before = _huge_bytes_mapped()
    later = FS.open_mapping(memory_mount / "arena", populate=True)
    assert _huge_bytes_mapped() - before == 2 * HUGE_BYTES
    assert mapped.view == later.view == content[: mapped.nbytes]
    later.view[0] ^= 1
    assert mapped.view[0] == content[0], "what was mapped for reading is private, whatever its pages"
    later.close()
    mapped.close()
    mapped.enlarge_pages(always)


def _huge_bytes_mapped() -> int:
    lines = Path("/proc/self/smaps").read_text().splitlines()
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("ShmemPmdMapped", "FilePmdMapped")))


def test_a_mapping_of_any_size_begins_and_ends_with_its_file(tmp_path: Path) -> None:
    for nbytes in (1, 4096, HUGE_BYTES - 1, HUGE_BYTES, HUGE_BYTES + 1, 3 * HUGE_BYTES + 4097):
        mapped = FS.create_mapping(tmp_path / f"{nbytes}", nbytes)
        assert len(mapped.view) == nbytes
        mapped.view[0], mapped.view[-1] = 1, 2
        mapped.close()
        again = FS.open_mapping(tmp_path / f"{nbytes}")
        assert bytes(again.view) == (tmp_path / f"{nbytes}").read_bytes()
        assert again.view[-1] == 2
        again.close()


def test_an_empty_file_cannot_be_mapped(tmp_path: Path) -> None:
    (tmp_path / "empty").touch()
    with pytest.raises(CorruptCopyError, match="is empty"):
        FS.open_mapping(tmp_path / "empty")


def test_two_ranks_that_make_and_remove_the_same_folders_do_not_disturb_each_other(tmp_path: Path) -> None:
    problems: list[Exception] = []

    def work(name: str) -> None:
        for _ in range(300):
            try:
                FS.make_dir(tmp_path / "iter" / name)
                FS.remove_dir(tmp_path / "iter" / name)
                FS.remove_dir(tmp_path / "iter")
            except StoreError as error:
                problems.append(error)

    threads = [threading.Thread(target=work, args=(name,)) for name in "ab"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(problems) <= 3, "a parent that vanishes twice in a row may still be an error, which fails one save"
