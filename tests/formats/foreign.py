"""Folders as Megatron Core leaves them, made by hand with plain torch.distributed.checkpoint; with NaN in the gaps."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner

__all__ = ["Small", "by_bucket", "by_parameter", "bucket_key", "groups", "number"]

ITERATION = 7
MOMENTS = ("exp_avg", "exp_avg_sq")


class Small(nn.Module):
    """Parameters of sizes that leave gaps in a bucket."""

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        for name, shape in {"wide": (5, 7), "long": (130,), "norm": (3,), "deep": (2, 3, 4)}.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape, dtype=dtype)))


def number(name: str, kind: str, shape: Sequence[int]) -> torch.Tensor:
    """Values in float32 that bfloat16 has to round."""
    draw = torch.Generator().manual_seed(sum(map(ord, f"{name} {kind}")))
    return torch.rand(tuple(shape), generator=draw)


def groups(**fields: Any) -> list[dict[str, Any]]:
    """Param groups as `common.pt` has them: what decays its weights, and what does not."""
    shared = {"lr": 0.125, "betas": (0.5, 0.75), "eps": 1e-3, "step": ITERATION, "is_expert_parallel": False}
    shared |= {"lr_mult": 1.0, "is_decoupled_lr": False, **fields}
    return [{**shared, "weight_decay": 0.25, "wd_mult": 1.0}, {**shared, "weight_decay": 0.0, "wd_mult": 0.0}]


def by_parameter(root: Path, model: nn.Module, **fields: Any) -> Path:
    """`fully_reshardable`; `fields` go over the entries of `common.pt`."""
    tensors: dict[str, Any] = dict(_weights(model))
    for name, parameter in model.named_parameters():
        for kind in ("param", *MOMENTS):
            tensors[f"optimizer.state.{kind}.{name}"] = number(name, kind, parameter.shape)
    optimizer = {"optimizer": {"param_groups": groups()}, "param_state_sharding_type": "fully_reshardable"}
    return _write(root, tensors, {"optimizer": optimizer, **fields}, "fully_reshardable")


def by_bucket(
    root: Path,
    model: nn.Module,
    order: Sequence[str],
    closed_after: Sequence[str] = (),
    *,
    places: int = 1,
    experts: Sequence[str] = (),
    expert_places: int = 1,
) -> Path:
    """`dp_reshardable`: buckets in this `order`, closed after these parameters. Each place has the same.

    `experts`, in their order, lie in the buckets of an optimizer of their own.
    """
    parameters = dict(model.named_parameters())
    tensors: dict[str, Any] = dict(_weights(model))
    chained = ("chained_0.", "chained_1.") if experts else ("", "")
    for place in range(places):
        tensors |= _buckets(parameters, order, closed_after, f"{chained[0]}optimizer", place)
    for place in range(expert_places if experts else 0):
        tensors |= _buckets(parameters, experts, closed_after, f"{chained[1]}optimizer", place)
    told = {"param_state_sharding_type": "dp_reshardable"}
    return _write(root, tensors, {"optimizer": {0: told, 1: told} if experts else told}, "dp_reshardable")


def _buckets(
    parameters: Mapping[str, nn.Parameter], order: Sequence[str], closed_after: Sequence[str], prefix: str, place: int
) -> dict[str, Any]:
    """Of one optimizer at one place."""
    found: dict[str, Any] = {}
    buckets: list[list[tuple[str, int]]] = [[]]
    for name in order:
        end = buckets[-1][-1][1] + parameters[buckets[-1][-1][0]].numel() if buckets[-1] else 0
        buckets[-1].append((name, math.ceil(end / 64) * 64))
        if name in closed_after:
            buckets.append([])
    lengths = []
    for bucket, placed in enumerate(filter(None, buckets)):
        lengths.append(placed[-1][1] + parameters[placed[-1][0]].numel())
        for kind in ("param", *MOMENTS):
            flat = torch.full((lengths[-1],), torch.nan)
            for name, start in placed:
                value = number(name, kind, parameters[name].shape).flatten()
                flat[start : start + len(value)] = value
            found[bucket_key(place, bucket, kind, prefix)] = flat
    stem = f"{prefix}.distributed.dp_group_idx_{place}"
    marked = groups(is_expert_parallel=prefix.startswith("chained_1"))
    found[f"{stem}.optimizer/shard_0_1"] = [{"param_groups": marked}]
    found[f"{stem}.per_bucket_numel_unpadded/shard_0_1"] = [[{(torch.bfloat16, torch.float32): lengths}]]
    return found


def bucket_key(place: int, bucket: int, kind: str, prefix: str = "optimizer") -> str:
    dtypes = "(torch.bfloat16, torch.float32)"
    return f"{prefix}.distributed.dp_group_idx_{place}.gbuf_idx_0.dtype_{dtypes}.bucket_idx_{bucket}.{kind}"


def _weights(model: nn.Module) -> Mapping[str, torch.Tensor]:
    return {name: number(name, "param", each.shape).to(torch.bfloat16) for name, each in model.named_parameters()}


def _write(root: Path, tensors: Mapping[str, Any], common: Mapping[str, Any], kind: str) -> Path:
    folder = root / f"iter_{ITERATION:07d}"
    planner = DefaultSavePlanner(flatten_state_dict=False)
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder), planner=planner, no_dist=True)
    content = {"distrib_optim_sharding_type": kind}
    small = {"checkpoint_version": 3.0, "iteration": ITERATION, "content_metadata": content, **common}
    torch.save(small, folder / "common.pt")
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist", "sharded_backend_version": 1}')
    (root / "latest_checkpointed_iteration.txt").write_text(str(ITERATION))
    return folder
