"""The virtual nodes of a drill: where each one's memory and disk lie, and what happens to them when it fails.

Memory has to be memory: where the work directory is on a disk and `/dev/shm` is there, the memory directories lie on
that, and `nodes/<node_id>/memory` is a link for people (stores are given the real path: they follow no links). What is
left in them at the end is moved to where the link was, so that a finished drill can be looked at.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from resilience.errors import CommandError

SHARED_MEMORY = Path("/dev/shm")
_IMAGE_BYTES = 16 << 30
BALLAST = "ballast"


@dataclass(frozen=True)
class VirtualNode:
    """Directories of one node. `home` is `<workdir>/nodes/<node_id>`."""

    index: int
    home: Path
    memory: Path
    disk: Path

    @property
    def node_id(self) -> str:
        return f"node{self.index}"


class VirtualNodes:
    """Makes, wipes, fills and clears away the nodes' directories. `close` is safe to call twice."""

    def __init__(self, workdir: Path, shared_memory: Path = SHARED_MEMORY) -> None:
        self._workdir = workdir
        self._nodes: dict[int, VirtualNode] = {}
        self._mounted: list[Path] = []
        self._memory_root: Path | None = None
        if _on_memory(shared_memory) and not _on_memory(workdir):
            self._memory_root = Path(tempfile.mkdtemp(prefix="resilience-drill-", dir=shared_memory))

    def node(self, index: int) -> VirtualNode:
        """The node, its directories made (0700) when it is first asked for."""
        if index not in self._nodes:
            home = self._workdir / "nodes" / f"node{index}"
            memory = home / "memory" if self._memory_root is None else self._memory_root / f"node{index}"
            for directory in (home, memory, home / "disk"):
                directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            if self._memory_root is not None:
                (home / "memory").symlink_to(memory)
            self._nodes[index] = VirtualNode(index, home, memory, home / "disk")
        return self._nodes[index]

    def directories(self) -> list[Path]:
        """Memory and disk of every node that there has been."""
        return [directory for node in self._nodes.values() for directory in (node.memory, node.disk)]

    def wipe(self, index: int, *, memory: bool, disk: bool) -> None:
        """Empty the node's directories, as a machine that is gone for good or was switched off."""
        node = self.node(index)
        for directory in [node.memory] * memory + [node.disk] * disk:
            for path in directory.iterdir():
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()

    def give_own_mount(self, index: int, what: Literal["memory", "disk"], all_nodes: Sequence[int]) -> None:
        """Put the node's memory or disk on a mount of its own, so that it can run full without harming others.

        A disk is a file system in a file where loop devices are at hand; else the disks of all nodes become memory
        mounts, because a job wants the same kind of mount on every node. Raises `CommandError` where this user may not
        mount.
        """
        node = self.node(index)
        if what == "disk" and self._mount_image(node):
            return
        for each in [node] if what == "memory" else [self.node(other) for other in all_nodes]:
            directory = each.memory if what == "memory" else each.disk
            if directory in self._mounted:
                continue
            refused = _run(["mount", "-t", "tmpfs", "-o", "mode=0700", "resilience-drill", str(directory)])
            if refused is not None:
                raise CommandError(
                    f"The fault full:node={index} needs a mount of its own, and this user may not mount ({refused}).",
                    advice="Run the drill as root (a container will do), or leave that fault out.",
                )
            self._mounted.append(directory)

    def _mount_image(self, node: VirtualNode) -> bool:
        image = node.home / "disk.img"
        with image.open("wb") as stream:
            stream.truncate(_IMAGE_BYTES)  # a hole: takes room only as it is written
        for command in (
            ["mkfs.ext4", "-q", "-F", "-m", "0", "-O", "^has_journal", str(image)],
            ["mount", "-o", "loop", str(image), str(node.disk)],
        ):
            if _run(command) is not None:
                image.unlink()
                return False
        self._mounted.append(node.disk)
        (node.disk / "lost+found").rmdir()
        node.disk.chmod(0o700)
        return True

    def fill(self, index: int, what: Literal["memory", "disk"]) -> None:
        """Leave not one free block on the node's own mount."""
        node = self.node(index)
        directory = node.memory if what == "memory" else node.disk
        if (node.home / "disk.img").exists() and what == "disk":
            _fill_with_ballast(directory)
            return
        usage = os.statvfs(directory)
        used = (usage.f_blocks - usage.f_bfree) * usage.f_frsize
        size = max(used, usage.f_frsize)  # size=0 would mean "without a limit"
        failed = _run(["mount", "-o", f"remount,size={size}", str(directory)])
        if failed is not None:
            raise CommandError(f"The mount {directory} could not be filled: {failed}.")

    def relieve(self, index: int, what: Literal["memory", "disk"]) -> None:
        """Take away what `fill` did."""
        node = self.node(index)
        directory = node.memory if what == "memory" else node.disk
        if (node.home / "disk.img").exists() and what == "disk":
            (directory / BALLAST).unlink(missing_ok=True)
        elif failed := _run(["mount", "-o", "remount,size=0", str(directory)]):  # 0: without a limit
            raise CommandError(f"The mount {directory} could not be given room again: {failed}.")

    def close(self) -> None:
        """Unmount, and move what is left in memory to `nodes/<node_id>/memory`."""
        while self._mounted:
            directory = self._mounted.pop()
            (directory / BALLAST).unlink(missing_ok=True)
            keep = directory.with_name(directory.name + "-kept")
            shutil.copytree(directory, keep, symlinks=True, dirs_exist_ok=True)
            _run(["umount", "--lazy", str(directory)])
            directory.rmdir()
            keep.rename(directory)
            (directory.parent / "disk.img").unlink(missing_ok=True)
        if self._memory_root is None:
            return
        for node in self._nodes.values():
            link = node.home / "memory"
            if link.is_symlink():
                link.unlink()
                shutil.move(node.memory, link)
        shutil.rmtree(self._memory_root, ignore_errors=True)
        self._memory_root = None


def may_mount() -> bool:
    """Whether this user may mount file systems here, found out by doing it."""
    with tempfile.TemporaryDirectory(prefix="resilience-drill-mount-") as place:
        if _run(["mount", "-t", "tmpfs", "-o", "size=4k", "resilience-drill", place]) is not None:
            return False
        return _run(["umount", "--lazy", place]) is None


def _fill_with_ballast(directory: Path) -> None:
    descriptor = os.open(directory / BALLAST, os.O_WRONLY | os.O_CREAT, 0o600)
    try:
        end, step = 0, _IMAGE_BYTES
        while step >= 1024:
            try:
                os.posix_fallocate(descriptor, end, step)
                end += step
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                end, step = max(end, os.fstat(descriptor).st_size), step // 2
    finally:
        os.close(descriptor)


def _on_memory(path: Path) -> bool:
    """Whether the path, or the nearest parent that exists, lies on a tmpfs."""
    while not path.exists():
        path = path.parent
    real = path.resolve()
    best, kind = "", ""
    try:
        mounts = Path("/proc/self/mounts").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False  # not Linux: no way to tell, and no shared memory mount either
    for line in mounts.splitlines():
        where, what = line.split(" ")[1:3]
        where = where.replace("\\040", " ")
        if (real == Path(where) or Path(where) in real.parents) and len(where) >= len(best):
            best, kind = where, what
    return kind in ("tmpfs", "ramfs")


def _run(command: list[str]) -> str | None:
    """None when it went well, else what was said."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    return None if done.returncode == 0 else (done.stderr.strip() or f"exit status {done.returncode}")
