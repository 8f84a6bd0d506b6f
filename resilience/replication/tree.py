"""Agreements among more ranks than one group can hold: up through the leaders, and back down.

Each rank talks in the group of its neighbours; the first of each group carries the group's word into the next one, up
to the last, and brings the answer back. A rank that loses somebody does not fall silent: what it hands on, up and down,
says who was lost, so that all ranks that can still be reached raise the same error. (Those of the group that was broken
notice by themselves: by their sockets, or by the heart that stands still.) After that the tree is of no use any more.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from resilience.errors import PeerLostError
from resilience.replication.communicator import Agreements

__all__ = ["Stage", "Tree"]

_UNKNOWN: Final = 1  # somebody is lost; else the rank + 2
_WELL, _LOST = b"+", b"-"


@dataclass(frozen=True)
class Stage:
    """One group that this rank talks in, as its first member (`leads`) or not; `last`: there is none above it."""

    group: Agreements
    leads: bool
    last: bool


class Tree:
    """`Agreements` over the stages of this rank, lowest first. Every member calls the same ones in the same order."""

    def __init__(self, name: str, rank: int, size: int, stages: Sequence[Stage]) -> None:
        self.rank = rank
        self.size = size
        self._name = name
        self._stages = tuple(stages)
        self._lost: PeerLostError | None = None

    def maximum(self, values: Sequence[int]) -> list[int]:
        """Up, each group's maximum; then down: what a leader knows is never lower than what its group does."""
        self._usable()
        merged, broken = [0, *values], set()
        for stage in self._stages:
            try:
                merged = stage.group.maximum(merged)
            except PeerLostError as error:
                merged = self._poison(merged, error)
                broken.add(stage)
        for stage in reversed(self._stages):
            if stage.last or stage in broken:
                continue
            try:
                merged = stage.group.maximum(merged)
            except PeerLostError as error:
                merged = self._poison(merged, error)
        if merged[0]:
            raise self._end(merged[0] - 2)
        return merged[1:]

    def gather(self, payload: bytes) -> list[bytes]:
        """Members of a group are neighbours, so what is joined going up is in the order of ranks."""
        self._usable()
        word, broken = _WELL + _pack([payload]), set()
        for stage in self._stages:
            try:
                word = _join(stage.group.gather(word))
            except PeerLostError as error:
                word = self._farewell(error)
                broken.add(stage)
        return _unpack(self._down(word, broken))

    def collect(self, payload: bytes) -> list[bytes]:
        """What is joined goes up; down comes only that nobody was lost."""
        self._usable()
        word, broken = _WELL + _pack([payload]), set()
        for stage in self._stages:
            try:
                words = stage.group.collect(word)
                word = _join(words) if stage.leads else _WELL
            except PeerLostError as error:
                word = self._farewell(error)
                broken.add(stage)
        self._down(_WELL if word[:1] == _WELL else word, broken, from_the_top=True)
        return _unpack(word[1:]) if self.rank == 0 else []

    def broadcast(self, payload: bytes | None) -> bytes:
        """Member 0 is the first of every group that it is in."""
        self._usable()
        broken: set[Stage] = set()
        word = _WELL + (payload or b"")
        for stage in self._stages:
            if stage.last:
                try:
                    word = stage.group.broadcast(word if stage.leads else None)
                except PeerLostError as error:
                    word = self._farewell(error)
        return self._down(word, broken)

    def barrier(self) -> None:
        self.maximum([0])

    def close(self) -> None:
        for stage in self._stages:
            stage.group.close()

    def _down(self, word: bytes, broken: set[Stage], *, from_the_top: bool = False) -> bytes:
        """`from_the_top`: in the last group only the first has it."""
        for stage in reversed(self._stages):
            if (stage.last and not from_the_top) or stage in broken:
                continue
            try:
                word = stage.group.broadcast(word if stage.leads else None)
            except PeerLostError as error:
                word = self._farewell(error)
        if word[:1] != _WELL:
            raise self._end(int(word[1:] or b"-1"))
        return word[1:]

    def _usable(self) -> None:
        if self._lost is not None:
            raise self._lost

    def _poison(self, merged: Sequence[int], error: PeerLostError) -> list[int]:
        self._lost = self._lost or error
        return [_UNKNOWN if error.rank is None else error.rank + 2, *merged[1:]]

    def _farewell(self, error: PeerLostError) -> bytes:
        self._lost = self._lost or error
        return _LOST + str(-1 if error.rank is None else error.rank).encode()

    def _end(self, rank: int) -> PeerLostError:
        """The error that ends this tree: this rank's own, or what it heard."""
        whom = f"rank {rank}" if rank >= 0 else "a rank"
        heard = PeerLostError(f"{self._name}: {whom} is lost, other ranks say", rank=rank if rank >= 0 else None)
        self._lost = self._lost or heard
        return self._lost


def _pack(payloads: Sequence[bytes]) -> bytes:
    return b"".join(len(payload).to_bytes(8, "big") + payload for payload in payloads)


def _unpack(packed: bytes) -> list[bytes]:
    payloads, start = [], 0
    while start < len(packed):
        length = int.from_bytes(packed[start : start + 8], "big")
        payloads.append(packed[start + 8 : start + 8 + length])
        start += 8 + length
    return payloads


def _join(words: Sequence[bytes]) -> bytes:
    """One word of a group's words: theirs one after the other, or the first that says somebody is lost."""
    lost = next((word for word in words if word[:1] != _WELL), None)
    return lost if lost is not None else _WELL + b"".join(word[1:] for word in words)
