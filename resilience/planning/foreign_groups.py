"""Which hyperparameters of another program's optimizer belong to which param group here. Pure, over plain values.

Megatron Core stores groups without the names of their parameters. What tells them apart are its multipliers; where the
groups here have none, it is whether they decay their weights. What a group's candidates do not agree on stays as it is
here, and that is said.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["IDENTIFIERS", "TakenGroup", "as_step", "saved_groups", "saved_step", "take_groups"]

Group = Mapping[str, Any]

#: What Megatron Core tells its groups apart by.
IDENTIFIERS = ("wd_mult", "lr_mult", "is_expert_parallel", "is_decoupled_lr")
_DEEPEST = 4
_MOST_STEPS = 1 << 53
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

    `{"param_groups": …}`, `{"optimizer": {…}}`, and a dictionary or list of these for several optimizers. Of a group
    what is no plain value is left out.
    """
    found = []
    for each in _optimizers(stored):
        groups = each.get("param_groups")
        found += [_plain(group) for group in groups if isinstance(group, Mapping)] if isinstance(groups, list) else []
    return found


def saved_step(stored: object) -> int | None:
    """The step that all parameters have in common, which optimizers without main parameters store beside the groups."""
    states = [each.get("state") for each in _optimizers(stored)]
    steps = [as_step(state.get("common_step")) for state in states if isinstance(state, Mapping)]
    return next((step for step in steps if step is not None), None)


def as_step(value: Any) -> int | None:
    """A count of steps, however it was stored; None for anything else."""
    number = _number(value)
    whole = isinstance(number, int | float) and not isinstance(number, bool) and 0 <= number < _MOST_STEPS
    return int(number) if whole and float(number).is_integer() else None


def _optimizers(stored: object, depth: int = 0) -> Iterator[Mapping[Any, Any]]:
    """The dictionaries that have the groups; nothing is nested deeper than several optimizers of mixed precision."""
    if depth > _DEEPEST:
        return
    if isinstance(stored, list):
        inside: Sequence[object] = stored
    elif not isinstance(stored, Mapping):
        return
    elif "param_groups" in stored:
        yield stored
        return
    elif "optimizer" in stored:
        inside = [stored["optimizer"]]
    else:
        inside = [stored[key] for key in stored if isinstance(key, int)]
    for each in inside:
        yield from _optimizers(each, depth + 1)


def _plain(group: Mapping[Any, Any]) -> dict[str, Any]:
    values = {name: _number(value) for name, value in group.items() if isinstance(name, str)}
    if "weight_decay" in values and _of(values, "wd_mult") == 0:
        values["weight_decay"] = 0.0  # Megatron's scheduler multiplies it out, from its first step on
    return {
        name: value
        for name, value in values.items()
        if isinstance(value, bool | int | float) or (isinstance(value, tuple | list) and _is_hyperparameter(value))
    }


def _number(value: Any) -> Any:
    """A tensor of one element by its element."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value


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
    steps = [step for each in candidates or saved if (step := as_step(each.get("step"))) is not None]
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


def _is_hyperparameter(value: object) -> bool:
    """A number, or a tuple of numbers. Switches (`fused`, `foreach`) are about this process."""
    each_one = value if isinstance(value, tuple | list) else [value]
    return bool(each_one) and all(isinstance(each, int | float) and not isinstance(each, bool) for each in each_one)
