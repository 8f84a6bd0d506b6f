"""What this rank keeps on its node: its own shards and those it holds for others, in warm, recycled buffers.

On a memory-backed mount the arena's file itself becomes the shard (a rename); on a disk the shard is written beside and
the arena is free again when its readers are done. An arena is free, filling, or sealed with readers; deletion unlinks
the record first, waits for the readers, and only then gives the bytes to the next save.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Collection, Sequence
from pathlib import Path

from resilience.errors import ResilienceError, SaveFailedError, StoreError
from resilience.planning.inventory import Kept, ParityCover, ParityName, Role, SaveId
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena
from resilience.stores.filesystem import FileSystem, MappedFile, no_space
from resilience.stores.node_store import NodeStore
from resilience.stores.pages import always
from resilience.stores.records import ShardRecord

__all__ = ["ShardKeeper"]

_MAKING_BOUND_S = 60.0  # for a buffer that is being made: then one more is made
_ROOM_FOR_RECORDS = 1 << 20  # what a reservation leaves on the mount


class ShardKeeper:
    """One per rank. The training thread takes arenas; the background worker commits and deletes."""

    def __init__(
        self,
        store: NodeStore,
        arena_dir: Path,
        fs: FileSystem,
        rank: int,
        world_size: int,
        now: Callable[[], float],
        threads: Threads = SYSTEM_THREADS,
    ) -> None:
        self.store = store
        self.arena_dir = arena_dir
        self._fs = fs
        self.rank = rank
        self._world_size = world_size
        self.now = now
        self.file_is_arena = store.memory_backed
        self._changed = threads.condition()
        self._buffers: dict[Kept, set[Arena]] = {}  # all that are mapped, by the owner whose shards they have held
        self._free: dict[Kept, list[Arena]] = {}  # those of them that wait for the next shard
        self._making: dict[Kept, int] = {}  # how many more are being made
        self._pins: dict[int, int] = {}  # readers of an arena, by id
        self._held: dict[tuple[SaveId, Kept], Arena | None] = {}  # committed copies; None: bytes not mapped here
        self._names = itertools.count()
        #: What a new buffer for this rank's own shards goes through before it is used.
        self.prepare: Callable[[Arena], None] = lambda arena: None

    # -- buffers ------------------------------------------------------------------------------------------------------

    def take_arena(self, nbytes: int, capacity: int, bound_s: float, *, held_count: bool = True) -> Arena:
        """An arena for this rank's next snapshot, pinned once. Waits for a recycled one when `capacity` are in use, and
        for one that is being made.

        `held_count`: whether copies that are kept count among them where the file is the arena. Not if saves no longer
        go to the node: what an earlier attempt left there would keep all arenas for ever.

        Raises SaveFailedError after `bound_s`, StoreError when a new one cannot be reserved.
        """
        with self._changed:
            if not self._changed.wait_for(lambda: self._available(nbytes, capacity, held_count), timeout=bound_s):
                made = ", 1 is being made" if self._making.get(self.rank) else ""
                raise SaveFailedError(f"no arena became free within {bound_s:g} s: {capacity} are in use{made}.")
        arena = self.slot(self.rank, nbytes)
        self.pin(arena)
        return arena

    def slot(self, owner: Kept, nbytes: int, *, reserved: bool = True) -> Arena:
        """A buffer of exactly `nbytes` for `owner`'s shard: a warm one if there is one of that size, or about to be.

        Without `reserved` a new one has no room as yet: `reserve_room`, before anything is written to it.
        """
        with self._changed:
            self._changed.wait_for(
                lambda: not self._making.get(owner) or self._fitting(owner, nbytes), timeout=_MAKING_BOUND_S
            )
            fitting = self._fitting(owner, nbytes)
            if fitting:
                return self._taken(owner, fitting[0])
            stale = self._begin_making(owner, nbytes)
        if reserved:
            return self._make(owner, nbytes, stale, always, ahead=False)
        return self._make(owner, nbytes, stale, always, ahead=False, begin=self._fs.begin_mapping)

    def warm_slot(self, owner: Kept, nbytes: int) -> Arena | None:
        """A free buffer of exactly `nbytes` for `owner`'s shard, if there is one. Does not wait and makes none."""
        with self._changed:
            fitting = self._fitting(owner, nbytes)
            return self._taken(owner, fitting[0]) if fitting else None

    def holding_slot(self, owner: Kept) -> tuple[Arena, SaveId] | None:
        """A free buffer that still has a verified shard of `owner`, the newest one, and of which save.

        Does not wait and makes none.
        """
        with self._changed:
            holding = [(arena.holds, arena) for arena in self._free.get(owner, ()) if arena.holds is not None]
            if not holding:
                return None
            save, arena = max(holding, key=lambda each: (each[0].generation, each[0].iteration))
            return self._taken(owner, arena), save

    def _taken(self, owner: Kept, arena: Arena) -> Arena:
        """Out of the free ones, and to be written to; under the lock."""
        self._free[owner].remove(arena)
        arena.holds = None
        return arena

    def reserve_room(self, arena: Arena, stop: int, wanted: Callable[[], bool]) -> None:
        """Give a buffer room up to byte `stop`. StoreError if there is none; ECANCELED once `wanted()` says no."""
        self._fs.reserve(arena.mapped, stop, wanted)

    def reserve(self, owner: Kept, nbytes: int, total: int, wanted: Callable[[], bool]) -> bool:
        """Make one more warm buffer for `owner`'s shards of `nbytes`, unless there are `total`; whether it did.

        For a lane, ahead of the saves that will need it. StoreError if there is no room, and where it would leave none
        for records; ECANCELED once `wanted()` says no.
        """
        with self._changed:
            held_here = {id(arena) for arena in self._held.values()}  # of another layout, free or lent, it will go
            there = [a for a in self._buffers.get(owner, ()) if a.nbytes == nbytes or id(a) in held_here]
            unmapped = sum(1 for key, held in self._held.items() if key[1] == owner and held is None)
            count = len(there) + self._making.get(owner, 0) + (unmapped if self.file_is_arena else 0)
            if count >= total or not wanted():
                return False
            stale = self._begin_making(owner, nbytes)
        self._make(owner, nbytes, stale, wanted, ahead=True)
        return True

    def enlarge_pages(self, wanted: Callable[[], bool]) -> None:
        """Have all buffers' content put into huge pages, where the kernel can. For a lane, when nothing waits for it.

        What is saved in them, and read at a restart, is then mapped in no time. Ends early once `wanted()` says no.
        """
        with self._changed:
            buffers = [arena for each in self._buffers.values() for arena in each]
        for arena in buffers:
            arena.mapped.enlarge_pages(wanted)

    def _begin_making(self, owner: Kept, nbytes: int) -> list[Arena]:
        """Under the lock. Returns free buffers of another layout: their memory goes back before new is asked for."""
        self._making[owner] = self._making.get(owner, 0) + 1
        stale = self._stale(owner, nbytes)
        self._free[owner] = self._fitting(owner, nbytes)
        return stale

    def _make(
        self,
        owner: Kept,
        nbytes: int,
        stale: Sequence[Arena],
        wanted: Callable[[], bool],
        *,
        ahead: bool,
        begin: Callable[[Path, int], MappedFile] | None = None,
    ) -> Arena:
        """`ahead`: it is nobody's yet, and free in the same moment in which it is no longer in the making.

        `begin`: what makes it without room as yet.
        """
        made: Arena | None = None
        try:
            for arena in stale:
                self._drop(owner, arena)
            if ahead and self._fs.free_bytes(self.arena_dir) < nbytes + _ROOM_FOR_RECORDS:
                raise no_space(f"reserving {nbytes} bytes would fill up", self.arena_dir)
            path = self._new_path(owner)
            self._fs.unlink(path)
            made = Arena(begin(path, nbytes) if begin else self._fs.create_mapping(path, nbytes, wanted))
            if owner == self.rank:
                self.prepare(made)
            return made
        finally:
            with self._changed:
                self._making[owner] -= 1
                if made is not None:
                    self._buffers.setdefault(owner, set()).add(made)
                    self._free.setdefault(owner, []).extend([made] if ahead else [])
                self._changed.notify_all()

    def _new_path(self, owner: Kept) -> Path:
        whose = f"clique{owner.clique:05d}" if isinstance(owner, ParityName) else f"{owner:05d}"
        return self.arena_dir / f"rank_{self.rank:05d}-for_{whose}-{next(self._names)}.arena"

    def _fitting(self, owner: Kept, nbytes: int) -> list[Arena]:
        return [arena for arena in self._free.get(owner, ()) if arena.nbytes == nbytes]

    def _stale(self, owner: Kept, nbytes: int) -> list[Arena]:
        return [arena for arena in self._free.get(owner, ()) if arena.nbytes != nbytes]

    def discard(self, owner: Kept, slot: Arena, *, reusable: bool) -> None:
        """A received shard is of no use. One that a broken link may still write into is never used again."""
        if reusable:
            self._give_back(owner, slot)
            return
        with self._changed:
            self._forget(owner, slot)
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
            if self._is_ours(self.rank, arena) and not any(held is arena for held in self._held.values()):
                self._free.setdefault(self.rank, []).append(arena)
            self._changed.notify_all()

    def _available(self, nbytes: int, capacity: int, held_count: bool) -> bool:
        if self._fitting(self.rank, nbytes):
            return True
        if self._making.get(self.rank):
            return False
        own = sum(1 for _, owner in self._held if owner == self.rank) if self.file_is_arena and held_count else 0
        busy = sum(1 for key in self._pins if not any(id(held) == key for held in self._held.values()))
        return own + busy < capacity

    def _give_back(self, owner: Kept, arena: Arena) -> None:
        with self._changed:
            if self._is_ours(owner, arena):
                self._free.setdefault(owner, []).append(arena)
            self._changed.notify_all()

    def _is_ours(self, owner: Kept, arena: Arena) -> bool:
        """Whether it may be used again; under the lock."""
        return arena in self._buffers.get(owner, ())

    def _forget_if_lost(self, owner: Kept, arena: Arena) -> None:
        """A commit failed, and so did taking the file back: a save in this buffer could never be committed."""
        try:
            lost = self._fs.stat(arena.mapped.path) is None
        except StoreError:
            lost = True
        if lost:
            with self._changed:
                self._forget(owner, arena)

    def _drop(self, owner: Kept, arena: Arena) -> None:
        with self._changed:
            self._forget(owner, arena)
        arena.close()
        self._fs.unlink(arena.mapped.path)

    def _forget(self, owner: Kept, arena: Arena) -> None:
        self._buffers.get(owner, set()).discard(arena)

    # -- copies -------------------------------------------------------------------------------------------------------

    def commit(self, save: SaveId, owner: int, arena: Arena, digest: str, *, role: Role, split: bool) -> None:
        """Make the sealed bytes in `arena` a copy of `owner`'s shard. Raises StoreError; then there is no copy."""
        self._commit(save, owner, arena, digest, role, split, None)

    def commit_parity(self, save: SaveId, cover: ParityCover, arena: Arena, digest: str, *, split: bool) -> None:
        """Make the bytes in `arena` this rank's parity of what `cover` says. Raises StoreError; then there is none."""
        self._commit(save, self.rank, arena, digest, "parity", split, cover)

    def _commit(
        self, save: SaveId, owner: int, arena: Arena, digest: str, role: Role, split: bool, cover: ParityCover | None
    ) -> None:
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
            created=self.now(),
            split=split,
            cover=cover,
        )
        if self.file_is_arena:
            try:
                arena.mapped.path = self.store.commit_file(arena.mapped.path, record)
            except StoreError:
                self._forget_if_lost(owner, arena)
                raise
            with self._changed:
                self._held[(save, record.kept)] = arena
            return
        self.store.commit_bytes(arena.mapped.view, record)
        with self._changed:
            self._held[(save, record.kept)] = None
        if record.kept != self.rank or id(arena) not in self._pins:  # nobody else is reading it
            self._give_back(record.kept, arena)

    def adopt(self, save: SaveId, owners: Sequence[Kept]) -> None:
        """Take charge of copies that an earlier attempt left in our own directory."""
        for owner in owners:
            path = self.store.shard_path(save, owner, self._world_size)
            if self._fs.stat(path) is not None:
                self._held.setdefault((save, owner), None)

    def holds(self, save: SaveId, owner: Kept) -> bool:
        return (save, owner) in self._held

    def mapped(self, save: SaveId, owner: Kept) -> Arena:
        """The bytes of a copy that is kept, mapped for sending. StoreError if it is not there."""
        arena = self._held.get((save, owner))
        if arena is None:
            arena = Arena(self._fs.open_mapping(self.store.shard_path(save, owner, self._world_size), writable=True))
            if self.file_is_arena:
                with self._changed:
                    self._held[(save, owner)] = arena
                    self._buffers.setdefault(owner, set()).add(arena)
        return arena

    def delete(self, save: SaveId) -> None:
        """Give up this rank's copies of `save`:

        records first; the bytes are recycled when their last reader is done.
        """
        with self._changed:  # another lane commits meanwhile
            mine = [key for key in self._held if key[0] == save]
        # the training thread waits for its own arena and then looks for slots: those are to be free by then
        mine.sort(key=lambda key: key[1] == self.rank)
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
        self.store.remover.remove_folder_if_empty(save)

    def give_up(self, save: SaveId, owner: Kept) -> None:
        """Remove one copy that is not to stay, and its memory."""
        try:
            path = self.store.uncommit(save, owner, self._world_size)
            if path is not None:
                self._fs.unlink(path)
        finally:
            with self._changed:
                arena = self._held.pop((save, owner), None)
                if arena is not None:
                    self._forget(owner, arena)
                spare = self._free.pop(owner, [])  # where the file is on a disk, the buffer it came through
                self._changed.notify_all()
            if arena is not None:
                arena.close()
        for buffer in spare:
            self._drop(owner, buffer)

    def keep_only(self, saves: Collection[SaveId]) -> None:
        """At a start, once it is known which saves are kept: copies fetched of others, in a round of the election that
        failed, go. Nobody would ever delete them, and each occupies an arena.
        """
        for save, owner in [key for key in self._held if key[0] not in saves]:
            with contextlib.suppress(StoreError):  # no longer held in any case, and swept by the next start
                self.give_up(save, owner)

    def _recycle(self, key: tuple[SaveId, Kept], path: Path) -> None:
        """The file goes back among the arenas under another name, its warm mapping with it.

        Until then the copy stays held, so that `unpin` leaves its arena alone: one of the two frees it, never both.
        """
        owner = key[1]
        target = self._new_path(owner)
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
            self._buffers.setdefault(owner, set()).add(arena)
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
        for owner, arenas in free.items():
            for arena in arenas:
                with contextlib.suppress(StoreError):  # a disk that refuses: swept by the next start
                    self._drop(owner, arena)
        for kept in held.values():
            if kept is not None:
                kept.close()
