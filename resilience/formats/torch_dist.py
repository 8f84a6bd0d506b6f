"""The format `torch_dist`: a folder of torch.distributed.checkpoint with the small files of Megatron Core.

This file says whether such a folder is whole, without torch; writing and reading are in the two files beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.formats.dcp_items import stored_items
from resilience.formats.dcp_metadata import METADATA, read_metadata
from resilience.formats.directory import COMMON, INTEGRITY, MARKER, marked_backend
from resilience.formats.keys import tree_key
from resilience.formats.protocol import CheckpointReader, RankShare, SaveMeta, StoredItem
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_inventory import folder_problem, read_folder

if TYPE_CHECKING:
    from resilience.formats.kept_plan import KeptPlan
    from resilience.replication.communicator import Agreements

__all__ = ["COMMON_STATE", "NAME", "TorchDist"]

NAME = "torch_dist"
#: From Megatron Core 0.19 on, an object takes the place of `common.pt`.
COMMON_STATE = "common_state/shard_0_1"


class TorchDist:
    """`registry` gives it out."""

    name = NAME

    def __init__(self, kept: KeptPlan | None = None) -> None:
        self._kept = kept

    def keeping_plans(self) -> TorchDist:
        from resilience.formats.kept_plan import KeptPlan

        return TorchDist(KeptPlan())

    def save(
        self,
        folder: Path,
        share: RankShare,
        meta: SaveMeta,
        agreements: Agreements,
        fs: FileSystem,
    ) -> None:
        from resilience.formats.torch_dist_writer import write_checkpoint

        write_checkpoint(folder, share, meta, agreements, fs, kept=self._kept)

    def open(self, folder: Path, fs: FileSystem) -> CheckpointReader:
        from resilience.formats.torch_dist_reader import TorchDistReader

        problem = self.problem(folder, fs)
        if problem:
            raise CorruptCopyError(f"{folder} is no whole checkpoint: {problem}.")
        return TorchDistReader(folder, fs)

    def problem(self, folder: Path, fs: FileSystem) -> str:
        try:
            record = read_folder(folder, fs)
            if record is not None:
                # Ours: the lengths of all files are known, so that the metadata need not be parsed.
                torn = folder_problem(folder, record, fs)
                missing = next((name for name in (INTEGRITY, METADATA) if fs.stat(folder / name) is None), "")
                return torn or (f"{missing} is missing" if missing else "")
            return _foreign_problem(folder, fs)
        except (CorruptCopyError, UnsafePathError, FileNotFoundError) as error:
            return str(error).rstrip(".")

    def data_files(self, folder: Path, fs: FileSystem) -> frozenset[str]:
        return frozenset(read_metadata(folder, fs).file_bytes)

    def items(self, folder: Path, fs: FileSystem) -> Sequence[StoredItem]:
        return stored_items(folder, fs, lambda keys: {key: tree_key(key) for key in keys})


def _foreign_problem(folder: Path, fs: FileSystem) -> str:
    if marked_backend(folder, fs) is None:
        return f"{MARKER} is missing"
    if fs.stat(folder / METADATA) is None:
        return f"{METADATA} is missing"
    index = read_metadata(folder, fs)
    if fs.stat(folder / COMMON) is None and COMMON_STATE not in index.objects:
        return f"{COMMON} is missing"
    return index.torn(folder, fs)
