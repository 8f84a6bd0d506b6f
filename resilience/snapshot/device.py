"""Copies from an accelerator's memory into an arena: cut so that nobody waits long, on a stream beside training's.

An accelerator's copy engine takes one command after the other. A tensor of gigabytes in one command would keep
training's own copies (a loss that is printed) waiting for as long, and thousands of small tensors cost more in commands
than in bytes. So large pieces are cut, and small ones that lie side by side in the arena are put side by side on the
device first and cross over together.

Nothing here waits for the whole device: streams wait for events, and a background thread for the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import is_
from typing import Any, Final

import torch

from resilience.snapshot.arena import typed_view
from resilience.snapshot.layout import Layout

__all__ = ["CrossingPlan", "SideStreams", "plan_crossing"]

#: So much crosses in one command: half a millisecond on PCIe 5, and much more than a command costs.
_PIECE_BYTES: Final = 32 << 20
#: Pieces below this meet with their neighbours before they cross.
_SMALL_BYTES: Final = 1 << 20


@dataclass(frozen=True)
class _Cut:
    """Elements of one source: the range of rows (`axis` 0) or of all elements in order (`flat`)."""

    position: int
    start: int
    stop: int
    flat: bool


@dataclass(frozen=True)
class _Crossing:
    """One command: bytes [start, stop) of the arena. `cuts`: what they are made of, each with its first byte."""

    start: int
    stop: int
    cuts: tuple[tuple[int, _Cut], ...]

    @property
    def direct(self) -> bool:
        """Whether the bytes lie on the device as they will in the arena."""
        return len(self.cuts) == 1 and self.cuts[0][1].flat


class CrossingPlan:
    """How some of a layout's pieces cross; holds while the layout and the way in which the sources lie do."""

    def __init__(self, crossings: Sequence[_Crossing]) -> None:
        self._crossings = tuple(crossings)
        self._met: dict[int, _Meeting] = {}  # by crossing

    def issue(self, content: torch.Tensor, sources: Sequence[torch.Tensor], room: torch.Tensor | None = None) -> None:
        """Put all of it on the current stream. `content`: the arena's bytes. Does not wait if they are page-locked.

        `room`: bytes on the device that nothing but this stream uses, for what meets; without it, torch's allocator
        gives some.
        """
        for number, crossing in enumerate(self._crossings):
            if crossing.direct:
                start, cut = crossing.cuts[0]
                part = _elements(sources[cut.position], cut)
                typed_view(content, start, part.dtype, part.shape).copy_(part, non_blocking=True)
                continue
            nbytes = crossing.stop - crossing.start
            if room is None or room.numel() < nbytes:
                device = sources[crossing.cuts[0][1].position].device
                meeting = _meet(crossing, sources, torch.empty(nbytes, dtype=torch.uint8, device=device))
            else:
                meeting = self._met_before(number, crossing, sources, room)
            torch._foreach_copy_(meeting.places, meeting.parts)
            content[crossing.start : crossing.stop].copy_(meeting.room[:nbytes], non_blocking=True)

    def _met_before(
        self, number: int, crossing: _Crossing, sources: Sequence[torch.Tensor], room: torch.Tensor
    ) -> _Meeting:
        """Thousands of views are kept, since to make them takes longer than to copy what they show."""
        known = self._met.get(number)
        if (
            known is None
            or known.room is not room
            or not known.is_of(sources[cut.position] for _, cut in crossing.cuts)
        ):
            known = self._met[number] = _meet(crossing, sources, room)
        return known


@dataclass(frozen=True)
class _Meeting:
    """The parts of one crossing, and their places side by side in `room`."""

    sources: list[torch.Tensor]
    parts: list[torch.Tensor]
    places: list[torch.Tensor]
    room: torch.Tensor

    def is_of(self, sources: Iterable[torch.Tensor]) -> bool:
        return all(map(is_, self.sources, sources))


def _meet(crossing: _Crossing, sources: Sequence[torch.Tensor], room: torch.Tensor) -> _Meeting:
    parts = [_elements(sources[cut.position], cut) for _, cut in crossing.cuts]
    places = [
        typed_view(room, start - crossing.start, part.dtype, part.shape)
        for (start, _), part in zip(crossing.cuts, parts, strict=True)
    ]
    return _Meeting([sources[cut.position] for _, cut in crossing.cuts], parts, places, room)


def plan_crossing(layout: Layout, sources: Sequence[torch.Tensor], positions: Iterable[int]) -> CrossingPlan:
    """The commands for the pieces at `positions`, all on one device, by rising place in the arena."""
    crossings: list[_Crossing] = []
    run: list[tuple[int, _Cut]] = []
    begin = end = 0

    def close() -> None:
        if run:
            crossings.append(_Crossing(begin, end, tuple(run)))
            run.clear()

    for position in sorted(positions, key=lambda each: layout.placed[each].start):
        source, start = sources[position], layout.placed[position].start
        nbytes, width = source.numel() * source.element_size(), source.element_size()
        if not nbytes:
            continue
        if nbytes >= _SMALL_BYTES:
            close()
            crossings += _cut_large(source, position, start)
            continue
        if run and (start != end or end + nbytes - begin > _PIECE_BYTES or (start - begin) % width):
            close()
        if not run:
            begin = start
        run.append((start, _whole(source, position)))
        end = start + nbytes
    close()
    return CrossingPlan(crossings)


def _cut_large(source: torch.Tensor, position: int, start: int) -> Iterable[_Crossing]:
    """A piece of its own, in parts of at most `_PIECE_BYTES` where it can be cut: one row, if it has strides."""
    width = source.element_size()
    if source.is_contiguous():
        step, count, unit = _PIECE_BYTES // width, source.numel(), width
    else:
        unit = source[0].numel() * width
        step, count = max(1, _PIECE_BYTES // unit), source.shape[0]
    for first in range(0, count, step):
        last = min(count, first + step)
        cut = _Cut(position, first, last, source.is_contiguous())
        yield _Crossing(start + first * unit, start + last * unit, ((start + first * unit, cut),))


def _whole(source: torch.Tensor, position: int) -> _Cut:
    if source.is_contiguous():
        return _Cut(position, 0, source.numel(), True)
    return _Cut(position, 0, source.shape[0], False)


def _elements(source: torch.Tensor, cut: _Cut) -> torch.Tensor:
    return source.reshape(-1)[cut.start : cut.stop] if cut.flat else source[cut.start : cut.stop]


class SideStreams:
    """The stream of each device on which snapshots cross, beside the one that training steps on.

    `begin` and `hold_back` are called by the training thread, since what they wait for, or make wait, is its current
    stream.
    """

    def __init__(self) -> None:
        self._streams: dict[torch.device, Any] = {}
        self._rooms: dict[torch.device, torch.Tensor] = {}

    def begin(self, devices: Iterable[torch.device]) -> None:
        """What crosses from now on is what the current streams will have made of all that was enqueued so far."""
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def on(self, device: torch.device) -> Any:
        """A context in which `device`'s side stream is current; any thread."""
        return torch.cuda.stream(self._streams[device])

    def room(self, device: torch.device) -> torch.Tensor:
        """Bytes on the device that only its side stream uses, in which small tensors meet. With that stream current."""
        if device not in self._rooms:
            self._rooms[device] = torch.empty(_PIECE_BYTES, dtype=torch.uint8, device=device)
        return self._rooms[device]

    def mark(self, device: torch.device) -> Any:
        """An event behind all that was put on the side stream so far. To wait for it does not spin."""
        event = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
        event.record(self._streams[device])
        return event

    @staticmethod
    def hold_back(events: Iterable[tuple[torch.device, Any]]) -> None:
        """Have the current streams wait for `events`; the host goes on."""
        for device, event in events:
            torch.cuda.current_stream(device).wait_event(event)
