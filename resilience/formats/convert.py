"""How a persistent checkpoint is written again in another format, tensor by tensor, without a process group.

The source is held against its digests first. Then one process does what the ranks of the save did, in turn
(`convert_ranks`): each gives its own state, and rank 0 gives the tensors that are shared, which are read part by part
as they are written. What is made lies beside the destination and is renamed there once all of it is durable.

A checkpoint of ours stays the same save of the same run, so that a resume from it is the same to the bit. What another
program wrote stays another program's: it gets no record and no ranks' states.
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from resilience.config.yaml_bounds import unfolds_too_far
from resilience.errors import AnotherJobError, CommandError, CorruptCopyError, StoreError
from resilience.formats.convert_parts import Extent, parts_of
from resilience.formats.convert_ranks import in_turn
from resilience.formats.convert_safetensors import write_safetensors
from resilience.formats.convert_source import PART_BYTES, StoredChunk, StoredTensors
from resilience.formats.directory import RUN_CONFIG
from resilience.formats.extras import TOKENIZER
from resilience.formats.folder_files import read_train_state
from resilience.formats.keys import MODEL_PREFIX
from resilience.formats.load import find_checkpoint
from resilience.formats.loader_files import loader_file, loader_states
from resilience.formats.protocol import CheckpointReader, Chunk, RankShare, RankState, SaveMeta, StoredTensor
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.stores.filesystem import FileSystem
from resilience.stores.lock import ALL_RANKS, LOCK
from resilience.stores.shared_records import RECORD_NAME, Owner, encode_owner, folder_name, iteration_of
from resilience.stores.trackers import RELEASE, TEXT_TRACKER, TRAIN_STATE, TRAIN_STATE_TRACKER

__all__ = ["SAFETENSORS", "Converted", "convert"]

SAFETENSORS = "safetensors"
_FILE_LIMIT = 1 << 30
_CONFIG_LIMIT = 64 << 20
_WRITTEN_ANEW = ("checkpoint_version", "iteration", "content_metadata")


@dataclass(frozen=True)
class Converted:
    """What was made. `items`: tensors; `path`: the new checkpoint's folder, or the directory of safetensors files."""

    path: Path
    items: int
    nbytes: int
    iteration: int
    world_size: int


def convert(source: Path, destination: Path, to: str, fs: FileSystem) -> Converted:
    """Write the checkpoint in `source` (a folder `iter_*`, or the newest below a directory) again as `to`.

    `destination` is a directory that does not exist yet, or is empty; CommandError otherwise. It becomes a base
    directory with trackers, or holds `*.safetensors`. CheckpointNotFoundError, CorruptCopyError, StoreError.
    """
    _refuse_what_is_there(destination, fs)
    reader = open_checkpoint(find_checkpoint(source, fs), fs)
    prefix = f".{destination.name}.converting-"
    beside = destination.with_name(prefix + secrets.token_hex(4))
    lock = fs.lock(beside, ALL_RANKS)
    try:
        reader.verify()
        tensors = StoredTensors(reader, fs)
        _sweep_killed(destination.parent, prefix, fs)
        fs.make_dir(beside)
        lock.acquire()
        if to == SAFETENSORS:
            inner = Path()
            write_safetensors(beside, tensors, fs)
        else:
            inner = Path(_write_checkpoint(beside, tensors, to, fs))
        nbytes = _make_durable(beside, fs)
        fs.rename(beside, destination)
        fs.unlink(destination / LOCK)
        fs.fsync_dir(destination)
        fs.fsync_dir(destination.parent)
    except BaseException:
        fs.remove_tree(beside)
        raise
    finally:
        lock.release()
        reader.close()
    world_size = reader.record.world_size if reader.record else 1
    return Converted(destination / inner, len(reader.index), nbytes, _iteration(reader, fs), world_size)


def _sweep_killed(parent: Path, prefix: str, fs: FileSystem) -> None:
    """Remove what conversions to the same destination were making when they were killed: nobody holds its lock."""
    for name in fs.list_dir(parent):
        if not name.startswith(prefix):
            continue
        lock = fs.lock(parent / name, ALL_RANKS)
        try:
            lock.acquire()
        except (AnotherJobError, StoreError):
            continue
        try:
            fs.remove_tree(parent / name)
        finally:
            lock.release()


def _refuse_what_is_there(destination: Path, fs: FileSystem) -> None:
    found = fs.stat(destination)
    if found is not None and (not found.is_dir or fs.list_dir(destination)):
        raise CommandError(
            f"{destination} is there and is no empty directory.", advice="Give one that does not exist yet.", status=2
        )


def _write_checkpoint(root: Path, tensors: StoredTensors, to: str, fs: FileSystem) -> str:
    """A base directory with one checkpoint; returns the folder's name."""
    reader = tensors.reader
    meta = _meta(reader, fs)
    name = reader.folder.name
    name = name if iteration_of(name) is not None or name == RELEASE else folder_name(meta.iteration)
    fs.make_dir(root / name)
    source = _Shares(tensors, meta, fs)
    shares = [source.of_rank(rank) for rank in range(meta.world_size)]
    form = checkpoint_format(to)
    in_turn(meta.world_size, lambda ranks: form.save(root / name, shares[ranks.rank], meta, ranks, fs))
    if meta.run_id:
        owner = Owner(meta.run_id, meta.attempt, meta.generation)
        fs.write_atomic(root / RECORD_NAME, encode_owner(owner))
    fs.write_atomic(root / TEXT_TRACKER, (RELEASE if name == RELEASE else str(meta.iteration)).encode())
    if name != RELEASE:
        fs.write_atomic(root / TRAIN_STATE_TRACKER, fs.read(root / name / TRAIN_STATE))
    return name


def _make_durable(root: Path, fs: FileSystem) -> int:
    """The folders that `save` left to whoever commits; returns the bytes of all files."""
    folders = [root]
    nbytes = 0
    for folder in folders:
        for name in fs.list_dir(folder):
            found = fs.stat(folder / name)
            if found is not None and found.is_dir:
                folders.append(folder / name)
            elif found is not None:
                nbytes += found.nbytes
    for folder in reversed(folders):
        fs.fsync_dir(folder)
    return nbytes


def _iteration(reader: CheckpointReader, fs: FileSystem) -> int:
    if reader.record is not None:
        return reader.record.save.iteration
    named = iteration_of(reader.folder.name)
    counters = read_train_state(reader.folder, fs) if named is None else None
    return int(counters["step"]) if counters else named or 0


def _meta(reader: CheckpointReader, fs: FileSystem) -> SaveMeta:
    """What the source says about itself."""
    record, config = reader.record, _run_config(reader.folder, fs)
    checkpoint = config.get("checkpoint")
    said: Mapping[str, Any] = checkpoint if isinstance(checkpoint, dict) else {}
    content = reader.common.get("content_metadata")
    return SaveMeta(
        iteration=_iteration(reader, fs),
        run_id=record.run_id if record else "",
        attempt=record.save.attempt if record else "",
        generation=record.save.generation if record else 0,
        base=record.base if record else None,
        fork=record.fork if record else None,
        world_size=record.world_size if record else 1,
        train_state=read_train_state(reader.folder, fs) or {},
        run_config=config,
        save_optim=bool(said.get("save_optim", True)),
        save_rng=bool(said.get("save_rng", True)),
        fully_parallel_save=bool(said.get("fully_parallel_save", True)),
        content=content if isinstance(content, dict) else {},
    )


def _run_config(folder: Path, fs: FileSystem) -> dict[str, Any]:
    path = folder / RUN_CONFIG
    try:
        config = yaml.safe_load(fs.read(path, _CONFIG_LIMIT))
        if unfolds_too_far(config):
            raise CorruptCopyError(f"{path}: its aliases stand for more values than a configuration has.")
    except FileNotFoundError:
        return {}
    except CorruptCopyError:
        raise
    except (yaml.YAMLError, ValueError, TypeError, LookupError, ArithmeticError, RecursionError) as error:
        # what a safe loader makes of a day that is none, a key that cannot be one, or ten thousand brackets
        raise CorruptCopyError(f"{path} cannot be read: {str(error)[:200] or type(error).__name__}") from error
    return config if isinstance(config, dict) else {}


class _Shares:
    """What each rank of the source gives to the save."""

    def __init__(self, tensors: StoredTensors, meta: SaveMeta, fs: FileSystem) -> None:
        self._tensors = tensors
        self._meta = meta
        self._fs = fs
        states = (tensors.rank_state(rank) for rank in range(meta.world_size))
        # the lowest rank that has one of these as its own will give it its plain name, as at the first save
        self._given_by_ranks = {
            path for state in states if state for path in state.tensors if path.startswith(MODEL_PREFIX)
        }

    def of_rank(self, rank: int) -> RankShare:
        state = self._tensors.rank_state(rank) if self._meta.run_id else None
        if self._meta.run_id and state is None:
            raise CorruptCopyError(f"{self._tensors.reader.folder} holds no state of rank {rank}.")
        own, aliases = self._own(rank, state) if state else ([], {})
        values = state.values if state else b""
        if rank != 0:
            return RankShare(own, values, aliases)
        reader = self._tensors.reader
        common = {name: value for name, value in reader.common.items() if name not in _WRITTEN_ANEW}
        chunks = [*own, *self._shared()]
        return RankShare(chunks, values, {**reader.aliases, **aliases}, _files(reader.folder, self._fs), common)

    def _own(self, rank: int, state: RankState) -> tuple[list[Chunk], dict[str, str]]:
        """What the rank has alone; tensors with the same memory are one under several names."""
        chunks: list[Chunk] = []
        aliases: dict[str, str] = {}
        first: dict[tuple[object, ...], str] = {}
        for path, tensor in state.tensors.items():
            place = (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape)) if tensor.numel() else (path,)
            root = first.setdefault(place, path)
            if root != path:
                aliases[path] = root
                continue
            stored = StoredTensor(tensor.dtype, tuple(tensor.shape))
            whole: Extent = ((0,) * tensor.dim(), tuple(tensor.shape))
            chunks.append(StoredChunk(path, stored, whole, self._of_state(rank, path), per_rank=True))
        return chunks, aliases

    def _of_state(self, rank: int, path: str) -> Callable[[], torch.Tensor]:
        def read() -> torch.Tensor:
            state = self._tensors.rank_state(rank)
            assert state is not None, "it was there before"
            return state.tensors[path]

        return read

    def _shared(self) -> Iterator[Chunk]:
        tensors = self._tensors
        for path in tensors.roots:
            if path in self._given_by_ranks:
                continue
            stored = tensors.index[path]
            for extent in parts_of(stored.global_shape, tensors.boxes(path), stored.dtype.itemsize, PART_BYTES):
                yield StoredChunk(path, stored, extent, self._of_index(path, extent))

    def _of_index(self, path: str, extent: Extent) -> Callable[[], torch.Tensor]:
        return lambda: self._tensors.part(path, extent)


def _files(folder: Path, fs: FileSystem) -> dict[str, bytes]:
    """The tokenizer's files and the data loaders' states, under the names that ours have."""
    files = {f"{TOKENIZER}/{name}": folder / TOKENIZER / name for name in _inside(folder / TOKENIZER, fs)}
    files |= {loader_file(dp_rank): path for dp_rank, path in loader_states(folder, fs).items()}
    return {name: fs.read(path, _FILE_LIMIT) for name, path in files.items()}


def _inside(folder: Path, fs: FileSystem, within: str = "") -> Iterator[str]:
    """Names of all files in a folder and its sub-folders; links are left out."""
    for name in fs.list_dir(folder / within):
        inner = f"{within}/{name}" if within else name
        found = fs.stat(folder / inner)
        if found is not None and found.is_dir:
            yield from _inside(folder, fs, inner)
        elif found is not None and found.is_file:
            yield inner
