"""Optimizer state that Megatron Core wrote goes on in the optimizers that are live here, whichever layout it is in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from resilience import CheckpointConfig, ParallelLayout, ResiliencyConfig, ResilientTrainer
from resilience.errors import LayoutMismatchError, MissingKeysError
from resilience.formats.convert import convert
from resilience.formats.load import load_checkpoint
from resilience.state.distributed_optimizer import DistributedOptimizer
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.foreign import ITERATION, MOMENTS, Small, bucket_key, by_bucket, by_parameter, groups, number

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

FS = PosixFileSystem()
REVERSED = ("deep", "norm", "long", "wide")


def trained(model: torch.nn.Module) -> list[dict[str, Any]]:
    decayed = [each for each in model.parameters() if each.dim() > 1]
    rest = [each for each in model.parameters() if each.dim() <= 1]
    return [{"params": decayed, "weight_decay": 0.01}, {"params": rest, "weight_decay": 0.0}]


def divided(model: torch.nn.Module) -> Any:
    return DistributedOptimizer(trained(model), torch.optim.AdamW, bucket_numel=50, lr=1e-3)


def undivided(model: torch.nn.Module) -> Any:
    return torch.optim.AdamW(trained(model), lr=1e-3)


def resumed(root: Path, model: torch.nn.Module, optimizer: Any, **fields: Any) -> Any:
    options = {"load": str(root), **fields.pop("options", {})}
    with ResilientTrainer(
        model, optimizer, checkpoint=CheckpointConfig(**options),
        resiliency=ResiliencyConfig(memory_dir=str(root.parent / "memory")), **fields,
    ) as trainer:  # fmt: skip
        return trainer.resumed_from


def state_by_name(model: torch.nn.Module, optimizer: Any) -> dict[str, dict[str, torch.Tensor]]:
    """Moments, and main parameters where there are any, in the parameters' shapes."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    if not isinstance(optimizer, DistributedOptimizer):
        return {names[parameter]: dict(its) for parameter, its in optimizer.state.items()}
    return {
        names[part.parameter]: {
            kind: value.view(part.parameter.shape) if value.dim() else value
            for kind, value in {"param": part.main.detach(), **optimizer.state_of(part)}.items()
        }
        for part in optimizer.slices()
    }


def assert_taken(model: torch.nn.Module, optimizer: Any) -> None:
    found = state_by_name(model, optimizer)
    for name, parameter in model.named_parameters():
        its = found[name]
        for kind in MOMENTS:
            expected = number(name, kind, parameter.shape).to(its[kind].dtype)
            assert torch.equal(its[kind], expected), (name, kind)
        main = number(name, "param", parameter.shape)
        assert torch.equal(parameter, main.to(parameter.dtype)), name
        assert "param" not in its or torch.equal(its["param"], main)
        assert its["step"] == ITERATION
    for group, stored in zip(optimizer.param_groups, groups(), strict=True):
        assert (group["lr"], group["betas"], group["eps"]) == (0.125, (0.5, 0.75), 1e-3)
        assert group["weight_decay"] == stored["weight_decay"]


def write(root: Path, layout: str) -> Path:
    return by_parameter(root, Small()) if layout == "by parameter" else by_bucket(root, Small(), REVERSED, ["norm"])


@pytest.mark.parametrize("layout", ["by parameter", "by bucket"])
@pytest.mark.parametrize("make", [divided, undivided])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_moments_main_parameters_step_and_hyperparameters_are_those_that_megatron_stored(
    tmp_path: Path, layout: str, make: Any, dtype: torch.dtype
) -> None:
    write(tmp_path / "save", layout)
    model = Small(dtype)
    optimizer = make(model)
    found = resumed(tmp_path / "save", model, optimizer)
    assert found.iteration == ITERATION
    assert_taken(model, optimizer)
    assert not [note for note in found.notes if note.startswith("optimizer")], found.notes
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()  # every moment is of a dtype that the optimizer works with
    assert all(bool(each.isfinite().all()) for each in model.parameters())


def test_everything_that_is_stored_is_asked_for_so_that_the_strictest_mode_takes_it(tmp_path: Path) -> None:
    write(tmp_path / "save", "by bucket")
    model = Small()
    resumed(tmp_path / "save", model, divided(model), options={"dist_ckpt_strictness": "raise_all"})


def test_main_parameters_that_no_optimizer_keeps_are_missing_in_the_strictest_mode(tmp_path: Path) -> None:
    write(tmp_path / "save", "by parameter")
    model = Small()
    with pytest.raises(MissingKeysError, match=r"optimizer\.state\.param\.deep"):
        resumed(tmp_path / "save", model, undivided(model), options={"dist_ckpt_strictness": "raise_all"})


def test_buckets_are_no_weights(tmp_path: Path) -> None:
    folder = write(tmp_path / "save", "by bucket")
    names = set(dict(Small().named_parameters()))
    assert set(load_checkpoint(folder)) == names
    convert(folder, tmp_path / "out", "safetensors", FS)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert set(file.keys()) == names
    with safe_open(tmp_path / "out" / "optimizer.safetensors", "pt") as file:
        assert bucket_key(0, 1, "exp_avg") in set(file.keys())


def test_weights_alone_are_taken_in_the_strictest_mode_past_the_buckets(tmp_path: Path) -> None:
    folder = write(tmp_path / "save", "by bucket")
    model = Small()
    load_checkpoint(folder, model, strictness="raise_all")
    options = {"dist_ckpt_strictness": "raise_all", "load_optim": False}
    resumed(tmp_path / "save", model, undivided(model), options=options)


def test_parameters_in_another_order_are_noticed_by_the_weights_and_nothing_is_taken(tmp_path: Path) -> None:
    class Alike(torch.nn.Module):
        def __init__(self, *names: str) -> None:
            super().__init__()
            for name in names:
                self.register_parameter(name, torch.nn.Parameter(torch.zeros(6, 6, dtype=torch.bfloat16)))

    by_bucket(tmp_path / "save", Alike("one", "two"), ("two", "one"))
    straight, swapped = Alike("one", "two"), Alike("two", "one")
    for model, taken in ((straight, True), (swapped, False)):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        notes = resumed(tmp_path / "save", model, optimizer).notes
        assert bool(optimizer.state) == taken
        assert any("are not its weights" in note and "its state is fresh" in note for note in notes) != taken
        assert torch.equal(model.one, number("one", "param", (6, 6)).to(torch.bfloat16))


def test_buckets_of_another_length_are_not_taken_and_that_is_said(tmp_path: Path) -> None:
    by_bucket(tmp_path / "save", Small(), ("deep", "norm", "wide", "long"))
    model = Small()
    optimizer = undivided(model)
    (note,) = resumed(tmp_path / "save", model, optimizer).notes
    assert "what lies where in the buckets cannot be told" in note
    assert not optimizer.state
    assert optimizer.param_groups[0]["lr"] == 1e-3


def test_buckets_of_another_tensor_parallel_size_are_refused_in_words(tmp_path: Path) -> None:
    by_bucket(tmp_path / "save", Small(), REVERSED, places=2)
    model = Small()
    with pytest.raises(LayoutMismatchError, match="2 places of tensor and pipeline parallelism") as refused:
        resumed(tmp_path / "save", model, undivided(model), layout=ParallelLayout())
    assert "load_optim=False" in str(refused.value)
    assert torch.equal(model.wide, torch.zeros_like(model.wide))
    resumed(tmp_path / "save", model, undivided(model), options={"load_optim": False})
    assert torch.equal(model.wide, number("wide", "param", (5, 7)).to(torch.bfloat16))


EXPERTS = ("deep", "long")


def with_experts(dtype: torch.dtype = torch.bfloat16) -> Small:
    """Marked as Megatron Core marks the parameters that not all data-parallel ranks have alike."""
    model = Small(dtype)
    for name in EXPERTS:
        getattr(model, name).allreduce = False
    return model


def divided_apart(model: torch.nn.Module) -> list[DistributedOptimizer]:
    """Experts in an optimizer of their own."""
    named = dict(model.named_parameters())
    parts = [[each for name, each in named.items() if (name in EXPERTS) == mine] for mine in (False, True)]
    return [DistributedOptimizer(part, torch.optim.AdamW, lr=1e-3) for part in parts]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_experts_are_found_in_the_buckets_of_their_own_optimizer(tmp_path: Path, dtype: torch.dtype) -> None:
    by_bucket(tmp_path / "save", Small(), ("norm", "wide"), experts=EXPERTS)
    model = with_experts(dtype)
    whole = undivided(model)
    assert not resumed(tmp_path / "save", model, whole).notes
    assert_taken(model, whole)
    apart = with_experts(dtype)
    optimizers = divided_apart(apart)
    resumed(tmp_path / "save", apart, optimizers)
    for each in optimizers:
        for name, its in state_by_name(apart, each).items():
            for kind in MOMENTS:
                assert torch.equal(its[kind], number(name, kind, its[kind].shape)), (name, kind)
            assert torch.equal(its["param"], number(name, "param", its["param"].shape))
            assert its["step"] == ITERATION


def test_buckets_of_another_expert_parallel_size_are_refused_in_words(tmp_path: Path) -> None:
    by_bucket(tmp_path / "two", Small(), ("norm", "wide"), experts=EXPERTS, expert_places=2)
    by_bucket(tmp_path / "one", Small(), REVERSED)
    for folder, told in (("two", "and 2 of experts"), ("one", "and 0 of experts")):
        model = with_experts()
        with pytest.raises(LayoutMismatchError, match=told) as refused:
            resumed(tmp_path / folder, model, undivided(model), layout=ParallelLayout())
        assert "load_optim=False" in str(refused.value)
        assert torch.equal(model.wide, torch.zeros_like(model.wide))


def test_a_third_optimizer_chained_behind_the_others_is_not_taken_for_one_of_them(tmp_path: Path) -> None:
    folder = by_bucket(tmp_path / "save", Small(), ("norm", "wide"), experts=EXPERTS)
    raw = (folder / ".metadata").read_bytes()
    (folder / ".metadata").write_bytes(raw.replace(b"chained_1", b"chained_2"))
    model = with_experts()
    with pytest.raises(LayoutMismatchError, match="two can be told apart"):
        resumed(tmp_path / "save", model, undivided(model))


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda model: torch.optim.RMSprop(model.parameters(), lr=1e-3), "a RMSprop does not keep what is stored"),
        (lambda model: torch.optim.AdamW(model.parameters(), amsgrad=True), "a AdamW does not keep what is stored"),
        (lambda model: torch.optim.SGD(model.parameters(), 0.1, momentum=0.9), "nothing is stored for its parameters"),
    ],
)
def test_an_optimizer_of_another_kind_begins_afresh_and_that_is_said(tmp_path: Path, make: Any, said: str) -> None:
    write(tmp_path / "save", "by parameter")
    model = Small()
    optimizer = make(model)
    found = resumed(tmp_path / "save", model, optimizer)
    assert any(said in note for note in found.notes), found.notes
    assert not optimizer.state
    assert torch.equal(model.wide, number("wide", "param", (5, 7)).to(torch.bfloat16))


@pytest.mark.parametrize("kind", ["dp_zero_gather_scatter", "fully_sharded_model_space"])
def test_the_older_layouts_are_read_for_the_model_only_and_that_is_said(tmp_path: Path, kind: str) -> None:
    content = {"distrib_optim_sharding_type": kind}
    by_parameter(tmp_path / "save", Small(), content_metadata=content)
    model = Small()
    optimizer = undivided(model)
    (note,) = resumed(tmp_path / "save", model, optimizer).notes
    assert f"the layout {kind!r} is read for the model only" in note
    assert not optimizer.state


def test_hyperparameters_that_the_stored_groups_differ_in_stay_as_they_are_here_and_that_is_said(
    tmp_path: Path,
) -> None:
    by_parameter(tmp_path / "save", Small())
    model = Small()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, weight_decay=0.0)
    stored = groups()
    stored[1]["lr"] = 0.5
    other = {"optimizer": {"optimizer": {"param_groups": [stored[1], {**stored[1], "lr": 0.75}]}}}
    by_parameter(tmp_path / "other", Small(), **other)
    resumed(tmp_path / "save", model, optimizer)
    assert optimizer.param_groups[0]["lr"] == 0.125
    found = resumed(tmp_path / "other", model, optimizer)
    assert any("lr stay as they are here: the stored groups differ" in note for note in found.notes), found.notes
    assert optimizer.param_groups[0]["lr"] == 0.125


class Megatrons:
    """A scheduler with the state that Megatron's has."""

    def __init__(self) -> None:
        self.held: dict[str, Any] = {"max_lr": 1.0, "min_lr": 0.0, "num_steps": 0}

    def state_dict(self) -> dict[str, Any]:
        return dict(self.held)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.held = dict(state)


def test_the_scheduler_goes_on_where_it_is_megatrons_and_is_said_to_begin_afresh_where_it_is_not(
    tmp_path: Path,
) -> None:
    stored = {"max_lr": 0.5, "min_lr": 0.25, "num_steps": 56}
    by_parameter(tmp_path / "save", Small(), opt_param_scheduler=stored)
    model, scheduler = Small(), Megatrons()
    optimizer = undivided(model)
    resumed(tmp_path / "save", model, optimizer, scheduler=scheduler)
    assert scheduler.held == stored
    other = torch.optim.lr_scheduler.StepLR(optimizer, 3)
    found = resumed(tmp_path / "save", model, optimizer, scheduler=other)
    assert any("StepLR begins afresh" in note and "num_steps" in note for note in found.notes)
