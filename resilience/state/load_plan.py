"""How a save gets into live objects: first what has to be filled, then, once it is, everything else in fixed order.

Nothing live changes while the plan is made. The caller copies the saved bytes of each key into its target (parameters
and buffers themselves; fresh tensors for all else), and only when all of them are filled, `finish` hands the rest over.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

import torch

from resilience.errors import CorruptCopyError, in_short
from resilience.state import rng
from resilience.state.items import SavedItem, blocks_of
from resilience.state.live_tensors import LiveTensors
from resilience.state.load_check import check_index, differences, raise_if_unlike
from resilience.state.sharding import without_block
from resilience.state.tensors import TensorRef
from resilience.state.tree import path_component
from resilience.state.tree_decoder import decode_with, finished

if TYPE_CHECKING:
    from resilience.state.training_state import TrainingState


class LoadPlan:
    """A load that was found to fit, and the tensors that it needs filled.

    `targets` lists (key, tensor): the saved bytes of that key belong into that tensor, which has the saved dtype and
    shape, any strides, and lies on any device. Then call `finish`, once. A key that is stored as an alias of another
    has no target of its own.
    """

    def __init__(
        self, state: TrainingState, values: bytes, index: Mapping[str, SavedItem], parts: Collection[str]
    ) -> None:
        self._state, self._values, self._index, self._parts = state, values, index, parts
        self._refs: dict[str, TensorRef] = {}
        try:
            saved = decode_with(values, self._remember)
            check_index(self._refs, index)
            self._live = LiveTensors(state, parts, self._refs)
            found = differences(state, saved, index, self._live.items, parts)
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            # The copy is what its owner wrote, and yet no tree of ours: another version's, or not a save at all.
            raise CorruptCopyError(f"The values of the save are no training state ({in_short(error)}).") from error
        needed = {key: ref for key, ref in self._refs.items() if key.split("/", 1)[0] in parts}
        for key, ref in needed.items():
            blocks = blocks_of(key, index)
            found += filter(None, (self._live.unlike_on_mesh(ref, blocks[0]), self._live.unlike_cut(ref, blocks)))
        raise_if_unlike(found)
        self._filled: dict[str, torch.Tensor] = {}
        self.targets: list[tuple[str, torch.Tensor]] = []
        for key in dict.fromkeys(self._root(key) for key in needed):
            ref, blocks = self._refs[key], blocks_of(key, index)
            self._filled[key] = self._live.target(ref, blocks)
            parts_of_it = self._live.parts(ref, blocks, self._filled[key])
            self.targets += zip((item.key for item in blocks), parts_of_it, strict=True)

    def finish(self) -> None:
        """Hand over what the targets hold now: models, optimizers, scheduler, scaler, extra, counters, loader, RNG.

        Call it once, on the training thread, when every target is filled. RNG comes last, because anything before it
        may draw random numbers (the loader does).
        """
        state = self._state
        with torch.no_grad():
            tree = decode_with(self._values, self._leaf)
            tree = {part: value for part, value in tree.items() if part in self._parts}
            for position, entries in enumerate(tree.get("model", ())):
                self._finish_model(position, entries)
            for optimizer, saved in zip(state.optimizers, tree.get("optimizer", ()), strict=False):
                self._write_through(f"optimizer/{optimizer.position}/parameters", saved.get("parameters", {}))
                optimizer.load(saved)
        self._finish_objects(tree)
        if "dataloader" in tree and tree["dataloader"] is not None:
            state.loader.load_state_dict(tree["dataloader"])
        if "rng" in tree:
            rng.restore(tree["rng"], state.devices)
        self._filled.clear()

    def _finish_model(self, position: int, entries: dict[str, Any]) -> None:
        where = f"model/{position}"
        backed = {name for name in entries if self._live.backed(f"{where}/{path_component(name)}")}
        self._write_through(where, backed)
        made = {name: value for name, value in entries.items() if name not in backed}
        self._state.models[position].load_made_entries(made)

    def _finish_objects(self, tree: dict[str, Any]) -> None:
        state, saved = self._state, tree.get("scheduler")
        if saved is not None:
            for scheduler, its in zip(state.schedulers, saved if isinstance(saved, list) else [saved], strict=True):
                scheduler.load_state_dict(its)
        if state.scaler is not None and tree.get("scaler"):  # a disabled one has an empty state, and refuses to load it
            state.scaler.load_state_dict(tree["scaler"])
        for name, its in tree.get("extra", {}).items():
            state.extra[name].load_state_dict(its)
        if "train_state" in tree:
            state.train_state.update(tree["train_state"])

    def _write_through(self, where: str, names: Collection[str]) -> None:
        for name in names:
            key = f"{where}/{path_component(name)}"
            if self._root(key) == key:
                self._live.write_through(key, self._filled[key])

    def _remember(self, ref: TensorRef) -> TensorRef:
        if self._refs.setdefault(ref.key, ref) is not ref:
            raise CorruptCopyError(f"The values refer to {ref.key} from two places.")
        return ref

    def _leaf(self, ref: TensorRef) -> Any:
        root = self._root(ref.key)
        if root not in self._filled:  # of a part that is not loaded
            return None
        saved = blocks_of(ref.key, self._index)[0]
        return finished(ref, self._live.whole(ref, saved, self._filled[root]))

    def _root(self, key: str) -> str:
        """The key of the tensor whose bytes are those of `key`: its own, mostly."""
        return without_block(blocks_of(key, self._index)[0].alias_of or key)
