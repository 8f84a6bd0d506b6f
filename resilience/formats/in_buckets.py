"""How the state of divided optimizers lies in their buckets, as Megatron Core's `dp_reshardable` has it, and how it is
found there again, by parameter.

    optimizer.distributed.dp_group_idx_0.gbuf_idx_0.dtype_(torch.bfloat16, torch.float32).bucket_idx_0.exp_avg   [2368]
    optimizer.distributed.dp_group_idx_0.optimizer/shard_0_1              param groups
    optimizer.distributed.dp_group_idx_0.per_bucket_numel/shard_0_1       and per_bucket_numel_unpadded

One such set for each place of tensor and pipeline parallelism (`dp_group_idx`; of experts, expert parallelism too): the
ranks of a place may become more or fewer, the places may not. What pads the buckets is zero here; elsewhere it is not
even defined.

A save in buckets takes the same pieces from the arena as any other. Each piece of a moment is a piece of its bucket; of
a float32 model, whose weights are the main parameters, so is each piece of a weight.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch

from resilience.errors import CorruptCopyError, LayoutMismatchError, ResilienceError, in_short
from resilience.formats.keys import BUCKETS_PREFIX
from resilience.formats.optimizer_common import DP_RESHARDABLE, SHARDING_TYPE, marked_groups
from resilience.formats.optimizer_view import OptimizerView
from resilience.formats.protocol import Chunk, RankShare, StateReader
from resilience.planning.bucket_space import Flattened, bucket_number, common_box, runs_of_box, stem_of
from resilience.replication.communicator import Agreements
from resilience.state.distributed_state import MAIN, DistributedOptimizerState
from resilience.state.flat_sharding import local_blocks
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.saved_world import layout_of, tree_of
from resilience.state.sharding import state_prefix
from resilience.state.tensors import DTYPES, dtype_name, is_expert
from resilience.state.training_state import TrainingState
from resilience.state.tree import path_component

__all__ = [
    "OwnBuckets",
    "fill_gaps",
    "group_objects",
    "into_buckets",
    "lies_in_buckets",
    "own_buckets",
    "seen_by_parameter",
]

_STEP = "step"
_PLACES = ("tp", "pp", "ep")


@dataclass(frozen=True)
class _Kept:
    """Elements `start` to `stop` of a bucket are what this rank keeps of the parameter called `name`."""

    name: str
    start: int
    stop: int


@dataclass(frozen=True)
class _Bucket:
    """`mine`: this rank's elements, as far as they are no padding of the end."""

    stem: str
    numel: int
    numel_unpadded: int
    dtype: str
    mine: range
    kept: tuple[_Kept, ...]


@dataclass(frozen=True)
class OwnBuckets:
    """The buckets of one divided optimizer on this rank, which do not change while it runs.

    `parameters`: what the paths of a parameter's state begin with → its place (`stored` is the bucket's stem).
    `weights`: path of a float32 weight → that prefix. `leads`: of the ranks that share the state it is the first.
    `experts`: names of the parameters that fewer ranks have alike.
    """

    position: int
    prefix: str
    leads: bool
    buckets: tuple[_Bucket, ...]
    parameters: Mapping[str, Flattened]
    weights: Mapping[str, str]
    experts: frozenset[str]

    @property
    def groups_key(self) -> str:
        """The object with the param groups."""
        return f"{self.prefix}.optimizer/shard_0_1"

    @cached_property
    def lengths(self) -> Mapping[str, int]:
        """Of each bucket, by its stem, without what pads its end."""
        return {bucket.stem: bucket.numel_unpadded for bucket in self.buckets}


def own_buckets(state: TrainingState) -> tuple[OwnBuckets, ...]:
    """Of all divided optimizers. Not collective."""
    layout = state.layout or ParallelLayout(dp=1).resolve(0, 1)
    several = len(state.optimizers) > 1
    return tuple(
        _own(each, state, layout, each.position if several else None)
        for each in state.optimizers
        if isinstance(each, DistributedOptimizerState)
    )


def _own(
    each: DistributedOptimizerState, state: TrainingState, layout: ParallelLayout, chained: int | None
) -> OwnBuckets:
    optimizer, named = each.optimizer, each.parameters()
    names_by_id = {id(parameter): name for name, parameter in named.items()}
    names = [names_by_id[id(parameter)] for parameter in optimizer.laid_out]
    experts = frozenset(name for name, parameter in named.items() if is_expert(parameter))
    place = _number(layout, optimizer.size)
    parameters: dict[str, Flattened] = {}
    weights: dict[str, str] = {}
    buckets: list[_Bucket] = []
    dtypes: dict[str, int] = {}
    for bucket in optimizer.buckets:
        number = dtypes.setdefault(bucket.dtype, 0)
        dtypes[bucket.dtype] += 1
        stem = stem_of(place, list(dtypes).index(bucket.dtype), bucket.dtype, number, chained)
        share = bucket.share(optimizer.rank, optimizer.size)
        kept = []
        for placed in bucket.placed:
            name = names[placed.index]
            prefix = f"optimizer/{each.position}/state/{path_component(name)}"
            parameters[prefix] = Flattened(stem, placed.start, *local_blocks(named[name]))
            if named[name].dtype == torch.float32:
                weights[state.model_key(name)] = prefix
            start, stop = max(placed.start, share.start), min(placed.stop, share.stop)
            if start < stop:
                kept.append(_Kept(name, start, stop))
        mine = range(share.start, max(share.start, min(share.stop, bucket.numel_unpadded)))
        buckets.append(_Bucket(stem, bucket.numel, bucket.numel_unpadded, bucket.dtype, mine, tuple(kept)))
    prefix = f"{'' if chained is None else f'chained_{chained}.'}optimizer.distributed.dp_group_idx_{place}"
    return OwnBuckets(each.position, prefix, optimizer.rank == 0, tuple(buckets), parameters, weights, experts)


def _number(layout: ParallelLayout, ranks: int) -> int:
    """Of a resolved layout. `ranks` that share an optimizer's state: fewer, where it is of experts alone."""
    tp, pp = (layout.tp_rank or 0, layout.tp), (layout.pp_rank or 0, layout.pp)
    alike = layout.world_size // (layout.tp * layout.pp)
    if layout.ep > 1 and ranks < alike:
        return bucket_number(tp, pp, (layout.ep_rank or 0, layout.ep))
    return bucket_number(tp, pp)


def _path(stem: str, moment: str) -> str:
    return f"{BUCKETS_PREFIX}{stem}.{moment}"


# -- writing ----------------------------------------------------------------------------------------------------------


def into_buckets(chunks: Iterable[Chunk], pieces: Iterable[Chunk], own: Sequence[OwnBuckets]) -> list[Chunk]:
    """`chunks` with what lies in buckets as parts of these, made of `pieces`: all that this rank has in its arena, also
    what another data-parallel group would write (every place has buckets of its own)."""
    moved = [chunk for chunk in chunks if not any(chunk.key not in each.weights for each, *_ in _places_of(chunk, own))]
    for piece in pieces:
        for each, flat, moment in _places_of(piece, own):
            moved += _flat_parts(piece, flat, moment, each.lengths[flat.stored])
    return moved


def _places_of(chunk: Chunk, own: Sequence[OwnBuckets]) -> Iterator[tuple[OwnBuckets, Flattened, str]]:
    prefix = state_prefix(chunk.key)
    moment = chunk.key.removeprefix(f"{prefix}/")
    for each in own:
        if chunk.key in each.weights:
            yield each, each.parameters[each.weights[chunk.key]], MAIN
        flat = each.parameters.get(prefix)
        if flat is not None and moment != _STEP and tuple(chunk.global_shape) == flat.global_shape:
            yield each, flat, moment


def _flat_parts(chunk: Chunk, flat: Flattened, moment: str, length: int) -> Iterator[Chunk]:
    for block in flat.blocks:
        common = common_box(block, chunk.offsets, chunk.sizes)
        if common is None:
            continue
        inside, local, sizes = common
        region = chunk.tensor
        for axis, (first, count) in enumerate(zip(inside, sizes, strict=True)):
            region = region.narrow(axis, first, count)
        elements = region.reshape(-1)
        for run in runs_of_box(flat.shape, local, sizes):
            part = elements[run.at : run.at + run.length]
            yield Chunk(_path(flat.stored, moment), part, (length,), (flat.start + run.start,), True)


def group_objects(trees: Sequence[Mapping[str, Any]], own: Sequence[OwnBuckets]) -> dict[str, Any]:
    """The param groups of the buckets that this rank leads; `trees` of all its optimizers, in plain values."""
    return {
        each.groups_key: {"param_groups": marked_groups(trees[each.position]["param_groups"], each.experts)}
        for each in own
        if each.leads
    }


def fill_gaps(share: RankShare, own: Sequence[OwnBuckets], group: Agreements) -> RankShare:
    """What is still lacking of the buckets: what pads them, and what says how long they are.

    State that a parameter does not have yet is zero. Collective over all ranks of the save.
    """
    mine = {"moments": _dtypes(share.chunks, own), "leads": [each.prefix for each in own if each.leads]}
    moments: dict[int, dict[str, str]] = {}
    leaders: dict[str, int] = {}
    for rank, payload in enumerate(group.gather(json.dumps(mine).encode())):
        told = json.loads(payload)
        for position, found in told["moments"].items():
            moments.setdefault(int(position), {}).update(found)
        for prefix in told["leads"]:
            leaders.setdefault(prefix, rank)
    kept = dict(_kept_moments(share.values, own))
    chunks, objects = list(share.chunks), dict(share.objects)
    for each in own:
        for moment, dtype in sorted(moments[each.position].items()):
            chunks += _gaps(each, moment, DTYPES[dtype], kept[each.position].get(moment, frozenset()))
        if leaders.get(each.prefix) == group.rank:
            objects |= _lengths(each)
        else:  # another group of ranks has the same
            objects.pop(each.groups_key, None)
    return replace(share, chunks=chunks, objects=objects)


def _kept_moments(values: bytes, own: Sequence[OwnBuckets]) -> Iterator[tuple[int, Mapping[str, frozenset[str]]]]:
    """Optimizer's position → moment → names of the parameters that this rank has it of."""
    optimizers = json.loads(values).get("optimizer", []) if own else []
    for each in own:
        found: dict[str, set[str]] = {MAIN: set()}
        for name, state in optimizers[each.position]["state"].items():
            for moment in state:
                found.setdefault(moment, set()).add(name)
        found[MAIN].update(kept.name for bucket in each.buckets for kept in bucket.kept)
        yield each.position, {moment: frozenset(names) for moment, names in found.items() if moment != _STEP}


def _dtypes(chunks: Iterable[Chunk], own: Sequence[OwnBuckets]) -> dict[int, dict[str, str]]:
    """Optimizer's position → moment → its dtype, as this rank has parts of it. Main parameters there are always."""
    positions = {bucket.stem: each.position for each in own for bucket in each.buckets}
    found = {each.position: {MAIN: "float32"} for each in own}
    for chunk in chunks:
        stem, _, moment = chunk.key.removeprefix(BUCKETS_PREFIX).rpartition(".")
        if chunk.key.startswith(BUCKETS_PREFIX) and stem in positions:
            found[positions[stem]][moment] = dtype_name(chunk.dtype)
    return found


def _gaps(own: OwnBuckets, moment: str, dtype: torch.dtype, names: Collection[str]) -> Iterator[Chunk]:
    """Zeros for this rank's elements that belong to no parameter, or to none of those that have such a state."""
    for bucket in own.buckets:
        at = bucket.mine.start
        ranges = [(each.start, each.stop) for each in bucket.kept if each.name in names]
        for start, stop in [*ranges, (bucket.mine.stop, bucket.mine.stop)]:
            if at < start:
                blank = torch.zeros(start - at, dtype=dtype)
                yield Chunk(_path(bucket.stem, moment), blank, (bucket.numel_unpadded,), (at,), True)
            at = max(at, stop)


def _lengths(own: OwnBuckets) -> dict[str, Any]:
    """The two objects by which Megatron Core sees that its buckets are the same."""
    found: dict[str, Any] = {}
    for name, length_of in _LENGTHS.items():
        buffers: dict[str, list[int]] = {}
        for bucket in own.buckets:
            buffers.setdefault(bucket.dtype, []).append(length_of(bucket))
        told = [{(getattr(torch, dtype), torch.float32): lengths} for dtype, lengths in buffers.items()]
        found[f"{own.prefix}.{name}/shard_0_1"] = told
    return found


_LENGTHS: Mapping[str, Callable[[_Bucket], int]] = {
    "per_bucket_numel": lambda bucket: bucket.numel,
    "per_bucket_numel_unpadded": lambda bucket: bucket.numel_unpadded,
}


# -- reading ----------------------------------------------------------------------------------------------------------


def lies_in_buckets(reader: StateReader) -> bool:
    """Whether the optimizer's state of this checkpoint is in this form."""
    content = reader.common.get("content_metadata")
    return isinstance(content, Mapping) and content.get(SHARDING_TYPE) == DP_RESHARDABLE


def seen_by_parameter(state: TrainingState, reader: StateReader) -> OptimizerView:
    """A checkpoint of ours in which optimizer state lies in buckets, seen by parameter, for this rank's place.

    LayoutMismatchError, before any tensor is read, if the sizes of tensor, pipeline or expert parallelism are other
    ones than those of the save; CorruptCopyError if the values of the save make no sense.
    """
    try:
        return _seen_by_parameter(state, reader)
    except (AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        if isinstance(error, ResilienceError):
            raise
        raise CorruptCopyError(f"{reader.folder} does not say what its buckets hold ({in_short(error)}).") from error


def _seen_by_parameter(state: TrainingState, reader: StateReader) -> OptimizerView:
    assert reader.record is not None, "a checkpoint of ours"
    layout = state.layout or ParallelLayout.default(0, 1)
    tree = _tree_of_this_place(reader, layout, reader.record.world_size)
    saved = layout_of(tree)
    assert saved is not None, "found by it"
    live = {name: each for optimizer in state.optimizers for name, each in optimizer.parameters().items()}
    optimizers = tree.get("optimizer", [])
    flattened: dict[str, Flattened] = {}
    copies: dict[str, str] = {}
    for position, written in enumerate(optimizers):
        if not isinstance(written, dict) or "buckets" not in written:
            continue
        told = written["buckets"]
        number = _number(saved, told["ranks"])
        chained = position if len(optimizers) > 1 else None
        for name, (buffer, bucket, start) in told["of"].items():
            if name not in live:
                continue
            stem = stem_of(number, buffer, told["dtypes"][buffer], bucket, chained)
            flat = Flattened(stem, start, *local_blocks(live[name]))
            for moment in _moments(reader, stem):
                stored = replace(flat, stored=_path(stem, moment))
                _check_fits(reader, stored, name)
                flattened[f"optimizer/{position}/state/{path_component(name)}/{moment}"] = stored
            if told["dtypes"][buffer] == "float32":
                copies[_path(stem, MAIN)] = state.model_key(name)
    return OptimizerView(reader, {}, flattened, copies)


def _moments(reader: StateReader, stem: str) -> list[str]:
    start = _path(stem, "")
    return [path.removeprefix(start) for path in reader.index if path.startswith(start)]


def _check_fits(reader: StateReader, flat: Flattened, name: str) -> None:
    length = math.prod(reader.index[flat.stored].global_shape)
    if flat.start + math.prod(flat.shape) > length:
        raise LayoutMismatchError(
            f"the optimizer's state of {name} in {reader.folder} does not lie in its bucket of {length} elements, at "
            f"{flat.start}: the parameter has another shape now, {list(flat.shape)}."
        )


def _tree_of_this_place(reader: StateReader, layout: ParallelLayout, world_size: int) -> Mapping[str, Any]:
    """The tree of a saved rank that stood where this rank stands."""
    for rank in range(world_size):
        state = reader.rank_state(rank)
        if state is None:
            break
        tree = tree_of(state.values)
        saved = layout_of(tree) or ParallelLayout.default(rank, world_size)
        if not saved.same_sizes(layout, *_PLACES):
            raise LayoutMismatchError(
                f"{reader.folder} was saved with dist_ckpt_optim_fully_reshardable=False at {saved.in_words()}: its "
                f"optimizer state is bound to tp, pp and ep, and here the layout is {layout.in_words()}.",
                advice="Resume with the sizes of the save, or take the weights alone with load_optim=False. Save with "
                "dist_ckpt_optim_fully_reshardable=True to be free to change them.",
            )
        if all(getattr(saved, f"{name}_rank") == getattr(layout, f"{name}_rank") for name in _PLACES):
            return {**tree, "layout": saved.to_dict()}
    raise CorruptCopyError(f"{reader.folder} holds no state of a rank at {layout.in_words()}.")
