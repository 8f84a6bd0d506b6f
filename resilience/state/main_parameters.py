"""Optimizers that keep main parameters in higher precision beside the model's, and how these follow a load.

When weights are loaded without the optimizer's state, its main parameters must be made anew: its first step would
otherwise put the initial weights back. Ours (`DistributedOptimizer`) are known by their class, Megatron's by their
`reload_model_params`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from resilience.state.distributed_optimizer import DistributedOptimizer

__all__ = ["StoredWeights", "keeps_main_parameters", "renew_main_parameters"]


@dataclass(frozen=True)
class StoredWeights:
    """The parameters as a checkpoint has them, on the CPU, this rank's part of each.

    `state_dict` is in the form of Megatron's: `model`, or `model0`, `model1`, … for several chunks. `by_parameter`: the
    same tensors by the live parameter.
    """

    state_dict: Mapping[str, Any]
    by_parameter: Mapping[torch.Tensor, torch.Tensor]


def keeps_main_parameters(optimizer: Any) -> bool:
    return isinstance(optimizer, DistributedOptimizer) or callable(getattr(optimizer, "reload_model_params", None))


@torch.no_grad()
def renew_main_parameters(optimizer: Any, stored: StoredWeights | None) -> None:
    """Main parameters from `stored`, or (None) from the model's parameters; nothing where there are none."""
    if isinstance(optimizer, DistributedOptimizer):
        optimizer.remake_main_parameters()
        for part in optimizer.slices() if stored is not None else ():
            weight = stored.by_parameter.get(part.parameter) if stored is not None else None
            if weight is not None:
                part.main.copy_(weight.reshape(-1)[part.start : part.stop].view_as(part.main))
    elif keeps_main_parameters(optimizer):
        optimizer.reload_model_params(*(() if stored is None else (stored.state_dict,)))
