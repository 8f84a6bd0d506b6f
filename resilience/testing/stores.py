"""What every file system that stores are put on must keep to: the real disk, a simulated one, one that counts or fails.

class TestMine(FileSystemContract):
    def on_disk(self, directory, act):
        act(MyFileSystem(), directory)
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from resilience.errors import AnotherJobError, CorruptCopyError, StoreError, UnsafePathError
from resilience.stores.filesystem import FileSystem

__all__ = ["FileSystemContract"]

Act = Callable[[FileSystem, Path], None]


class FileSystemContract:
    """Each test is done by `on_disk`, in a place of its own."""

    def on_disk(self, directory: Path, act: Act) -> None:
        """Call `act` with the file system and an existing, empty directory on it. `directory`: on the real disk."""
        raise NotImplementedError

    def test_what_was_written_is_read_and_replaced_whole(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            fs.write_atomic(here / "a", b"first")
            fs.write_atomic(here / "a", b"second, longer")
            fs.write_atomic(here / "b", b"", durable=False)
            assert (fs.read(here / "a"), fs.read(here / "b")) == (b"second, longer", b"")
            assert fs.list_dir(here) == ["a", "b"], "nothing else is left beside them"

        self.on_disk(tmp_path, act)

    def test_reading_is_bounded_and_absence_is_told_from_trouble(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            fs.write_atomic(here / "a", bytes(100))
            assert _raises(CorruptCopyError, lambda: fs.read(here / "a", 99))
            assert fs.read(here / "a", 100) == bytes(100)
            assert _raises(FileNotFoundError, lambda: fs.read(here / "none"))
            assert _raises(FileNotFoundError, lambda: fs.open_mapping(here / "none"))
            assert fs.stat(here / "none") is None
            assert fs.list_dir(here / "none") == []
            assert fs.unlink(here / "none") is False
            fs.remove_tree(here / "none")

        self.on_disk(tmp_path, act)

    def test_directories_are_made_with_their_parents_and_listed_in_order(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            for name in ("z", "a", "m"):
                fs.make_dir(here / "deep" / "er" / name)
            fs.make_dir(here / "deep" / "er" / "a")  # once more is no error
            assert fs.list_dir(here / "deep" / "er") == ["a", "m", "z"]
            found = fs.stat(here / "deep")
            assert found is not None
            assert (found.is_dir, found.is_file) == (True, False)
            fs.write_atomic(here / "file", b"x")
            assert _raises(UnsafePathError, lambda: fs.make_dir(here / "file"))

        self.on_disk(tmp_path, act)

    def test_removal_says_whether_something_went(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            fs.make_dir(here / "full")
            fs.write_atomic(here / "full" / "a", b"x")
            assert fs.remove_dir(here / "full") is False
            assert fs.unlink(here / "full" / "a") is True
            assert fs.remove_dir(here / "full") is True
            assert fs.remove_dir(here / "full") is False
            fs.make_dir(here / "tree" / "below")
            fs.write_atomic(here / "tree" / "below" / "a", b"x")
            fs.remove_tree(here / "tree")
            assert fs.list_dir(here) == []

        self.on_disk(tmp_path, act)

    def test_a_rename_replaces_a_file_and_never_a_full_directory(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            fs.write_atomic(here / "a", b"new")
            fs.write_atomic(here / "b", b"old")
            before = fs.stat(here / "a")
            fs.rename(here / "a", here / "b")
            after = fs.stat(here / "b")
            assert before is not None
            assert after is not None
            assert (fs.read(here / "b"), after.inode, fs.stat(here / "a")) == (b"new", before.inode, None)
            for name in ("one", "two"):
                fs.make_dir(here / name)
                fs.write_atomic(here / name / "kept", name.encode())
            assert _raises(StoreError, lambda: fs.rename(here / "one", here / "two"))
            assert fs.read(here / "two" / "kept") == b"two"
            fs.rename(here / "one", here / "three")
            assert fs.read(here / "three" / "kept") == b"one"
            assert _raises(StoreError, lambda: fs.rename(here / "none", here / "four"))

        self.on_disk(tmp_path, act)

    def test_a_mapping_is_the_file_under_whatever_name(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            mapped = fs.create_mapping(here / "a", 10_000)
            mapped.view[:5] = b"first"
            fs.rename(here / "a", here / "b")
            mapped.view[9_995:] = b"later"
            content = fs.read(here / "b")
            assert (len(content), content[:5], content[-5:]) == (10_000, b"first", b"later")
            private = fs.open_mapping(here / "b")
            private.view[:5] = b"mine!"
            assert fs.read(here / "b")[:5] == b"first", "a mapping to read from cannot change the file"
            shared = fs.open_mapping(here / "b", writable=True)
            shared.view[:5] = b"ours!"
            assert fs.read(here / "b")[:5] == b"ours!"
            for each in (mapped, private, shared):
                each.close()

        self.on_disk(tmp_path, act)

    def test_room_that_is_not_wanted_any_more_is_not_made(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            assert _raises(StoreError, lambda: fs.create_mapping(here / "a", 10_000, lambda: False))
            assert fs.list_dir(here) == []
            begun = fs.begin_mapping(here / "b", 10_000)
            assert (begun.nbytes, begun.reserved) == (10_000, 0)
            fs.reserve(begun, 10_000, lambda: True)
            assert begun.reserved == 10_000
            begun.close()

        self.on_disk(tmp_path, act)

    def test_a_file_is_written_once_and_in_order(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            before = fs.moved_bytes
            fs.write_file(here / "a", iter([memoryview(b"one"), memoryview(b""), memoryview(b"two")]))
            assert (fs.read(here / "a"), fs.moved_bytes - before) == (b"onetwo", 6)
            assert _raises(StoreError, lambda: fs.write_file(here / "a", iter([memoryview(b"other")])))
            assert fs.read(here / "a") == b"onetwo", "what was there is another's"

        self.on_disk(tmp_path, act)

    def test_an_empty_file_is_no_shard(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            fs.write_atomic(here / "a", b"")
            assert _raises(CorruptCopyError, lambda: fs.open_mapping(here / "a"))

        self.on_disk(tmp_path, act)

    def test_a_directory_is_claimed_by_one_at_a_time(self, tmp_path: Path) -> None:
        def act(fs: FileSystem, here: Path) -> None:
            fs.make_dir(here / "mine")
            first, second = fs.lock(here / "mine", 0), fs.lock(here / "mine", 0)
            first.acquire()
            assert _raises(AnotherJobError, second.acquire)
            first.release()
            second.acquire()
            second.release()

        self.on_disk(tmp_path, act)


def _raises(kind: type[BaseException], act: Callable[[], object]) -> bool:
    try:
        act()
    except kind:
        return True
    return False
