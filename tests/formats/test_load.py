"""`load_checkpoint`: a model for evaluation, from a folder or the directory above, in one plain process."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from resilience.errors import (
    CheckpointNotFoundError,
    ConfigError,
    CorruptCopyError,
    LayoutMismatchError,
    MissingKeysError,
)
from resilience.formats.load import load_checkpoint
from resilience.formats.strictness import STRICTNESS, judge_keys
from tests.formats.worlds import save, whole


def model(seed: int) -> torch.nn.Sequential:
    torch.manual_seed(seed)
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))


def save_model(folder: Path, saved: torch.nn.Module, iteration: int) -> None:
    save(
        folder,
        lambda rank: (
            [whole(f"model/0/{name}", tensor.detach()) for name, tensor in saved.state_dict().items()]
            + [whole("optimizer/0/state/0.weight/exp_avg", torch.zeros(4, 3))]
        ),
        iteration=iteration,
    )


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    for iteration in (5, 10):
        save_model(tmp_path / f"iter_{iteration:07d}", model(iteration), iteration)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("10")
    return tmp_path


def test_the_models_tensors_come_without_a_model(directory: Path) -> None:
    loaded = load_checkpoint(directory / "iter_0000005")
    assert loaded.keys() == model(5).state_dict().keys()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in model(5).state_dict().items())


def test_the_directory_gives_what_its_tracker_names(directory: Path) -> None:
    assert load_checkpoint(directory).folder.name == "iter_0000010"
    (directory / "latest_checkpointed_iteration.txt").write_text("5")
    assert load_checkpoint(directory).folder.name == "iter_0000005"


def test_a_model_is_filled_in_place(directory: Path) -> None:
    mine = model(99)
    weight = mine[0].weight
    load_checkpoint(directory, mine)
    assert mine[0].weight is weight
    assert weight.requires_grad
    assert all(torch.equal(tensor, mine.state_dict()[name]) for name, tensor in model(10).state_dict().items())


def test_a_wrapped_model_is_filled_too(directory: Path) -> None:
    class Wrapper(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = model(99)

    wrapped = Wrapper()
    load_checkpoint(directory, wrapped)
    assert torch.equal(wrapped.module[0].weight, model(10)[0].weight)


def test_damage_leaves_the_model_as_it_was(directory: Path) -> None:
    file = directory / "iter_0000010" / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[-1000] ^= 1
    file.write_bytes(content)
    mine = model(99)
    with pytest.raises(CorruptCopyError, match="SHA-256"):
        load_checkpoint(directory, mine)
    assert torch.equal(mine[0].weight, model(99)[0].weight)


def test_another_shape_is_refused(directory: Path) -> None:
    with pytest.raises(LayoutMismatchError, match=r"0\.weight has shape \(4, 3\)"):
        load_checkpoint(directory, torch.nn.Sequential(torch.nn.Linear(2, 4)))


def test_nothing_to_load_says_what_is_there(directory: Path, tmp_path: Path) -> None:
    for iteration in (5, 10):
        (directory / f"iter_{iteration:07d}" / ".metadata").unlink()
    with pytest.raises(CheckpointNotFoundError, match=r"iteration 10: \.metadata is missing; iteration 5"):
        load_checkpoint(directory)
    with pytest.raises(FileNotFoundError, match="none at all"):
        load_checkpoint(tmp_path / "nowhere")


def bigger() -> torch.nn.Sequential:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Identity(), torch.nn.Linear(4, 1, bias=False))


BN = {f"1.{name}" for name in ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")}


@pytest.mark.parametrize("strictness", ["assume_ok_unexpected", "raise_unexpected", "raise_all"])
def test_a_key_asked_for_in_vain_raises(directory: Path, strictness: str) -> None:
    with pytest.raises(MissingKeysError, match=r"not in the checkpoint \(unexpected\): 2\.weight") as caught:
        load_checkpoint(directory, bigger(), strictness=strictness)
    assert ("not asked for" in str(caught.value)) == (strictness == "raise_all")


@pytest.mark.parametrize(
    ("strictness", "missing"),
    [
        ("log_unexpected", set()),
        ("log_all", BN),
        ("return_unexpected", set()),
        ("return_all", BN),
        ("ignore_all", BN),
    ],
)
def test_or_keeps_its_initial_value_and_is_reported(
    directory: Path, strictness: str, missing: set[str], caplog: pytest.LogCaptureFixture
) -> None:
    mine = bigger()
    before = mine[2].weight.detach().clone()
    with caplog.at_level(logging.WARNING):
        loaded = load_checkpoint(directory, mine, strictness=strictness)
    assert torch.equal(mine[2].weight, before)
    assert torch.equal(mine[0].weight, model(10)[0].weight)
    assert (loaded.unexpected_keys, loaded.missing_keys) == ({"2.weight"}, missing)
    assert ("Keys differ" in caplog.text) == strictness.startswith("log_")


def test_an_unknown_mode_names_the_eight(directory: Path) -> None:
    with pytest.raises(ConfigError, match="ignore_all") as caught:
        load_checkpoint(directory, strictness="strict")
    assert all(mode in str(caught.value) for mode in STRICTNESS)


@pytest.mark.parametrize("strictness", STRICTNESS)
def test_equal_keys_are_fine_in_every_mode(strictness: str) -> None:
    difference = judge_keys((), (), strictness)
    assert not difference.missing
    assert not difference.unexpected
