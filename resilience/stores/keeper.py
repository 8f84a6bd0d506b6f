"""What this rank keeps on its node: its own shards and those it holds for others, in warm, recycled buffers.

On a memory-backed mount the arena's file itself becomes the shard (a rename); on a disk the shard is written beside and
the arena is free again when its readers are done. An arena is free, filling, or sealed with readers; deletion unlinks
the record first, waits for the readers, and only then gives the bytes to the next save.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from resilience.errors import ResilienceError, SaveFailedError, StoreError
from resilience.planning.inventory import Role, SaveId
from resilience.snapshot.arena import Arena
from resilience.stores.filesystem import FileSystem
from resilience.stores.node_store import NodeStore
from resilience.stores.records import ShardRecord

__all__ = ["ShardKeeper"]


class ShardKeeper:
    """One per rank. The training thread takes arenas; the background worker commits and deletes."""

    def __init__(
        self, store: NodeStore, arena_dir: Path, fs: FileSystem, rank: int, world_size: int, now: Callable[[], float]
    ) -> None:
        self.store = store
        self.arena_dir = arena_dir
        self._fs = fs
        self.rank = rank
        self._world_size = world_size
        self._now = now
        self.file_is_arena = store.memory_backed
        self._changed = threading.Condition()
        self._free: dict[int, list[Arena]] = {}  # by the owner whose shards they have held
        self._pins: dict[int, int] = {}  # readers of an arena, by id
        self._held: dict[tuple[SaveId, int], Arena | None] = {}  # committed copies; None: bytes not mapped here
        self._names = itertools.count()

    # -- buffers ------------------------------------------------------------------------------------------------------

    def take_arena(self, nbytes: int, capacity: int, bound_s: float, *, held_count: bool = True) -> Arena:
        """An arena for this rank's next snapshot, pinned once. Waits for a recycled one when `capacity` are in use.

        `held_count`: whether copies that are kept count among them where the file is the arena. Not if saves no longer
        go to the node: what an earlier attempt left there would keep all arenas for ever.

        Raises SaveFailedError after `bound_s`, StoreError when a new one cannot be reserved.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._available(nbytes, capacity, held_count), timeout=bound_s):
                raise SaveFailedError(f"no arena became free within {bound_s:g} s: {capacity} are in use.")
        arena = self.slot(self.rank, nbytes)
        self.pin(arena)
        return arena

    def slot(self, owner: int, nbytes: int) -> Arena:
        """A buffer of exactly `nbytes` for `owner`'s shard: a warm one if there is one of that size."""
        with self._changed:
            free = self._free.setdefault(owner, [])
            fitting = [arena for arena in free if arena.nbytes == nbytes]
            if fitting:
                free.remove(fitting[0])
                return fitting[0]
            stale, self._free[owner] = free, []
        for arena in stale:  # another layout: its memory goes back before new memory is asked for
            self._drop(arena)
        name = f"rank_{self.rank:05d}-for_{owner:05d}-{next(self._names)}.arena"
        self._fs.unlink(self.arena_dir / name)
        return Arena(self._fs.create_mapping(self.arena_dir / name, nbytes))

    def discard(self, owner: int, slot: Arena, *, reusable: bool) -> None:
        """A received shard is of no use. One that a broken link may still write into is never used again."""
        if reusable:
            self._give_back(owner, slot)
        else:
            self._fs.unlink(slot.mapped.path)

    def pin(self, arena: Arena) -> None:
        """One more reader of `arena`."""
        with self._changed:
            self._pins[id(arena)] = self._pins.get(id(arena), 0) + 1

    def unpin(self, arena: Arena) -> None:
        """A reader is done; an arena that holds no committed copy becomes free with its last reader."""
        with self._changed:
            left = self._pins.get(id(arena), 0) - 1
            if left > 0:
                self._pins[id(arena)] = left
                return
            self._pins.pop(id(arena), None)
            if not any(held is arena for held in self._held.values()):
                self._free.setdefault(self.rank, []).append(arena)
            self._changed.notify_all()

    def _available(self, nbytes: int, capacity: int, held_count: bool) -> bool:
        free = self._free.get(self.rank, [])
        if any(arena.nbytes == nbytes for arena in free):
            return True
        own = sum(1 for _, owner in self._held if owner == self.rank) if self.file_is_arena and held_count else 0
        busy = sum(1 for key in self._pins if not any(id(held) == key for held in self._held.values()))
        return own + busy < capacity

    def _give_back(self, owner: int, arena: Arena) -> None:
        with self._changed:
            self._free.setdefault(owner, []).append(arena)
            self._changed.notify_all()

    def _drop(self, arena: Arena) -> None:
        arena.close()
        self._fs.unlink(arena.mapped.path)

    # -- copies -------------------------------------------------------------------------------------------------------

    def commit(self, save: SaveId, owner: int, arena: Arena, digest: str, *, role: Role, split: bool) -> None:
        """Make the sealed bytes in `arena` a copy of `owner`'s shard. Raises StoreError; then there is no copy."""
        record = ShardRecord(
            run_id=self.store.run_id,
            save=save,
            owner=owner,
            world_size=self._world_size,
            role=role,
            tier=self.store.tier,
            node_id=self.store.node_id,
            nbytes=arena.nbytes,
            digest=digest,
            created=self._now(),
            split=split,
        )
        if self.file_is_arena:
            arena.mapped.path = self.store.commit_file(arena.mapped.path, record)
            with self._changed:
                self._held[(save, owner)] = arena
            return
        self.store.commit_bytes(arena.mapped.view, record)
        with self._changed:
            self._held[(save, owner)] = None
        if owner != self.rank or id(arena) not in self._pins:  # nobody else is reading it
            self._give_back(owner, arena)

    def adopt(self, save: SaveId, owners: Sequence[int]) -> None:
        """Take charge of copies that an earlier attempt left in our own directory."""
        for owner in owners:
            path = self.store.shard_path(save, owner, self._world_size)
            if self._fs.stat(path) is not None:
                self._held.setdefault((save, owner), None)

    def holds(self, save: SaveId, owner: int) -> bool:
        return (save, owner) in self._held

    def mapped(self, save: SaveId, owner: int) -> Arena:
        """The bytes of a copy that is kept, mapped for sending. StoreError if it is not there."""
        arena = self._held.get((save, owner))
        if arena is None:
            arena = Arena(self._fs.open_mapping(self.store.shard_path(save, owner, self._world_size), writable=True))
            if self.file_is_arena:
                self._held[(save, owner)] = arena
        return arena

    def delete(self, save: SaveId) -> None:
        """Give up this rank's copies of `save`:

        records first; the bytes are recycled when their last reader is done.
        """
        with self._changed:  # another lane commits meanwhile
            mine = [key for key in self._held if key[0] == save]
        for held_save, owner in mine:
            path = self.store.uncommit(held_save, owner, self._world_size)
            if path is not None and self.file_is_arena:
                self._recycle((held_save, owner), path)
                continue
            with self._changed:
                self._held.pop((held_save, owner))
            if path is not None:
                self._fs.unlink(path)
        with self._changed:
            self._changed.notify_all()  # whoever waits for room: there is some even where no bytes were left to recycle
        self.store.remove_folder_if_empty(save)

    def give_up(self, save: SaveId, owner: int) -> None:
        """Remove one copy that is not to stay, and its memory."""
        try:
            path = self.store.uncommit(save, owner, self._world_size)
            if path is not None:
                self._fs.unlink(path)
        finally:
            with self._changed:
                arena = self._held.pop((save, owner), None)
                spare = self._free.pop(owner, [])  # where the file is on a disk, the buffer it came through
                self._changed.notify_all()
            if arena is not None:
                arena.close()
        for buffer in spare:
            self._drop(buffer)

    def keep_only(self, saves: Collection[SaveId]) -> None:
        """At a start, once it is known which saves are kept: copies fetched of others, in a round of the election that
        failed, go. Nobody would ever delete them, and each occupies an arena.
        """
        for save, owner in [key for key in self._held if key[0] not in saves]:
            with contextlib.suppress(StoreError):  # no longer held in any case, and swept by the next start
                self.give_up(save, owner)

    def _recycle(self, key: tuple[SaveId, int], path: Path) -> None:
        """The file goes back among the arenas under another name, its warm mapping with it.

        Until then the copy stays held, so that `unpin` leaves its arena alone: one of the two frees it, never both.
        """
        owner = key[1]
        target = self.arena_dir / f"rank_{self.rank:05d}-for_{owner:05d}-{next(self._names)}.arena"
        fresh: Arena | None = None
        try:
            self._fs.rename(path, target)
            if self._held[key] is None:
                fresh = Arena(self._fs.open_mapping(target, writable=True, populate=True))
        except (ResilienceError, OSError):
            with self._changed:
                self._held.pop(key)  # the record is gone: no copy, and what is left of it is swept by the next start
            raise
        with self._changed:
            arena = self._held.pop(key) or fresh  # a sender may have mapped it meanwhile
            if arena is None:
                raise ValueError("a copy lost its mapping while it was deleted")
            arena.mapped.path = target
            if id(arena) not in self._pins:  # else it is being read (drained), and `unpin` frees it
                self._free.setdefault(owner, []).append(arena)
            self._changed.notify_all()
        if fresh is not None and fresh is not arena:
            fresh.close()

    def close(self) -> None:
        """Unmap everything; free arenas are removed, committed copies stay."""
        with self._changed:
            free, self._free = self._free, {}
            held, self._held = self._held, {}
        for arena in itertools.chain.from_iterable(free.values()):
            self._drop(arena)
        for kept in held.values():
            if kept is not None:
                kept.close()
