"""What of a persistent checkpoint goes where in the live state: which parts, which keys, from which of two checkpoints.

Everything is read into staging tensors; the function that comes back copies them, and only then live tensors change.
Differences between the keys that are asked for and those that are there are judged by `dist_ckpt_strictness`. What the
checkpoint lacks of the model comes from `pretrained_checkpoint`, if there is one (an adapter on a frozen base).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from resilience.config import CheckpointConfig
from resilience.errors import CorruptCopyError, LayoutMismatchError, NoUsableSaveError, ResilienceError
from resilience.formats.by_layer import LayeredReader
from resilience.formats.folder_files import read_train_state
from resilience.formats.in_buckets import lies_in_buckets, seen_by_parameter
from resilience.formats.keys import MODEL_PREFIX, stored_key
from resilience.formats.loader_files import read_loader
from resilience.formats.optimizer_view import OptimizerView
from resilience.formats.parallel_load import PeerFailedError, agree, read_together
from resilience.formats.protocol import CheckpointReader, RankState, StateReader, Target
from resilience.formats.strictness import KeyDifference, judge_keys, looks_at_missing
from resilience.planning.decision import Candidate
from resilience.replication.communicator import Agreements, SoloAgreements
from resilience.reports import Resume
from resilience.restore_foreign import foreign_extra_state, foreign_rng
from resilience.restore_optimizer import Adopted, adopt
from resilience.restore_targets import converted, index_of, staging, stored_like
from resilience.snapshot.memory_copy import copy_tensors
from resilience.state.items import Item, SavedItem, blocks_of
from resilience.state.live_tensors import cut_as_placed
from resilience.state.load_plan import LoadPlan
from resilience.state.main_parameters import StoredWeights, keeps_main_parameters, renew_main_parameters
from resilience.state.reconcile import reconcile
from resilience.state.recut import is_cut_alike, recut
from resilience.state.saved_world import SavedWorld, layout_of, tree_of
from resilience.state.sharding import without_block
from resilience.state.training_state import PARTS, TrainingState
from resilience.state.tree import encode, path_component
from resilience.stores.filesystem import FileSystem
from resilience.stores.trackers import RELEASE

__all__ = ["Peers", "Stager"]

_MODEL_ONLY = ("model",)
#: Parts that a checkpoint may have been saved without (`save_optim`, `save_rng`).
_OPTIONAL = ("optimizer", "scheduler", "rng")


@dataclass(frozen=True)
class Peers:
    """How this rank talks to the others while it loads; default: there are none.

    `everyone`: all ranks. `open_replicas` opens a new group of the ranks that hold the same parameters, collectively.
    `dp_rank` of `dp_size` is this rank's place in the data.
    """

    everyone: Agreements = field(default_factory=SoloAgreements)
    open_replicas: Callable[[], Agreements] = SoloAgreements
    dp_rank: int = 0
    dp_size: int = 1


@dataclass(frozen=True)
class _Wanted:
    """A load that fits, before anything is read. `staged` holds one tensor for each of the plan's targets."""

    plan: LoadPlan
    parts: Sequence[str]
    staged: Sequence[torch.Tensor]
    targets: Sequence[Target]
    base_targets: Sequence[Target]
    asked: frozenset[str]
    unexpected: frozenset[str]


class Stager:
    """One load of one checkpoint on one rank.

    `open_base` opens the newest checkpoint of `pretrained_checkpoint`, whose files are held against their digests if
    `verify` says so (those of the checkpoint itself were, before).
    """

    def __init__(
        self,
        reader: StateReader,
        chosen: Candidate,
        checkpoint: CheckpointConfig,
        open_base: Callable[[], CheckpointReader | None],
        rank: int,
        peers: Peers,
        fs: FileSystem,
        tell: Callable[..., None],
        *,
        verify: bool = True,
        bring: Callable[[Sequence[Target]], None] | None = None,
    ) -> None:
        """`bring` has what the targets are read from come here; collective. Then nothing is staged: it is read straight
        into the live tensors, since all of it is verified and at hand before the first of them changes.
        """
        self._bring = bring
        self._verify = verify
        self._source = reader
        self._reader = LayeredReader(reader, {}, ())  # the plan adds the names that are asked for here
        self._adopted: Adopted | None = None
        self._by_parameter: OptimizerView | None = None
        self._chosen = chosen
        self._checkpoint = checkpoint
        self._open_base = open_base
        self._base: LayeredReader | None = None
        self._base_files: CheckpointReader | None = None
        self._rank = rank
        self._peers = peers
        self._fs = fs
        self._tell = tell
        self._loader_state: Any = None
        self._restored_whole = chosen.tier != "persistent"  # a non-persistent save of this run
        self._release = reader.folder.name == RELEASE
        self._notes: tuple[str, ...] = ()

    def stage(self, state: TrainingState) -> Callable[[], Resume]:
        """Read all that is needed; the function that comes back puts it into the live objects.

        Collective, but for a save of this very run that is not shared out: if another rank fails there, what comes back
        here must not be called (the ranks agree on that before they call it).
        """
        wanted: _Wanted | None = None
        problem: Exception | None = None
        try:
            try:
                wanted = self._plan(state)
            except Exception as error:  # noqa: BLE001  (the others may be waiting for this rank)
                problem = error
            difference = self._judge(wanted, problem)
            assert wanted is not None, "else there was a problem, and it was raised"
            self._read(wanted)
            stored_weights = self._stored_weights(state, wanted.parts)
        except PeerFailedError:
            return _not_to_be_called
        finally:
            for reader in (self._source, self._base):
                if reader is not None:
                    reader.close()

        def copy() -> Resume:
            with torch.no_grad():
                pairs = zip((tensor for _, tensor in wanted.plan.targets), wanted.staged, strict=True)
                staged = [(live, tensor) for live, tensor in pairs if live is not tensor]
                copy_tensors([live for live, _ in staged], [tensor for _, tensor in staged])
                if self._bring is not None:
                    self._reader.read(wanted.targets)
                wanted.plan.finish()
                for optimizer in state.optimizers if "optimizer" not in wanted.parts else ():
                    renew_main_parameters(optimizer.optimizer, stored_weights)
            if self._loader_state is not None:
                state.loader.loader.load_state_dict(self._loader_state)
            return self._resume(difference)

        return copy

    # -- what is to be loaded -----------------------------------------------------------------------------------------

    def _plan(self, state: TrainingState) -> _Wanted:
        self._reader = LayeredReader(self._source, state.stored_places().bases, state.bases())
        model_alone = self._chosen.weights_only or self._release
        parts = self._parts()
        if not model_alone and self._source.record is not None and "optimizer" in parts:
            self._by_parameter = seen_by_parameter(state, self._reader) if lies_in_buckets(self._reader) else None
        own = None if model_alone else self._own(state, parts)
        if own is None:
            own, parts = self._without_rank_state(state, parts)
        parts = self._saved_parts(own, parts)
        live = {item.key: item for item in state.collect(_MODEL_ONLY).items}
        values, from_live, added = own.values, frozenset[str](), frozenset[str]()
        if not self._restored_whole:
            here = encode(state.tree(tuple({"model", "optimizer"} & set(parts))))[0]
            # with the optimizer's own state goes the very dtype of its parameters; without it weights are converted
            fitted = reconcile(own.values, here, convert="optimizer" not in parts or self._adopted is not None)
            values, from_live, added = fitted.values, fitted.from_live, fitted.added
        index = cut_as_placed(state, values, index_of(self._view.index, own, live, state, from_live))
        if self._adopted is not None:
            index = converted(index, self._adopted.dtypes)
        held = set(map(without_block, index))
        # an empty extra state that the checkpoint knows nothing of is nothing that is lacking
        lacking = added - held - state.empty_extra_keys()
        from_base = self._look_in_base(lacking, index, live, state)
        initial = lacking - from_base
        unexpected = initial - self._adapters(initial, state)
        index |= {key: SavedItem.of(item) for key, item in live.items() if without_block(key) in initial}
        plan = state.plan_load(values, index, parts)
        direct = self._bring is not None
        staged, targets, base_targets = staging(plan, index, own, live, from_base, initial, direct=direct)
        asked = {self._stored_path(without_block(key)) for key in (*(key for key, _ in plan.targets), *live)}
        asked |= {alias for alias, root in self._view.aliases.items() if root in asked}
        return _Wanted(plan, parts, staged, targets, base_targets, frozenset(asked - unexpected), frozenset(unexpected))

    @property
    def _view(self) -> StateReader:
        """What tensors are read from: the checkpoint, or the checkpoint with optimizer state under the names it has
        here."""
        return self._by_parameter or self._reader

    def _stored_path(self, key: str) -> str:
        return key if self._by_parameter is None else self._by_parameter.stored_path(key)

    def _own(self, state: TrainingState, parts: Collection[str]) -> RankState | None:
        """What this rank saved; in another layout, what it would have saved there."""
        reader, record, layout = self._reader, self._reader.record, state.layout
        own = reader.rank_state(self._rank)
        if record is None or layout is None or not layout.is_resolved:
            return own
        saved = None if own is None else layout_of(tree_of(own.values))
        if own is not None and record.world_size == layout.world_size and is_cut_alike(state, own.values, saved):
            return own
        world = SavedWorld(record.world_size, self._view.index, reader.rank_state, self._whole)
        moved = recut(state, world, parts, self._chosen.save.iteration)
        self._notes = moved.notes
        return RankState(moved.values, moved.tensors)

    def _whole(self, key: str) -> torch.Tensor:
        stored = self._view.index[key]
        out = torch.empty(stored.global_shape, dtype=stored.dtype)
        self._view.read([Target(key, out, (0,) * out.dim())])
        return out

    def _parts(self) -> tuple[str, ...]:
        """What the load options ask for; a non-persistent save of this run is always restored whole."""
        if self._restored_whole:
            return PARTS
        left_out = set() if self._checkpoint.load_optim else {"optimizer", "scheduler"}
        left_out |= set() if self._checkpoint.load_rng else {"rng"}
        return tuple(part for part in PARTS if part not in left_out)

    def _saved_parts(self, own: RankState, parts: Sequence[str]) -> tuple[str, ...]:
        """`parts` less what the checkpoint was saved without, which is said."""
        try:
            saved = json.loads(own.values)
        except (ValueError, RecursionError):
            return tuple(parts)  # the plan refuses it in words
        absent = [part for part in _OPTIONAL if part in parts and isinstance(saved, dict) and part not in saved]
        if absent:
            what = f"{self._reader.folder} was saved without {', '.join(absent)}: what is here stays as it is"
            self._tell("warning", what=what, advice="")
        return tuple(part for part in parts if part not in absent)

    def _without_rank_state(self, state: TrainingState, parts: Sequence[str]) -> tuple[RankState, tuple[str, ...]]:
        """The model, the counters, and what else another program stored. For what this rank alone knew there is
        nothing."""
        reader = self._reader
        models = foreign_extra_state(reader, state, self._tell)
        if self._chosen.weights_only:
            return _rank_state({"model": models}), _MODEL_ONLY
        if reader.record is not None and not self._release:
            raise CorruptCopyError(f"{reader.folder} holds no state of rank {self._rank}.")
        counters = read_train_state(reader.folder, self._fs)
        tree: dict[str, Any] = {"model": models}
        if counters is not None:
            tree["train_state"] = counters
        if self._release:
            return _rank_state(tree), tuple(tree)
        if "rng" in parts and (rng := foreign_rng(reader, state, self._tell)):
            tree["rng"] = rng
        own = _rank_state(tree)
        self._adopted = adopted = adopt(state, reader, parts)
        self._by_parameter = adopted.reader
        self._notes += tuple(adopted.notes)
        written = tree_of(own.values) | adopted.parts
        found = [part for part in PARTS if part in written]
        kept = [*found, *self._find_loader(state)]
        lost = ", ".join(part for part in parts if part not in kept)
        what = f"iteration {self._chosen.save.iteration} in {reader.folder} holds no state of rank {self._rank}"
        self._tell("warning", what=f"{what}: {' and '.join(kept)} are loaded, not {lost or 'more'}", advice="")
        values = json.dumps(written, allow_nan=False, separators=(",", ":")).encode("ascii")
        return RankState(values, {**own.tensors, **adopted.tensors}), tuple(found)

    def _find_loader(self, state: TrainingState) -> tuple[str, ...]:
        """Look for this data-parallel rank's place in the data, as others write it; say why there is none."""
        peers = self._peers
        if not state.loader.stateful:
            return ()
        self._loader_state, problem = read_loader(self._reader.folder, self._fs, peers.dp_rank, peers.dp_size)
        if problem:
            self._tell("warning", what=f"the data loader begins afresh: {problem}", advice="")
            return ()
        return ("dataloader",)

    # -- keys that differ ---------------------------------------------------------------------------------------------

    def _look_in_base(
        self, lacking: Collection[str], index: dict[str, SavedItem], live: Mapping[str, Item], state: TrainingState
    ) -> frozenset[str]:
        """What the checkpoint lacks and the pretrained one has; adds it to `index`."""
        if not lacking or self._chosen.weights_only or self._checkpoint.pretrained_checkpoint is None:
            return frozenset()
        with _of_base():
            base = self._open_base()
        if base is None:
            return frozenset()
        self._base_files = base
        self._base = LayeredReader(base, state.stored_places().bases, state.bases())
        found = frozenset(lacking) & self._base.index.keys()
        for key in found:
            blocks = blocks_of(key, live)
            index |= stored_like(key, blocks[0].tensor.dtype, self._base.index[key].global_shape, blocks)
        return found

    def _adapters(self, lacking: Collection[str], state: TrainingState) -> frozenset[str]:
        """What a pretrained checkpoint may lack: trained parts of a model of which others are frozen."""
        if not self._chosen.weights_only or not lacking:
            return frozenset()
        frozen = state.frozen_keys()
        if not frozen or frozen & set(lacking):
            return frozenset()
        what = f"{self._reader.folder} lacks {len(lacking)} entries of the model, which begin with their initial values"
        self._tell("warning", what=f"{what}: {_few(lacking)}", advice="Parameters that it has are frozen: an adapter.")
        return frozenset(lacking)

    def _judge(self, wanted: _Wanted | None, problem: Exception | None) -> KeyDifference:
        """Hold the keys against each other as `dist_ckpt_strictness` says; collective but for a save of this very run.

        Raises this rank's problem, or PeerFailedError if others have one: each rank comes as far as the agreement.
        """
        mode = "assume_ok_unexpected" if self._restored_whole else self._checkpoint.dist_ckpt_strictness
        group, missing, difference = self._peers.everyone, frozenset[str](), KeyDifference()
        told = [] if self._restored_whole else group.gather(self._asked(wanted))
        if problem is None and wanted is not None:
            try:
                missing = self._missing(wanted, told)
                difference = judge_keys(set(map(stored_key, wanted.unexpected)), set(map(stored_key, missing)), mode)
            except ResilienceError as error:
                problem = error
        if told or self._shared_load or self._bring is not None:
            agree(group, problem)
        elif problem is not None:
            raise problem
        if missing and group.rank == 0 and not looks_at_missing(mode):
            what = f"{len(missing)} entries of {self._reader.folder} are asked for by no rank, and are left behind"
            self._tell(
                "warning", what=f"{what}: {_few(missing)}", advice="See dist_ckpt_strictness: raise_all refuses that."
            )
        return difference

    def _asked(self, wanted: _Wanted | None) -> bytes:
        """A bit for each tensor of the checkpoint (layer by layer, where they lie in one), by name: whether this rank
        asks for it. Empty without a plan."""
        if wanted is None:
            return b""
        mine = self._reader.units_asked(wanted.asked)
        asked = [unit in mine for unit in self._reader.units()]
        return b"\1" + np.packbits(np.array(asked, bool)).tobytes()

    def _missing(self, wanted: _Wanted, told: Sequence[bytes]) -> frozenset[str]:
        """What the checkpoint has of the loaded parts, and no rank asks for. Nothing, if one cannot say."""
        if not told or not all(told):
            return frozenset()
        if len(set(map(len, told))) > 1:
            raise CorruptCopyError(f"{self._reader.folder} was read with other tensors on other ranks.")
        asked = np.bitwise_or.reduce([np.unpackbits(np.frombuffer(each, np.uint8)[1:]) for each in told])
        unasked = {unit for at, unit in enumerate(self._reader.units()) if not asked[at]}
        return frozenset(key for key in self._reader.paths_of(unasked) if _part_of(key) in wanted.parts)

    # -- reading ------------------------------------------------------------------------------------------------------

    @property
    def _shared_load(self) -> bool:
        return self._bring is None and self._checkpoint.fully_parallel_load and self._peers.everyone.size > 1

    def _read(self, wanted: _Wanted) -> None:
        if self._bring is not None:
            self._bring(self._reader.as_stored(wanted.targets))
        elif self._shared_load:
            group = self._peers.open_replicas()
            try:
                read_together(self._view, wanted.targets, group)
            finally:
                group.close()
        else:
            self._view.read(wanted.targets)
        if self._base is None or self._base_files is None or not wanted.base_targets:
            return
        with _of_base():
            if self._verify:
                self._base_files.verify(self._base_files.files(self._base.as_stored(wanted.base_targets)))
            self._base.read(wanted.base_targets)

    # -- main parameters of a mixed-precision optimizer ---------------------------------------------------------------

    def _stored_weights(self, state: TrainingState, parts: Sequence[str]) -> StoredWeights | None:
        """The model's parameters as they are stored, for `load_main_params_from_ckpt`; None: not asked for."""
        if not self._checkpoint.load_main_params_from_ckpt or "optimizer" in parts or self._chosen.weights_only:
            return None
        if not any(keeps_main_parameters(optimizer.optimizer) for optimizer in state.optimizers):
            what = "load_main_params_from_ckpt has no effect: no optimizer keeps main parameters of its own"
            self._tell("warning", what=what, advice="A DistributedOptimizer and Megatron's mixed-precision ones do.")
            return None
        live = {item.key: item for item in state.collect(_MODEL_ONLY).items}
        chunks: dict[str, dict[str, torch.Tensor]] = {}
        by_parameter: dict[torch.Tensor, torch.Tensor] = {}
        for model in state.models:
            stored = chunks.setdefault("model" if len(state.models) == 1 else f"model{model.position}", {})
            for name, parameter in model.parameters():
                key = f"{MODEL_PREFIX}{model.position}/{path_component(name)}"
                reader = self._reader if key in self._reader.index else self._base
                if reader is None or key not in reader.index:
                    continue
                pieces = [
                    Target(key, torch.empty(item.tensor.shape, dtype=reader.index[key].dtype), item.offsets)
                    for item in blocks_of(key, live)
                ]
                reader.read(pieces)
                stored[name] = torch.cat([each.out for each in pieces]) if len(pieces) > 1 else pieces[0].out
                by_parameter[parameter] = stored[name]
        return StoredWeights(chunks, by_parameter)

    def _resume(self, difference: KeyDifference) -> Resume:
        chosen = self._chosen
        return Resume(
            0 if chosen.weights_only else chosen.save.iteration, chosen.save.generation, chosen.tier, 0.0,
            missing_keys=tuple(sorted(difference.missing)), unexpected_keys=tuple(sorted(difference.unexpected)),
            notes=self._notes,
        )  # fmt: skip


@contextmanager
def _of_base() -> Iterator[None]:
    """What fails in `pretrained_checkpoint` is no reason to strike off the checkpoint that was elected."""
    try:
        yield
    except (CorruptCopyError, OSError) as error:
        raise NoUsableSaveError(f"pretrained_checkpoint cannot be used: {error}") from error


def _rank_state(tree: dict[str, Any]) -> RankState:
    values, tensors = encode(tree)
    return RankState(values, dict(tensors))


def _not_to_be_called() -> Resume:
    raise LayoutMismatchError("another rank cannot load the elected save.", advice="See that rank's log.")


def _part_of(key: str) -> str:
    """The part of the state that a stored key belongs to, other programs' optimizer keys included."""
    return "optimizer" if stored_key(key).startswith("optimizer.") else key.split("/", 1)[0]


def _few(keys: Collection[str]) -> str:
    shown = ", ".join(sorted(map(stored_key, keys))[:10])
    return f"{shown} and {len(keys) - 10} more" if len(keys) > 10 else shown
