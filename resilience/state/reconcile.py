"""How the tree of a save is made to fit a model that has other entries: what both have is the save's, the rest is ours.

Works on the JSON of two trees and changes names only: what the save lacks stands as it is here, what only the save has
goes. Whether such differences are let pass is the caller's to decide (`dist_ckpt_strictness`).
"""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from resilience.errors import CorruptCopyError
from resilience.state.strict_json import json_of
from resilience.state.tree import path_component

__all__ = ["Reconciled", "reconcile", "without_entries", "without_parts"]


@dataclass(frozen=True)
class Reconciled:
    """A tree with the entries that the live model has.

    `from_live`: the keys of the model's entries whose description is the live tree's, because the save's tree has no
    such entry, or because the caller wants the stored tensor converted to what is here.
    """

    values: bytes
    from_live: frozenset[str]
    added: frozenset[str]  # of those: not in the save's tree


def reconcile(saved: bytes, live: bytes, *, convert: bool = False) -> Reconciled:
    """`saved` with the model entries and the optimized parameters of `live`.

    `convert`: tensors of the model that both have are described as they are here (dtype, placement). CorruptCopyError
    if `saved` is no tree.
    """
    tree, here = _object(saved), _object(live)
    from_live: set[str] = set()
    added: set[str] = set()
    models, lives = tree.get("model"), here.get("model", [])
    if _same_length(models, lives):
        assert isinstance(models, list), "checked"
        for position, (entries, mine) in enumerate(zip(models, lives, strict=True)):
            if not (_plain(entries) and _plain(mine)):
                continue
            new = mine.keys() - entries.keys()
            both = {name for name in mine if convert and _tensor(mine[name]) and _tensor(entries.get(name))}
            models[position] = {name: mine[name] if name in new or name in both else entries[name] for name in mine}
            added |= {f"model/{position}/{path_component(name)}" for name in new}
            from_live |= {f"model/{position}/{path_component(name)}" for name in new | both}
    optimizers, lives = tree.get("optimizer"), here.get("optimizer", [])
    if _same_length(optimizers, lives):
        assert isinstance(optimizers, list), "checked"
        for optimizer, mine in zip(optimizers, lives, strict=True):
            _fit_optimizer(optimizer, mine)
    return Reconciled(_bytes(tree), frozenset(from_live), frozenset(added))


def without_parts(values: bytes, parts: Collection[str]) -> bytes:
    """The tree less some of its parts."""
    return _bytes({part: value for part, value in _object(values).items() if part not in parts}) if parts else values


def without_entries(values: bytes, keys: Collection[str]) -> bytes:
    """The tree less some entries of its models, by key."""
    tree = _object(values)
    for position, entries in enumerate(tree.get("model", ())):
        if _plain(entries):
            for name in [name for name in entries if f"model/{position}/{path_component(name)}" in keys]:
                del entries[name]
    return _bytes(tree)


def _fit_optimizer(saved: Any, live: Any) -> None:
    """Groups hold the parameters that they hold here, and state stays for these; hyperparameters are the save's."""
    groups, mine = (each.get("param_groups") if _plain(each) else None for each in (saved, live))
    if not _same_length(groups, mine):
        return
    assert isinstance(groups, list) and isinstance(mine, list), "checked"  # noqa: PT018
    if any(not _plain(group) for group in (*groups, *mine)):
        return
    before, here = ({name for group in each for name in _names(group)} for each in (groups, mine))
    if any(set(_names(old)) & here != set(_names(new)) & before for old, new in zip(groups, mine, strict=True)):
        return  # a parameter is in another group now, with other hyperparameters: the plan says so
    known: set[str] = set()
    for old, new in zip(groups, mine, strict=True):
        if set(_names(old)) != set(_names(new)):
            old["params"] = new["params"]
        known |= set(_names(new))
    if _plain(saved.get("state")):
        saved["state"] = {name: state for name, state in saved["state"].items() if name in known}


def _names(group: Mapping[str, Any]) -> list[str]:
    found = group.get("params")
    return [name for name in found if isinstance(name, str)] if isinstance(found, list) else []


def _tensor(written: Any) -> bool:
    return isinstance(written, dict) and "$tensor" in written


def _plain(written: Any) -> bool:
    """A dict with str keys, written as such."""
    return isinstance(written, dict) and not next(iter(written), "").startswith("$")


def _same_length(one: Any, other: Any) -> bool:
    return isinstance(one, list) and isinstance(other, list) and len(one) == len(other)


def _object(values: bytes) -> dict[str, Any]:
    tree = json_of(values)
    if not _plain(tree):
        raise CorruptCopyError("The values of a save are no tree of a training state.")
    return dict(tree)


def _bytes(tree: Mapping[str, Any]) -> bytes:
    return json.dumps(tree, allow_nan=False, separators=(",", ":")).encode("ascii")
