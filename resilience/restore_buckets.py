"""Which parameter lies where in the buckets of Megatron Core's `dp_reshardable` layout, and the proof that it does.

The layout is bound to the sizes of tensor and pipeline parallelism, and to the order of the parameters in the module.
Experts, of which fewer ranks have the same, are trained by an optimizer of their own, chained behind that of all else.
The first is told by the numbers of the buckets; the second is held against the buckets' lengths and then, element by
element, against the weights: a main parameter, rounded, is the weight.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
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
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.tensors import is_dtensor, is_expert
from resilience.state.training_state import TrainingState
from resilience.state.tree import path_component

__all__ = ["Buckets"]

_BUCKET = re.compile(
    r"(?:chained_(\d{1,6})\.)?"
    r"optimizer\.distributed\.dp_group_idx_(\d{1,7})\.gbuf_idx_(\d{1,6})\.dtype_(\(.+\))\.bucket_idx_(\d{1,7})\.(\w+)"
)
_COMPARED_ELEMENTS = 4 << 20  # of weights and main parameters in memory, while they are held against each other

#: Moment → path of the bucket's tensor, by number of the buffer and of the bucket in it.
_Stored = dict[int, dict[int, dict[str, str]]]
_Named = list[tuple[str, torch.nn.Parameter]]


@dataclass(frozen=True)
class _Part:
    """The buckets of one optimizer of Megatron's at this rank's place: what is stored, and what it trains here.

    `prefix`: what the keys begin with, up to the place's number.
    """

    prefix: str
    stored: _Stored
    experts: bool

    @property
    def groups_key(self) -> str:
        return f"{self.prefix}.optimizer/shard_0_1"


@dataclass(frozen=True)
class _Places:
    """Of all buckets that are stored: which places of the model have them. `chained`: where experts have their own."""

    alone: frozenset[int]
    chained: frozenset[int]
    experts: frozenset[int]

    @classmethod
    def of(cls, matches: Sequence[re.Match[str]]) -> _Places:
        found: dict[str | None, set[int]] = {}
        for match in matches:
            found.setdefault(match[1], set()).add(int(match[2]))
        if not found.keys() <= {None, "0", "1"}:
            raise LayoutMismatchError(
                f"optimizers {', '.join(sorted(map(str, found)))} are chained in the buckets; two can be told apart, "
                "that of experts and that of all else.",
                advice="Take the weights alone with load_optim=False.",
            )
        return cls(*(frozenset(found.get(which, ())) for which in (None, "0", "1")))

    def check(self, layout: ParallelLayout, experts_here: bool, folder: object) -> None:
        """LayoutMismatchError if they are those of other sizes of tensor, pipeline or expert parallelism."""
        tp, pp, ep = layout.tp, layout.pp, layout.ep
        dense = self.alone | self.chained
        stages = {number // tp for number in self.chained}  # a stage without experts has one optimizer
        experts = {bucket_number((t, tp), (p, pp), (e, ep)) for t in range(tp) for p in stages for e in range(ep)}
        divided = bool(experts) or not experts_here  # else all experts are stored as any other parameter
        if dense == set(range(tp * pp)) and not self.alone & self.chained and self.experts == experts and divided:
            return
        of_experts = f" and {len(self.experts)} of experts" if self.experts or experts_here else ""
        raise LayoutMismatchError(
            f"{folder} has optimizer state of {len(dense)} places of tensor and pipeline parallelism{of_experts} in a "
            f"form that is bound to them (dp_reshardable); here there are {tp * pp} (tp={tp}, pp={pp})"
            + (f", and {tp * ep} of experts in each stage (ep={ep})." if of_experts else "."),
            advice="Resume with the sizes of the save, or take the weights alone with load_optim=False.",
        )


class Buckets:
    """The buckets of this rank's place, as a checkpoint has them. `groups`: what is stored of param groups."""

    def __init__(self, state: TrainingState, reader: StateReader) -> None:
        self._state = state
        self._reader = reader
        self.groups: Any = None

    def found(self) -> tuple[Mapping[str, Mapping[str, str | Flattened]], str]:
        """Parameter's name as it stands in paths → moment → its place; or why that cannot be told.

        LayoutMismatchError, before anything is read, if the sizes of tensor, pipeline or expert parallelism are other
        ones.
        """
        keys = [stored_key(path) for path in self._reader.index if path.startswith(BUCKETS_PREFIX)]
        matches = [match for key in keys if (match := _BUCKET.fullmatch(key))]
        if not matches:
            return {}, "no buckets are stored"
        layout = self._state.layout or ParallelLayout.default(0, 1)
        _Places.of(matches).check(layout, self._experts_here(), self._reader.folder)
        parts = list(self._of_this_place(matches, layout))
        try:
            placed = {name: place for part in parts for name, place in self._place(part)}
            self._hold_against_weights(placed, parts)
        except LayoutMismatchError as error:
            return {}, f"what lies where in the buckets cannot be told: {error}"
        self.groups = self._groups_of(parts)
        return placed, ""

    def _experts_here(self) -> bool:
        return any(is_expert(parameter) for model in self._state.models for _, parameter in model.parameters())

    def _of_this_place(self, matches: Sequence[re.Match[str]], layout: ParallelLayout) -> Iterator[_Part]:
        tp, pp = (layout.tp_rank or 0, layout.tp), (layout.pp_rank or 0, layout.pp)
        dense, experts = bucket_number(tp, pp), bucket_number(tp, pp, (layout.ep_rank or 0, layout.ep))
        for chained, number in ((None, dense), ("0", dense), ("1", experts)):
            stored: _Stored = {}
            for match in matches:
                if (match[1], int(match[2])) == (chained, number):
                    path = BUCKETS_PREFIX + path_component(match[0])
                    stored.setdefault(int(match[3]), {}).setdefault(int(match[5]), {})[match[6]] = path
            if stored:
                prefix = "" if chained is None else f"chained_{chained}."
                yield _Part(f"{prefix}optimizer.distributed.dp_group_idx_{number}", stored, chained == "1")

    def _groups_of(self, parts: Sequence[_Part]) -> list[Any]:
        """Each optimizer's, where they are stored."""
        objects = self._reader.objects
        return [self._reader.read_object(part.groups_key) for part in parts if part.groups_key in objects]

    def _place(self, part: _Part) -> Iterator[tuple[str, dict[str, str | Flattened]]]:
        buffers, stored = list(self._buffers(part)), part.stored
        if sorted(stored) != list(range(len(buffers))):
            raise LayoutMismatchError(
                f"{len(stored)} buffers are stored under {part.prefix}, and the model's "
                f"{'experts' if part.experts else 'parameters'} make {len(buffers)}"
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

    def _buffers(self, part: _Part) -> Iterator[_Named]:
        """Model by model, dtype by dtype: the parameters that it trains, in the order of the module, by path."""
        for model in self._state.models:
            by_dtype: dict[torch.dtype, _Named] = {}
            for name, parameter in model.parameters():
                if is_dtensor(parameter):
                    raise LayoutMismatchError(f"{name} is a DTensor")
                if parameter.requires_grad and is_expert(parameter) == part.experts:
                    path = f"model/{model.position}/{path_component(name)}"
                    by_dtype.setdefault(parameter.dtype, []).append((path, parameter))
            yield from by_dtype.values()

    # -- the proof ----------------------------------------------------------------------------------------------------

    def _hold_against_weights(
        self, placed: Mapping[str, Mapping[str, str | Flattened]], parts: Sequence[_Part]
    ) -> None:
        """LayoutMismatchError unless every main parameter, rounded, is the stored weight that it is taken for."""
        items = {item.key: item for item in self._state.collect(("model",)).items}
        for buffer in (each for part in parts for each in self._buffers(part)):
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
