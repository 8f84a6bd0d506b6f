"""Layers that a checkpoint has in one tensor and the model in many, or the other way round, are found under both names.

    stored                                     asked for
    decoder.layers.mlp.weight   [L, F, H]      decoder.layers.3.mlp.weight   [F, H]      one of a stack
    decoder.layers.3.mlp.weight [F, H]         decoder.layers.mlp.weight     [L, F, H]   all of them as one
    mlp.weight_w, mlp.weight_v  [F, H]         mlp.weight                    [2F, H]     halves of a gated projection

A model that says under which key each of its tensors is stored (Megatron Core's) is believed; any other is served by
these rules, for its weights and for the optimizer's state alike. What is asked for is read from where it lies.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resilience.errors import LayoutMismatchError
from resilience.formats.protocol import RankState, StateReader, StoredTensor, Target
from resilience.state.sharding import state_prefix
from resilience.state.stored_place import StoredPlace
from resilience.stores.shared_records import FolderRecord

__all__ = ["LayeredReader"]

_ONE_LAYER = re.compile(r"(.*/(?:[^/]*\.)?layers)\.(\d{1,6})\.([^/]+)", re.DOTALL)
_ALL_LAYERS = re.compile(r"(.*/(?:[^/]*\.)?layers)\.((?!\d+\.)[^/]+)", re.DOTALL)
_HALVES = ("_w", "_v")
_MOST_LAYERS = 4096  # of a stored tensor that are told apart where keys are compared


@dataclass(frozen=True)
class _Part:
    """Rows `start` to `start + length` of what is asked for: a stored tensor, at `index` of its first axes.

    `stacked`: the rows are tensors of their own, each a whole stored one.
    """

    path: str
    index: tuple[int, ...] = ()
    start: int = 0
    length: int | None = None  # None: all rows
    stacked: bool = False


class LayeredReader:
    """See `StateReader`. Everything that `reader` has is there too, under its own name."""

    def __init__(self, reader: StateReader, places: Mapping[str, StoredPlace], wanted: Iterable[str]) -> None:
        """`places`: tree path of a tensor, or what the paths of its optimizer state begin with → where it is stored.

        `wanted`: these paths for all of the live state. LayoutMismatchError if another number of layers is stored.
        """
        self._reader = reader
        self._whole = dict(reader.index)
        self._stored: dict[str, list[str]] = {}
        for path in self._whole:
            self._stored.setdefault(state_prefix(path) or path, []).append(path)
        self._parts: dict[str, tuple[_Part, ...]] = {}
        found: dict[str, StoredTensor] = {}
        for base in wanted:
            for path, stored, parts in self._look(base, places.get(base)):
                found[path], self._parts[path] = stored, parts
        self.index: Mapping[str, StoredTensor] = {**self._whole, **found}

    @property
    def folder(self) -> Path:
        return self._reader.folder

    @property
    def record(self) -> FolderRecord | None:
        return self._reader.record

    @property
    def aliases(self) -> Mapping[str, str]:
        return self._reader.aliases

    @property
    def common(self) -> Mapping[str, Any]:
        return self._reader.common

    @property
    def objects(self) -> Collection[str]:
        return self._reader.objects

    def read_object(self, key: str) -> Any:
        return self._reader.read_object(key)

    def rank_state(self, rank: int) -> RankState | None:
        return self._reader.rank_state(rank)

    def read(self, targets: Sequence[Target]) -> None:
        self._reader.read(self.as_stored(targets))

    def as_stored(self, targets: Sequence[Target]) -> list[Target]:
        """The same regions where they lie, under the names that they have there."""
        return [stored for target in targets for stored in self._as_stored(target)]

    def close(self) -> None:
        self._reader.close()

    # -- which keys are asked for -------------------------------------------------------------------------------------

    def units(self) -> list[str]:
        """All that is stored, layer by layer where layers lie in one tensor: the same on every rank."""
        return sorted(unit for path in self._whole for unit in self._units_of(path))

    def units_asked(self, paths: Iterable[str]) -> set[str]:
        """Which of them are asked for with these paths."""
        asked: set[str] = set()
        for path in paths:
            for part in self._parts.get(path, (_Part(path),)):
                if part.path in self._whole:
                    units = self._units_of(part.path)
                    asked.update(units if not part.index or len(units) == 1 else [units[part.index[0]]])
        return asked

    def paths_of(self, units: Collection[str]) -> set[str]:
        """What such units are called: the stored tensor, where all of its layers are among them."""
        found: set[str] = set()
        for path in self._whole:
            own = self._units_of(path)
            found.update([path] if units and all(unit in units for unit in own) else set(own) & set(units))
        return found

    def _units_of(self, path: str) -> list[str]:
        shape = self._whole[path].global_shape
        layered = _ALL_LAYERS.fullmatch(state_prefix(path) or path) is not None
        if layered and len(shape) > 1 and 1 <= shape[0] <= _MOST_LAYERS:
            return [f"{path}[{number}]" for number in range(shape[0])]
        return [path]

    # -- what is asked for, where it lies -----------------------------------------------------------------------------

    def _look(self, base: str, place: StoredPlace | None) -> Iterator[tuple[str, StoredTensor, tuple[_Part, ...]]]:
        """What is stored elsewhere than under its own name: path, what it is, where it lies."""
        if place is not None and place.path in self._stored:
            if place.index or place.path != base:
                yield from self._one_of(base, place.path, place.index, place.counts)
        elif base in self._stored:
            return
        elif (one := _ONE_LAYER.fullmatch(base)) and f"{one[1]}.{one[3]}" in self._stored:
            yield from self._one_of(base, f"{one[1]}.{one[3]}", (int(one[2]),), None)
        elif every := _ALL_LAYERS.fullmatch(base):
            yield from self._all_of(base, every[1], every[2])
        yield from self._halves_of(base)

    def _one_of(
        self, base: str, stored_base: str, index: tuple[int, ...], counts: tuple[int, ...] | None
    ) -> Iterator[tuple[str, StoredTensor, tuple[_Part, ...]]]:
        for path in self._stored[stored_base]:
            stored, axes = self._whole[path], len(index)
            there = stored.global_shape[:axes]
            if len(there) < axes:
                continue  # a count of steps, kept per parameter
            if counts is not None and there != counts:
                raise LayoutMismatchError(
                    f"{path} has {list(there)} along its first axes in {self.folder} (layers, experts); here it is "
                    f"{list(counts)}.",
                    advice="Build a model of as many layers as the checkpoint has.",
                )
            if all(at < length for at, length in zip(index, there, strict=True)):
                what = StoredTensor(stored.dtype, stored.global_shape[axes:])
                yield base + path.removeprefix(stored_base), what, (_Part(path, index),)

    def _all_of(self, base: str, before: str, after: str) -> Iterator[tuple[str, StoredTensor, tuple[_Part, ...]]]:
        layers: list[str] = []
        while (layer := f"{before}.{len(layers)}.{after}") in self._stored:
            layers.append(layer)
        for path in self._stored[layers[0]] if layers else ():
            moment = path.removeprefix(layers[0])
            stored = [self._whole.get(layer + moment) for layer in layers]
            if stored[0] is not None and all(each == stored[0] for each in stored):
                what = StoredTensor(stored[0].dtype, (len(layers), *stored[0].global_shape))
                parts = (_Part(layer + moment, (), n, 1, stacked=True) for n, layer in enumerate(layers))
                yield base + moment, what, tuple(parts)

    def _halves_of(self, base: str) -> Iterator[tuple[str, StoredTensor, tuple[_Part, ...]]]:
        halves = [base + half for half in _HALVES]
        if base in self._stored or not all(half in self._stored for half in halves):
            return
        for path in self._stored[halves[0]]:
            moment = path.removeprefix(halves[0])
            stored = [self._whole.get(half + moment) for half in halves]
            first, second = stored
            if first is None or second is None or first != second or not first.global_shape:
                continue
            rows = first.global_shape[0]
            what = StoredTensor(first.dtype, (2 * rows, *first.global_shape[1:]))
            yield base + moment, what, tuple(_Part(h + moment, (), n * rows, rows) for n, h in enumerate(halves))

    def _as_stored(self, target: Target) -> Iterator[Target]:
        parts = self._parts.get(target.key)
        if parts is None:
            yield target
            return
        whole = self.index[target.key].global_shape
        if target.global_shape is not None and tuple(target.global_shape) != whole:
            raise LayoutMismatchError(
                f"{target.key} has shape {whole} in {self.folder}; asked for is one of {tuple(target.global_shape)}."
            )
        for part in parts:
            yield from _of_part(target, part)


def _of_part(target: Target, part: _Part) -> Iterator[Target]:
    """Which region of a stored tensor goes where in the target; nothing if they have no rows in common."""
    out, offsets = target.out.detach(), tuple(target.offsets)
    if part.length is not None:
        low = max(offsets[0], part.start)
        high = min(offsets[0] + out.shape[0], part.start + part.length)
        if low >= high:
            return
        out = out.narrow(0, low - offsets[0], high - low)
        offsets = (low - part.start, *offsets[1:])
        if part.stacked:
            out, offsets = out.squeeze(0), offsets[1:]
    for _ in part.index:
        out = out.unsqueeze(0)
    yield Target(part.path, out, (*part.index, *offsets))
