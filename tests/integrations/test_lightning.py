"""A run of the real Lightning that is killed goes on in the middle of an epoch, and ends as one that was not."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from resilience import CheckpointConfig, ResiliencyConfig
from resilience.state.digest import state_digest
from tests.ranks import killed, run_ranks, values

EPOCHS, BATCHES = 3, 8


@dataclass(frozen=True)
class Job:
    """One start. `die_at`: the optimizer step in which rank `victim` is killed."""

    root: str
    nodes: tuple[str, ...] = ("a",)
    die_at: int | None = None
    victim: int = 0
    seed: int = 0
    accumulate: int = 1
    persistent: bool = False
    protected: bool = True
    max_epochs: int = EPOCHS


@dataclass(frozen=True)
class Ran:
    resumed: int | None
    digest: str
    told: tuple[tuple[int, str, float], ...]  # what was logged: step, name, value
    epochs: int
    steps: int
    best: str


def make(job: Job, rank: int) -> tuple[Any, Any, Any]:
    """A module, a loader and the callbacks; everything is imported here, as a program would."""
    import pytorch_lightning as pl

    class Module(pl.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))
            self.told: list[tuple[int, str, float]] = []

        def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
            if self.global_step == job.die_at and rank == job.victim:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.die_at is not None:
                time.sleep(0.05)  # its saves are to be there when it dies
            inputs, targets = batch
            loss = nn.functional.mse_loss(self.net(inputs), targets)
            self.told.append((self.global_step, f"train {batch_idx} of {self.current_epoch}", loss.item()))
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            inputs, targets = batch
            loss = nn.functional.mse_loss(self.net(inputs), targets)
            self.told.append((self.global_step, f"validation {batch_idx}", loss.item()))
            self.log("val_loss", loss, sync_dist=len(job.nodes) > 1)

        def configure_optimizers(self) -> Any:
            optimizer = torch.optim.AdamW(self.parameters(), lr=0.02)
            scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 5, 0.7)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    torch.manual_seed(5)
    data = TensorDataset(torch.randn(BATCHES * 4 * len(job.nodes), 4), torch.randn(BATCHES * 4 * len(job.nodes), 1))
    torch.manual_seed(job.seed)
    module = Module()
    sampler = DistributedSampler(data, len(job.nodes), rank, seed=3) if len(job.nodes) > 1 else None
    train = DataLoader(data, 4, shuffle=sampler is None, sampler=sampler)
    return module, train, DataLoader(data, 16)


def environment(rank: int, size: int) -> Any:
    from pytorch_lightning.plugins.environments import LightningEnvironment

    class Ours(LightningEnvironment):
        @property
        def creates_processes_externally(self) -> bool:
            return True

        def world_size(self) -> int:
            return size

        def global_rank(self) -> int:
            return rank

        def local_rank(self) -> int:
            return 0

        def node_rank(self) -> int:
            return rank

        def set_world_size(self, size: int) -> None: ...

        def set_global_rank(self, rank: int) -> None: ...

    return Ours()


def run(rank: int, job: Job) -> Ran:
    import pytorch_lightning as pl

    warnings.simplefilter("ignore")
    module, train, validation = make(job, rank)
    node = f"{job.root}/{job.nodes[rank]}"
    options: dict[str, Any] = {"non_persistent_ckpt_type": "local", "non_persistent_save_interval": 1}
    options |= {"non_persistent_local_ckpt_dir": node, "replication": len(job.nodes) > 1}
    if job.persistent:
        options = {"save": f"{job.root}/save", "save_interval": 1}
    limits = ResiliencyConfig(
        run_id="run", node_id=job.nodes[rank], memory_dir=node, exchange_timeout_s=20.0, keep_after_success=True
    )
    protection = None
    if job.protected:
        from resilience.integrations.lightning import Protection

        protection = Protection(checkpoint=CheckpointConfig(**options), resiliency=limits)
        train = protection.loader(train)
    best = pl.callbacks.ModelCheckpoint(dirpath=f"{job.root}/best-{rank}", monitor="val_loss", filename="{epoch}")
    distributed: dict[str, Any] = {}
    if len(job.nodes) > 1:
        distributed = {"strategy": "ddp", "num_nodes": len(job.nodes), "plugins": [environment(rank, len(job.nodes))]}
    trainer = pl.Trainer(
        max_epochs=job.max_epochs, accelerator="cpu", devices=1, logger=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[best, *([protection] if protection else [])],
        use_distributed_sampler=False, accumulate_grad_batches=job.accumulate, **distributed,
    )  # fmt: skip
    pl.seed_everything(100 + rank + job.seed, verbose=False)
    trainer.fit(module, train_dataloaders=train, val_dataloaders=validation)
    resumed = protection.resilient.resumed_from if protection else None
    from resilience import TrainingState

    state = TrainingState(
        module, list(trainer.optimizers), scheduler=[c.scheduler for c in trainer.lr_scheduler_configs]
    )
    return Ran(
        resumed.iteration if resumed else None, state_digest(state.collect(("model", "optimizer", "scheduler", "rng"))),
        tuple(module.told), trainer.current_epoch, trainer.global_step, best.best_model_path.rsplit("/", 1)[-1],
    )  # fmt: skip


@functools.cache
def undisturbed(nodes: tuple[str, ...], accumulate: int, root: str) -> tuple[Ran, ...]:
    job = Job(f"{root}/undisturbed-{len(nodes)}-{accumulate}", nodes, accumulate=accumulate, protected=False)
    return tuple(values(run_ranks(len(nodes), run, job, distributed=len(nodes) > 1)))


def check(killed_job: Job, root: str, lose: str | None = None) -> None:
    size = len(killed_job.nodes)
    expected = undisturbed(killed_job.nodes, killed_job.accumulate, root)
    outcomes = run_ranks(size, run, killed_job, distributed=size > 1)
    assert killed(outcomes[killed_job.victim]), outcomes
    again = Job(**{**vars(killed_job), "die_at": None, "seed": 1})
    if lose:
        shutil.rmtree(Path(killed_job.root, lose))
    ran = values(run_ranks(size, run, again, distributed=size > 1))
    for mine, wanted in zip(ran, expected, strict=True):
        assert mine.resumed is not None
        assert 0 < mine.resumed <= (killed_job.die_at or 0), "saves are made in the background"
        later = [each for each in wanted.told if each[0] >= mine.resumed]
        at_boundary = [each for each in later if not (each[0] == mine.resumed and each[1].startswith("validation"))]
        assert [each for each in mine.told if each[0] > mine.resumed or each[1].startswith("train")] == at_boundary
        assert (mine.digest, mine.epochs, mine.steps) == (wanted.digest, wanted.epochs, wanted.steps)
        assert mine.best == wanted.best


@pytest.mark.parametrize("die_at", [BATCHES + 3, 2 * BATCHES], ids=["in an epoch", "at its beginning"])
def test_a_killed_lightning_run_goes_on_in_the_middle_of_an_epoch(die_at: int, memory_mount: Path) -> None:
    check(Job(str(memory_mount / "job"), die_at=die_at), str(memory_mount))


@pytest.mark.long
@pytest.mark.parametrize(
    "changed", [{"accumulate": 2, "die_at": 5}, {"persistent": True, "die_at": BATCHES + 3}], ids=str
)
def test_so_does_one_that_accumulates_gradients_and_one_with_persistent_saves(
    changed: dict[str, Any], memory_mount: Path
) -> None:
    check(Job(str(memory_mount / "job"), **changed), str(memory_mount))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_lightning_job_of_two_nodes_loses_one_and_ends_in_the_same_bits(memory_mount: Path) -> None:
    """DDP; the lost node's directory is wiped, so that its rank goes on from the replica on the other."""
    job = Job(str(memory_mount / "job"), ("a", "b"), die_at=BATCHES + 3, victim=1)
    check(job, str(memory_mount), lose="b")


def stop_early(rank: int, root: str, how: str) -> tuple[int, int, list[str]]:
    """Where a run that ends before its epochs do has come, and what is in `save`."""
    import pytorch_lightning as pl

    from resilience.integrations.lightning import Protection

    job = Job(root)
    module, train, validation = make(job, rank)
    protection = Protection(
        checkpoint=CheckpointConfig(save=f"{root}/save", save_interval=1000),
        resiliency=ResiliencyConfig(run_id="run", memory_dir=f"{root}/mem"),
    )

    class Early(pl.Callback):
        def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
            if trainer.global_step == 11 and how == "should_stop":
                trainer.should_stop = True
            if trainer.global_step == 11 and how == "request":
                protection.resilient.request_stop()

    trainer = pl.Trainer(
        max_epochs=EPOCHS, max_steps=13 if how == "max_steps" else -1, accelerator="cpu", devices=1, logger=False,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False,
        callbacks=[Early(), protection],
    )  # fmt: skip
    status = 0
    try:
        trainer.fit(module, train_dataloaders=protection.loader(train), val_dataloaders=validation)
    except SystemExit as left:
        status = int(left.code or 0)
    return trainer.global_step, status, sorted(path.name for path in Path(root, "save").glob("iter_*"))


@pytest.mark.parametrize(
    ("how", "expected"),
    [
        ("max_steps", (13, 0, ["iter_0000013"])),
        ("should_stop", (11, 0, ["iter_0000011"])),
        ("request", (12, 75, ["iter_0000012"])),
    ],
)
def test_however_a_run_ends_its_last_step_is_saved(
    how: str, expected: tuple[int, int, list[str]], tmp_path: Path
) -> None:
    (ended,) = values(run_ranks(1, stop_early, str(tmp_path), how, distributed=False))
    assert ended == expected


def test_what_cannot_be_protected_is_refused_in_words(tmp_path: Path) -> None:
    import pytorch_lightning as pl
    from torch.utils.data import IterableDataset

    from resilience.errors import ConfigError
    from resilience.integrations.lightning import Protection

    class Endless(IterableDataset[int]):
        def __iter__(self) -> Any:
            return iter(int, 1)

    protection = Protection(checkpoint=CheckpointConfig(save=str(tmp_path / "save")))
    with pytest.raises(ConfigError, match="has no length"):
        protection.loader(DataLoader(Endless()))
    with pytest.raises(RuntimeError, match="fit has not begun"):
        _ = protection.resilient
    module, train, _ = make(Job(str(tmp_path)), 0)
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, callbacks=[protection],
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"Protection\.loader"):
        trainer.fit(module, train_dataloaders=train)


@pytest.mark.parametrize("what", ["limit_train_batches", "overfit_batches", "several optimizers", "ckpt_path"])
def test_what_would_train_otherwise_than_without_protection_is_refused(what: str, tmp_path: Path) -> None:
    import pytorch_lightning as pl

    from resilience.errors import ConfigError
    from resilience.integrations.lightning import Protection

    module, train, _ = make(Job(str(tmp_path)), 0)
    protection = Protection(checkpoint=CheckpointConfig(save=str(tmp_path / "save")))
    quiet: dict[str, Any] = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    limits = {what: 5} if what in ("limit_train_batches", "overfit_batches") else {}
    trainer = pl.Trainer(
        max_epochs=1, accelerator="cpu", enable_checkpointing=False, callbacks=[protection], **quiet, **limits
    )
    path = None
    if what == "several optimizers":
        module.automatic_optimization = False
        module.configure_optimizers = lambda: [torch.optim.SGD(module.parameters(), lr=0.1) for _ in range(2)]
    if what == "ckpt_path":
        path = tmp_path / "last.ckpt"
        plain = pl.Trainer(max_epochs=1, accelerator="cpu", enable_checkpointing=False, **quiet)
        plain.fit(module, train_dataloaders=train)
        plain.save_checkpoint(path)
    with pytest.raises(ConfigError, match="2 optimizers" if what == "several optimizers" else what):
        trainer.fit(module, train_dataloaders=protection.loader(train), ckpt_path=path)
    assert not (tmp_path / "save").exists(), "before anything is made"
