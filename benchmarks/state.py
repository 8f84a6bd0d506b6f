"""The state that is saved: a model of plain weights with Adam's moments, equal on all ranks, and one rank's half of it.

The others (torch.save, DCP, NVRx) get the half cut out beforehand; ours starts from the live model and optimizer.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.settings import RANKS, Settings

__all__ = ["OTHER", "SAVED", "Weights", "adam_for", "changes", "half_of"]

#: Of the weights: what a restore is to find, and what it finds instead in a new process.
SAVED, OTHER = 1.0, -1.0


class Weights(nn.Module):
    """`layers` matrices, or three times as many (`whole`: as many bytes as with Adam); equal on all ranks."""

    def __init__(self, settings: Settings, *, value: float = 1.0, whole: bool = False) -> None:
        super().__init__()
        count = settings.layers * (3 if whole else 1)
        shape = (settings.rows, settings.columns)
        self.layers = nn.ParameterList(torch.full(shape, value + position) for position in range(count))


def adam_for(model: nn.Module) -> torch.optim.Adam:
    """An optimizer that has stepped once, so that its moments exist and are not all zero."""
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 0.5)
    optimizer.step()
    optimizer.zero_grad()
    return optimizer


def half_of(model: Weights, optimizer: torch.optim.Adam, rank: int) -> dict[str, torch.Tensor]:
    """This rank's share: every second layer's weight and moments, under names that only this rank uses."""
    half: dict[str, torch.Tensor] = {}
    for position in range(rank, len(model.layers), RANKS):
        parameter = model.layers[position]
        half[f"layers.{position}"] = parameter.detach()
        for moment in ("exp_avg", "exp_avg_sq"):
            half[f"layers.{position}.{moment}"] = optimizer.state[parameter][moment]
    return half


def changes(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Callable[[], None]:
    """What a step does to a state as far as a save can tell: something of every tensor is another value.

    Else nothing would have to be sent at a save.
    """
    moments = [] if optimizer is None else [each for state in optimizer.state.values() for each in state.values()]
    firsts = [tensor.detach().reshape(-1)[:1] for tensor in (*model.parameters(), *moments)]

    def change() -> None:
        torch._foreach_add_(firsts, 1.0)

    return change
