"""The copy: live tensors into arenas, now or while training goes on, and who waits for what of it.

On the host plain blocks are copied as memory, which is quickest, and all else with one call of torch's over cached
views, which takes mixed dtypes and strides. Either gives up the interpreter lock once: a Python loop over thousands of
tensors takes orders of magnitude longer against a busy interpreter. What lies on an accelerator crosses on a stream of
its own.

An *eager* copy is over when `start` returns. An *overlapped* one copies at the boundary what the next forward and
backward may change (all that is not told apart as `later`), and the rest in a lane; `Copy.join`, called before anything
changes that rest, lets the training thread go on only when it is safe, and `Copy.wait` is for the lanes that read the
arena.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, Protocol

import torch

from resilience.errors import ResilienceError, SaveFailedError
from resilience.runtime.threads import SYSTEM_THREADS, Threads
from resilience.runtime.worker import Lane
from resilience.snapshot.arena import Arena
from resilience.snapshot.device import CrossingPlan, SideStreams, plan_crossing
from resilience.snapshot.layout import Layout, Piece
from resilience.snapshot.memory_copy import Blocks, copy_blocks, copy_others, is_block, lanes_copy_blocks
from resilience.snapshot.page_lock import page_lock
from resilience.snapshot.sources import Cut
from resilience.stores.pages import always

__all__ = ["DONE", "Copy", "Copying", "Pair", "Part", "Witness"]

#: A host tensor, and what is copied into it.
Pair = tuple[torch.Tensor, torch.Tensor]

_NOTHING: Final[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class Part:
    """One arena to be filled with `layout`'s pieces, from what `cut` has for each."""

    arena: Arena
    layout: Layout
    cut: Cut

    @property
    def sources(self) -> list[torch.Tensor]:
        return self.cut.tensors


class Witness(Protocol):
    """Somebody who saw the sources at the boundary, and tells whether they, and the arena, are still that."""

    def unchanged(self) -> str:
        """Whether the sources are what they were: "" or why not. Before they may change."""
        ...

    def agrees(self) -> str:
        """Whether the arena got what they were: "" or why not. Once all is copied."""
        ...

    waits_for_join: bool  # whether the copy may be believed only when `unchanged` was asked at the join


class Copy:
    """One copy on its way. Training thread: `join`, `abandon`. Lanes: `wait`."""

    def __init__(self, threads: Threads | None = None) -> None:
        """Without `threads`: one that is over."""
        self._guard = None if threads is None else threads.condition()
        self._handed_over = self._settled = self._joined = threads is None
        self._said = ""  # what the witness saw at the join
        self._problem = ""
        self._events: list[tuple[torch.device, Any]] = []

    def wait(self) -> str:
        """Until the arenas are sealed; "" or why they must not be used. For the lanes.

        It ends with the copy, which nothing holds up; where the copy has a witness, with the join.
        """
        if self._guard is not None:
            with self._guard:
                self._guard.wait_for(lambda: self._settled)
        return self._problem

    @property
    def pending(self) -> bool:
        """Whether it has yet to be joined."""
        return not self._joined

    def join(self, witness: Witness | None, bound_s: float | None = None) -> bool:
        """Wait until the sources may be changed: the host's are copied, and the device's stream waits by itself.

        With `bound_s`, at a failing end, not for longer than that; whether they may be.
        """
        if self._guard is None or self._joined:
            return True
        with self._guard:
            if not self._guard.wait_for(lambda: self._handed_over or self._settled, timeout=bound_s):
                return False
            settled = self._settled
            events = list(self._events)
        said = "" if settled or witness is None else witness.unchanged()
        SideStreams.hold_back(events)
        with self._guard:
            self._joined, self._said = True, said
            self._guard.notify_all()
        return True

    def abandon(self, why: str) -> None:
        """It is not to be believed any more, unless it was found right or joined already. Nobody waits for its join."""
        if self._guard is not None:
            with self._guard:
                if not self._joined:
                    self._joined, self._said = True, why
                    self._guard.notify_all()

    # -- for the lane that copies -------------------------------------------------------------------------------------

    def hand_over(self, events: Sequence[tuple[torch.device, Any]]) -> None:
        """All that the training thread has to wait for is done, or on its way."""
        assert self._guard is not None
        with self._guard:
            self._events, self._handed_over = list(events), True
            self._guard.notify_all()

    def verdict(self, witness: Witness | None) -> str:
        """What is wrong with the copy, which is over: what was seen at the join, or is seen now if that is to come."""
        assert self._guard is not None
        if witness is None:
            return ""
        with self._guard:
            if witness.waits_for_join:
                self._guard.wait_for(lambda: self._joined)
            said = self._said if self._joined else witness.unchanged()  # a join waits for this look
        return said or witness.agrees()

    def settle(self, problem: str) -> None:
        assert self._guard is not None
        with self._guard:
            self._problem, self._handed_over, self._settled = problem, True, True
            self._events = []
            self._guard.notify_all()


DONE = Copy()


@dataclass
class _Host:
    """What is copied on the host, by the positions of the pieces."""

    blocks: list[int] = field(default_factory=list)
    places: Blocks = field(default_factory=lambda: Blocks.at([], []))  # where in the file the blocks are to lie
    others: list[int] = field(default_factory=list)

    def place(self, part: Part) -> None:
        """Once all positions are there."""
        self.places = Blocks.at(
            (part.layout.placed[position].start for position in self.blocks),
            (part.sources[position].nbytes for position in self.blocks),
        )


@dataclass
class _Plan:
    """How the pieces of one part are copied: which where, and when."""

    layout: Layout
    kind: object  # of the sources
    later: Collection[str]
    deferred: list[int] = field(default_factory=list)  # positions of those that are copied later
    host_now: _Host = field(default_factory=_Host)
    host_later: _Host = field(default_factory=_Host)
    device_now: dict[torch.device, CrossingPlan] = field(default_factory=dict)
    device_later: dict[torch.device, CrossingPlan] = field(default_factory=dict)


class Copying:
    """The copies of one rank. `start` and `start_overlapped` are the training thread's."""

    def __init__(
        self,
        lane: Lane | None = None,
        threads: Threads = SYSTEM_THREADS,
        tell: Callable[..., None] = lambda *_, **__: None,
    ) -> None:
        """`lane`: where overlapped copies run; without one all are eager."""
        self._lane = lane
        self._threads = threads
        self._tell = tell
        self._streams = SideStreams()
        self._plans: dict[int, _Plan] = {}  # by which layout object
        self._held: Callable[[], None] | None = None  # a copy that is to begin
        self._pageable = False  # a lock was refused: told once, and not asked for again

    def start(self, parts: Sequence[Part], pairs: Sequence[Pair], seal: Callable[[], None]) -> None:
        """An eager copy: all of it, sealed. SaveFailedError if the device has no room to gather small tensors in."""
        plans = self._plans_of(parts, _NOTHING)
        devices = self._begin(parts, plans, pairs)
        try:
            with _room_on_device():
                for device in devices:
                    with self._streams.on(device):
                        room = self._streams.room(device)
                        _cross(device, parts, [plan.device_now for plan in plans], pairs, room)
            _copy_host(parts, [plan.host_now for plan in plans], pairs)
        finally:
            self._arrive(devices)
        seal()

    def start_overlapped(
        self,
        parts: Sequence[Part],
        pairs_now: Sequence[Pair],
        pairs_later: Sequence[Pair],
        seal: Callable[[], None],
        *,
        later: Collection[str],
        witness: Witness | None,
        disproved: Callable[[str], None],
    ) -> Copy:
        """What is not of the keys `later` now; the rest while training goes on, from `go` on. `seal`s in the lane.

        `later` stays the same object while it has the same keys. `disproved` hears, in the lane, why the witness does
        not vouch for the copy.
        """
        assert self._lane is not None
        self.go()
        plans = self._plans_of(parts, later)
        with _room_on_device():
            for device in _devices([plan.device_now for plan in plans], pairs_now):  # in the order of training's stream
                _cross(device, parts, [plan.device_now for plan in plans], pairs_now)
        _copy_host(parts, [plan.host_now for plan in plans], pairs_now)
        devices = self._begin(parts, plans, (*pairs_now, *pairs_later))
        copy = Copy(self._threads)

        def run() -> None:
            problem = "the copy was given up"
            try:
                self._copy_later(copy, parts, plans, pairs_later, devices)
                problem = copy.verdict(witness)
                if problem:
                    disproved(problem)
                else:
                    seal()
            except (ResilienceError, OSError, RuntimeError) as error:  # torch's errors are RuntimeErrors
                problem = f"the overlapped copy failed: {error}"
                with contextlib.suppress(RuntimeError):
                    self._arrive(devices)
            finally:
                copy.settle(problem)

        self._held = run
        return copy

    def go(self) -> None:
        """Have the copy that was started last begin, unless it did. What the training thread still has to do at the
        boundary is quicker while nobody else wants its core."""
        held, self._held = self._held, None
        if held is not None and self._lane is not None:
            self._lane.submit("copy", held)

    def deferred(self, part: Part, later: Collection[str]) -> list[int]:
        """Positions of the pieces that are copied later."""
        return self._plan(part, later).deferred

    def prepare(self, arena: Arena) -> None:
        """Make a new arena fit to be crossed into: huge pages, locked ones. Any thread; takes a while.

        Huge pages first: locked ones cannot be moved any more.
        """
        arena.mapped.enlarge_pages(always)
        self._lock_pages(arena)

    def _begin(self, parts: Sequence[Part], plans: Sequence[_Plan], pairs: Sequence[Pair]) -> list[torch.device]:
        """The devices that something is to cross from, once their current streams have made it."""
        for part, plan in zip(parts, plans, strict=True):
            if plan.device_now or plan.device_later:
                self._lock_pages(part.arena)  # once, if that was not done ahead
        devices = _devices([plan.device_now for plan in plans] + [plan.device_later for plan in plans], pairs)
        self._streams.begin(devices)
        return devices

    def _copy_later(
        self,
        copy: Copy,
        parts: Sequence[Part],
        plans: Sequence[_Plan],
        pairs: Sequence[Pair],
        devices: Sequence[torch.device],
    ) -> None:
        for device in devices:
            with self._streams.on(device):
                room = self._streams.room(device)
                _cross(device, parts, [plan.device_later for plan in plans], pairs, room)
        events = [(device, self._streams.mark(device)) for device in devices]
        _copy_host(parts, [plan.host_later for plan in plans], pairs, in_lane=True)
        copy.hand_over(events)
        for _, event in events:
            event.synchronize()

    def _arrive(self, devices: Sequence[torch.device]) -> None:
        """Until all that was put on the side streams is across: an arena must not go before."""
        for event in [self._streams.mark(device) for device in devices]:
            event.synchronize()

    def _lock_pages(self, arena: Arena) -> None:
        if self._pageable:
            return
        try:
            arena.lock_pages(page_lock)
        except RuntimeError as error:
            self._pageable = True
            what = f"an arena could not be page-locked, so that snapshots of the device take longer: {error}"
            self._tell("warning", what=what, advice="")

    def _plans_of(self, parts: Sequence[Part], later: Collection[str]) -> list[_Plan]:
        """All others are forgotten: they would keep tensors of a device alive that training has given up."""
        plans = [self._plan(part, later) for part in parts]
        self._plans = {id(plan.layout): plan for plan in plans}
        return plans

    def _plan(self, part: Part, later: Collection[str]) -> _Plan:
        """Kept while layout and kind of sources are the same."""
        plan = self._plans.get(id(part.layout))
        if plan and plan.layout is part.layout and plan.kind is part.cut.kind and plan.later is later:
            return plan
        plan = _Plan(part.layout, part.cut.kind, later)
        now: dict[torch.device, list[int]] = {}
        then: dict[torch.device, list[int]] = {}
        for position, (source, placed) in enumerate(zip(part.sources, part.layout.placed, strict=True)):
            deferred = placed.piece.key in later
            plan.deferred += [position] if deferred else []
            host = plan.host_later if deferred else plan.host_now
            if source.is_cuda:
                (then if deferred else now).setdefault(source.device, []).append(position)
            elif _is_plain(source, placed.piece) and (not deferred or lanes_copy_blocks()):
                host.blocks.append(position)
            else:
                host.others.append(position)
        plan.host_now.place(part)
        plan.host_later.place(part)
        plan.device_now = {device: plan_crossing(part.layout, part.sources, them) for device, them in now.items()}
        plan.device_later = {device: plan_crossing(part.layout, part.sources, them) for device, them in then.items()}
        self._plans[id(part.layout)] = plan
        return plan


@contextlib.contextmanager
def _room_on_device() -> Iterator[None]:
    """A device without room costs this save, and no training."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise SaveFailedError(f"the device has no room for what a snapshot needs of it: {error}") from error


def _devices(plans: Sequence[Mapping[torch.device, CrossingPlan]], pairs: Sequence[Pair]) -> list[torch.device]:
    found = {device for plan in plans for device in plan}
    found |= {source.device for _, source in pairs if source.is_cuda}
    return sorted(found, key=str)


def _is_plain(source: torch.Tensor, piece: Piece) -> bool:
    """Whether the source's bytes are what is to be stored of it."""
    return is_block(source) and (source.dtype, source.nbytes) == (piece.dtype, piece.nbytes)


def _copy_host(parts: Sequence[Part], chosen: Sequence[_Host], pairs: Sequence[Pair], *, in_lane: bool = False) -> None:
    """All that lies on the host. SaveFailedError where something has no memory any more."""
    targets = [target for target, source in pairs if not source.is_cuda]
    sources = [source for _, source in pairs if not source.is_cuda]
    for part, host in zip(parts, chosen, strict=True):
        if host.blocks:
            begin = part.arena.content.data_ptr()
            copy_blocks(begin, host.places, _at(host.blocks, part.sources), in_lane=in_lane)
        if host.others:
            targets += _at(host.others, part.arena.views)
            sources += _at(host.others, part.sources)
    copy_others(targets, sources)


def _at(positions: Sequence[int], tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return tensors if len(positions) == len(tensors) else [tensors[position] for position in positions]


@torch.no_grad()
def _cross(
    device: torch.device,
    parts: Sequence[Part],
    plans: Sequence[Mapping[torch.device, CrossingPlan]],
    pairs: Sequence[Pair],
    room: torch.Tensor | None = None,
) -> None:
    """On the current stream of `device`."""
    for target, source in pairs:
        if source.device == device:
            target.copy_(source, non_blocking=True)
    for part, plan in zip(parts, plans, strict=True):
        if device in plan:
            plan[device].issue(part.arena.content, part.sources, room)
