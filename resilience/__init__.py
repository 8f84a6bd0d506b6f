"""Training jobs that survive failures: the public names, loaded when they are first used.

`import resilience` itself imports neither torch nor anything that does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from resilience import errors
    from resilience.config import CheckpointConfig, ResiliencyConfig, load_config
    from resilience.controller import ResiliencyController
    from resilience.formats.load import load_checkpoint
    from resilience.reports import Resume, SaveReport
    from resilience.state import ParallelLayout, TrainingState, TrainState, shard, shard_at
    from resilience.state.distributed_optimizer import DistributedOptimizer
    from resilience.trainer import ResilientTrainer

__version__ = "0.1.0"

__all__ = [
    "CheckpointConfig",
    "DistributedOptimizer",
    "ParallelLayout",
    "ResiliencyConfig",
    "ResiliencyController",
    "ResilientTrainer",
    "Resume",
    "SaveReport",
    "TrainState",
    "TrainingState",
    "errors",
    "load_checkpoint",
    "load_config",
    "shard",
    "shard_at",
]

#: Name → the module that defines it; a module of that very name is exported itself.
_HOME = {
    "CheckpointConfig": "resilience.config",
    "DistributedOptimizer": "resilience.state.distributed_optimizer",
    "ParallelLayout": "resilience.state",
    "ResiliencyConfig": "resilience.config",
    "ResiliencyController": "resilience.controller",
    "ResilientTrainer": "resilience.trainer",
    "Resume": "resilience.reports",
    "SaveReport": "resilience.reports",
    "TrainState": "resilience.state",
    "TrainingState": "resilience.state",
    "errors": "resilience.errors",
    "load_checkpoint": "resilience.formats.load",
    "load_config": "resilience.config",
    "shard": "resilience.state",
    "shard_at": "resilience.state",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import importlib

    module = importlib.import_module(_HOME[name])
    value = module if module.__name__ == f"{__name__}.{name}" else getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
