"""Which hyperparameters of another program's optimizer belong to which param group here. Pure, over plain values.

Megatron Core stores groups without the names of their parameters. What tells them apart are its multipliers; where the
groups here have none, it is whether they decay their weights. What a group's candidates do not agree on stays as it is
here, and that is said.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["IDENTIFIERS", "TakenGroup", "saved_groups", "saved_step", "take_groups"]

Group = Mapping[str, Any]

#: What Megatron Core tells its groups apart by.
IDENTIFIERS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_NOT_TAKEN = frozenset({"params", "step", "initial_lr", *IDENTIFIERS})


@dataclass(frozen=True)
class TakenGroup:
    """Of one group here: the values that it takes over, and what its candidates disagree about. `alike`: whether it has
    any. `step`: the highest of theirs, or else of all; None if none says."""

    values: Mapping[str, Any]
    disputed: tuple[str, ...]
    alike: bool
    step: int | None


def saved_groups(stored: object) -> list[dict[str, Any]]:
    """All param groups in what `common.pt` (or a bucket's object) has under `optimizer`, in whatever nesting.

    `{"param_groups": …}`, `{"optimizer": {…}}`, and a dictionary or list of these for several optimizers.
    """
    if isinstance(stored, Mapping):
        groups = stored.get("param_groups")
        if isinstance(groups, list):
            return [dict(each) for each in groups if isinstance(each, Mapping)]
        inside = [stored["optimizer"]] if "optimizer" in stored else [stored[key] for key in stored if _is_number(key)]
        return [group for each in inside for group in saved_groups(each)]
    if isinstance(stored, list):
        return [group for each in stored for group in saved_groups(each)]
    return []


def saved_step(stored: object) -> int | None:
    """The step that all parameters have in common, which optimizers without main parameters store beside the groups."""
    if not isinstance(stored, Mapping):
        return None
    state = stored.get("state")
    step = _as_int(state.get("common_step")) if isinstance(state, Mapping) else None
    if step is not None:
        return step
    inside = [stored["optimizer"]] if "optimizer" in stored else [stored[key] for key in stored if _is_number(key)]
    return next((found for each in inside if (found := saved_step(each)) is not None), None)


def take_groups(live: Sequence[Group], saved: Sequence[Group]) -> list[TakenGroup]:
    """For each live group what it takes over from the saved ones."""
    return [_take(group, _candidates(group, live, saved), saved) for group in live]


def _take(live: Group, candidates: Sequence[Group], saved: Sequence[Group]) -> TakenGroup:
    values: dict[str, Any] = {}
    disputed: list[str] = []
    for name, here in live.items():
        found = [each[name] for each in candidates if name in each]
        if name in _NOT_TAKEN or not found or not all(_is_hyperparameter(each) for each in found):
            continue
        if not _is_hyperparameter(here) and not hasattr(here, "dtype"):  # a learning rate may be a tensor
            continue
        if any(each != found[0] for each in found):
            disputed.append(name)
        else:
            values[name] = found[0]
    steps = [step for each in candidates or saved if (step := _as_int(each.get("step"))) is not None]
    return TakenGroup(values, tuple(disputed), bool(candidates), max(steps, default=None))


def _candidates(group: Group, live: Sequence[Group], saved: Sequence[Group]) -> list[Group]:
    if all(name in group for name in IDENTIFIERS):
        return [each for each in saved if all(_of(each, name) == group[name] for name in IDENTIFIERS)]
    if len(saved) == 1 or not all("weight_decay" in each for each in (*live, *saved)):
        return list(saved)
    decays = bool(group["weight_decay"])
    return [each for each in saved if bool(each["weight_decay"]) == decays]


def _of(group: Group, name: str) -> Any:
    """NeMo calls two of them otherwise."""
    return group.get(name, group.get(f"pre_{name}"))


def _is_number(key: object) -> bool:
    return isinstance(key, int) and not isinstance(key, bool)


def _is_hyperparameter(value: object) -> bool:
    """A number, or a tuple of numbers. Switches (`fused`, `foreach`) are about this process."""
    each_one = value if isinstance(value, tuple | list) else [value]
    return bool(each_one) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in each_one)


def _as_int(value: Any) -> int | None:
    value = value.item() if hasattr(value, "numel") and value.numel() == 1 else value
    whole = isinstance(value, int) or (isinstance(value, float) and value.is_integer())
    return int(value) if whole and not isinstance(value, bool) else None
