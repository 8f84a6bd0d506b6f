"""A run of the real Trainer that is killed goes on in the middle of an epoch, and ends as one that was not."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import time
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset

from resilience import CheckpointConfig, ResiliencyConfig, TrainingState
from resilience.errors import ConfigError
from resilience.state.digest import state_digest
from tests.ranks import killed, run_ranks, values

EPOCHS, STEPS = 3, 8  # steps of an epoch


@dataclass(frozen=True)
class Job:
    """One start. `die_at`: the step in which rank `victim` is killed."""

    root: str
    nodes: tuple[str, ...] = ("a",)
    die_at: int | None = None
    victim: int = 0
    scrambled: int = 0
    accumulate: int = 1
    persistent: bool = False
    protected: bool = True
    patience: int = 0  # of evaluations that get no better
    options: tuple[tuple[str, Any], ...] = ()


@dataclass(frozen=True)
class Ran:
    resumed: int | None
    digest: str
    told: tuple[tuple[int, str, float], ...]  # step, name, value
    logged: tuple[tuple[int, str, float], ...]
    steps: int
    epoch: float


class Numbers(Dataset[dict[str, torch.Tensor]]):
    def __init__(self, count: int) -> None:
        draw = torch.Generator().manual_seed(5)
        self._inputs = torch.randn(count, 4, generator=draw)
        self._labels = torch.randn(count, 1, generator=draw)

    def __len__(self) -> int:
        return len(self._inputs)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"inputs": self._inputs[index], "labels": self._labels[index]}


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.3), nn.Linear(16, 1))

    def forward(self, inputs: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self.layers(inputs)
        return {"loss": nn.functional.mse_loss(found, labels), "logits": found}


def make(job: Job, rank: int) -> tuple[Any, list[tuple[int, str, float]]]:
    """A trainer and what its steps see; everything is imported here, as a program would."""
    from transformers import EarlyStoppingCallback, Trainer, TrainingArguments, set_seed

    told: list[tuple[int, str, float]] = []

    class Watched(Trainer):
        def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
            if self.state.global_step == job.die_at and rank == job.victim:
                os.kill(os.getpid(), signal.SIGKILL)
            if job.die_at is not None:
                time.sleep(0.05)  # its saves are to be there when it dies
            loss = super().training_step(model, inputs, num_items_in_batch)
            told.append((self.state.global_step, "train", loss.item()))
            return loss

    arguments = {
        "output_dir": f"{job.root}/out-{rank}", "num_train_epochs": EPOCHS, "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": job.accumulate, "learning_rate": 0.02, "warmup_steps": 3, "logging_steps": 3,
        "eval_strategy": "steps", "eval_steps": 4, "save_strategy": "no", "report_to": [], "use_cpu": True, "seed": 7,
        "disable_tqdm": True, "ddp_backend": "gloo" if len(job.nodes) > 1 else None, **dict(job.options),
    }  # fmt: skip
    callbacks = []
    if job.patience:
        arguments |= {"metric_for_best_model": "loss", "greater_is_better": True, "save_strategy": "no"}
        callbacks = [EarlyStoppingCallback(job.patience)]
    count = STEPS * 4 * len(job.nodes) * job.accumulate
    model = Net()
    with torch.random.fork_rng():
        torch.manual_seed(11 + job.scrambled)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.5)
    trainer = Watched(
        model, TrainingArguments(**arguments), train_dataset=Numbers(count), eval_dataset=Numbers(16),
        callbacks=callbacks,
    )  # fmt: skip
    set_seed(100 + job.scrambled)  # of all ranks alike, as the library has it
    return trainer, told


def run(rank: int, job: Job) -> Ran:
    warnings.simplefilter("ignore")
    if len(job.nodes) == 1:  # a process of its own: the library takes these for a launcher's
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            os.environ.pop(name, None)
    else:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="1")  # it asks, and uses the group that is there
    trainer, told = make(job, rank)
    node = f"{job.root}/{job.nodes[rank]}"
    options: dict[str, Any] = {"non_persistent_ckpt_type": "local", "non_persistent_save_interval": 1}
    options |= {"non_persistent_local_ckpt_dir": node, "replication": len(job.nodes) > 1}
    if job.persistent:
        options = {"save": f"{job.root}/save", "save_interval": 1}
    limits = ResiliencyConfig(
        run_id="run", node_id=job.nodes[rank], memory_dir=node, exchange_timeout_s=20.0, keep_after_success=True
    )
    resumed = None
    if job.protected:
        from resilience.integrations.transformers import protect

        protection = protect(trainer, checkpoint=CheckpointConfig(**options), resiliency=limits)
    trainer.train()
    if job.protected:
        found = protection.resilient.resumed_from
        resumed = found.iteration if found else None
    state = TrainingState(trainer.model, trainer.optimizer.optimizer, scheduler=trainer.lr_scheduler)
    logged = [
        (entry["step"], name, entry[name])
        for entry in trainer.state.log_history
        for name in ("loss", "grad_norm", "learning_rate", "eval_loss", "epoch", "train_loss")
        if name in entry
    ]
    return Ran(
        resumed, state_digest(state.collect(("model", "optimizer", "scheduler", "rng"))), tuple(told), tuple(logged),
        trainer.state.global_step, trainer.state.epoch,
    )  # fmt: skip


@functools.cache
def undisturbed(job: Job) -> tuple[Ran, ...]:
    return tuple(values(run_ranks(len(job.nodes), run, job, distributed=len(job.nodes) > 1)))


def check(killed_job: Job, lose: str | None = None) -> None:
    size = len(killed_job.nodes)
    expected = undisturbed(replace(killed_job, root=f"{killed_job.root}-undisturbed", protected=False, die_at=None))
    outcomes = run_ranks(size, run, killed_job, distributed=size > 1)
    assert killed(outcomes[killed_job.victim]), outcomes
    if lose:
        shutil.rmtree(Path(killed_job.root, lose))
    again = replace(killed_job, die_at=None, scrambled=1)
    for mine, wanted in zip(values(run_ranks(size, run, again, distributed=size > 1)), expected, strict=True):
        assert mine.resumed is not None
        assert 0 < mine.resumed <= (killed_job.die_at or 0), "saves are made in the background"
        assert mine.told == tuple(each for each in wanted.told if each[0] >= mine.resumed)
        assert mine.logged == wanted.logged, "with what was logged before"
        assert (mine.digest, mine.steps, mine.epoch) == (wanted.digest, wanted.steps, wanted.epoch)


@pytest.mark.parametrize("die_at", [STEPS + 4, 2 * STEPS], ids=["in an epoch", "at its beginning"])
def test_a_killed_run_of_hugging_faces_trainer_goes_on_in_the_middle_of_an_epoch(
    die_at: int, memory_mount: Path
) -> None:
    check(Job(str(memory_mount / "job"), die_at=die_at))


@pytest.mark.long
@pytest.mark.parametrize(
    "changed",
    [
        {"accumulate": 2, "die_at": STEPS + 3},
        {"persistent": True, "die_at": STEPS + 4},
        {"patience": 3, "die_at": STEPS + 3},
        {"die_at": 5, "options": (("logging_nan_inf_filter", False), ("max_grad_norm", 0.0))},
    ],
    ids=str,
)
def test_so_does_one_that_accumulates_saves_persistently_or_stops_early(
    changed: dict[str, Any], memory_mount: Path
) -> None:
    check(Job(str(memory_mount / "job"), **changed))


@pytest.mark.long
@pytest.mark.timeout(600)
def test_a_trainer_on_two_nodes_loses_one_and_ends_in_the_same_bits(memory_mount: Path) -> None:
    """DDP; the lost node's directory is wiped, so that its rank goes on from the replica on the other."""
    check(Job(str(memory_mount / "job"), ("a", "b"), die_at=STEPS + 4, victim=1), lose="b")


def twice(rank: int, root: str) -> list[Any]:
    """A run that is asked to stop, then one that goes on, then one that has nothing left to do."""
    from transformers import TrainerCallback

    from resilience.integrations.transformers import protect

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    found: list[Any] = []

    class Stop(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **named: Any) -> None:
            if state.global_step == 5 and not found:
                protections[-1].resilient.request_stop()

    protections: list[Any] = []
    for _ in range(3):
        trainer, _ = make(Job(root), rank)
        trainer.add_callback(Stop())
        protections.append(
            protect(
                trainer, checkpoint=CheckpointConfig(save=f"{root}/save", save_interval=1000),
                resiliency=ResiliencyConfig(run_id="run", memory_dir=f"{root}/mem"),
            )
        )  # fmt: skip
        code = None
        try:
            trainer.train()
        except SystemExit as leaving:
            code = leaving.code
        resumed = protections[-1].resilient.resumed_from
        folders = sorted(path.name for path in Path(root, "save").glob("iter_*"))
        found.append((code, resumed and resumed.iteration, trainer.state.global_step, folders))
        with pytest.raises(ConfigError, match="one call of train"):
            trainer.train()
    return found


def test_a_requested_stop_is_saved_and_a_finished_run_is_found_finished(tmp_path: Path) -> None:
    ((first, second, third),) = values(run_ranks(1, twice, str(tmp_path), distributed=False))
    code, resumed, steps, folders = first
    assert (code, resumed) == (75, None)
    assert 5 <= steps <= 7
    assert folders == [f"iter_{steps:07d}"]
    assert second[:3] == (None, steps, EPOCHS * STEPS)
    assert third[:3] == (None, EPOCHS * STEPS, EPOCHS * STEPS)
    assert third[3][-1] == f"iter_{EPOCHS * STEPS:07d}"


def extend(rank: int, root: str) -> list[Any]:
    """A run on its node alone; the same again with a directory for its last save; and one epoch more, from there."""
    from resilience.integrations.transformers import protect

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    found: list[Any] = []
    on_node = {"non_persistent_ckpt_type": "local", "non_persistent_save_interval": 1}
    on_node["non_persistent_local_ckpt_dir"] = f"{root}/node"
    persistent = {"save": f"{root}/save", "save_interval": 1000}
    for epochs, place, options in (
        (EPOCHS, "node", on_node), (EPOCHS, "node", on_node | persistent), (EPOCHS + 1, "other", persistent),
    ):  # fmt: skip
        longer = (("num_train_epochs", epochs), ("lr_scheduler_type", "constant_with_warmup"))
        trainer, told = make(Job(root, options=longer), rank)
        limits = ResiliencyConfig(run_id="run", memory_dir=f"{root}/{place}", keep_after_success=True)
        protection = protect(trainer, checkpoint=CheckpointConfig(**options), resiliency=limits)
        trainer.train()
        resumed = protection.resilient.resumed_from
        found.append((resumed and (resumed.iteration, resumed.tier), [each[0] for each in told], told))
    return found


def test_a_finished_run_is_given_another_epoch_and_goes_on_behind_its_last(memory_mount: Path) -> None:
    ((first, second, third),) = values(run_ranks(1, extend, str(memory_mount / "job"), distributed=False))
    last, steps = EPOCHS * STEPS, [*range((EPOCHS + 1) * STEPS)]
    assert first[:2] == (None, steps[:last])
    assert second[:2] == ((last, "local"), []), "nothing was left but to save it"
    assert third[:2] == ((last, "persistent"), steps[last:])
    options = (("num_train_epochs", EPOCHS + 1), ("lr_scheduler_type", "constant_with_warmup"))
    (expected,) = undisturbed(Job(str(memory_mount / "whole"), protected=False, options=options))
    assert tuple(third[2]) == expected.told[last:]


def refuse(rank: int, root: str) -> list[str]:
    from resilience.integrations.transformers import protect

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    told: list[str] = []

    def note(**changed: Any) -> None:
        given = changed.pop("resume", None)
        trainer, _ = make(Job(root, options=tuple(changed.items())), rank)
        try:
            limits = ResiliencyConfig(run_id="run", memory_dir=f"{root}/mem")
            protect(trainer, checkpoint=CheckpointConfig(save=f"{root}/save", save_interval=5), resiliency=limits)
            trainer.train(resume_from_checkpoint=given)
        except ConfigError as error:
            told.append(str(error))

    note(ignore_data_skip=True)
    note(auto_find_batch_size=True)
    note(accelerator_config={"use_seedable_sampler": False})
    note(max_steps=10)
    note(max_steps=20, per_device_train_batch_size=2)
    return told


def test_a_trainer_that_would_train_otherwise_than_without_protection_is_refused(tmp_path: Path) -> None:
    (told,) = values(run_ranks(1, refuse, str(tmp_path), distributed=False))
    assert len(told) == 4, told
    expected = ("begins the epoch anew", "one batch size after", "no order can be drawn again", "the place in the data")
    for what, sentence in zip(expected, told, strict=True):
        assert what in sentence


def begin_from_others(rank: int, root: str) -> list[Any]:
    """With another program's checkpoint: as what is to go on, and as weights to begin with."""
    from resilience.integrations.transformers import protect
    from tests.formats.foreign import by_parameter

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    by_parameter(Path(root, "theirs"), Net())
    found: list[Any] = []
    for source in ("load", "pretrained_checkpoint"):
        trainer, told = make(Job(root, options=(("max_steps", 2), ("eval_strategy", "no"))), rank)
        given = {source: f"{root}/theirs", "dist_ckpt_strictness": "log_all", "save": f"{root}/{source}"}
        limits = ResiliencyConfig(run_id=source, memory_dir=f"{root}/mem")
        protect(trainer, checkpoint=CheckpointConfig(**given), resiliency=limits)
        try:
            trainer.train()
            found.append([each[0] for each in told])
        except ConfigError as error:
            found.append(str(error))
    return found


def test_another_programs_checkpoint_is_weights_to_begin_with_and_no_place_to_go_on_from(tmp_path: Path) -> None:
    ((refused, trained),) = values(run_ranks(1, begin_from_others, str(tmp_path), distributed=False))
    assert "iteration 7 was resumed from a save that says nothing of a Trainer's place" in refused
    assert trained == [0, 1]


def resume_from_theirs(rank: int, root: str) -> str:
    from resilience.integrations.transformers import protect

    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        os.environ.pop(name, None)
    saving = (("save_strategy", "steps"), ("save_steps", 4), ("max_steps", 4), ("eval_strategy", "no"))
    trainer, _ = make(Job(root, options=saving), rank)
    trainer.train()
    trainer, _ = make(Job(root, options=saving), rank)
    protect(trainer, checkpoint=CheckpointConfig(save=f"{root}/save", save_interval=5))
    with pytest.raises(ConfigError) as refused:
        trainer.train(resume_from_checkpoint=True)
    return str(refused.value)


def test_a_protected_run_does_not_resume_from_the_librarys_own_checkpoints(tmp_path: Path) -> None:
    (told,) = values(run_ranks(1, resume_from_theirs, str(tmp_path), distributed=False))
    assert "a protected run resumes by itself" in told
