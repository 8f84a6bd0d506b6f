"""How a model is loaded from a persistent checkpoint for evaluation: one process, no process group, no trainer."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from resilience.errors import CheckpointNotFoundError, SourceUnavailableError
from resilience.formats.registry import foreign_problem, format_name, open_checkpoint
from resilience.stores.filesystem import FileSystem, PosixFileSystem
from resilience.stores.shared_inventory import newer_than_tracker
from resilience.stores.shared_store import SharedStore

if TYPE_CHECKING:
    import torch

__all__ = ["LoadedModel", "find_checkpoint", "load_checkpoint"]


class LoadedModel(dict[str, "torch.Tensor"]):
    """A model's state dict, and what `strictness` let pass.

    A model that was saved in several chunks has its keys as `model_chunk_1.…` from the second chunk on.
    """

    def __init__(
        self,
        tensors: Mapping[str, torch.Tensor],
        folder: Path,
        missing_keys: frozenset[str] = frozenset(),
        unexpected_keys: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(tensors)
        self.folder = folder
        self.missing_keys = missing_keys
        self.unexpected_keys = unexpected_keys


def load_checkpoint(
    path: str | os.PathLike[str],
    model: torch.nn.Module | None = None,
    *,
    strictness: str = "assume_ok_unexpected",
) -> LoadedModel:
    """The model's tensors of a persistent checkpoint, on the CPU; with `model` they are put into it, wherever it is.

    `path`: an `iter_NNNNNNN` folder, or the directory above, of which the newest checkpoint by its tracker is taken.
    The files are held against `integrity.json` if there is one. With `model` the result holds the model's own tensors.

    CheckpointNotFoundError; MissingKeysError as `strictness` says; LayoutMismatchError for another shape;
    CorruptCopyError for damage. The model is changed only after everything was found and verified.
    """
    from resilience.formats.load_model import load_into

    fs = PosixFileSystem()
    folder = find_checkpoint(Path(path), fs)
    reader = open_checkpoint(folder, fs)
    try:
        tensors, difference = load_into(reader, model, strictness)
        return LoadedModel(tensors, reader.folder, difference.missing, difference.unexpected)
    finally:
        reader.close()


def find_checkpoint(path: Path, fs: FileSystem) -> Path:
    """`path` itself if it is a checkpoint's folder, else the newest usable one in it by its tracker."""
    if format_name(path, fs) is not None:
        return path
    store = SharedStore(path, fs, source="load", foreign_problem=foreign_problem)
    found = store.inventory(None)
    if found.unknown:
        raise SourceUnavailableError(f"{path} cannot be read: {found.unknown}")
    for save in found.shared_saves:
        if not save.problem and not newer_than_tracker(save):
            return store.folder_of(save.save)
    there = "; ".join(f"iteration {save.save.iteration}: {save.problem}" for save in found.shared_saves[:10])
    raise CheckpointNotFoundError(f"{path} holds no checkpoint that can be loaded ({there or 'it has none at all'}).")
