"""The format `fsdp_dtensor`: one nested dictionary in a folder of torch.distributed.checkpoint, and nothing to mark it.

Megatron's FSDP writes it, and it is what plain DCP makes of an FSDP2 model. `.metadata` without `metadata.json` is its
sign. This file says whether such a folder is whole, without torch; writing and reading are in the two files beside it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.errors import CorruptCopyError, UnsafePathError
from resilience.formats.dcp_items import stored_items
from resilience.formats.dcp_metadata import METADATA, read_metadata
from resilience.formats.directory import COMMON, INTEGRITY, MARKER
from resilience.formats.fsdp_dtensor_keys import is_model_key, tree_keys
from resilience.formats.protocol import CheckpointReader, RankShare, SaveMeta, StoredItem
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_inventory import folder_problem, read_folder

if TYPE_CHECKING:
    from resilience.formats.kept_plan import KeptPlan
    from resilience.replication.communicator import Agreements

__all__ = ["NAME", "FsdpDtensor"]

NAME = "fsdp_dtensor"


class FsdpDtensor:
    """`registry` gives it out."""

    name = NAME

    def __init__(self, kept: KeptPlan | None = None) -> None:
        self._kept = kept

    def keeping_plans(self) -> FsdpDtensor:
        from resilience.formats.kept_plan import KeptPlan

        return FsdpDtensor(KeptPlan())

    def save(
        self,
        folder: Path,
        share: RankShare,
        meta: SaveMeta,
        agreements: Agreements,
        fs: FileSystem,
    ) -> None:
        from resilience.formats.fsdp_dtensor_beside import FSDP_DTENSOR
        from resilience.formats.torch_dist_writer import write_checkpoint

        write_checkpoint(folder, share, meta, agreements, fs, FSDP_DTENSOR, kept=self._kept)

    def open(self, folder: Path, fs: FileSystem) -> CheckpointReader:
        from resilience.formats.fsdp_dtensor_reader import FsdpDtensorReader

        problem = self.problem(folder, fs)
        if problem:
            raise CorruptCopyError(f"{folder} is no whole checkpoint: {problem}.")
        return FsdpDtensorReader(folder, fs)

    def problem(self, folder: Path, fs: FileSystem) -> str:
        try:
            record = read_folder(folder, fs)
            if record is not None and record.format != NAME:
                return f"{MARKER} is missing"
            if record is not None:
                torn = folder_problem(folder, record, fs)
                missing = next((name for name in (INTEGRITY, METADATA) if fs.stat(folder / name) is None), "")
                return torn or (f"{missing} is missing" if missing else "")
            return _foreign_problem(folder, fs)
        except (CorruptCopyError, UnsafePathError, FileNotFoundError) as error:
            return str(error).rstrip(".")

    def data_files(self, folder: Path, fs: FileSystem) -> frozenset[str]:
        return frozenset(read_metadata(folder, fs).file_bytes)

    def items(self, folder: Path, fs: FileSystem) -> Sequence[StoredItem]:
        wrapped = read_folder(folder, fs) is None
        return stored_items(folder, fs, lambda keys: tree_keys(keys, wrapped=wrapped))


def _foreign_problem(folder: Path, fs: FileSystem) -> str:
    """A folder of `torch_dist` that was left before its last files were written looks almost like one of these."""
    if fs.stat(folder / COMMON) is not None:
        return f"{MARKER} is missing beside {COMMON}"
    index = read_metadata(folder, fs)
    if not any(map(is_model_key, index.tensors)):
        return f"{MARKER} is missing, and no tensor is called model.…, as those of {NAME} are"
    return index.torn(folder, fs)
