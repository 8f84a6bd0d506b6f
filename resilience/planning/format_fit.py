"""Which checkpoint format a job can be saved in, given what its model and its optimizer are.

The table is Megatron Bridge's ("Format Compatibility"), with one departure: `fsdp_dtensor` also takes torch's FSDP2 and
other models of DTensors, which plain torch.distributed.checkpoint stores in the same form.

                    DDP    distributed optimizer    Megatron FSDP    torch FSDP2    async save
    torch_dist      yes    yes                      no               yes            yes
    zarr            yes    yes                      no               yes            no
    fsdp_dtensor    no     no                       yes              yes            no

It holds for persistent saves and for non-persistent ones of the type `global`. Saves on the nodes are in no such format
and take every job, whatever `ckpt_format` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from resilience.errors import ConfigError

__all__ = ["JobFacts", "ModelKind", "check_format", "in_buckets"]

#: "ddp": plain tensors, wrapped or not. "torch_fsdp2": some parameters are DTensors.
ModelKind = Literal["ddp", "megatron_fsdp", "torch_fsdp2"]


@dataclass(frozen=True)
class JobFacts:
    """What decides. `distributed_optimizer`: its state is cut over data-parallel ranks by itself, not as DTensors."""

    model: ModelKind
    distributed_optimizer: bool = False


@dataclass(frozen=True)
class _Row:
    models: frozenset[ModelKind]
    distributed_optimizer: bool
    async_save: bool
    buckets: bool = False  # a distributed optimizer's state may lie as the optimizer has it


_TABLE: Mapping[str, _Row] = {
    "torch_dist": _Row(frozenset({"ddp", "torch_fsdp2"}), distributed_optimizer=True, async_save=True, buckets=True),
    "zarr": _Row(frozenset({"ddp", "torch_fsdp2"}), distributed_optimizer=True, async_save=False),
    "fsdp_dtensor": _Row(frozenset({"megatron_fsdp", "torch_fsdp2"}), distributed_optimizer=False, async_save=False),
}
_MODELS: Mapping[ModelKind, str] = {
    "ddp": "a model of plain tensors (DDP, or not wrapped)",
    "megatron_fsdp": "a model of Megatron's FSDP",
    "torch_fsdp2": "a model of DTensors (torch's FSDP2)",
}


def in_buckets(ckpt_format: str, *, fully_reshardable: bool) -> bool:
    """Whether a distributed optimizer's state is stored in its buckets, which only the data-parallel size may leave.

    Only Megatron's own format has them; in any other the state is always fully reshardable.
    """
    return _TABLE[ckpt_format].buckets and not fully_reshardable


def check_format(ckpt_format: str, facts: JobFacts, *, async_save: bool) -> None:
    """ConfigError, naming the formats that would do, if the job cannot be saved in this one."""
    problem = _problem(_TABLE[ckpt_format], facts, async_save)
    if not problem:
        return
    fitting = [f'"{name}"' for name, row in _TABLE.items() if not _problem(row, facts, async_save)]
    raise ConfigError(
        f'checkpoint.ckpt_format: "{ckpt_format}" does not fit this job: it {problem}.',
        advice=f"Use ckpt_format={' or '.join(fitting)}." if fitting else "No format takes all of this job.",
    )


def _problem(row: _Row, facts: JobFacts, async_save: bool) -> str:
    if facts.model not in row.models:
        return f"does not take {_MODELS[facts.model]}"
    if facts.distributed_optimizer and not row.distributed_optimizer:
        return "does not take a distributed optimizer"
    return "is not written in the background (async_save)" if async_save and not row.async_save else ""
