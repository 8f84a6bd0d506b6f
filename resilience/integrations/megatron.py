"""Megatron's training loops with this package's local checkpoints: one line before `pretrain`, or one in a loop.

    from resilience.integrations.megatron import use_local_checkpoints

    use_local_checkpoints()   # Megatron-LM, Megatron Bridge: before pretrain(), on every rank
    pretrain(...)             # with non_persistent_ckpt_type="local"

Both build NVRx's `LocalCheckpointManager` and `CliqueReplicationStrategy` where they set a job up; afterwards these
names are ours. What Megatron saves to shared storage stays Megatron's; `resilience ls`, `verify` and `convert` read it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any, Final

from torch import distributed as dist

from resilience.config import CheckpointConfig
from resilience.errors import ConfigError
from resilience.integrations.nvrx import (
    CliqueReplicationStrategy,
    LazyCliqueReplicationStrategy,
    LocalCheckpointManager,
)

__all__ = ["KEEP", "checkpointing_context", "use_local_checkpoints"]

#: One more than NVRx: were the newest damaged, the one before it is there.
KEEP: Final = 2

_LOCAL: Final = "nvidia_resiliency_ext.checkpointing.local"
_MANAGER: Final = f"{_LOCAL}.ckpt_managers.local_manager"
_STRATEGIES: Final = f"{_LOCAL}.replication.strategies"


def use_local_checkpoints(
    *, keep: int = KEEP, trusted_classes: Iterable[type | str] = (), timeout_s: float = 120.0
) -> None:
    """Have Megatron build this package's local checkpoints. Local; call it on all ranks; a second call sets anew.

    `keep`, `trusted_classes`, `timeout_s`: as `LocalCheckpointManager` takes them. ConfigError if NVRx, which Megatron
    asks for before it looks at its local checkpoints, cannot be imported.
    """
    trusted = tuple(trusted_classes)

    class Manager(LocalCheckpointManager):
        """Ours, with what was asked for; Megatron gives the rest."""

        def __init__(self, root_local_ckpt_dir: str, session_id: str = "", repl_strategy: Any = None) -> None:
            super().__init__(
                root_local_ckpt_dir, session_id, repl_strategy, keep=keep, trusted_classes=trusted, timeout_s=timeout_s
            )

    Manager.__name__ = Manager.__qualname__ = "LocalCheckpointManager"
    ours: dict[str, type] = {
        "LocalCheckpointManager": Manager,
        "CliqueReplicationStrategy": CliqueReplicationStrategy,
        "LazyCliqueReplicationStrategy": LazyCliqueReplicationStrategy,
    }
    try:
        places = [import_module(_MANAGER), import_module(_STRATEGIES)]
    except ImportError as error:
        raise ConfigError(
            f"NVIDIA's Resiliency Extension cannot be imported, and Megatron's local checkpoints ask for it: {error}",
            advice="pip install nvidia-resiliency-ext, or give the loop checkpointing_context() yourself.",
        ) from error
    megatron = [module for name, module in list(sys.modules.items()) if name.partition(".")[0] == "megatron"]
    for module in [*places, *megatron]:
        for name, ours_now in ours.items():
            if isinstance(vars(module).get(name), type):
                setattr(module, name, ours_now)


def checkpointing_context(
    checkpoint: CheckpointConfig,
    *,
    keep: int = KEEP,
    trusted_classes: Iterable[type | str] = (),
    timeout_s: float = 120.0,
) -> dict[str, Any]:
    """What Megatron's `save_checkpoint` and `load_checkpoint` take under this name; empty unless the type is "local".

    Collective where copies are kept on other nodes (`checkpoint.replication`): all ranks, once torch.distributed runs.
    """
    if checkpoint.non_persistent_ckpt_type != "local" or checkpoint.non_persistent_local_ckpt_dir is None:
        return {}
    strategy = None
    if checkpoint.replication and dist.is_initialized() and dist.get_world_size() > 1:
        strategy = CliqueReplicationStrategy.from_replication_params(
            checkpoint.replication_jump, checkpoint.replication_factor
        )
    manager = LocalCheckpointManager(
        checkpoint.non_persistent_local_ckpt_dir, repl_strategy=strategy, keep=keep, trusted_classes=trusted_classes,
        timeout_s=timeout_s,
    )  # fmt: skip
    return {"local_checkpoint_manager": manager}
