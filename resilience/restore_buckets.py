"""Which parameter lies where in the buckets of Megatron Core's `dp_reshardable` layout, and the proof that it does.

The layout is bound to the sizes of tensor and pipeline parallelism, and to the order of the parameters in the module.
The first is told by the numbers of the buckets; the second is held against the buckets' lengths and then, element by
element, against the weights: a main parameter, rounded, is the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from resilience.errors import LayoutMismatchError
from resilience.formats.keys import BUCKETS_PREFIX, stored_key
from resilience.formats.optimizer_view import OptimizerView
from resilience.formats.protocol import StateReader, StoredTensor, Target
from resilience.planning.bucket_space import Flattened, bucket_number, places_in_buckets
from resilience.state.distributed_state import MAIN
from resilience.state.flat_sharding import local_blocks
from resilience.state.items import Item, blocks_of
from resilience.state.tensors import is_dtensor
from resilience.state.training_state import TrainingState
from resilience.state.tree import path_component

__all__ = ["Buckets"]

_BUCKET = re.compile(
    r"optimizer\.distributed\.dp_group_idx_(\d{1,7})\.gbuf_idx_(\d{1,6})\.dtype_(\(.+\))\.bucket_idx_(\d{1,7})\.(\w+)"
)
_COMPARED_ELEMENTS = 4 << 20  # of weights and main parameters in memory, while they are held against each other

#: Moment → path of the bucket's tensor, by number of the buffer and of the bucket in it.
_Stored = dict[int, dict[int, dict[str, str]]]


class Buckets:
    """The buckets of this rank's place, as a checkpoint has them. `groups`: what is stored of param groups."""

    def __init__(self, state: TrainingState, reader: StateReader) -> None:
        self._state = state
        self._reader = reader
        self.groups: Any = None

    def found(self) -> tuple[Mapping[str, Mapping[str, str | Flattened]], str]:
        """Parameter's name as it stands in paths → moment → its place; or why that cannot be told.

        LayoutMismatchError, before anything is read, if the sizes of tensor or pipeline parallelism are other ones.
        """
        keys = [stored_key(path) for path in self._reader.index if path.startswith(BUCKETS_PREFIX)]
        if any(key.startswith("chained_") for key in keys):
            return {}, "several optimizers are chained in the buckets (experts), which are not read"
        mine = self._of_this_place([match for key in keys if (match := _BUCKET.fullmatch(key))])
        if not mine:
            return {}, "no buckets are stored"
        if any(getattr(each, "allreduce", True) is False for _, each in self._parameters()):
            return {}, "experts have buckets of their own, which are not read"
        try:
            placed = dict(self._place(mine))
            self._hold_against_weights(placed)
        except LayoutMismatchError as error:
            return {}, f"what lies where in the buckets cannot be told: {error}"
        return placed, ""

    def _of_this_place(self, matches: list[re.Match[str]]) -> _Stored:
        layout = self._state.layout
        tp, pp = (layout.tp, layout.pp) if layout is not None else (1, 1)
        places = {int(match[1]) for match in matches}
        if places and places != set(range(tp * pp)):
            raise LayoutMismatchError(
                f"{self._reader.folder} has optimizer state of {len(places)} places of tensor and pipeline parallelism "
                f"in a form that is bound to them (dp_reshardable); here there are {tp * pp} (tp={tp}, pp={pp}).",
                advice="Resume with the sizes of the save, or take the weights alone with load_optim=False.",
            )
        place = (layout.tp_rank or 0, layout.pp_rank or 0) if layout is not None else (0, 0)
        number = bucket_number((place[0], tp), (place[1], pp))
        groups = f"optimizer.distributed.dp_group_idx_{number}.optimizer/shard_0_1"
        self.groups = self._reader.read_object(groups) if groups in self._reader.objects else None
        stored: _Stored = {}
        for match in matches:
            if int(match[1]) == number:
                path = BUCKETS_PREFIX + path_component(match[0])
                stored.setdefault(int(match[2]), {}).setdefault(int(match[4]), {})[match[5]] = path
        return stored

    def _place(self, stored: _Stored) -> Iterator[tuple[str, dict[str, str | Flattened]]]:
        buffers = list(self._buffers())
        if sorted(stored) != list(range(len(buffers))):
            raise LayoutMismatchError(
                f"{len(stored)} buffers are stored, and the model's parameters make {len(buffers)}"
            )
        for number, named in enumerate(buffers):
            buckets = [stored[number][bucket] for bucket in sorted(stored[number])]
            lengths = [self._length(bucket, number) for bucket in buckets]
            places = places_in_buckets([parameter.numel() for _, parameter in named], lengths)
            for (path, parameter), place in zip(named, places, strict=True):
                shape, whole, blocks = local_blocks(parameter)
                yield (
                    path.split("/", 2)[2],
                    {
                        moment: Flattened(bucket, place.start, shape, whole, blocks)
                        for moment, bucket in buckets[place.bucket].items()
                    },
                )

    def _length(self, bucket: Mapping[str, str], number: int) -> int:
        lengths = {math.prod(self._reader.index[path].global_shape) for path in bucket.values()}
        if len(lengths) != 1 or MAIN not in bucket:
            raise LayoutMismatchError(f"a bucket of buffer {number} has tensors {sorted(bucket)} of lengths {lengths}")
        return lengths.pop()

    def _buffers(self) -> Iterator[list[tuple[str, torch.nn.Parameter]]]:
        """Model by model, dtype by dtype: the parameters that are trained, in the order of the module, by path."""
        for model in self._state.models:
            by_dtype: dict[torch.dtype, list[tuple[str, torch.nn.Parameter]]] = {}
            for name, parameter in model.parameters():
                if is_dtensor(parameter):
                    raise LayoutMismatchError(f"{name} is a DTensor")
                if parameter.requires_grad:
                    path = f"model/{model.position}/{path_component(name)}"
                    by_dtype.setdefault(parameter.dtype, []).append((path, parameter))
            yield from by_dtype.values()

    def _parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        for model in self._state.models:
            yield from model.parameters()

    # -- the proof ----------------------------------------------------------------------------------------------------

    def _hold_against_weights(self, placed: Mapping[str, Mapping[str, str | Flattened]]) -> None:
        """LayoutMismatchError unless every main parameter, rounded, is the stored weight that it is taken for."""
        items = {item.key: item for item in self._state.collect(("model",)).items}
        for buffer in self._buffers():
            for path, _ in buffer:
                main = placed[path.split("/", 2)[2]][MAIN]
                weight = self._reader.index.get(path)
                assert isinstance(main, Flattened), "made so above"
                if weight is None or weight.global_shape != main.global_shape:
                    raise LayoutMismatchError(f"{path} is not stored in the shape {list(main.global_shape)}")
                view = OptimizerView(self._reader, {}, {f"{path}/{MAIN}": main})
                for item in blocks_of(path, items):
                    _compare(view, path, item, weight)


def _compare(view: OptimizerView, path: str, item: Item, weight: StoredTensor) -> None:
    """One block of a weight, some rows at a time."""
    shape = tuple(item.tensor.shape)
    rows = shape[0] if shape else 1
    step = max(1, _COMPARED_ELEMENTS * rows // max(1, math.prod(shape)))
    for start in range(0, rows, step):
        part = (min(step, rows - start), *shape[1:]) if shape else ()
        at = (item.offsets[0] + start, *item.offsets[1:]) if shape else ()
        rounded = torch.empty(part, dtype=torch.float32)
        stored = torch.empty(part, dtype=weight.dtype)
        view.read([Target(f"{path}/{MAIN}", rounded, at), Target(path, stored, at)])
        if not torch.equal(rounded.to(weight.dtype), stored):
            raise LayoutMismatchError(f"the main parameters at the place of {path} are not its weights")
