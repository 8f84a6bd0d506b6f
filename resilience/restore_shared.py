"""Shared storage at a start: who owns `save`, what lies in each directory, and how a checkpoint from there is loaded.

The leader looks and claims; every rank reads for itself, after the files were held against their digests, shared out
over the ranks. Bytes go into staging tensors first: no live tensor changes before every rank has all of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from resilience.config import CheckpointConfig
from resilience.errors import CorruptCopyError, ResilienceError
from resilience.formats.directory import read_digests
from resilience.formats.protocol import CheckpointReader, RankState, Target
from resilience.formats.registry import foreign_problem, open_checkpoint
from resilience.planning.decision import Candidate, Strike
from resilience.planning.inventory import Inventory
from resilience.reports import Resume
from resilience.state.items import Item, SavedItem
from resilience.state.training_state import PARTS, TrainingState
from resilience.state.tree import encode
from resilience.stores.filesystem import FileSystem
from resilience.stores.healed import healed
from resilience.stores.shared_store import SharedStore

__all__ = ["SharedLoader"]

_MODEL_ONLY = ("model",)


@dataclass
class SharedLoader:
    """The directories on shared storage that the configuration names."""

    checkpoint: CheckpointConfig
    fs: FileSystem
    rank: int
    world_size: int
    verify: bool
    tell: Callable[..., None]
    stores: dict[str, SharedStore] = field(default_factory=dict)
    _claimed: bool = False

    def __post_init__(self) -> None:
        config = self.checkpoint
        for source, path in (
            ("save", config.save),
            ("load", config.load),
            ("pretrained", config.pretrained_checkpoint),
        ):
            same = source == "load" and config.save and path and Path(path).resolve() == Path(config.save).resolve()
            if path is not None and not (same and config.ckpt_step is None):
                self._add(source, Path(path))
        if config.non_persistent_ckpt_type == "global":
            default = Path(config.save or ".") / "non_persistent"
            self._add("global", Path(config.non_persistent_global_ckpt_dir or default))

    def _add(self, source: str, root: Path) -> None:
        self.stores[source] = SharedStore(root, self.fs, source=source, foreign_problem=foreign_problem)  # type: ignore[arg-type]

    def inventories(self, run_id: str) -> list[Inventory]:
        """The leader's look at every directory."""
        return [store.inventory(run_id) for store in self.stores.values()]

    def inventories_after_heal(self, run_id: str) -> list[Inventory]:
        """The directories as `claim` would leave them, if that changed anything; else none. Only looks."""
        if self._claimed:
            return []
        views = dict(self.stores)
        for source in ("save", "global"):
            try:
                if source in views and views[source].after_heal():
                    views[source] = healed(views[source], foreign_problem)[0]
            except OSError as error:  # its inventory says that it cannot be read
                self.tell("warning", what=f"{source}: {error}", advice="")
        return [store.inventory(run_id) for store in views.values()] if views != self.stores else []

    def claim(self, run_id: str, attempt: str, generation: int) -> bool:
        """Take the directories that we write over from older attempts and heal them. Leader only; once per start.

        True if something may have changed, so that the inventories must be taken again.
        """
        if self._claimed:
            return False
        self._claimed = True
        for source in ("save", "global"):
            if source in self.stores:
                self.stores[source].take_ownership(run_id, attempt, generation)
                for done in self.stores[source].heal():
                    self.tell("warning", what=f"{source}: {done}", advice="")
        return bool(self.stores)

    def obtain(
        self, chosen: Candidate, state: TrainingState
    ) -> tuple[list[Strike], Callable[[TrainingState], Callable[[], Resume]]]:
        """Open and verify this rank's share of the checkpoint's files; the function plans and stages the load."""
        strike = [Strike(chosen.source, chosen.tier, chosen.save)]
        try:
            folder = self.stores[chosen.source].folder_of(chosen.save)
            reader = open_checkpoint(folder, self.fs)
            if self.verify:
                reader.verify(self._share(reader))
        except (ResilienceError, OSError) as error:
            self.tell("warning", what=f"checkpoint of iteration {chosen.save.iteration}: {error}", advice="")
            return strike, lambda _: lambda: _resume(chosen)
        return [], lambda live: self._stage(reader, chosen, live)

    def _share(self, reader: CheckpointReader) -> list[str]:
        """Each file that has a digest is read in full by one rank."""
        names = sorted(read_digests(reader.folder, self.fs) or ())
        return names[self.rank :: self.world_size]

    def _stage(self, reader: CheckpointReader, chosen: Candidate, state: TrainingState) -> Callable[[], Resume]:
        parts = self._parts(chosen)
        own = reader.rank_state(self.rank)
        if own is None and not chosen.weights_only:
            self._model_alone(reader, chosen, parts)
        if own is None or chosen.weights_only:
            own, parts = RankState(encode(state.tree(_MODEL_ONLY))[0], {}), _MODEL_ONLY
        items = {item.key: item for item in state.collect(_MODEL_ONLY).items}
        index = {key: _saved(key, tensor.dtype, tuple(tensor.shape), None) for key, tensor in own.tensors.items()}
        for key, stored in reader.index.items():
            index.setdefault(key, _saved(key, stored.dtype, stored.global_shape, _live_like(key, items, state)))
        plan = state.plan_load(own.values, index, parts)
        staged: list[torch.Tensor] = []
        targets: list[Target] = []
        for key, tensor in plan.targets:
            if key in own.tensors:
                staged.append(own.tensors[key])
                continue
            out = torch.empty(tensor.shape, dtype=tensor.dtype)
            staged.append(out)
            targets.append(Target(key, out, index[key].offsets, index[key].global_shape))
        reader.read(targets)
        reader.close()

        def copy() -> Resume:
            with torch.no_grad():
                torch._foreach_copy_([tensor for _, tensor in plan.targets], staged)
                plan.finish()
            return _resume(chosen)

        return copy

    def _model_alone(self, reader: CheckpointReader, chosen: Candidate, parts: tuple[str, ...]) -> None:
        """No state of this rank is there: damage in a folder of ours; in anybody else's, only said."""
        if reader.record is not None:
            raise CorruptCopyError(f"{reader.folder} holds no state of rank {self.rank}.")
        lost = ", ".join(part for part in parts if part not in _MODEL_ONLY)
        what = f"iteration {chosen.save.iteration} in {reader.folder} holds no state of rank {self.rank}"
        self.tell("warning", what=f"{what}: only the model is loaded, not {lost}", advice="")

    def _parts(self, chosen: Candidate) -> tuple[str, ...]:
        """What the load options ask for; a non-persistent save of this run is always restored whole."""
        if chosen.tier != "persistent":
            return PARTS
        left_out = set() if self.checkpoint.load_optim else {"optimizer", "scheduler"}
        left_out |= set() if self.checkpoint.load_rng else {"rng"}
        return tuple(part for part in PARTS if part not in left_out)


def _resume(chosen: Candidate) -> Resume:
    iteration = 0 if chosen.weights_only else chosen.save.iteration
    return Resume(iteration, chosen.save.generation, chosen.tier, 0.0)


def _saved(key: str, dtype: torch.dtype, shape: tuple[int, ...], live: Item | None) -> SavedItem:
    """A whole tensor, or the part of it that the live DTensor has on this rank."""
    if live is None or live.global_shape != shape:
        return SavedItem(key, dtype, shape, (0,) * len(shape), shape)
    return SavedItem(key, dtype, shape, live.offsets, tuple(live.tensor.shape))


def _live_like(key: str, items: Mapping[str, Item], state: TrainingState) -> Item | None:
    """The live tensor itself, or the parameter whose optimizer state this is (it is sharded alike)."""
    parts = key.split("/")
    if parts[0] == "optimizer" and len(parts) >= 4 and parts[2] == "state":
        return items.get(state.model_key(parts[3]))
    return items.get(key)
