"""How much room this node has: what the process may use, its shared-memory mount, its disk."""

from __future__ import annotations

from pathlib import Path

from resilience.stores.filesystem import FileSystem

__all__ = ["available_bytes"]


def available_bytes(memory: Path, disk: Path, fs: FileSystem) -> dict[str, int | None]:
    """Free bytes by place: "memory" (of the machine, or what the control group leaves), "shared_memory", "disk"."""
    found = [room for room in (_machine(), _control_group()) if room is not None]
    return {
        "memory": min(found) if found else None,
        "shared_memory": fs.free_bytes(memory) if fs.is_memory_backed(memory) else None,
        "disk": fs.free_bytes(disk),
    }


def _machine() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    for line in lines:
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return None


def _control_group() -> int | None:
    """Limit minus use of this process's cgroup (version 2); tmpfs pages count there too. None without a limit."""
    try:
        name = Path("/proc/self/cgroup").read_text().split("::", 1)[1].strip()
        folder = Path("/sys/fs/cgroup") / name.lstrip("/")
        limit = (folder / "memory.max").read_text().strip()
        return None if limit == "max" else int(limit) - int((folder / "memory.current").read_text())
    except (OSError, IndexError, ValueError):
        return None
