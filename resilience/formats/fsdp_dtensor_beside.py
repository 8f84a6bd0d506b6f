"""What `fsdp_dtensor` keeps for other programs beside the tensors: hyperparameters, scheduler, counters, random state.

    checkpoint_version, iteration
    opt_param_scheduler.<name>                              the scheduler's state
    optimizer.param_to_group_meta.<parameter>.<name>        hyperparameters, once per parameter
    rng_state.(0, 0).0.<generator>                          rank 0's, in Megatron's names
    resilience/common                                       what `common.pt` holds in the other formats

All but the last lie in the nested dictionary that plain DCP gives back. Readers of ours take the last one and each
rank's own object.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch.distributed.checkpoint._nested_dict import flatten_state_dict

from resilience.formats.dcp_dialect import Beside, Dialect
from resilience.formats.folder_files import Backend, common_state
from resilience.formats.fsdp_dtensor import NAME
from resilience.formats.fsdp_dtensor_keys import nested_path, stored_key
from resilience.formats.megatron_objects import megatron_rng
from resilience.formats.optimizer_common import groups_by_optimizer
from resilience.formats.protocol import RankShare, SaveMeta

__all__ = ["COMMON_OBJECT", "FSDP_DTENSOR"]

COMMON_OBJECT = "resilience/common"


def _beside(share: RankShare, meta: SaveMeta) -> Beside:
    """On rank 0. What is cut over ranks is no part of it."""
    common = common_state(share, meta)
    nested: dict[str, Any] = {"checkpoint_version": common["checkpoint_version"], "iteration": common["iteration"]}
    if "opt_param_scheduler" in common:
        nested["opt_param_scheduler"] = common["opt_param_scheduler"]
    for number, groups in enumerate(groups_by_optimizer(common.get("optimizer"))):
        section = nested.setdefault(f"optimizer_{number}" if number else "optimizer", {})
        section["param_to_group_meta"] = dict(_by_parameter(groups))
    rng = _rng(share)
    if rng:
        nested["rng_state"] = {"(0, 0)": [rng]}
    flat, paths = flatten_state_dict(nested)
    return {tuple(paths[key]): value for key, value in flat.items()} | {(COMMON_OBJECT,): [common]}


def _by_parameter(groups: list[dict[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for group in groups:
        for parameter in group.get("params", ()):  # another program's may name none
            yield parameter, {name: value for name, value in group.items() if name != "params"}


def _rng(share: RankShare) -> dict[str, Any]:
    whole = {chunk.key: chunk.tensor for chunk in share.chunks if chunk.key.startswith("rng/")}
    return megatron_rng(share.values, whole.get)


FSDP_DTENSOR = Dialect(Backend(NAME, marked=False), stored_key, _beside, nested_path)
