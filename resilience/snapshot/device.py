"""Copies from an accelerator's memory into an arena: cut so that nobody waits long, on a stream beside training's.

An accelerator's copy engine takes one command after the other. A tensor of gigabytes in one command would keep
training's own copies (a loss that is printed) waiting for as long, and thousands of small tensors cost more in commands
than in bytes. So large pieces are cut, and small ones that lie side by side in the arena are put side by side on the
device first and cross over together. The buffer they meet in comes from torch's allocator, in the order of the stream.

Nothing here waits for the whole device: streams wait for events, and a background thread for the last one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
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


@dataclass(frozen=True)
class CrossingPlan:
    """How some of a layout's pieces cross; holds while the layout and the sources' strides do."""

    crossings: tuple[_Crossing, ...]

    def issue(self, content: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        """Put all of it on the current stream. `content`: the arena's bytes. Does not wait if they are page-locked."""
        for crossing in self.crossings:
            if crossing.direct:
                start, cut = crossing.cuts[0]
                part = _elements(sources[cut.position], cut)
                typed_view(content, start, part.dtype, part.shape).copy_(part, non_blocking=True)
            else:
                self._meet_and_cross(crossing, content, sources)

    def _meet_and_cross(self, crossing: _Crossing, content: torch.Tensor, sources: Sequence[torch.Tensor]) -> None:
        parts = [_elements(sources[cut.position], cut) for _, cut in crossing.cuts]
        together = torch.empty(crossing.stop - crossing.start, dtype=torch.uint8, device=parts[0].device)
        places = [
            typed_view(together, start - crossing.start, part.dtype, part.shape)
            for (start, _), part in zip(crossing.cuts, parts, strict=True)
        ]
        torch._foreach_copy_(places, parts)
        content[crossing.start : crossing.stop].copy_(together, non_blocking=True)


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
    return CrossingPlan(tuple(crossings))


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

    def begin(self, devices: Iterable[torch.device]) -> None:
        """What crosses from now on is what the current streams will have made of all that was enqueued so far."""
        for device in devices:
            if device not in self._streams:
                self._streams[device] = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
            self._streams[device].wait_stream(torch.cuda.current_stream(device))

    def on(self, device: torch.device) -> Any:
        """A context in which `device`'s side stream is current; any thread."""
        return torch.cuda.stream(self._streams[device])

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
