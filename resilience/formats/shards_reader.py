"""Any region of any tensor of a save, read from the shards of its ranks: behind the port that checkpoints are read by.

What the shards show of themselves (`ShownShard`) is on every rank; their bytes come later, and only what is asked for.
So a load goes in this order: plan it, `wanted` says which segments that takes, somebody brings them, `fill` and `read`
take the tensors out of them. Local; nothing here talks to other ranks.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from resilience.errors import LayoutMismatchError, MissingKeysError
from resilience.formats.protocol import RankState, StoredTensor, Target
from resilience.formats.shard_parts import Assembled, Part, Together
from resilience.formats.shown_shard import ShownShard
from resilience.snapshot.arena import typed_view
from resilience.stores.digest import SEGMENT_BYTES
from resilience.stores.shared_records import FolderRecord

__all__ = ["ShardsReader"]

#: Bytes `lo` to `hi` of an owner's shard, as a tensor of bytes.
Content = Callable[[int, int, int], torch.Tensor]


class ShardsReader:
    """See `StateReader`. One rank's."""

    def __init__(
        self,
        folder: Path,
        record: FolderRecord,
        shards: Mapping[int, ShownShard],
        together: Together,
        here: Collection[int],
        content: Content,
    ) -> None:
        """`here`: owners whose shards this rank's node has itself: preferred. `content`: of what was brought."""
        self.folder = folder
        self.record = record
        self._shards = shards
        self._together = together
        self._here = frozenset(here)
        self._content = content
        self._promised: list[tuple[Assembled, torch.Tensor]] = []

    @property
    def index(self) -> Mapping[str, StoredTensor]:
        return {key: StoredTensor(_dtype(each.dtype), each.global_shape) for key, each in self._together.whole.items()}

    @property
    def aliases(self) -> Mapping[str, str]:
        return {}

    @property
    def common(self) -> Mapping[str, Any]:
        return {}

    @property
    def objects(self) -> tuple[str, ...]:
        return ()

    def read_object(self, key: str) -> Any:
        raise MissingKeysError(f"{self.folder} has no object {key}: shards hold nothing for other programs.")

    def rank_state(self, rank: int) -> RankState | None:
        """Tensors that did not come along are promised: allocated when they are asked for, filled by `fill`."""
        if rank not in self._shards:
            return None
        return RankState(self._shards[rank].values, _Own(self, rank), self._together.digests[rank])

    def read(self, targets: Sequence[Target]) -> None:
        for target, assembled in self._found(targets):
            self._fill(assembled, target.out, target.offsets)

    def fill(self) -> None:
        """Keep what was promised; once its bytes were brought."""
        for assembled, out in self._promised:
            self._fill(assembled, out, (0,) * out.dim())
        self._promised.clear()

    def wanted(self, targets: Sequence[Target]) -> dict[int, set[int]]:
        """Segments, by owner, that hold what the targets, and all that was promised so far, are read from."""
        asked = [(assembled, target.offsets, tuple(target.out.shape)) for target, assembled in self._found(targets)]
        asked += [(assembled, (0,) * out.dim(), tuple(out.shape)) for assembled, out in self._promised]
        found: dict[int, set[int]] = {}
        for assembled, offsets, shape in asked:
            for region in self._regions(assembled, offsets, shape):
                if region.start not in self._shards[region.owner].small and region.low < region.high:
                    segments = range(region.low // SEGMENT_BYTES, (region.high - 1) // SEGMENT_BYTES + 1)
                    found.setdefault(region.owner, set()).update(segments)
        return found

    def close(self) -> None:
        """The mappings belong to whoever brought them."""

    def own(self, rank: int, key: str) -> torch.Tensor:
        """A tensor that a rank of the save had for itself: at once if it came along, else promised."""
        assembled = self._together.own[rank][key]
        out = torch.empty(assembled.global_shape, dtype=_dtype(assembled.dtype))
        regions = list(self._regions(assembled, (0,) * out.dim(), tuple(out.shape)))
        if all(region.start in self._shards[region.owner].small for region in regions):
            self._fill(assembled, out, (0,) * out.dim())
        else:
            self._promised.append((assembled, out))
        return out

    def own_keys(self, rank: int) -> Collection[str]:
        return self._together.own[rank].keys()

    def _found(self, targets: Sequence[Target]) -> list[tuple[Target, Assembled]]:
        whole = self._together.whole
        missing = sorted({target.key for target in targets} - whole.keys())
        if missing:
            shown = ", ".join(missing[:20])
            raise MissingKeysError(f"{self.folder} lacks {len(missing)} of the items asked for: {shown}.")
        for target in targets:
            _check_fits(target, whole[target.key], self.folder)
        return [(target, whole[target.key]) for target in targets]

    def _fill(self, assembled: Assembled, out: torch.Tensor, offsets: tuple[int, ...]) -> None:
        dtype = _dtype(assembled.dtype)
        for region in self._regions(assembled, offsets, tuple(out.shape)):
            small = self._shards[region.owner].small.get(region.start)
            if small is None:
                content = self._content(region.owner, region.low, region.high)
            else:
                first = region.low - region.start
                content = torch.frombuffer(bytearray(small), dtype=torch.uint8)[
                    first : first + region.high - region.low
                ]
            rows = typed_view(content, 0, dtype, region.rows)
            into = _narrow(out.detach(), region.into, region.lengths)
            into.copy_(_narrow(rows, region.within, region.lengths))

    def _regions(self, assembled: Assembled, offsets: tuple[int, ...], shape: tuple[int, ...]) -> Iterator[_Region]:
        itemsize = _dtype(assembled.dtype).itemsize
        for part in assembled.parts:
            region = _overlap(part, self._choose(part), offsets, shape, itemsize)
            if region is not None:
                yield region

    def _choose(self, part: Part) -> tuple[int, int]:
        """Of several shards with the same bytes: one that lies here, else one as good as any, not always the first.

        Equal for all ranks of a node, so that it is brought to the node once.
        """
        nearby = [each for each in part.at if each[0] in self._here] or list(part.at)
        return nearby[zlib.crc32(repr((part.offsets, part.shape, part.at)).encode()) % len(nearby)]


class _Own(Mapping[str, torch.Tensor]):
    """What a rank of the save had for itself; tensors are made when they are asked for."""

    def __init__(self, reader: ShardsReader, rank: int) -> None:
        self._reader = reader
        self._rank = rank

    def __getitem__(self, key: str) -> torch.Tensor:
        if key not in self._reader.own_keys(self._rank):
            raise KeyError(key)
        return self._reader.own(self._rank, key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._reader.own_keys(self._rank))

    def __len__(self) -> int:
        return len(self._reader.own_keys(self._rank))


@dataclass(frozen=True)
class _Region:
    """Rows of one part that a target needs: bytes `low` to `high` of the shard of `owner`, of the shape `rows`.

    `start`: where the part begins. `within` the rows and `into` the target, both of `lengths`, is what is copied.
    """

    owner: int
    start: int
    low: int
    high: int
    rows: tuple[int, ...]
    within: tuple[int, ...]
    into: tuple[int, ...]
    lengths: tuple[int, ...]


def _overlap(
    part: Part, at: tuple[int, int], offsets: tuple[int, ...], shape: tuple[int, ...], itemsize: int
) -> _Region | None:
    """What of the part lies in the box of `shape` at `offsets`; None: nothing."""
    owner, start = at
    low = [max(mine, its) for mine, its in zip(part.offsets, offsets, strict=True)]
    high = [
        min(mine + length, its + wanted)
        for mine, length, its, wanted in zip(part.offsets, part.shape, offsets, shape, strict=True)
    ]
    lengths = tuple(stop - begin for begin, stop in zip(low, high, strict=True))
    if any(length <= 0 for length in lengths):
        return None
    within = [begin - mine for begin, mine in zip(low, part.offsets, strict=True)]
    into = tuple(begin - its for begin, its in zip(low, offsets, strict=True))
    row_bytes = itemsize
    for length in part.shape[1:]:
        row_bytes *= length
    first, count = (within[0], lengths[0]) if part.shape else (0, 1)
    begin = start + first * row_bytes
    rows = (count, *part.shape[1:]) if part.shape else ()
    if part.shape:
        within[0] = 0
    return _Region(owner, start, begin, begin + count * row_bytes, rows, tuple(within), into, lengths)


def _check_fits(target: Target, stored: Assembled, folder: Path) -> None:
    sizes, shape, expected = tuple(target.out.shape), stored.global_shape, target.global_shape
    inside = len(sizes) == len(target.offsets) == len(shape) and all(
        start >= 0 and start + length <= whole
        for start, length, whole in zip(target.offsets, sizes, shape, strict=True)
    )
    if not inside or (expected is not None and tuple(expected) != shape):
        wanted = f"{sizes} at {target.offsets}" + (f" of {tuple(expected)}" if expected is not None else "")
        raise LayoutMismatchError(f"{target.key} has shape {shape} in {folder}; asked for is {wanted}.")


def _narrow(tensor: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> torch.Tensor:
    for axis, (start, length) in enumerate(zip(starts, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _dtype(name: str) -> torch.dtype:
    return getattr(torch, name)  # type: ignore[no-any-return]  # `read_header` admits names of dtypes only
