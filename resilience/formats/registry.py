"""Which formats of persistent checkpoints there are, by the name in `ckpt_format`; the only place that asks for one.

Importing this file needs no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from resilience.errors import ConfigError, CorruptCopyError
from resilience.formats.dcp_metadata import METADATA
from resilience.formats.directory import marked_backend
from resilience.formats.fsdp_dtensor import FsdpDtensor
from resilience.formats.protocol import CheckpointFormat, CheckpointReader, StoredItem
from resilience.formats.torch_dist import TorchDist
from resilience.formats.zarr_v3 import ZarrV3
from resilience.stores.filesystem import FileSystem

__all__ = ["checkpoint_format", "data_files", "foreign_problem", "format_name", "open_checkpoint", "stored_items"]

_FORMATS: dict[str, CheckpointFormat] = {
    TorchDist.name: TorchDist(),
    ZarrV3.name: ZarrV3(),
    FsdpDtensor.name: FsdpDtensor(),
}


def checkpoint_format(name: str) -> CheckpointFormat:
    """The format called `name`; ConfigError that says what there is."""
    if name in _FORMATS:
        return _FORMATS[name]
    there = ", ".join(map(repr, _FORMATS))
    raise ConfigError(f"ckpt_format {name!r} is unknown; this version has {there}.", advice="Use torch_dist.")


def format_name(folder: Path, fs: FileSystem) -> str | None:
    """What a checkpoint folder says it is; None if it does not look like one."""
    marked = marked_backend(folder, fs)
    if marked is not None:
        return marked
    return FsdpDtensor.name if fs.stat(folder / METADATA) is not None else None


def open_checkpoint(folder: Path, fs: FileSystem) -> CheckpointReader:
    """Open a folder in the format it is in; CorruptCopyError if it is in none that can be read."""
    return _format_of(folder, fs).open(folder, fs)


def data_files(folder: Path, fs: FileSystem) -> frozenset[str]:
    """Which of its files hold a folder's tensors, without torch; raises as `open_checkpoint` does."""
    return _format_of(folder, fs).data_files(folder, fs)


def stored_items(folder: Path, fs: FileSystem) -> Sequence[StoredItem]:
    """Everything that a folder stores, by key, without torch; raises as `open_checkpoint` does."""
    return _format_of(folder, fs).items(folder, fs)


def _format_of(folder: Path, fs: FileSystem) -> CheckpointFormat:
    name = format_name(folder, fs)
    form = _FORMATS.get(name or "")
    if form is None:
        raise CorruptCopyError(f"{folder}: {_unreadable(name)}.")
    return form


def foreign_problem(folder: Path, fs: FileSystem) -> str:
    """Why a folder that another program wrote cannot be used; for `SharedStore`, which knows no formats."""
    name = format_name(folder, fs)
    form = _FORMATS.get(name or "")
    return form.problem(folder, fs) if form else _unreadable(name)


def _unreadable(name: str | None) -> str:
    if name is None:
        return "it has neither metadata.json nor .metadata"
    return f"its format {name[:40]!r} is not one that this version reads ({', '.join(_FORMATS)})"
