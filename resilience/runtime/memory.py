"""How much room this node has: what the process may use, its shared-memory mount, its disk."""

from __future__ import annotations

from pathlib import Path

from resilience.stores.filesystem import FileSystem

__all__ = ["available_bytes", "control_group_limit"]


def available_bytes(memory: Path, disk: Path, fs: FileSystem) -> dict[str, int | None]:
    """Free bytes by place: "memory" (of the machine, or what the control group leaves), "shared_memory", "disk".

    None where there is no such place, or where nobody can tell.
    """
    found = [room for room in (_machine(), _control_group()) if room is not None]
    return {
        "memory": min(found) if found else None,
        "shared_memory": _free(memory, fs) if fs.is_memory_backed(memory) else None,
        "disk": _free(disk, fs),
    }


def _free(place: Path, fs: FileSystem) -> int | None:
    """None if the mount does not answer: nobody may be refused for that, and the other ranks wait."""
    try:
        return fs.free_bytes(place)
    except OSError:
        return None


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def control_group_limit() -> int | None:
    """Bytes that this process's cgroup (version 2) may use; tmpfs pages count there too. None without a limit."""
    return _of_control_group("memory.max")


def _control_group() -> int | None:
    """What is left of that limit."""
    limit, used = control_group_limit(), _of_control_group("memory.current")
    return None if limit is None or used is None else limit - used


def _of_control_group(name: str) -> int | None:
    try:
        group = Path("/proc/self/cgroup").read_text().split("::", 1)[1].strip()
        return int((Path("/sys/fs/cgroup") / group.lstrip("/") / name).read_text())
    except (OSError, IndexError, ValueError):  # "max" is no number
        return None
