"""The format `zarr`: tensors in a group of zarr v3, which plain zarr opens, beside the small files of Megatron Core.

This file says whether such a folder is whole, without torch; writing and reading are in the files beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.formats.directory import INTEGRITY, MARKER, marked_backend
from resilience.formats.keys import tree_key
from resilience.formats.protocol import CheckpointReader, RankShare, SaveMeta, StoredItem
from resilience.formats.zarr_grid import Grid
from resilience.formats.zarr_metadata import ARRAY, STORE, ZarrArray, read_index
from resilience.formats.zarr_names import OBJECTS
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_inventory import folder_problem, read_folder

if TYPE_CHECKING:
    from resilience.formats.kept import Kept
    from resilience.formats.zarr_plan import Planned
    from resilience.replication.communicator import Agreements

__all__ = ["NAME", "ZarrV3"]

NAME = "zarr"
_GROUP = f"{STORE}/{ARRAY}"


class ZarrV3:
    """`registry` gives it out."""

    name = NAME

    def __init__(self, kept: Kept[Planned] | None = None) -> None:
        self._kept = kept

    def keeping_plans(self) -> ZarrV3:
        from resilience.formats.kept import Kept

        return ZarrV3(Kept())

    def save(
        self,
        folder: Path,
        share: RankShare,
        meta: SaveMeta,
        agreements: Agreements,
        fs: FileSystem,
    ) -> None:
        from resilience.formats.zarr_writer import write_checkpoint

        write_checkpoint(folder, share, meta, agreements, fs, self._kept)

    def open(self, folder: Path, fs: FileSystem) -> CheckpointReader:
        from resilience.formats.zarr_reader import ZarrReader

        problem = self.problem(folder, fs)
        if problem:
            raise CorruptCopyError(f"{folder} is no whole checkpoint: {problem}.")
        return ZarrReader(folder, fs)

    def problem(self, folder: Path, fs: FileSystem) -> str:
        try:
            if marked_backend(folder, fs) is None:
                return f"{MARKER} is missing"
            record = read_folder(folder, fs)
            torn = folder_problem(folder, record, fs) if record is not None else ""
            needed = (_GROUP,) if record is None else (INTEGRITY, _GROUP)
            missing = next((name for name in needed if fs.stat(folder / name) is None), "")
            if torn or missing:
                return torn or f"{missing} is missing"
            if record is None:  # of ours the group's digest is known, and the metadata need not be parsed
                read_index(folder, fs)
            return ""
        except (CorruptCopyError, UnsafePathError, FileNotFoundError) as error:
            return str(error).rstrip(".")

    def data_files(self, folder: Path, fs: FileSystem) -> frozenset[str]:
        record = read_folder(folder, fs)
        if record is not None:
            inside = (f"{STORE}/", f"{OBJECTS}/")
            return frozenset(name for name in record.files if name.startswith(inside) and name != _GROUP)
        arrays = read_index(folder, fs).arrays.values()
        return frozenset(name for array in arrays for _, name in _chunks_of(array, folder, fs))

    def items(self, folder: Path, fs: FileSystem) -> Sequence[StoredItem]:
        index = read_index(folder, fs)
        named = {**index.arrays, **{alias: index.arrays[key] for alias, key in index.aliases.items()}}
        items = [
            StoredItem(
                key,
                "tensor",
                [_told(place, name, array.grid) for place, name in _chunks_of(array, folder, fs)],
                tree_key(key),
                array.dtype,
                array.grid.shape,
            )
            for key, array in named.items()
        ]
        for name in fs.list_dir(folder / OBJECTS):
            file = f"{OBJECTS}/{name}"
            found = fs.stat(folder / file)
            items.append(StoredItem(file, "object", [{"file": file, "bytes": found.nbytes if found else 0}]))
        return sorted(items, key=lambda item: item.key)


def _chunks_of(array: ZarrArray, folder: Path, fs: FileSystem) -> Iterator[tuple[tuple[int, ...], str]]:
    """Place and file of an array's chunks that are there: another program leaves out those of the fill value."""
    grid = array.grid
    for place in grid.touched((0,) * len(grid.shape), grid.shape):
        name = array.chunk_file(place)
        if fs.stat(folder / name) is not None:
            yield place, name


def _told(place: Sequence[int], name: str, grid: Grid) -> dict[str, object]:
    overlap = grid.overlap(place, (0,) * len(grid.shape), grid.shape)
    return {"offsets": list(overlap.starts), "shape": list(overlap.lengths), "file": name}
