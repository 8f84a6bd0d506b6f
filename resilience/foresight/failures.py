"""When does what fail? Failures of a whole job as a sequence in time, drawn from a model and a seed.

The time between failures of a job is exponential (no memory) or Weibull (shape below 1: failures come in bursts, as in
the field data of Schroeder and Gibson, DOI 10.1109/TDSC.2009.4; they found 0.7 to 0.8). What fails is one process, one
node, or a whole rack.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from random import Random
from typing import Literal

from resilience.errors import ConfigError

__all__ = ["DISTRIBUTIONS", "Distribution", "Failure", "FailureModel", "drawn"]

Distribution = Literal["exponential", "weibull"]
DISTRIBUTIONS: tuple[Distribution, ...] = ("exponential", "weibull")


@dataclass(frozen=True)
class Failure:
    """Something fails `at_s` seconds after the job was first started. `nodes`: those that lost what they held.

    No nodes: a process died, or hung; every node keeps its copies.
    """

    at_s: float
    nodes: tuple[int, ...] = ()


@dataclass(frozen=True)
class FailureModel:
    """`mtbf_s`: mean seconds between failures of the whole job. Shares are of all failures; the rest are lost nodes.

    Nodes `k * nodes_per_rack` and on make up rack k. `shape` is Weibull's.
    """

    nodes: int
    mtbf_s: float
    distribution: Distribution = "exponential"
    shape: float = 0.7
    process_share: float = 0.0
    rack_share: float = 0.0
    nodes_per_rack: int = 1

    def __post_init__(self) -> None:
        if not self.mtbf_s > 0 or not math.isfinite(self.mtbf_s):
            raise ConfigError(f"a mean time between failures of {self.mtbf_s:g} s: it must be above 0.")
        if self.nodes < 1 or self.nodes_per_rack < 1:
            raise ConfigError(f"{self.nodes} nodes in racks of {self.nodes_per_rack}: at least 1 is needed of both.")
        if not 0.1 <= self.shape <= 10:
            raise ConfigError(f"a Weibull shape of {self.shape:g}: it must lie between 0.1 and 10.", advice="Try 0.7.")
        shares = (self.process_share, self.rack_share)
        if not all(0 <= share <= 1 for share in shares) or sum(shares) > 1:
            raise ConfigError(
                f"shares of failures {self.process_share:g} (processes) and {self.rack_share:g} (racks): each must lie "
                "between 0 and 1, and they must not exceed 1 together."
            )


def drawn(model: FailureModel, random: Random) -> Iterator[Failure]:
    """Failures in the order of time, without end."""
    scale = model.mtbf_s / math.gamma(1 + 1 / model.shape)
    at_s = 0.0
    while True:
        if model.distribution == "exponential":
            at_s += random.expovariate(1 / model.mtbf_s)
        else:
            at_s += random.weibullvariate(scale, model.shape)
        yield Failure(at_s, _struck(model, random))


def _struck(model: FailureModel, random: Random) -> tuple[int, ...]:
    what = random.random()
    if what < model.process_share:
        return ()
    node = random.randrange(model.nodes)
    if what >= model.process_share + model.rack_share:
        return (node,)
    first = node - node % model.nodes_per_rack
    return tuple(range(first, min(first + model.nodes_per_rack, model.nodes)))
