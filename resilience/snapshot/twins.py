"""Replicas without traffic: a holder puts what data parallelism keeps equal into a replica from its own live tensors.

What a rank of the data-parallel group stores of the shared items, every other rank of the group has too, byte for byte.
So a holder copies it into the replica's slot together with its own snapshot, and only the header, the plain
values and what the owner has alone travel. How the owner's shard is laid out the holder reads from the header of the
first one, which came whole. The digest decides: the composed bytes must have the one that the owner computed, or they
are refused like any other bytes, and the next save finds out which item is not equal after all.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

from resilience.planning.travel import Range, rest_of, worth_it
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Part
from resilience.snapshot.layout import Layout, Piece, PlacedPiece
from resilience.snapshot.sources import Sources
from resilience.state.items import Item
from resilience.stores.shard_file import SavedPiece, ShardHeader, layout_id_of, read_header

__all__ = ["Twin", "Twins", "rest_for"]

#: A warm slot of that size for that owner's replica, or None.
WarmSlot = Callable[[int, int], Arena | None]


@dataclass(frozen=True)
class Twin:
    """The slot of one replica, which holds all of the owner's shard but `rest`."""

    slot: Arena
    layout_id: int
    rest: tuple[Range, ...]


@dataclass(frozen=True)
class _Known:
    """The layout of an owner's shards, as the newest one that came showed it."""

    layout_id: int
    header: ShardHeader
    nbytes: int


class _Recipe:
    """How an owner's shard is filled from the live items of one plan; None where it cannot be, or does not pay."""

    def __init__(self, known: _Known, items: Sequence[Item], shared: Collection[str]) -> None:
        self.known = known
        self.layout = _layout(known, items, shared)
        covered = [] if self.layout is None else [_range(placed) for placed in self.layout.placed]
        self.rest = rest_of(known.nbytes, covered)
        self.sources = Sources()
        if not worth_it(known.nbytes, self.rest):
            self.layout = None


class Twins:
    """The replicas that this rank can compose. Asked by the training thread, taught by the lane that receives."""

    def __init__(self, group: Sequence[int], threads: Threads = SYSTEM_THREADS) -> None:
        """`group`: the data-parallel group, whose members have the same shared items."""
        self._group = tuple(group)
        self._guard = threads.condition()
        self._known: dict[int, _Known] = {}
        self._recipes: dict[int, _Recipe] = {}
        self._plan: object = None  # of which the recipes are

    def learn(self, owner: int, content: memoryview) -> None:
        """Remember how `owner` lays its shards out, from a shard that was verified. For the lane."""
        layout_id = layout_id_of(content)
        with self._guard:
            known = self._known.get(owner)
        if known is not None and known.layout_id == layout_id:
            return
        header = read_header(content, f"the shard of rank {owner}")
        with self._guard:
            if header.group == self._group:
                self._known[owner] = _Known(layout_id, header, len(content))
            else:
                self._known.pop(owner, None)

    def sizes(self) -> dict[int, int]:
        """By owner: bytes of its shards, as the newest ones showed."""
        with self._guard:
            return {owner: known.nbytes for owner, known in self._known.items()}

    def forget(self, owner: int) -> None:
        """What was composed did not match: the next shard of `owner` is to come whole. For the lane."""
        with self._guard:
            self._known.pop(owner, None)

    def compose(
        self, plan: object, items: Sequence[Item], shared: Collection[str], warm: WarmSlot
    ) -> dict[int, tuple[Twin, Part]]:
        """By owner: a slot for its shard, and what of it this rank has, to be copied there with its own snapshot.

        `plan` stays the same object while `items` have one structure and `shared` holds. No slot is made here: an
        owner for whom none is warm is left out, and its shard travels whole.
        """
        with self._guard:
            known = dict(self._known)
        if plan is not self._plan:
            self._plan, self._recipes = plan, {}
        composed: dict[int, tuple[Twin, Part]] = {}
        for owner, what in known.items():
            recipe = self._recipes.get(owner)
            if recipe is None or recipe.known is not what:
                recipe = self._recipes[owner] = _Recipe(what, items, shared)
            slot = None if recipe.layout is None else warm(owner, what.nbytes)
            if slot is None or recipe.layout is None:
                continue
            slot.use(recipe.layout)
            part = Part(slot, recipe.layout, recipe.sources.of(items, recipe.layout))
            composed[owner] = Twin(slot, what.layout_id, recipe.rest), part
        return composed


def rest_for(layout: Layout) -> tuple[Range, ...]:
    """What of a shard of this rank's own must travel to a holder that composes it."""
    return rest_of(layout.nbytes, [_range(placed) for placed in layout.placed if placed.piece.shared])


def _range(placed: PlacedPiece) -> Range:
    return placed.start, placed.start + placed.piece.nbytes


def _layout(known: _Known, items: Sequence[Item], shared: Collection[str]) -> Layout | None:
    """The shared pieces of the owner's shard as pieces of this rank's items; None if one of them is not here."""
    here = {item.key: position for position, item in enumerate(items) if item.alias_of is None and item.key in shared}
    placed: list[PlacedPiece] = []
    for saved in known.header.pieces.values():
        if not saved.shared:
            continue
        position = here.get(saved.key)
        piece = None if position is None else _piece(saved, items[position], position)
        if piece is None:
            return None
        placed.append(PlacedPiece(piece, saved.start))
    start, stop = known.header.values
    return Layout(tuple(placed), start, stop - start, 0, known.nbytes, "", known.layout_id)


def _piece(saved: SavedPiece, item: Item, position: int) -> Piece | None:
    """The rows of a live item that a stored piece has."""
    shape, offsets = tuple(item.tensor.shape), item.offsets
    dtype = str(item.tensor.dtype).removeprefix("torch.")
    if (dtype, item.global_shape) != (saved.dtype, saved.global_shape) or shape[1:] != saved.shape[1:]:
        return None
    if not shape:
        return Piece(item.key, item.tensor.dtype, (), (), (), True, position)
    first = saved.offsets[0] - offsets[0]
    if saved.offsets[1:] != offsets[1:] or not 0 <= first <= first + saved.shape[0] <= shape[0]:
        return None
    return Piece(
        item.key, item.tensor.dtype, item.global_shape, saved.offsets, saved.shape, True, position, first,
        first + saved.shape[0],
    )  # fmt: skip
