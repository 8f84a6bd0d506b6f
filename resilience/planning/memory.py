"""What a node must hold at worst, spelled out as a sum, and whether it fits before anything is allocated."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from resilience.errors import MemoryBudgetError

#: Shared memory counts as memory too (a cgroup charges its pages), so such a line stands in both places.
Place = Literal["memory", "shared_memory", "disk"]
_PLACE_WORDS: dict[Place, str] = {"memory": "memory", "shared_memory": "shared memory", "disk": "disk"}


@dataclass(frozen=True)
class MemoryBudget:
    """The sum for one node: `lines` for people, `needs` bytes per place, `total` bytes of all lines."""

    lines: tuple[str, ...]
    total: int
    needs: tuple[tuple[Place, int], ...]
    estimated: bool = (
        False  # before the first step: sizes are those of the parameters and of what an optimizer will add
    )

    def __str__(self) -> str:
        return f"{_size(self.total)} per node{' (estimated)' if self.estimated else ''} = " + " + ".join(self.lines)


def arenas_per_rank(keep_last: int, interval: int | None, file_is_arena: bool) -> int:
    """Arenas of one rank. One more when saves follow each other so closely that two are in the making at once.

    Where files lie on a disk, one is filled while the other one is written.
    """
    extra = 1 if interval is not None and interval < 4 else 0
    return _saves_held(keep_last) + extra if file_is_arena else 2


def _saves_held(keep_last: int) -> int:
    """Saves that exist at once: those kept (at least the newest complete and the newest protected) and one in work."""
    return max(keep_last, 2) + 1


def budget(
    *,
    own_bytes: Sequence[int],
    replica_bytes: Sequence[int],
    keep_last: int,
    interval: int | None,
    file_is_arena: bool,
    buffer_bytes: int,
    on_nodes: bool = True,
    needed_bytes: int = 0,
    staged_bytes: int = 0,
    present_bytes: int = 0,
    estimated: bool = False,
    kept_for_others: str = "replicas",
) -> MemoryBudget:
    """The node's sum. `own_bytes`: shard sizes of its ranks; `replica_bytes`: of what it keeps of one save for others.

    `kept_for_others`: what that is.

    `on_nodes`: saves lie on nodes, and not only on shared storage. `buffer_bytes`: bounded buffers of all its ranks.
    `needed_bytes`: the shards of one save that its ranks read at a restart; what it does not hold is fetched.
    `staged_bytes`: what its ranks read from shared storage before any live tensor changes. A restart takes the room
    that arenas take later, so that only what goes beyond is added. `present_bytes`: files of this run that lie there
    already; they are kept or recycled as arenas, so that they take nothing more.
    """
    arenas = arenas_per_rank(keep_last, interval, file_is_arena)
    own, replicas = sum(own_bytes), sum(replica_bytes)
    in_memory: tuple[Place, ...] = ("memory", "shared_memory")
    entries: list[tuple[str, int, tuple[Place, ...]]] = []
    entries.append((f"{arenas} arenas of {len(own_bytes)} ranks", arenas * own, in_memory))
    files: tuple[Place, ...] = in_memory if file_is_arena else ("disk",)
    if file_is_arena:
        entries.append((f"{arenas} slots for {len(replica_bytes)} {kept_for_others}", arenas * replicas, in_memory))
        allocated = arenas * (own + replicas)
    elif on_nodes:
        allocated = _saves_held(keep_last) * (own + replicas)
        entries.append((f"{len(replica_bytes)} slots for {kept_for_others}", replicas, in_memory))
        entries.append((f"{_saves_held(keep_last)} saves with their {kept_for_others}", allocated, files))
    else:
        allocated = 0
    in_buffers = sum(size for _, size, places in entries if places == in_memory)
    kept = (_saves_held(keep_last) - 1) * (own + replicas) if on_nodes else 0
    entries.append(("buffers", buffer_bytes, ("memory",)))
    fetched = max(0, needed_bytes - own - replicas) - (allocated - kept) if on_nodes else 0
    if fetched > 0:
        entries.append(("fetched at a restart beyond that, then freed", fetched, files))
    staged = staged_bytes - (in_buffers - (kept if file_is_arena else 0))
    if staged > 0:
        entries.append(("staged at a load beyond that, then freed", staged, ("memory",)))
    if present_bytes:
        entries.append(("files of this run already there", -min(present_bytes, allocated), files))
    lines = tuple(f"{what} {_size(size)} ({_words(places)})" for what, size, places in entries)
    needs = tuple((place, sum(size for _, size, places in entries if place in places)) for place in _PLACE_WORDS)
    return MemoryBudget(lines, sum(size for _, size, _ in entries), needs, estimated)


def optimizer_bytes(kind: str, trained_bytes: int, *, momentum: bool = False, amsgrad: bool = False) -> int:
    """What an optimizer of class `kind` will keep for parameters of `trained_bytes`, once it has stepped.

    0 for one that is not known: the sum is then the least that is needed.
    """
    name = kind.lower()
    if "adam" in name and "8bit" not in name:
        return (3 if amsgrad else 2) * trained_bytes
    return trained_bytes if momentum or name in ("rmsprop", "adagrad") else 0


def check(budget: MemoryBudget, available: Mapping[str, int | None], *, again: bool = False) -> str:
    """Raise MemoryBudgetError, with the sum, where a place has fewer bytes free than needed (None: not known).

    `again`: the run has trained before. Then a disk that is too small, because something else has filled it, keeps a
    node from holding copies, and the job not from training: that is returned in words. Memory is refused all the same,
    before the kernel ends the process for it.
    """
    short = {
        place: f"{_size(need)} of {_PLACE_WORDS[place]} needed, {_size(free)} free"
        for place, need in budget.needs
        if (free := available.get(place)) is not None and need > free
    }
    if not short:
        return ""
    said = f"The node cannot hold its checkpoints: {'; '.join(short.values())}. The sum: {budget}."
    if again and set(short) == {"disk"}:
        return said
    advice = "Lower keep_last or replication_factor, use a disk for local saves, or give the node more room."
    raise MemoryBudgetError(said, advice=advice)


def _words(places: Sequence[Place]) -> str:
    return _PLACE_WORDS[places[-1]]  # shared memory is memory: naming the narrower place is enough


def _size(nbytes: int) -> str:
    value, unit = float(nbytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB", "PiB"):
        if abs(value) < 1024 or unit == "PiB":
            break
        value /= 1024
    return f"{nbytes} B" if unit == "B" else f"{value:.1f} {unit}"
