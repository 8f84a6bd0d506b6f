"""What a job's model and optimizer are, as far as checkpoint formats care (`planning/format_fit.py` decides)."""

from __future__ import annotations

from typing import Any

from resilience.config import CheckpointConfig
from resilience.formats.optimizer_common import DP_RESHARDABLE, FULLY_RESHARDABLE, SHARDING_TYPE
from resilience.planning.format_fit import JobFacts, in_buckets
from resilience.state.distributed_state import DistributedOptimizerState
from resilience.state.tensors import is_dtensor
from resilience.state.training_state import TrainingState

__all__ = ["content_metadata", "job_facts"]

#: By name, because neither Megatron nor a version of torch that lacks one of them has to be importable.
_MEGATRON_FSDP = frozenset({"MegatronFSDP", "FullyShardedDataParallel"})
_DISTRIBUTED_OPTIMIZERS = frozenset({"DistributedOptimizer", "ZeroRedundancyOptimizer"})


def job_facts(state: TrainingState) -> JobFacts:
    """The same on all ranks of a job. Looks only; not collective."""
    modules = [model.module for model in state.models]
    optimizers = [optimizer.optimizer for optimizer in state.optimizers]
    distributed = any(_is_called(each, _DISTRIBUTED_OPTIMIZERS) for each in optimizers)
    if any(_is_called(part, _MEGATRON_FSDP, "megatron") for module in modules for part in module.modules()):
        return JobFacts("megatron_fsdp", distributed)
    sharded = any(is_dtensor(parameter) for module in modules for parameter in module.parameters())
    return JobFacts("torch_fsdp2" if sharded else "ddp", distributed)


def content_metadata(state: TrainingState, checkpoint: CheckpointConfig) -> dict[str, Any]:
    """How the optimizer's state lies in a checkpoint, in Megatron Core's words."""
    if not any(isinstance(optimizer, DistributedOptimizerState) for optimizer in state.optimizers):
        return {}
    if in_buckets(checkpoint.ckpt_format, fully_reshardable=checkpoint.dist_ckpt_optim_fully_reshardable):
        return {SHARDING_TYPE: DP_RESHARDABLE}
    mem_efficient = checkpoint.distrib_optim_fully_reshardable_mem_efficient
    return {SHARDING_TYPE: FULLY_RESHARDABLE, "distrib_optim_fully_reshardable_mem_efficient": mem_efficient}


def _is_called(found: Any, names: frozenset[str], package: str = "") -> bool:
    """Whether its class, or one that it inherits from, has one of the names, in a module that begins with `package`."""
    return any(kind.__name__ in names and kind.__module__.startswith(package) for kind in type(found).__mro__)
