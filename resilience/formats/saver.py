"""From a sealed arena to a committed checkpoint on shared storage: the drain of one save, on every rank.

Runs in a lane of its own over a group of its own, so that a slow file system holds up nothing else. Collective: all
ranks go through the same drains in the same order, and come to the same outcome.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from resilience.errors import EvictedError, ResilienceError, SaveFailedError
from resilience.formats.protocol import CheckpointFormat, Chunk, RankShare, SaveMeta
from resilience.planning.inventory import SaveId
from resilience.planning.split import split_rows
from resilience.replication.communicator import Agreements
from resilience.snapshot.arena import Arena
from resilience.snapshot.layout import Layout
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_store import SharedStore

__all__ = ["DrainJob", "SharedSaver", "chunks_of"]


@dataclass(frozen=True)
class DrainJob:
    """One save on its way to shared storage. `arena` None: the snapshot failed on this rank."""

    save: SaveId
    arena: Arena | None
    values: bytes
    aliases: Mapping[str, str]
    meta: SaveMeta
    targets: tuple[tuple[SharedStore, int | None], ...]  # stores, and how many checkpoints to keep there (None: all)
    error: str = ""
    leave_out: tuple[str, ...] = ()  # parts of the state that the options exclude
    split: bool = True
    part: int = 0  # this rank's place in its data-parallel group, and the group's size
    parts: int = 1


class SharedSaver:
    """Writes checkpoints. Used by the drain lane alone."""

    def __init__(self, form: CheckpointFormat, group: Agreements, fs: FileSystem) -> None:
        self._form = form
        self._group = group
        self._fs = fs

    def run(self, job: DrainJob, abandoned: Callable[[], Collection[SaveId]] = tuple) -> None:
        """Save and commit `job` in each of its stores. SaveFailedError on all ranks if it failed on one.

        EvictedError on all ranks if a newer start of the run took the directory over: this job must end.
        """
        problem, chunks = job.error, list[Chunk]()
        if not problem and (job.arena is None or job.arena.layout is None):
            problem = "the snapshot failed"
        elif not problem and job.arena is not None and job.arena.layout is not None:
            try:
                chunks = chunks_of(job.arena, job.arena.layout, job)
            except Exception as error:  # noqa: BLE001 - the others must not wait for a rank that is gone
                problem = f"{type(error).__name__}: {error}"
        self._agree(problem)
        share = RankShare(chunks, job.values, job.aliases)
        for store, keep in job.targets:
            folder = self._leader(lambda store=store: str(store.begin(job.save.iteration, job.save.attempt)))  # type: ignore[misc]
            self._form.save(Path(folder), share, job.meta, self._group, self._fs)
            self._leader(lambda store=store: _commit(store, job.save))  # type: ignore[misc]
            if keep is not None:
                self._leader(lambda store=store, keep=keep: _prune(store, keep, abandoned()))  # type: ignore[misc]

    def _leader(self, step: Callable[[], str]) -> str:
        """One rank does it, all learn how it went."""
        answer: bytes | None = None
        if self._group.rank == 0:
            try:
                answer = json.dumps({"done": step()}).encode()
            except Exception as error:  # noqa: BLE001 - whatever it is, the others wait for the broadcast
                told = (
                    str(error) if isinstance(error, (ResilienceError, OSError)) else f"{type(error).__name__}: {error}"
                )
                answer = json.dumps({"error": told, "evicted": isinstance(error, EvictedError)}).encode()
        outcome = json.loads(self._group.broadcast(answer))
        if "error" in outcome:
            raise EvictedError(outcome["error"]) if outcome["evicted"] else SaveFailedError(outcome["error"])
        return str(outcome["done"])

    def _agree(self, problem: str) -> None:
        if self._group.maximum([int(bool(problem))])[0]:
            raise SaveFailedError(problem or "another rank could not take its snapshot.")


def chunks_of(arena: Arena, layout: Layout, job: DrainJob) -> list[Chunk]:
    """What this rank writes: its rows of what the group shares, and all that is its own."""
    chunks: list[Chunk] = []
    whole: list[int] = []
    for position, placed in enumerate(layout.placed):
        piece = placed.piece
        if piece.key.split("/", 1)[0] in job.leave_out:
            continue
        if piece.shared and not job.split:
            whole.append(position)
            continue
        per_rank = not piece.shared and piece.shape == piece.global_shape
        chunks.append(Chunk(piece.key, arena.views[position], piece.global_shape, piece.offsets, per_rank))
    return chunks + _rows(arena, layout, whole, job)


def _rows(arena: Arena, layout: Layout, whole: Sequence[int], job: DrainJob) -> list[Chunk]:
    """Every rank has all of these (`atomic`): each writes its part of the rows."""
    pieces = [layout.placed[position].piece for position in whole]
    rows = [(p.shape[0] if p.shape else 1, p.nbytes // (p.shape[0] if p.shape and p.shape[0] else 1)) for p in pieces]
    chunks: list[Chunk] = []
    for index, start, stop in split_rows(rows, job.parts)[job.part]:
        piece, view = pieces[index], arena.views[whole[index]]
        part = view[start:stop] if piece.shape else view
        offsets = (piece.offsets[0] + start, *piece.offsets[1:]) if piece.shape else ()
        chunks.append(Chunk(piece.key, part, piece.global_shape, offsets, False))
    return chunks


def _commit(store: SharedStore, save: SaveId) -> str:
    store.commit(save.iteration, save.attempt)
    return ""


def _prune(store: SharedStore, keep: int, abandoned: Collection[SaveId]) -> str:
    return str(len(store.prune(keep, abandoned=abandoned)))
