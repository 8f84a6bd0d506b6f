"""Random state and extra state in Megatron's forms: what is ours comes back from them, and nothing else is believed."""

from __future__ import annotations

import io
import os
import random
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemWriter

from resilience.errors import CorruptCopyError
from resilience.formats.megatron_objects import (
    extra_state_key,
    extra_states,
    megatron_rng,
    rng_from_megatron,
    rng_grids,
    rng_key,
    writes_rng,
)
from resilience.formats.registry import open_checkpoint
from resilience.state import rng
from resilience.state.parallel_layout import ParallelLayout
from resilience.state.tree import encode
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.jobs import Job, Net

FS = PosixFileSystem()
pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")


def theirs() -> dict[str, Any]:
    """What Megatron's `get_rng_state` gives on a host without a GPU, drawn from already."""
    random.random()
    np.random.standard_normal()  # leaves a second number behind, which the state holds
    torch.randn(3)
    return {
        "random_rng_state": random.getstate(),
        "np_rng_state": np.random.get_state(),
        "torch_rng_state": torch.get_rng_state(),
        "rng_tracker_states": {},
    }


def drawn() -> list[Any]:
    return [random.random(), np.random.standard_normal(3).tolist(), torch.randn(3).tolist()]


def test_a_state_goes_to_megatrons_form_and_back(tmp_path: Path) -> None:
    theirs()
    values, tensors = encode({"rng": rng.capture()})
    expected = drawn()
    torch.save([[megatron_rng(values, dict(tensors).get)]], tmp_path / "state.pt")
    (found,) = torch.load(tmp_path / "state.pt", weights_only=False)
    drawn()
    rng.restore(rng_from_megatron(found, 0, "it"))
    assert drawn() == expected


def foreign(root: Path, **objects: Any) -> Path:
    folder = root / "iter_0000007"
    folder.mkdir()
    writer, planner = FileSystemWriter(folder), DefaultSavePlanner(flatten_state_dict=False)
    stored = {**Net().state_dict(), **{key: [value] for key, value in objects.items()}}
    dcp.save(stored, storage_writer=writer, planner=planner, no_dist=True)
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    torch.save({"iteration": 7}, folder / "common.pt")
    return folder


def test_a_resume_goes_on_in_the_random_numbers_of_another_program_at_the_same_place(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    states = theirs()
    foreign(tmp_path, **{"rng_state/shard_0.0_1.1": [states]})
    expected = torch.rand(1, generator=torch.Generator().set_state(states["torch_rng_state"])).item()
    assert Job(tmp_path).run().drawn == expected
    said = capfd.readouterr().err
    assert "model and rng are loaded" in said


def test_of_another_place_none_is_taken_and_that_is_said(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    foreign(tmp_path, **{f"rng_state/shard_0.{tp}_1.2": [theirs()] for tp in range(2)})
    torch.manual_seed(0)
    Job(tmp_path).run()
    said = capfd.readouterr().err
    assert "random state for pp=1, tp=2, and none for tp=1, pp=1" in said


@pytest.mark.parametrize("part", ["random_rng_state", "np_rng_state", "torch_rng_state", "rng_tracker_states"])
@pytest.mark.parametrize("value", [None, (1, 2), torch.zeros(3, dtype=torch.uint8), {"a": "b"}])
def test_what_is_no_random_state_is_refused_before_anything_is_set(part: str, value: Any) -> None:
    if part == "rng_tracker_states" and value is None:
        return  # none is what a host without a GPU has
    with pytest.raises(CorruptCopyError, match="it is no random state"):
        rng_from_megatron([{**theirs(), part: value}], 0, "it")


@pytest.mark.parametrize("stored", [[], {}, None, [[]], "text"])
def test_nor_is_what_has_another_form(stored: Any) -> None:
    with pytest.raises(CorruptCopyError, match="it is no random state"):
        rng_from_megatron(stored, 0, "it")


class Bomb:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


@pytest.mark.parametrize("wrap", [lambda bomb: bomb, lambda bomb: np.array([bomb], dtype=object)])
def test_an_object_that_would_run_something_is_refused_also_in_an_array(tmp_path: Path, wrap: Any) -> None:
    folder = foreign(
        tmp_path, **{"rng_state/shard_0.0_1.1": [{**theirs(), "np_rng_state": wrap(Bomb(tmp_path / "ran"))}]}
    )
    with pytest.raises(CorruptCopyError):
        open_checkpoint(folder, FS).read_object("rng_state/shard_0.0_1.1")
    assert not (tmp_path / "ran").exists()


def test_the_key_is_that_of_the_place_and_one_rank_writes_it() -> None:
    place = ParallelLayout(tp=2, pp=3, cp=2).resolve(2 * 2 * 2 + 1, 24)
    assert (place.pp_rank, place.tp_rank) == (1, 1)
    assert rng_key(ParallelLayout(tp=2, pp=3, tp_rank=1, pp_rank=2).resolve(0, 6)) == "rng_state/shard_2.1_3.2"
    ranks = [ParallelLayout(tp=2, pp=2, cp=2).resolve(rank, 16) for rank in range(16)]
    written = [rng_key(place) for place in ranks if writes_rng(place)]
    assert sorted(written) == sorted({rng_key(place) for place in ranks}), "each once"
    experts = [ParallelLayout(tp=1, ep=2).resolve(rank, 4) for rank in range(4)]
    assert [rng_key(place) for place in experts] == [f"rng_state/shard_0.0.{rank}_1.1.4" for rank in range(4)]
    assert all(map(writes_rng, experts))
    assert rng_grids(written) == ["pp=2, tp=2"]


class Keeping(Net):
    """What it keeps is no tensor of its own, and it tells what it was given."""

    def __init__(self, kept: Any = None) -> None:
        super().__init__()
        self.kept = kept

    def get_extra_state(self) -> Any:
        return self.kept

    def set_extra_state(self, state: Any) -> None:
        self.kept = state


def test_extra_state_of_another_program_is_taken_and_an_empty_one_is_not_missed(tmp_path: Path) -> None:
    kept = torch.arange(5, dtype=torch.uint8)
    foreign(tmp_path, **{"_extra_state/shard_0_1": kept})
    job = Job(tmp_path, make=Keeping, options={"load_rng": False}).run()
    assert torch.equal(job.model.kept, kept)  # type: ignore[arg-type]
    without = foreign((tmp_path / "b") if (tmp_path / "b").mkdir() is None else tmp_path)
    assert Job(without.parent, make=Keeping).run().model.kept is None


def test_extra_state_that_would_need_a_pickle_stays_as_it_is_here_and_that_is_said(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    foreign(tmp_path, **{"_extra_state/shard_0_1": io.BytesIO(b"what Transformer Engine once kept")})
    assert Job(tmp_path, make=Keeping).run().model.kept is None
    assert "1 objects of extra state" in capfd.readouterr().err


def test_extra_state_is_written_under_the_keys_that_a_model_names() -> None:
    values, tensors = encode({"model": [{"a._extra_state": torch.ones(2), "b._extra_state": None, "w": torch.ones(1)}]})
    keys = [{"a._extra_state": "layers.a._extra_state/shard_1_4", "b._extra_state": "b._extra_state/shard_0_1"}]
    found = extra_states(values, dict(tensors).get, keys)
    assert torch.equal(found.pop("layers.a._extra_state/shard_1_4"), torch.ones(2))
    assert found == {"b._extra_state/shard_0_1": None}


@pytest.mark.parametrize(
    ("name", "said", "key"),
    [
        ("layers.2.a._extra_state", None, "layers.a._extra_state/shard_2_4"),
        ("x.layers.2.a._extra_state", None, None),
        ("b._extra_state", None, "b._extra_state/shard_0_1"),
        ("layers.9.b._extra_state", "b._extra_state/shard_0_1", "b._extra_state/shard_0_1"),
        ("layers.22.a._extra_state", None, None),
    ],
)
def test_extra_state_is_found_by_the_models_word_by_its_name_or_by_its_layer(
    name: str, said: str | None, key: str | None
) -> None:
    stored = [*(f"layers.a._extra_state/shard_{layer}_4" for layer in range(4)), "b._extra_state/shard_0_1"]
    assert extra_state_key(name, said, stored) == key


def test_what_megatron_keeps_apart_comes_along_where_a_program_uses_it(monkeypatch: pytest.MonkeyPatch) -> None:
    states = {"model-parallel-rng": torch.arange(16, dtype=torch.uint8), "graphed": torch.Generator().manual_seed(3)}
    tracker = SimpleNamespace(states=states)
    tracker.get_states = lambda: dict(tracker.states)
    tracker.set_states = lambda given: setattr(tracker, "states", given)
    module: Any = ModuleType("megatron.core.tensor_parallel.random")
    module._CUDA_RNG_STATE_TRACKER, module._CUDA_RNG_STATE_TRACKER_INITIALIZED = tracker, True
    monkeypatch.setitem(sys.modules, module.__name__, module)
    saved = rng.capture()
    generator = states["graphed"]
    expected = torch.rand(3, generator=generator)  # type: ignore[arg-type]
    tracker.states = {"model-parallel-rng": torch.zeros(16, dtype=torch.uint8), "graphed": generator}
    rng.restore(saved)
    assert torch.equal(tracker.states["model-parallel-rng"], torch.arange(16, dtype=torch.uint8))
    assert tracker.states["graphed"] is generator, "a CUDA graph holds it"
    assert torch.equal(torch.rand(3, generator=generator), expected)  # type: ignore[arg-type]
