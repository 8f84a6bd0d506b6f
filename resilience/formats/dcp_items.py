"""What stands in a folder of torch.distributed.checkpoint, as `inspect` tells it. Importing this needs no torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from resilience.formats.dcp_metadata import read_metadata
from resilience.formats.protocol import StoredItem
from resilience.stores.filesystem import FileSystem

__all__ = ["stored_items"]


def stored_items(
    folder: Path, fs: FileSystem, paths_of: Callable[[Iterable[str]], Mapping[str, str]]
) -> list[StoredItem]:
    """By key; `paths_of` gives the tree path of each tensor's key."""
    stored = read_metadata(folder, fs)
    paths = paths_of(stored.tensors)
    items = [
        StoredItem(
            key,
            "tensor",
            [
                {"offsets": list(chunk.offsets), "shape": list(chunk.sizes), "file": chunk.extent.file}
                for chunk in region.chunks
            ],
            paths[key],
            region.dtype,
            region.shape,
        )
        for key, region in stored.tensors.items()
    ]
    items += [
        StoredItem(key, "object", [{"file": extent.file, "bytes": extent.nbytes}])
        for key, extent in stored.objects.items()
    ]
    return sorted(items, key=lambda item: item.key)
