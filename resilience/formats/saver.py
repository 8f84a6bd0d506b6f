"""From a sealed arena to a committed checkpoint on shared storage: the drain of one save, on every rank.

Runs in a lane of its own over a group of its own, so that a slow file system holds up nothing else. Collective: all
ranks go through the same drains in the same order, and come to the same outcome.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.errors import EvictedError, ResilienceError, SaveFailedError
from resilience.formats.extras import Extras
from resilience.formats.in_buckets import OwnBuckets, fill_gaps, group_objects, into_buckets
from resilience.formats.in_common import check_in_common
from resilience.formats.once import once
from resilience.formats.optimizer_common import main_aliases, with_steps
from resilience.formats.protocol import CheckpointFormat, Chunk, RankShare, SaveMeta
from resilience.formats.stacks import Stacks
from resilience.planning.inventory import SaveId
from resilience.planning.split import split_rows
from resilience.replication.communicator import Agreements
from resilience.snapshot.arena import Arena
from resilience.snapshot.equality import Across
from resilience.snapshot.layout import Layout, Piece
from resilience.state.plain import plain_parts
from resilience.state.reconcile import without_entries, without_parts
from resilience.state.sharding import without_block
from resilience.state.stored_place import StoredPlaces
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_store import SharedStore

if TYPE_CHECKING:
    import torch

__all__ = ["DrainJob", "DrainTarget", "SharedSaver", "chunks_of", "share_of"]


@dataclass(frozen=True)
class DrainTarget:
    """A directory that a save goes to. `keep`: how many checkpoints to keep there (None: all).

    `leave_out`: parts of the state that the options exclude; `skip`: keys of the model that are not stored. `buckets`:
    this rank's, where the state of divided optimizers is stored in buckets; None where it is not.
    """

    store: SharedStore
    keep: int | None
    meta: SaveMeta
    leave_out: tuple[str, ...] = ()
    skip: frozenset[str] = frozenset()
    tokenizer: bool = False
    buckets: tuple[OwnBuckets, ...] | None = None


#: What a rank adds to its tensors, given the values that it saves, its tensors by key, and whether the tokenizer goes
#: along. Called in the lane.
MakeExtras = Callable[[bytes, Callable[[str], "torch.Tensor | None"], bool], Extras]


@dataclass(frozen=True)
class DrainJob:
    """One save on its way to shared storage. `arena` None: the snapshot failed on this rank."""

    save: SaveId
    arena: Arena | None
    values: bytes
    aliases: Mapping[str, str]
    targets: tuple[DrainTarget, ...]
    make_extras: MakeExtras
    error: str = ""
    split: bool = True
    part: int = 0  # this rank's place in its data-parallel group, and the group's size
    parts: int = 1
    fully_parallel: bool = True  # the group shares the writing of what it shares; else the first one writes it
    across: Across = field(default_factory=Across)  # what other data-parallel groups have too
    group_number: int = 0  # of this rank's data-parallel group
    places: StoredPlaces = field(default_factory=lambda: StoredPlaces({}))  # keys that the model itself names


class SharedSaver:
    """Writes checkpoints. Used by the drain lane alone."""

    def __init__(self, form: CheckpointFormat, group: Agreements, fs: FileSystem) -> None:
        self._form = form
        self._group = group
        self._fs = fs
        self._stacks = Stacks()

    def run(self, job: DrainJob, abandoned: Callable[[], Collection[SaveId]] = tuple) -> None:
        """Save and commit `job` in each of its stores. SaveFailedError on all ranks if it failed on one.

        EvictedError on all ranks if a newer start of the run took the directory over: this job must end.
        """
        for target in job.targets:
            store, keep = target.store, target.keep
            problem, share = job.error, RankShare((), b"")
            if not problem:
                try:
                    share = share_of(job, target)
                except Exception as error:  # noqa: BLE001 - the others must not wait for a rank that is gone
                    told = isinstance(error, ResilienceError)
                    problem = str(error) if told else f"{type(error).__name__}: {error}"
            named = self._agree(problem, job.places)
            check_in_common(_in_common(job, target), job.group_number, self._group)
            buckets = target.buckets or ()
            share = with_steps(share, self._group, {each.groups_key: each.position for each in buckets})
            if target.buckets is not None:
                share = fill_gaps(share, buckets, self._group)
            if named:
                share = self._stacks.store(share, job.places, self._group, str(store.root))
            share = replace(share, chunks=once(share.chunks, self._group))
            folder = self._leader(lambda store=store: str(store.begin(job.save.iteration, job.save.attempt)))  # type: ignore[misc]
            self._form.save(Path(folder), share, target.meta, self._group, self._fs)
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

    def _agree(self, problem: str, places: StoredPlaces) -> bool:
        """Whether any rank's model names keys of its own."""
        failed, named = self._group.maximum([int(bool(problem)), int(bool(places))])
        if failed:
            raise SaveFailedError(problem or "another rank could not take its snapshot.")
        return bool(named)


def share_of(job: DrainJob, target: DrainTarget) -> RankShare:
    """What this rank gives to the checkpoint in one of the directories. SaveFailedError without a snapshot."""
    arena = job.arena
    if arena is None or arena.layout is None:
        raise SaveFailedError("the snapshot failed")
    skip = target.skip | {alias for alias, root in job.aliases.items() if root in target.skip}
    values = without_parts(job.values, target.leave_out)
    if skip:
        values = without_entries(values, skip)
    aliases = {alias: root for alias, root in job.aliases.items() if alias not in skip}
    if target.buckets is None:
        mains = {alias: job.aliases.get(root, root) for alias, root in main_aliases(values).items()}
        aliases = {**mains, **aliases}
    own = {placed.piece.key: position for position, placed in enumerate(arena.layout.placed) if not placed.piece.shared}

    def tensor_of(key: str) -> torch.Tensor | None:
        position = own.get(job.aliases.get(key, key))
        return None if position is None else arena.views[position]

    extras = job.make_extras(values, tensor_of, target.tokenizer)
    chunks = chunks_of(arena, arena.layout, job, leave_out=target.leave_out, skip=skip)
    objects = dict(extras.objects)
    if target.buckets:
        pieces = chunks_of(arena, arena.layout, job, leave_out=target.leave_out, skip=skip, of_every_group=True)
        chunks = into_buckets(chunks, pieces, target.buckets)
        objects |= group_objects(plain_parts(values, ("optimizer",), tensor_of)["optimizer"], target.buckets)
    return RankShare(chunks, values, aliases, extras.files, extras.common, objects)


def chunks_of(
    arena: Arena,
    layout: Layout,
    job: DrainJob,
    *,
    leave_out: Collection[str] = (),
    skip: Collection[str] = (),
    of_every_group: bool = False,
) -> list[Chunk]:
    """What this rank has to write: its rows of what the group shares, and all that is its own.

    `of_every_group`: also what another group writes, if all groups have it alike.
    """
    chunks: list[Chunk] = []
    whole: list[int] = []
    for position, placed in enumerate(layout.placed):
        piece, key = placed.piece, without_block(placed.piece.key)
        if key.split("/", 1)[0] in leave_out or key in skip:
            continue
        if piece.shared and piece.key in job.across.elsewhere and not of_every_group:
            continue
        if piece.shared and not job.split:
            whole.append(position)
            continue
        chunks.append(Chunk(key, arena.views[position], piece.global_shape, piece.offsets, not piece.shared))
    return chunks + _rows(arena, layout, whole, job)


def _in_common(job: DrainJob, target: DrainTarget) -> Iterator[tuple[Piece, torch.Tensor]]:
    """This rank's rows of what other groups have too; where every rank has all rows, those of the first."""
    if job.arena is None or job.arena.layout is None or not (job.split or job.part == 0):
        return
    for position, placed in enumerate(job.arena.layout.placed):
        piece = placed.piece
        if piece.shared and piece.key in job.across.common and piece.key.split("/", 1)[0] not in target.leave_out:
            yield piece, job.arena.views[position]


def _rows(arena: Arena, layout: Layout, whole: Sequence[int], job: DrainJob) -> list[Chunk]:
    """Every rank has all of these (`atomic`): each writes its part of the rows, or the first one all of them."""
    pieces = [layout.placed[position].piece for position in whole]
    rows = [(p.shape[0] if p.shape else 1, p.nbytes // (p.shape[0] if p.shape and p.shape[0] else 1)) for p in pieces]
    shares = split_rows(rows, job.parts if job.fully_parallel else 1)
    chunks: list[Chunk] = []
    for index, start, stop in shares[job.part] if job.part < len(shares) else ():
        piece, view = pieces[index], arena.views[whole[index]]
        part = view[start:stop] if piece.shape else view
        offsets = (piece.offsets[0] + start, *piece.offsets[1:]) if piece.shape else ()
        chunks.append(Chunk(without_block(piece.key), part, piece.global_shape, offsets, False))
    return chunks


def _commit(store: SharedStore, save: SaveId) -> str:
    store.commit(save.iteration, save.attempt)
    return ""


def _prune(store: SharedStore, keep: int, abandoned: Collection[SaveId]) -> str:
    return str(len(store.prune(keep, abandoned=abandoned)))
