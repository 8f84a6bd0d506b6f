"""What a tensor of the training state is called in a `fsdp_dtensor` checkpoint: the path in one nested dictionary.

    tree path                                     key (DCP joins the dictionary's keys by dots)
    model/0/layers.0.weight                       model.layers.0.weight
    model/1/layers.0.weight                       model1.layers.0.weight
    optimizer/0/state/layers.0.weight/exp_avg     optimizer.state.layers.0.weight.exp_avg
    optimizer/1/state/layers.0.weight/exp_avg     optimizer_1.state.layers.0.weight.exp_avg
    anything else (extra/ema/0/w)                 resilience/extra/ema/0/w

What other programs keep beside (`rng_state.…`, `opt_param_scheduler.…`) stands under `foreign/`: nobody must take it
for a part of the model. Importing this file needs no torch.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

__all__ = ["FOREIGN", "is_model_key", "nested_path", "stored_key", "tree_keys"]

_OTHER = "resilience/"
FOREIGN = "foreign/"
_MODEL = re.compile(r"model(0|[1-9]\d{0,5})?\.(.+)", re.DOTALL)
_OPTIMIZER = re.compile(r"optimizer(?:_([1-9]\d{0,5}))?\.state\.(.+)\.([^.]+)", re.DOTALL)
_WRAPPER = "module."
_MAX_WRAPPERS = 2


def stored_key(path: str) -> str:
    """The key of a tree path."""
    friendly = _friendly(path.split("/"))
    return friendly if friendly and tree_keys([friendly])[friendly] == path else _OTHER + path


def tree_keys(keys: Iterable[str], *, wrapped: bool = False) -> dict[str, str]:
    """Key → tree path. `wrapped`: another program's, whose parameters' names begin with none, one or two `module.`.

    How many it is goes by what all names of the model, or of the optimizer's state, have in common.
    """
    listed = list(keys)
    models = {key: match for key in listed if (match := _MODEL.fullmatch(key))}
    moments = {key: match for key in listed if (match := _OPTIMIZER.fullmatch(key))}
    of_model = _wrappers([match[2] for match in models.values()]) if wrapped else 0
    of_moments = _wrappers([match[2] for match in moments.values()]) if wrapped else 0
    found: dict[str, str] = {}
    for key in listed:
        if key.startswith(_OTHER):
            found[key] = key.removeprefix(_OTHER)
        elif match := moments.get(key):
            name = _escape(match[2][of_moments:])
            found[key] = f"optimizer/{match[1] or 0}/state/{name}/{_escape(match[3])}"
        elif match := models.get(key):
            found[key] = f"model/{match[1] or 0}/{_escape(match[2][of_model:])}"
        else:
            found[key] = f"{FOREIGN}{_escape(key)}"
    return found


def nested_path(key: str) -> tuple[str | int, ...]:
    """Where a tensor stands in the nested dictionary that plain DCP gives back."""
    if match := _OPTIMIZER.fullmatch(key):
        return (key.partition(".")[0], "state", match[2], match[3])
    if _MODEL.fullmatch(key):
        return tuple(key.split(".", 1))
    return (key,)


def is_model_key(key: str) -> bool:
    """Whether a tensor of this name is one of a model's in such a checkpoint."""
    return _MODEL.fullmatch(key) is not None


def _wrappers(names: list[str]) -> int:
    """Length of the `module.` prefixes that all names begin with."""
    count = 0
    while names and count < _MAX_WRAPPERS and all(name.startswith(_WRAPPER * (count + 1)) for name in names):
        count += 1
    return count * len(_WRAPPER)


def _friendly(parts: list[str]) -> str:
    match parts:
        case ["model", "0", name]:
            return f"model.{_unescape(name)}"
        case ["model", chunk, name]:
            return f"model{chunk}.{_unescape(name)}"
        case ["optimizer", "0", "state", name, moment]:
            return f"optimizer.state.{_unescape(name)}.{_unescape(moment)}"
        case ["optimizer", number, "state", name, moment]:
            return f"optimizer_{number}.state.{_unescape(name)}.{_unescape(moment)}"
    return ""


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
