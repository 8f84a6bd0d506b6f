"""Where `resiliency.metrics` sends figures: a Prometheus text file, or TensorBoard."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from resilience.errors import ConfigError

__all__ = ["MetricsTarget", "metrics_target"]

_TENSORBOARD = "tensorboard:"


@dataclass(frozen=True)
class MetricsTarget:
    """`path`: the file as it was given (each rank writes one beside it), or TensorBoard's directory."""

    kind: Literal["prometheus", "tensorboard"]
    path: Path


def metrics_target(given: str) -> MetricsTarget:
    """What the setting names. ConfigError for what nobody would read, or where TensorBoard is not installed."""
    if given.startswith(_TENSORBOARD):
        directory = given.removeprefix(_TENSORBOARD)
        if not directory:
            raise ConfigError(
                f"resiliency.metrics: given {given!r}, but no directory follows the colon.",
                advice="Give tensorboard:DIR.",
            )
        if find_spec("tensorboard") is None:
            raise ConfigError(
                f"resiliency.metrics: {given!r} needs a package that is not installed here.",
                advice="Install it: pip install torch-resilience[tensorboard]",
            )
        return MetricsTarget("tensorboard", Path(directory))
    path = Path(given)
    if path.suffix != ".prom" or not path.stem:
        raise ConfigError(
            f"resiliency.metrics: given {given!r}; a file that ends in .prom (node_exporter's textfile collector "
            "reads no other) or tensorboard:DIR is expected.",
            advice="Give DIR/resilience.prom, with DIR the collector's directory.",
        )
    return MetricsTarget("prometheus", path)
