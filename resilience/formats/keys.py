"""What a tensor of the training state is called inside a checkpoint, so that other programs find it by the usual name.

    tree path                                     key in the checkpoint
    model/0/layers.0.weight                       layers.0.weight
    model/1/layers.0.weight                       model_chunk_1.layers.0.weight
    optimizer/0/state/layers.0.weight/exp_avg     optimizer.state.exp_avg.layers.0.weight
    optimizer/1/state/layers.0.weight/exp_avg     optimizer_1.state.exp_avg.layers.0.weight
    optimizer/megatron/<the key, escaped>         optimizer.distributed.…, chained_1.optimizer.distributed.…
    anything else (extra/ema/0/w)                 resilience/extra/ema/0/w
    what rank 3 of 8 has alone (an object)        resilience/shard_3_8

The first four forms are Megatron Core's or its closest neighbours. The fifth is what its optimizers store by their own
buckets, not by parameter: such a key is nobody's weight, and stands for itself. A name that would read back as another
path (a model with a submodule `optimizer.state`) takes the last tensor form, so that each key stands for exactly one
path.
"""

from __future__ import annotations

import re

__all__ = [
    "BUCKETS_PREFIX",
    "MODEL_PREFIX",
    "OPTIMIZER_PREFIX",
    "OWN_PREFIX",
    "rank_key",
    "rank_of",
    "stored_key",
    "tree_key",
]

MODEL_PREFIX = "model/"
OPTIMIZER_PREFIX = "optimizer/"
#: What Megatron Core's optimizers store in a form of their own.
BUCKETS_PREFIX = "optimizer/megatron/"
OWN_PREFIX = "resilience/"
_CHUNK = re.compile(r"model_chunk_([1-9]\d{0,5})\.(.+)", re.DOTALL)
_OPTIMIZER = re.compile(r"optimizer(?:_([1-9]\d{0,5}))?\.state\.([^.]+)\.(.+)", re.DOTALL)
_BUCKETS = re.compile(r"(?:chained_\d{1,6}\.)?optimizer\.distributed\..+|chained_\d{1,6}\.optimizer\..+", re.DOTALL)
_RANK = re.compile(r"resilience/shard_(\d{1,7})_(\d{1,7})")


def stored_key(path: str) -> str:
    """The key of a tree path."""
    friendly = _friendly(path.split("/"))
    return friendly if friendly and tree_key(friendly) == path else OWN_PREFIX + path


def tree_key(key: str) -> str:
    """The tree path of a key; keys of other programs are taken for the model's."""
    if key.startswith(OWN_PREFIX):
        return key.removeprefix(OWN_PREFIX)
    if match := _OPTIMIZER.fullmatch(key):
        return f"optimizer/{match[1] or 0}/state/{_escape(match[3])}/{_escape(match[2])}"
    if _BUCKETS.fullmatch(key):
        return BUCKETS_PREFIX + _escape(key)
    if match := _CHUNK.fullmatch(key):
        return f"{MODEL_PREFIX}{match[1]}/{_escape(match[2])}"
    return f"{MODEL_PREFIX}0/{_escape(key)}"


def rank_key(rank: int, world_size: int) -> str:
    """The object that holds what `rank` has alone."""
    return f"{OWN_PREFIX}shard_{rank}_{world_size}"


def rank_of(key: str) -> tuple[int, int] | None:
    """`(rank, world_size)` of such an object's key."""
    match = _RANK.fullmatch(key)
    return (int(match[1]), int(match[2])) if match else None


def _friendly(parts: list[str]) -> str:
    match parts:
        case ["model", "0", name]:
            return _unescape(name)
        case ["model", chunk, name]:
            return f"model_chunk_{chunk}.{_unescape(name)}"
        case ["optimizer", "megatron", key]:
            return _unescape(key)
        case ["optimizer", "0", "state", name, moment]:
            return f"optimizer.state.{_unescape(moment)}.{_unescape(name)}"
        case ["optimizer", number, "state", name, moment]:
            return f"optimizer_{number}.state.{_unescape(moment)}.{_unescape(name)}"
    return ""


def _escape(part: str) -> str:
    return part.replace("~", "~0").replace("/", "~1")


def _unescape(part: str) -> str:
    return part.replace("~1", "/").replace("~0", "~")
