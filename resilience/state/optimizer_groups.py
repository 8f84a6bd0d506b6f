"""An optimizer's param groups as state: hyperparameters, and the parameters' names in place of the parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

__all__ = ["NamesById", "groups_by_name", "groups_differ", "load_groups"]

#: Gives the names of the models' parameters by identity (`id`). Called when an optimizer's groups change, no oftener.
NamesById = Callable[[], Mapping[int, str]]


def groups_by_name(groups: Sequence[Mapping[str, Any]], names: Sequence[Sequence[str]]) -> list[dict[str, Any]]:
    """The groups with `names` as their parameters."""
    # By name: the order in which hyperparameters were added to a group says nothing.
    return [
        {**{key: group[key] for key in sorted(group, key=str) if key != "params"}, "params": list(named)}
        for group, named in zip(groups, names, strict=True)
    ]


def groups_differ(where: str, saved: Sequence[Mapping[str, Any]], here: Sequence[Mapping[str, Any]]) -> list[str]:
    """Why saved groups cannot be put back into those here, in words; empty when they can."""
    if len(here) != len(saved):
        return [
            f"{where}: saved with {len(saved)} param groups, here it has {len(here)} (groups that were added by "
            f"add_param_group have to be added before the restore)"
        ]
    return [
        f"{where}/param_groups/{index}: {_difference_of_names(old['params'], live['params'])}"
        for index, (live, old) in enumerate(zip(here, saved, strict=True))
        if live["params"] != old["params"]
    ]


def load_groups(live: Sequence[dict[str, Any]], saved: Sequence[Mapping[str, Any]]) -> None:
    """Put hyperparameters back. Group dicts stay the same objects, and a hyperparameter that is a tensor keeps its
    memory (compiled and captured steps hold on to it)."""
    for group, old in zip(live, saved, strict=True):
        for name, value in old.items():
            if name != "params" and not _copied_into(group.get(name), value):
                group[name] = value


def _copied_into(live: Any, saved: Any) -> bool:
    if not isinstance(live, torch.Tensor) or not isinstance(saved, torch.Tensor):
        return False
    if live.shape != saved.shape or live.dtype != saved.dtype:
        return False
    with torch.no_grad():
        live.copy_(saved)
    return True


def _difference_of_names(saved: list[str], here: list[str]) -> str:
    missing, added = [n for n in saved if n not in here], [n for n in here if n not in saved]
    if not missing and not added:
        return "holds the same parameters in another order"
    parts = []
    if missing:
        parts.append(f"saved with {_few(missing)}, which it lacks here")
    if added:
        parts.append(f"holds {_few(added)}, which the save lacks")
    return "; ".join(parts)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
