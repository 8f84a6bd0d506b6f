"""The table of formats and jobs, cell by cell as the documentation of Megatron Bridge has it, and what decides."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from resilience.errors import ConfigError
from resilience.job_facts import job_facts
from resilience.planning.format_fit import JobFacts, check_format

DDP, MEGATRON, FSDP2 = JobFacts("ddp"), JobFacts("megatron_fsdp"), JobFacts("torch_fsdp2")
DISTRIBUTED = JobFacts("ddp", distributed_optimizer=True)

#: ckpt_format: DDP, distributed optimizer, Megatron FSDP, torch FSDP2. The last cell of fsdp_dtensor is a departure.
TABLE = {
    "torch_dist": (True, True, False, True),
    "zarr": (True, True, False, True),
    "fsdp_dtensor": (False, False, True, True),
}


@pytest.mark.parametrize("ckpt_format", TABLE)
def test_a_format_takes_the_jobs_of_its_row_and_no_others(ckpt_format: str) -> None:
    for facts, taken in zip((DDP, DISTRIBUTED, MEGATRON, FSDP2), TABLE[ckpt_format], strict=True):
        if taken:
            check_format(ckpt_format, facts, async_save=False)
        else:
            with pytest.raises(ConfigError, match=f'"{ckpt_format}" does not fit this job') as refused:
                check_format(ckpt_format, facts, async_save=False)
            assert "Use ckpt_format=" in refused.value.advice


def test_a_distributed_optimizer_does_not_go_with_dtensors_in_fsdp_dtensor() -> None:
    with pytest.raises(ConfigError, match=r"does not take a distributed optimizer.*Use .*torch_dist.* or .*zarr"):
        check_format("fsdp_dtensor", JobFacts("torch_fsdp2", distributed_optimizer=True), async_save=False)


def test_only_torch_dist_is_saved_in_the_background() -> None:
    check_format("torch_dist", FSDP2, async_save=True)
    for ckpt_format in ("zarr", "fsdp_dtensor"):
        with pytest.raises(ConfigError, match=r'async_save.*Use ckpt_format="torch_dist"\.'):
            check_format(ckpt_format, FSDP2, async_save=True)
    with pytest.raises(ConfigError, match=r"No format takes all of this job"):
        check_format("fsdp_dtensor", MEGATRON, async_save=True)


def _named(name: str, module: str, *bases: type) -> Any:
    return type(name, bases, {"__module__": module})


def _job(model: nn.Module, optimizer: object = None) -> Any:
    wrapped = [SimpleNamespace(optimizer=optimizer)] if optimizer is not None else []
    return SimpleNamespace(models=[SimpleNamespace(module=model)], optimizers=wrapped)


def test_plain_tensors_are_ddp_and_the_optimizer_is_known_by_its_class() -> None:
    model = nn.Linear(2, 2)
    assert job_facts(_job(model, torch.optim.AdamW(model.parameters()))) == DDP
    derived = _named("Mine", "job", _named("DistributedOptimizer", "megatron.core.optimizer.distrib_optimizer", object))
    assert job_facts(_job(model, derived())) == DISTRIBUTED


def test_megatrons_fsdp_is_found_wherever_it_is_in_the_model_and_not_mistaken_for_torchs() -> None:
    wrapper = _named("FullyShardedDataParallel", "megatron.core.distributed.fsdp.mcore_fsdp_adapter", nn.Module)
    assert job_facts(_job(nn.Sequential(wrapper()))) == MEGATRON
    assert job_facts(_job(nn.Sequential(_named("FullyShardedDataParallel", "mine", nn.Module)()))) == DDP
