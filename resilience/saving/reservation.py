"""Arenas and slots made ahead of the saves that will need them, so that no save waits for pages of its own.

Making a buffer takes five to fifteen times as long as copying into one. All that a rank will ever use are made by a
lane of their own as soon as the layout is known; a save that comes before its buffer waits for that one, and a full
mount is told and tried again with the next save. Once all are there, they are put into huge pages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from resilience.planning.inventory import Kept
from resilience.runtime.worker import Lane
from resilience.stores.keeper import ShardKeeper

__all__ = ["Buffers", "Reservation"]


@dataclass(frozen=True)
class Buffers:
    """`count` buffers of `nbytes` for `owner`'s shards, or parity of that name."""

    owner: Kept
    nbytes: int
    count: int


class Reservation:
    """What is reserved on one rank. Called by the training thread, carried out in its lane."""

    def __init__(self, keeper: ShardKeeper, lane: Lane, tell: Callable[..., None]) -> None:
        self._keeper = keeper
        self._lane = lane
        self._tell = tell
        self._wanted: tuple[Buffers, ...] = ()
        self._lacking = False
        self._held_back = False
        self._under_way = False
        self._ended = False

    def want(self, wanted: Sequence[Buffers]) -> None:
        """What this rank is to have from now on, in the order in which it is needed; `go_on` begins."""
        if tuple(wanted) != self._wanted:
            self._wanted = tuple(wanted)
            self._lacking = True

    def hold_back(self, held_back: bool) -> None:
        """While files of earlier attempts lie on the node that will go: there is not room for both."""
        self._held_back = held_back

    def go_on(self) -> None:
        """Reserve what is lacking. Does not wait; at every save, so that what failed once is tried again."""
        if self._lacking and not (self._held_back or self._under_way or self._ended):
            self._under_way = True
            self._lane.submit("reserve arenas", self._run)

    def enlarge(self) -> None:
        """Put what a restore brought here into huge pages, since nothing may be saved for long. Does not wait."""
        self._lane.submit("enlarge pages", lambda: self._keeper.enlarge_pages(self._go_on))

    def stop(self) -> None:
        """Give up what is being reserved, within moments, and leave nothing of it; the lane is to be closed then."""
        self._ended = True

    def _run(self) -> None:
        wanted = self._wanted
        try:
            for each in wanted:
                while self._keeper.reserve(each.owner, each.nbytes, each.count, self._go_on):
                    pass
            self._lacking = wanted is not self._wanted
            self._keeper.enlarge_pages(self._go_on)
        except OSError as error:
            if not self._ended:
                what = f"not all buffers could be reserved ahead of the saves that need them: {error}"
                self._tell("warning", what=what, advice="The next save tries again.")
        finally:
            self._under_way = False

    def _go_on(self) -> bool:
        return not self._ended
