"""What of this rank's shard is as it was in an earlier save, and need not be sent to a holder that has that one.

Frozen weights, embeddings that no batch touches, a model beside the one that is trained: their bytes are equal in one
save after the other. To find out, all of a shard is hashed twice at first and again now and then, after it was sent.
What did not change in between is hashed before the next shards are sent, and not sent where a holder has the same
bytes. A state that changes everywhere costs no more than the looks.

The digests only choose what travels. The holder hashes the whole shard that it put together, and takes it only with the
digest that the owner made of its own.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

import xxhash

from resilience.planning.inventory import SaveId
from resilience.planning.travel import MOST_RANGES, Range, rest_of, spans_of
from resilience.snapshot.arena import Arena
from resilience.snapshot.layout import Layout

__all__ = ["Still"]

_LOOK_EVERY: Final = 16  # saves
_KNOWN_SAVES: Final = 16  # more than a holder has buffers

_Marks = dict[int, bytes]  # digests of spans, by number


class Still:
    """Of one owner, in one epoch: `begin`, `rest` for each holder, and `end`, for one save after the other."""

    def __init__(self, *, look_at_once: bool = False) -> None:
        """`look_at_once`: before a holder has anything, since it will."""
        self._layout: Layout | None = None
        self._spans: tuple[Range, ...] = ()
        self._known: OrderedDict[SaveId, _Marks] = OrderedDict()
        self._still: set[int] = set()  # numbers of the spans that did not change of late
        self._seen: _Marks = {}  # all spans, when they were looked at last
        self._wanted = look_at_once  # whether a holder ever had anything
        self._count = 0  # of saves of this layout since then
        self._save: SaveId | None = None
        self._arena: Arena | None = None

    @property
    def expects_any(self) -> bool:
        """Whether something of the newest save may be what a holder has."""
        return bool(self._still)

    def begin(self, save: SaveId, arena: Arena | None) -> None:
        """A sealed arena, before it is sent; None, or one of which it is not known what lies where: it goes whole."""
        self._save, self._arena = save, arena
        if arena is None or arena.layout is None:
            self._arena = None
            return
        if arena.layout is not self._layout:
            self._begin_layout(arena.layout)
        before = next(reversed(self._known.values()), {})
        marks = {number: self._digest(arena, number) for number in self._still}
        self._still = {number for number, digest in marks.items() if before.get(number, digest) == digest}
        self._known[save] = marks
        while len(self._known) > _KNOWN_SAVES:
            self._known.popitem(last=False)

    def rest(self, held: SaveId) -> tuple[Range, ...] | None:
        """What a holder needs that has the shard of the save `held`; None: all of it."""
        self._wanted = True
        if self._arena is None or self._save is None:
            return None
        there, here = self._known.get(held, {}), self._known[self._save]
        same = [self._spans[number] for number, digest in here.items() if there.get(number) == digest]
        ranges = rest_of(self._arena.nbytes, same, joined_bytes=0)
        return ranges if same and len(ranges) <= MOST_RANGES else None

    def end(self) -> None:
        """The arena was sent, and is looked at once more if it is time."""
        arena, self._arena = self._arena, None
        if arena is None or self._save is None or not self._wanted:
            return
        self._count += 1
        if self._count > 2 and self._count % _LOOK_EVERY:
            return
        marks = self._known[self._save]
        for number in range(len(self._spans)):
            if number not in marks:
                marks[number] = self._digest(arena, number)
        self._still = {number for number, digest in marks.items() if self._seen.get(number) == digest}
        self._seen = dict(marks)

    def _begin_layout(self, layout: Layout) -> None:
        places = [(placed.start, placed.start + placed.piece.nbytes) for placed in layout.placed]
        self._layout, self._spans = layout, spans_of(places, layout.nbytes)
        self._known, self._still, self._seen, self._count = OrderedDict(), set(), {}, 0

    def _digest(self, arena: Arena, number: int) -> bytes:
        start, stop = self._spans[number]
        return xxhash.xxh3_128_digest(arena.mapped.view[start:stop])
