"""What the load options make of a persistent checkpoint, seen from a start that resumes."""

from __future__ import annotations

import functools
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.errors import (
    CheckpointNotFoundError,
    LayoutMismatchError,
    MissingCheckpointExit,
    MissingKeysError,
    NoUsableSaveError,
)
from resilience.observe.events import read_events
from resilience.state.distributed_optimizer import DistributedOptimizer
from tests.formats.jobs import Job, Net, equal

more = functools.partial(Net, more=True)
less = functools.partial(Net, less=True)
adapted = functools.partial(Net, adapter=True)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "ckpt"


def warnings_of(root: Path) -> str:
    found = read_events([root.parent / "events"])
    return "\n".join(str(each.get("what")) for each in found if each["event"] == "warning")


def test_by_default_everything_is_loaded(root: Path) -> None:
    first = Job(root).run(4)
    second = Job(root, seed=1).run()
    assert (second.step, second.resume.tier) == (4, "persistent")
    assert equal(second.loaded, first.model.state_dict())
    assert equal(second.moments, first.moments)
    assert second.scheduler is not None
    assert second.scheduler.last_epoch == 4
    assert second.counters["consumed_train_samples"] == 20
    assert (second.resume.missing_keys, second.resume.unexpected_keys) == ((), ())


def test_without_the_optimizer_its_state_and_the_scheduler_stay_fresh_and_the_rest_is_loaded(root: Path) -> None:
    first = Job(root).run(4)
    whole = Job(root, seed=1).run()
    second = Job(root, seed=2, options={"load_optim": False}).run()
    assert second.step == 4
    assert equal(second.loaded, first.model.state_dict())
    assert not second.moments
    assert second.scheduler is not None
    assert second.scheduler.last_epoch == 0
    assert second.counters["consumed_train_samples"] == 20
    assert second.drawn == whole.drawn, "the generators go on where they were"


def test_without_rng_the_generators_stay_as_they_are(root: Path) -> None:
    Job(root).run(2)
    whole, kept = Job(root, seed=1).run(), Job(root, seed=1, options={"load_rng": False}).run()
    Job(root.parent / "other", seed=1)  # draws what building the model draws
    assert kept.drawn == torch.rand(1).item()
    assert kept.drawn != whole.drawn


@pytest.mark.parametrize(("option", "lost"), [("save_optim", "optimizer, scheduler"), ("save_rng", "rng")])
def test_a_checkpoint_that_was_saved_without_a_part_is_resumed_without_it_and_that_is_said(
    root: Path, option: str, lost: str
) -> None:
    first = Job(root, options={option: False}).run(3)
    second = Job(root, seed=1).run()
    assert second.step == 3
    assert equal(second.loaded, first.model.state_dict())
    assert bool(second.moments) == (option != "save_optim")
    assert f"was saved without {lost}" in warnings_of(root)


# -- which checkpoint -------------------------------------------------------------------------------------------------


def test_ckpt_step_takes_that_iteration_and_a_missing_one_says_what_is_there(root: Path) -> None:
    Job(root, options={"save_interval": 2}).run(6)
    assert Job(root, options={"ckpt_step": 4}, resiliency={"fork_id": "a"}).run().step == 4
    with pytest.raises(FileNotFoundError, match=r"ckpt_step=5 is not in `load`; there is 2, 4, 6"):
        Job(root, options={"ckpt_step": 5}, resiliency={"fork_id": "b"}).run()


def test_ckpt_step_never_applies_to_the_pretrained_checkpoint(root: Path, tmp_path: Path) -> None:
    base = Job(tmp_path / "base", options={"save_interval": 2}).run(4)
    options = {"pretrained_checkpoint": str(tmp_path / "base"), "ckpt_step": 2}
    with pytest.raises(CheckpointNotFoundError, match="there is no checkpoint"):
        Job(root, options=options, resiliency={"fork_id": "a"}).run()
    Job(root, make=adapted, options=options | {"ckpt_step": None, "save_interval": 2}).run(4)
    resumed = Job(root, seed=5, make=adapted, options=options, resiliency={"fork_id": "b"}).run()
    assert resumed.step == 2
    assert torch.equal(resumed.loaded["up.weight"], base.model.up.weight), "the base's newest, which is its 4"


def test_nothing_to_load_is_a_fresh_start_or_an_exit_with_status_1(root: Path) -> None:
    with pytest.raises(MissingCheckpointExit, match="exit_on_missing_checkpoint") as caught:
        Job(root, options={"exit_on_missing_checkpoint": True}).run()
    assert isinstance(caught.value.code, str), "a message: the interpreter prints it and exits with status 1"
    assert Job(root).run().resumed is None


# -- pretrained weights and adapters ----------------------------------------------------------------------------------


def test_pretrained_weights_are_all_that_is_taken_and_a_restart_goes_on_from_its_own_save(
    root: Path, tmp_path: Path
) -> None:
    base = Job(tmp_path / "base").run(4)
    options = {"pretrained_checkpoint": str(tmp_path / "base")}
    first = Job(root, seed=1, options=options).run(2)
    assert first.step == 0
    assert equal(first.loaded, base.model.state_dict())
    assert first.counters["consumed_train_samples"] == 0
    assert first.scheduler is not None
    assert first.scheduler.last_epoch == 2
    second = Job(root, seed=2, options=options).run()
    assert second.step == 2
    assert equal(second.loaded, first.model.state_dict())


def test_an_adapter_starts_on_a_frozen_base_that_lacks_it(root: Path, tmp_path: Path) -> None:
    base = Job(tmp_path / "base").run(4)
    first = Job(root, seed=1, make=adapted, options={"pretrained_checkpoint": str(tmp_path / "base")}).run(3)
    assert torch.equal(first.loaded["up.weight"], base.model.up.weight)
    assert torch.equal(first.loaded["lora.weight"], first.before["lora.weight"])
    assert "lora.weight" in warnings_of(root)
    assert first.resume.unexpected_keys == ()


def test_a_pretrained_checkpoint_that_lacks_a_frozen_parameter_is_refused(root: Path, tmp_path: Path) -> None:
    Job(tmp_path / "base", make=less).run(4)
    with pytest.raises(MissingKeysError, match=r"\(unexpected\): down\.bias, down\.weight"):
        Job(root, make=adapted, options={"pretrained_checkpoint": str(tmp_path / "base")}).run()


def test_an_adapter_checkpoint_holds_the_trained_part_alone_and_the_base_comes_from_pretrained(
    root: Path, tmp_path: Path
) -> None:
    base = Job(tmp_path / "base").run(4)
    options = {"pretrained_checkpoint": str(tmp_path / "base")}
    only = {"save_frozen": False}
    first = Job(root, seed=1, make=adapted, options=options, resiliency=only).run(3)
    stored = torch.load(root / "iter_0000003" / "train_state.pt", weights_only=True)
    assert stored["step"] == 3
    import torch.distributed.checkpoint as dcp

    keys = dcp.FileSystemReader(root / "iter_0000003").read_metadata().state_dict_metadata
    assert [key for key in keys if not key.startswith(("optimizer.", "resilience/", "rng_state/"))] == ["lora.weight"]
    second = Job(root, seed=2, make=adapted, options=options, resiliency=only).run()
    assert second.step == 3
    assert equal(second.loaded, first.model.state_dict())
    assert torch.equal(second.loaded["down.weight"], base.model.down.weight)
    assert equal(second.moments, first.moments)
    with pytest.raises(MissingKeysError, match=r"down\.bias, down\.weight, up\.bias, up\.weight"):
        Job(root, seed=3, make=adapted).run()


def test_a_base_that_is_damaged_is_refused_and_no_reason_to_fall_back_to_an_older_save(
    root: Path, tmp_path: Path
) -> None:
    Job(tmp_path / "base").run(4)
    options, only = {"pretrained_checkpoint": str(tmp_path / "base")}, {"save_frozen": False}
    Job(root, make=adapted, options=options, resiliency=only).run(3)
    file = tmp_path / "base" / "iter_0000004" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-900] ^= 1
    file.write_bytes(content)
    with pytest.raises(NoUsableSaveError, match="pretrained_checkpoint cannot be used"):
        Job(root, make=adapted, options=options, resiliency=only).run()


def test_a_base_that_is_not_whole_is_refused_before_anything_is_struck_off(root: Path, tmp_path: Path) -> None:
    Job(tmp_path / "base").run(4)
    options, only = {"pretrained_checkpoint": str(tmp_path / "base")}, {"save_frozen": False}
    Job(root, make=adapted, options=options, resiliency=only).run(3)
    (tmp_path / "base" / "iter_0000004" / "__0_0.distcp").unlink()
    with pytest.raises(NoUsableSaveError, match="pretrained_checkpoint cannot be used"):
        Job(root, make=adapted, options=options, resiliency=only).run()


# -- a release, and another program's checkpoint ----------------------------------------------------------------------


def test_a_release_gives_weights_and_counters_and_begins_at_step_0(root: Path) -> None:
    first = Job(root).run(3)
    (root / "iter_0000003").rename(root / "release")
    for name in ("latest_train_state.pt", "resilience.json"):
        (root / name).unlink()
    (root / "latest_checkpointed_iteration.txt").write_text("release")
    for name in ("resilience.json", "integrity.json"):
        (root / "release" / name).unlink()
    second = Job(root.parent / "new", seed=1, options={"load": str(root)}).run()
    assert equal(second.loaded, first.model.state_dict())
    assert not second.moments
    assert (second.step, second.counters["step"], second.counters["consumed_train_samples"]) == (0, 0, 15)


def test_of_another_programs_checkpoint_the_model_and_the_counters_are_loaded_and_the_rest_is_named(root: Path) -> None:
    first = Job(root).run(3)
    for path in (root / "resilience.json", root / "iter_0000003" / "resilience.json"):
        path.unlink()
    stored = root / "iter_0000003" / "integrity.json"
    stored.unlink()
    (root / "attempts").rename(root.parent / "gone")
    import torch.distributed.checkpoint as dcp  # as Megatron Core writes: no object of ours in it

    keys = {name: torch.zeros_like(tensor) for name, tensor in first.model.state_dict().items()}
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.load(keys, checkpoint_id=root / "iter_0000003", no_dist=True)
    for file in ("__0_0.distcp", ".metadata"):
        (root / "iter_0000003" / file).unlink()
    with pytest.warns(UserWarning, match="torch.distributed"):
        dcp.save(keys, checkpoint_id=root / "iter_0000003", no_dist=True)
    second = Job(root.parent / "new", seed=1, options={"load": str(root)}).run()
    assert equal(second.loaded, first.model.state_dict())
    assert (second.step, second.counters["consumed_train_samples"]) == (3, 15)
    assert "model and train_state are loaded, not optimizer, scheduler" in warnings_of(root.parent / "new")


# -- the eight modes --------------------------------------------------------------------------------------------------

UNEXPECTED = ("extra.bias", "extra.weight")
MISSING = ("down.bias", "down.weight")
STATE = tuple(f"optimizer.state.{moment}.{name}" for name in MISSING for moment in ("exp_avg", "exp_avg_sq", "step"))


@pytest.mark.parametrize("mode", ["assume_ok_unexpected", "raise_unexpected", "raise_all"])
def test_a_key_that_is_asked_for_in_vain_raises_and_changes_nothing(root: Path, mode: str) -> None:
    Job(root).run(2)
    job = Job(root, seed=1, make=more, options={"dist_ckpt_strictness": mode})
    with pytest.raises(MissingKeysError, match=r"\(unexpected\): extra\.bias, extra\.weight"):
        job.run()
    assert equal(job.model.state_dict(), job.before)


@pytest.mark.parametrize("mode", ["log_unexpected", "log_all", "return_unexpected", "return_all", "ignore_all"])
def test_or_it_keeps_its_initial_value_and_is_told_of(root: Path, mode: str, caplog: Any) -> None:
    first = Job(root).run(2)
    with caplog.at_level(logging.WARNING):
        second = Job(root, seed=1, make=more, options={"dist_ckpt_strictness": mode}).run(3)
    assert second.step == 2
    assert torch.equal(second.loaded["extra.weight"], second.before["extra.weight"])
    assert torch.equal(second.loaded["down.weight"], first.model.down.weight)
    assert second.resume.unexpected_keys == UNEXPECTED
    assert second.resume.missing_keys == ()
    assert ("(unexpected): extra.bias, extra.weight" in caplog.text) == mode.startswith("log_")


@pytest.mark.parametrize("mode", ["assume_ok_unexpected", "log_unexpected", "raise_unexpected", "return_unexpected"])
def test_a_key_that_nobody_asks_for_is_not_looked_at(root: Path, mode: str, caplog: Any) -> None:
    first = Job(root).run(2)
    with caplog.at_level(logging.WARNING):
        second = Job(root, seed=1, make=less, options={"dist_ckpt_strictness": mode}).run(3)
    assert torch.equal(second.loaded["up.weight"], first.model.up.weight)
    assert (second.resume.missing_keys, "Keys differ" in caplog.text) == ((), False)


def test_trained_weights_that_nobody_asks_for_are_never_left_behind_in_silence(root: Path) -> None:
    Job(root).run(2)
    assert Job(root, seed=1).run().step == 2
    assert "left behind" not in warnings_of(root)
    assert Job(root, seed=2, make=less).run().step == 2
    assert "left behind: down.bias, down.weight, optimizer.state.exp_avg.down.bias" in warnings_of(root)


@pytest.mark.parametrize("mode", ["log_all", "return_all", "ignore_all"])
def test_or_it_is_reported(root: Path, mode: str, caplog: Any) -> None:
    Job(root).run(2)
    with caplog.at_level(logging.WARNING):
        second = Job(root, seed=1, make=less, options={"dist_ckpt_strictness": mode}).run()
    assert second.resume.missing_keys == tuple(sorted((*MISSING, *STATE)))
    assert ("(missing): down.bias" in caplog.text) == (mode == "log_all")


def test_a_parameter_that_is_in_another_group_now_does_not_take_that_groups_hyperparameters(root: Path) -> None:
    def grouped(*decayed: str) -> Any:
        def make(model: torch.nn.Module) -> torch.optim.Optimizer:
            named = dict(model.named_parameters())
            groups = [[named[name] for name in decayed], [named[name] for name in named if name not in decayed]]
            return torch.optim.AdamW([{"params": group, "weight_decay": 0.1 * n} for n, group in enumerate(groups)])

        return make

    Job(root, optimizer=grouped("up.weight", "down.weight")).run(2)
    with pytest.raises(LayoutMismatchError, match="param_groups/0"):
        Job(root, optimizer=grouped("up.weight")).run()


def test_raise_all_names_the_keys_on_both_sides(root: Path) -> None:
    Job(root).run(2)
    job = functools.partial(Job, root, seed=1, options={"dist_ckpt_strictness": "raise_all"})
    with pytest.raises(MissingKeysError, match=r"\(missing\): down\.bias, down\.weight, optimizer"):
        job(make=less).run()
    with pytest.raises(MissingKeysError, match=r"unexpected\): extra.*missing\): down"):
        job(make=functools.partial(Net, more=True, less=True)).run()
    assert job().run().step == 2


def test_what_the_load_options_leave_out_is_never_missing(root: Path) -> None:
    Job(root).run(2)
    options = {"dist_ckpt_strictness": "raise_all", "load_optim": False, "load_rng": False}
    assert Job(root, seed=1, options=options).run().step == 2


@pytest.mark.parametrize("mode", ["ignore_all", "return_all"])
def test_another_shape_is_refused_in_every_mode(root: Path, mode: str) -> None:
    Job(root).run(2)

    def wider() -> Net:
        net = Net()
        net.down = torch.nn.Linear(4, 3)
        return net

    with pytest.raises(LayoutMismatchError, match=r"model/0/down\.weight: saved float32 \[2, 4\]"):
        Job(root, make=wider, options={"dist_ckpt_strictness": mode}).run()


# -- main parameters of a mixed-precision optimizer -------------------------------------------------------------------


class MainParameters:
    """As Megatron's mixed-precision optimizers: float32 copies that the steps change, and weights made from them."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.params = list(model.named_parameters())
        self.main = {name: parameter.detach().float() for name, parameter in self.params}
        self.hooks: list[Any] = []

    def reload_model_params(self, state_dict: dict[str, Any] | None = None) -> None:
        source = dict(self.params) if state_dict is None else state_dict["model"]
        self.main = {name: source[name].detach().float() for name, _ in self.params}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.main)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.main = dict(state)

    def step(self) -> None:
        for name, parameter in self.params:
            self.main[name] -= 0.01 * parameter.grad.float()
            parameter.data.copy_(self.main[name])

    def zero_grad(self) -> None:
        for _, parameter in self.params:
            parameter.grad = None


LOW = torch.bfloat16


def test_main_parameters_follow_the_loaded_weights_when_the_optimizer_is_not_loaded(root: Path) -> None:
    first = Job(root, optimizer=MainParameters, dtype=LOW).run(2)
    second = Job(root, seed=1, optimizer=MainParameters, dtype=LOW, options={"load_optim": False}).run()
    assert equal(second.opt.main, {name: each.float() for name, each in first.model.state_dict().items()})


def test_or_they_are_remade_from_the_checkpoint_in_its_own_precision(root: Path) -> None:
    first = Job(root).run(2)  # a float32 model
    options = {"load_optim": False, "load_main_params_from_ckpt": True}
    second = Job(root, seed=1, optimizer=MainParameters, dtype=LOW, options=options).run()
    assert equal(second.loaded, {name: each.to(LOW) for name, each in first.model.state_dict().items()})
    assert equal(second.opt.main, dict(first.model.state_dict())), "not rounded by way of the model"
    third = Job(root, seed=1, optimizer=MainParameters, dtype=LOW, options={"load_optim": False}).run()
    assert equal(third.opt.main, {name: each.to(LOW).float() for name, each in first.model.state_dict().items()})


def adam(model: torch.nn.Module) -> DistributedOptimizer:
    return DistributedOptimizer(model.parameters(), torch.optim.AdamW, lr=0.1)


def mains(job: Job) -> dict[str, torch.Tensor]:
    names = {id(parameter): name for name, parameter in job.model.named_parameters()}
    parts = {names[id(part.parameter)]: (part.main, part.parameter.shape) for part in job.opt.slices()}
    return {name: main.detach().view(shape) for name, (main, shape) in parts.items()}


@pytest.mark.parametrize("from_checkpoint", [True, False])
def test_the_same_holds_for_our_distributed_optimizer(root: Path, from_checkpoint: bool) -> None:
    first = Job(root).run(2)
    options = {"load_optim": False, "load_main_params_from_ckpt": from_checkpoint}
    second = Job(root, seed=1, optimizer=adam, dtype=LOW, options=options).run()
    rounded = {name: each.to(LOW) for name, each in first.model.state_dict().items()}
    assert equal(second.loaded, rounded)
    exact = dict(first.model.state_dict())
    assert equal(mains(second), exact if from_checkpoint else {name: each.float() for name, each in rounded.items()})


def test_without_a_mixed_precision_optimizer_that_has_no_effect_and_is_said(root: Path) -> None:
    Job(root).run(2)
    options = {"load_optim": False, "load_main_params_from_ckpt": True}
    assert Job(root, seed=1, options=options).run().step == 2
    assert "load_main_params_from_ckpt has no effect" in warnings_of(root)


def test_tied_weights_come_back_tied(root: Path) -> None:
    class Tied(Net):
        def __init__(self) -> None:
            super().__init__()
            self.again = torch.nn.Linear(3, 4)
            self.again.weight = self.up.weight

    first = Job(root, make=Tied).run(2)
    second = Job(root, seed=1, make=Tied).run()
    assert equal(second.loaded, first.model.state_dict())
    assert second.model.again.weight is second.model.up.weight


@pytest.mark.parametrize("verify", ["digest", "off"])
def test_damage_is_found_unless_it_was_asked_not_to_be_looked_for(root: Path, verify: str) -> None:
    first = Job(root).run(2)
    file = root / "iter_0000002" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    weight = first.model.up.weight.detach().numpy().tobytes()
    content[content.index(weight)] ^= 1
    file.write_bytes(content)
    job = Job(root, seed=1, resiliency={"verify_load": verify})
    if verify == "digest":
        with pytest.raises(NoUsableSaveError, match="failed to read or verify"):
            job.run()
        assert equal(job.model.state_dict(), job.before)
    else:
        job.run()
        assert not torch.equal(job.loaded["up.weight"], first.model.up.weight), "nobody looked"
