"""What every format of persistent checkpoints takes and gives: the values that cross its border, and its two ports.

Importing this file needs no torch.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from resilience.planning.inventory import SaveId
from resilience.stores.filesystem import FileSystem
from resilience.stores.shared_records import FolderRecord

if TYPE_CHECKING:
    import torch

    from resilience.replication.communicator import Agreements

__all__ = [
    "CheckpointFormat",
    "CheckpointReader",
    "Chunk",
    "RankShare",
    "RankState",
    "SaveMeta",
    "StateReader",
    "StoredItem",
    "StoredTensor",
    "Target",
]


@dataclass(frozen=True)
class Chunk:
    """A part of one tensor that this rank writes.

    `key` is the tree path (`model/0/layers.0.weight`). `tensor` is on the CPU and must not change until the save is
    over. `per_rank`: this rank's own, whatever others have under this key; else the chunks of all ranks together cover
    `global_shape` exactly once.
    """

    key: str
    tensor: torch.Tensor
    global_shape: tuple[int, ...]
    offsets: tuple[int, ...]
    per_rank: bool

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype


@dataclass(frozen=True)
class RankShare:
    """What one rank gives to a save.

    `values`: the JSON of its state's tree; without any, the rank has nothing of its own and gets no object. `aliases`:
    tree path → the earlier path that has the same tensor. `files`: its files besides the tensors, by name relative to
    the folder (`dataloader_state/train_dataloader_dprank000.pt`). `common`: entries of `common.pt`, tensors and plain
    values only; rank 0's count. `objects`: what other programs look for under keys of their own
    (`rng_state/shard_0_1`), each given by one rank; formats that have no such objects leave them out.
    """

    chunks: Sequence[Chunk]
    values: bytes
    aliases: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, bytes] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class SaveMeta:
    """What a save says about itself, equal on all ranks.

    `train_state` has Megatron Bridge's counters (`consumed_train_samples`, `do_train`, …): those it lacks are written
    as 0 or False, and `step` is the iteration. `run_config` becomes `run_config.yaml`. `tp` and `pp` are the sizes of
    tensor and pipeline parallelism (None: nobody said). `content` goes into
    `content_metadata`, beside what is always there. `run_id` "": the content is another program's, and the folder gets
    no record.
    """

    iteration: int
    run_id: str
    attempt: str
    generation: int
    base: SaveId | None
    fork: tuple[int, str] | None
    world_size: int
    train_state: Mapping[str, float | int | bool] = field(default_factory=dict)
    run_config: Mapping[str, Any] | None = None
    save_optim: bool = True
    save_rng: bool = True
    tp: int | None = None
    pp: int | None = None
    fully_parallel_save: bool = True
    content: Mapping[str, Any] = field(default_factory=dict)

    @property
    def save(self) -> SaveId:
        return SaveId(self.iteration, self.generation, self.attempt)


@dataclass(frozen=True)
class StoredTensor:
    """What a checkpoint says of one global tensor."""

    dtype: torch.dtype
    global_shape: tuple[int, ...]


@dataclass(frozen=True)
class StoredItem:
    """One entry of a checkpoint, for people.

    `kind`: "tensor" or "object". `chunks`: a tensor's parts, with `offsets`, `shape` and `file`, or an object's `file`
    and `bytes`. `path`: a tensor's tree path.
    """

    key: str
    kind: str
    chunks: Sequence[Mapping[str, Any]]
    path: str = ""
    dtype: str | None = None
    global_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class Target:
    """A place to read into: `out` takes the region of `key` that begins at `offsets` and has the shape of `out`.

    `global_shape`, where given, must be the checkpoint's. A dtype other than the stored one is converted to.
    """

    key: str
    out: torch.Tensor
    offsets: tuple[int, ...]
    global_shape: tuple[int, ...] | None = None


@dataclass(frozen=True)
class RankState:
    """What one rank alone knew: its values (the JSON of its state's tree) and its tensors by tree path.

    A tensor of the model or the optimizer that no other rank had is not here but in the reader's `index`. `told`: the
    tensors' fingerprints, where they are known without looking at the tensors.
    """

    values: bytes
    tensors: Mapping[str, torch.Tensor]
    told: Mapping[str, str] | None = None

    @property
    def digests(self) -> Mapping[str, str]:
        """Of dtype, shape and bytes of each tensor."""
        from resilience.state.saved_world import fingerprint

        if self.told is not None:
            return self.told
        return {path: fingerprint(tensor) for path, tensor in self.tensors.items()}


class StateReader(Protocol):
    """What a load needs of a save, wherever its bytes lie: in one folder, or in shards on many nodes.

    Nothing here is collective; every rank opens its own.
    """

    @property
    def folder(self) -> Path:
        """Where it lies, for people too."""
        ...

    @property
    def record(self) -> FolderRecord | None:
        """Which save it is; None for a checkpoint that another program wrote."""
        ...

    @property
    def index(self) -> Mapping[str, StoredTensor]:
        """Every global tensor by tree path. A model's tensor that differs per rank is here as the lowest rank's."""
        ...

    @property
    def aliases(self) -> Mapping[str, str]:
        """Of tensors in the index that have the same bytes (tied weights): path → the one path that is no alias."""
        ...

    @property
    def common(self) -> Mapping[str, Any]:
        """What is not sharded: `common.pt` or the object `common_state`; nothing in shards."""
        ...

    @property
    def objects(self) -> Collection[str]:
        """Keys of what is stored beside tensors for other programs, or by them (`rng_state/shard_0.1_1.2`)."""
        ...

    def read_object(self, key: str) -> Any:
        """One of them; CorruptCopyError if it is more than tensors, numpy arrays of numbers and plain values."""
        ...

    def rank_state(self, rank: int) -> RankState | None:
        """What `rank` of the saving world stored for itself alone; None if this checkpoint has nothing for it."""
        ...

    def read(self, targets: Sequence[Target]) -> None:
        """Fill all targets.

        MissingKeysError for keys that are not there and LayoutMismatchError for other global shapes, both before a
        byte is read; CorruptCopyError for bytes that are not what the checkpoint says.
        """
        ...

    def close(self) -> None:
        """Let go of all memory that the files take; whoever reads afterwards maps them again."""
        ...


class CheckpointReader(StateReader, Protocol):
    """One complete checkpoint in a folder, open for reading."""

    def files(self, targets: Sequence[Target], rank: int | None = None) -> frozenset[str]:
        """Names of the files that `read(targets)`, `rank_state(rank)` and opening the checkpoint touch."""
        ...

    def verify(self, files: Iterable[str] | None = None) -> None:
        """Read `files` (default: all) in full against `integrity.json`; CorruptCopyError on the first that differs.

        A checkpoint without digests passes: there is nothing to hold it against.
        """
        ...


class CheckpointFormat(Protocol):
    """One way to lay a checkpoint out in a folder."""

    @property
    def name(self) -> str: ...

    def keeping_plans(self) -> CheckpointFormat:
        """The same format for one series of saves whose structure is assumed to stay; itself if it plans nothing."""
        ...

    def save(
        self,
        folder: Path,
        share: RankShare,
        meta: SaveMeta,
        agreements: Agreements,
        fs: FileSystem,
    ) -> None:
        """Write a whole checkpoint into the empty `folder`; everything is fsynced, the folder itself is not.

        Collective over `agreements` (all ranks of the save, in rank order). SaveFailedError on all ranks if any of them
        failed.
        """
        ...

    def open(self, folder: Path, fs: FileSystem) -> CheckpointReader:
        """CorruptCopyError, UnsafePathError or FileNotFoundError if the folder is not a whole checkpoint."""
        ...

    def problem(self, folder: Path, fs: FileSystem) -> str:
        """Why the folder is no complete checkpoint of this format, without reading its tensors; "" if it is one."""
        ...

    def data_files(self, folder: Path, fs: FileSystem) -> frozenset[str]:
        """Names, relative to the folder, of the files that hold its tensors; without torch. Raises as `open` does."""
        ...

    def items(self, folder: Path, fs: FileSystem) -> Sequence[StoredItem]:
        """Everything that it stores, by key; without torch. Raises as `open` does."""
        ...
