"""What `common.pt` says of optimizers, in Megatron Core's nesting, so that its optimizers find groups and step there.

    a divided optimizer     {"optimizer": {"param_groups": [...]}, "param_state_sharding_type": "fully_reshardable"}
      in buckets            {"param_state_sharding_type": "dp_reshardable"}: groups are stored for each place
    an undivided one        {"param_groups": [...], "state": {"common_step": ...}}
    several                 {0: ..., 1: ...}

Each group has the step and the multipliers by which Megatron Core tells groups apart; both are worked out here.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from resilience.formats.protocol import Chunk, RankShare
from resilience.replication.communicator import Agreements
from resilience.state.distributed_state import MAIN
from resilience.state.tree import path_component

__all__ = [
    "DP_RESHARDABLE",
    "FULLY_RESHARDABLE",
    "SHARDING_TYPE",
    "groups_by_optimizer",
    "main_aliases",
    "marked_groups",
    "optimizer_common",
    "with_steps",
]

#: In `content_metadata`; absent without a divided optimizer.
SHARDING_TYPE = "distrib_optim_sharding_type"
#: Whether the state of divided optimizers lies in the parameters' shapes, or in the optimizers' buckets.
FULLY_RESHARDABLE = "fully_reshardable"
DP_RESHARDABLE = "dp_reshardable"
_STEP = "step"


def optimizer_common(
    trees: Sequence[Mapping[str, Any]], sharding_type: str, experts: Collection[str] = frozenset()
) -> Any:
    """The entry `optimizer` for these optimizers (plain values); None if none of them has groups.

    `sharding_type`: how the state of divided ones lies. `experts`: names of parameters that fewer ranks have alike. The
    step is not known yet: `with_steps` puts it in.
    """
    told = {number: _of(tree, sharding_type, experts) for number, tree in enumerate(trees) if "param_groups" in tree}
    return (told[next(iter(told))] if len(trees) == 1 else told) if told else None


def groups_by_optimizer(stored: Any) -> list[list[dict[str, Any]]]:
    """The param groups of each optimizer in such an entry, or in what earlier versions wrote (a list of optimizers)."""
    if isinstance(stored, Mapping) and "param_groups" in stored:
        return [stored["param_groups"]]
    if isinstance(stored, Mapping) and "optimizer" in stored:
        return groups_by_optimizer(stored["optimizer"])
    several = stored.values() if isinstance(stored, Mapping) else stored if isinstance(stored, list) else ()
    return [groups for each in several for groups in groups_by_optimizer(each)]


def with_steps(share: RankShare, group: Agreements, positions: Mapping[str, int]) -> RankShare:
    """`share` with the step of each group, which is known to whichever rank writes it. Collective over all ranks.

    Of parameters that have taken different numbers of steps the highest counts: Megatron Core knows one for all.
    `positions`: objects that have the groups of one optimizer, by key.
    """
    mine = _steps(share.chunks, share.values)
    steps: dict[str, int] = {}
    for payload in group.gather(json.dumps(mine).encode()):
        for place, step in json.loads(payload).items():
            steps[place] = max(step, steps.get(place, 0))
    stored = share.common.get("optimizer")
    if isinstance(stored, Mapping):
        several = all(isinstance(key, int) for key in stored)
        stepped = {key: _stepped(one, key, steps) for key, one in (stored.items() if several else [(0, stored)])}
        share = replace(share, common={**share.common, "optimizer": stepped if several else stepped[0]})
    objects = {
        key: _stepped(one, positions[key], steps, divided=True) if key in positions else one
        for key, one in share.objects.items()
    }
    return replace(share, objects=objects)


def main_aliases(values: bytes) -> dict[str, str]:
    """Where the model is float32, its parameters are the main parameters of a divided optimizer: second names for them.

    Tree path of the main parameter → that of the model's, of all parameters that this rank's groups name.
    """
    tree = json.loads(values)
    models, aliases = tree.get("model", ()), dict[str, str]()
    for position, optimizer in enumerate(tree.get("optimizer", ())):
        if not isinstance(optimizer, dict) or "slices" not in optimizer:
            continue
        for name in (name for group in optimizer["param_groups"] for name in group["params"]):
            chunk, inside = (0, name) if len(models) == 1 else _chunk_and_name(name)
            entry = models[chunk].get(inside) if chunk < len(models) and isinstance(models[chunk], dict) else None
            if isinstance(entry, dict) and entry.get("dtype") == "float32" and "$tensor" in entry:
                aliases[f"optimizer/{position}/state/{path_component(name)}/{MAIN}"] = str(entry["$tensor"])
    return aliases


def _chunk_and_name(name: str) -> tuple[int, str]:
    chunk, _, inside = name.partition(".")
    return (int(chunk) if chunk.isdigit() else 0), inside


def marked_groups(given: Sequence[Mapping[str, Any]], experts: Collection[str]) -> list[dict[str, Any]]:
    """Groups with the multipliers, and the mark of experts, by which Megatron Core tells groups apart."""
    groups = [dict(group) for group in given]
    decays = [_number(group.get("weight_decay")) for group in groups]
    rates = [_number(group.get("initial_lr", group.get("lr"))) for group in groups]
    for group, decay, rate in zip(groups, decays, rates, strict=True):
        group.setdefault("wd_mult", _share(decay, decays))
        group.setdefault("lr_mult", _share(rate, rates))
        of_experts = bool(group["params"]) and all(name in experts for name in group["params"])
        group.setdefault("is_expert_parallel", of_experts)
        group.setdefault("is_decoupled_lr", False)
    return groups


def _of(tree: Mapping[str, Any], sharding_type: str, experts: Collection[str]) -> dict[str, Any]:
    divided = "slices" in tree
    if divided and sharding_type == DP_RESHARDABLE:
        return {"param_state_sharding_type": sharding_type}
    groups = marked_groups(tree["param_groups"], experts)
    if divided:
        return {"optimizer": {"param_groups": groups}, "param_state_sharding_type": sharding_type}
    return {"param_groups": groups}


def _share(value: float, of: Sequence[float]) -> float:
    """Of the largest, as somebody would write it; 1.0 where all are 0."""
    return float(f"{value / max(of):.6g}") if max(of, default=0.0) > 0.0 else 1.0


def _number(value: Any) -> float:
    value = value.item() if isinstance(value, torch.Tensor) and value.numel() == 1 else value
    return float(value) if isinstance(value, int | float) else 0.0


def _steps(chunks: Iterable[Chunk], values: bytes) -> dict[str, int]:
    """`<optimizer>/<group>` → the highest step of its parameters that this rank writes."""
    found: dict[str, int] = {}
    written = [(parts, chunk) for chunk in chunks for parts in [chunk.key.split("/")] if _is_step(parts, chunk)]
    if not written:
        return found
    groups = dict(_groups_by_parameter(json.loads(values)))
    for parts, chunk in written:
        place = groups.get((parts[1], parts[3]))
        if place is not None:
            found[place] = max(int(chunk.tensor.item()), found.get(place, 0))
    return found


def _is_step(parts: Sequence[str], chunk: Chunk) -> bool:
    return len(parts) == 5 and (parts[0], parts[2], parts[4]) == ("optimizer", "state", _STEP) and chunk.sizes == ()


def _groups_by_parameter(tree: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str], str]]:
    for position, optimizer in enumerate(tree.get("optimizer", ())):
        groups = optimizer.get("param_groups", ()) if isinstance(optimizer, dict) else ()
        for number, group in enumerate(groups):
            for name in group["params"]:
                yield (str(position), path_component(name)), f"{position}/{number}"


def _stepped(
    one: Mapping[str, Any], position: int, steps: Mapping[str, int], *, divided: bool = False
) -> dict[str, Any]:
    """One optimizer's entry with its steps. A group without any (no parameter of it was trained) has the others'."""
    if "optimizer" in one:
        return {**one, "optimizer": _stepped(one["optimizer"], position, steps, divided=True)}
    groups = one.get("param_groups", ())
    known = [steps.get(f"{position}/{number}") for number in range(len(groups))]
    highest = max((step for step in known if step is not None), default=None)
    if highest is None:
        return dict(one)
    stepped = [{**group, _STEP: highest if step is None else step} for group, step in zip(groups, known, strict=True)]
    return {**one, "param_groups": stepped, **({} if divided else {"state": {"common_step": highest}})}
