"""A transformer that was saved under one layout goes on under another: its state to the bit, its losses with it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.resharding.layouts import Ran, Sizes, Start, assert_ranks_hold, run, stored

SAVED_AT, STEPS = 5, 9
#: Losses around 4.2 in float32, after at most four steps of AdamW on gradients that were added in another order.
TOLERANCE = 2e-4

TP2_PP2 = {"tp": 2, "pp": 2}
Options = tuple[tuple[str, Any], ...]
RESHARDABLE = ("dist_ckpt_optim_fully_reshardable", True)


class Saved:
    """A run that saved at `SAVED_AT` and went on to `STEPS`: what others resume from and are compared with."""

    def __init__(self, root: Path, memory: Path, sizes: Sizes, options: Options = (), **fields: Any) -> None:
        self.root, self.memory, self.fields = root, memory, fields
        start = Start(sizes, str(memory), STEPS, save=str(root), options=(*options, RESHARDABLE), **fields)
        self.losses = run(start)[0].losses
        self.wholes = stored(root, SAVED_AT)

    def resume(self, sizes: Sizes, options: Options = ()) -> list[Ran]:
        options = (("ckpt_step", SAVED_AT), *options)
        return run(Start(sizes, str(self.memory), STEPS, load=str(self.root), options=options, **self.fields))

    def check(self, sizes: Sizes, options: Options = ()) -> list[Ran]:
        ranks = self.resume(sizes, options)
        assert {ran.resumed for ran in ranks} == {SAVED_AT}
        assert_ranks_hold(ranks, self.wholes)
        assert ranks[0].losses == pytest.approx(self.losses[SAVED_AT:], abs=TOLERANCE)
        assert {ran.consumed for ran in ranks} == {8 * SAVED_AT}
        assert {ran.position for ran in ranks} == {SAVED_AT}
        assert len({tuple(ran.lr) for ran in ranks}) == 1
        return ranks


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """Two stages of two tensor-parallel ranks."""
    return Saved(tmp_path_factory.mktemp("save"), tmp_path_factory.mktemp("memory"), TP2_PP2)


def test_four_ranks_of_two_stages_go_on_as_one(saved: Saved) -> None:
    ranks = saved.check({"tp": 1})
    assert any("saved by 4 ranks (tp=2, pp=2, dp=1, cp=1, ep=1), resumed by 1" in note for note in ranks[0].notes)
    assert any("not those of an undisturbed run" in note for note in ranks[0].notes)


def test_experts_and_data_are_shared_out_over_two_ranks(saved: Saved) -> None:
    ranks = saved.check({"dp": 2, "ep": 2})
    assert any(note.startswith("data: goes on behind the same samples") for note in ranks[0].notes)
    held = [{part[0] for part in ran.parts if ".experts." in part[0]} for ran in ranks]
    assert not held[0] & held[1]


def test_the_same_layout_goes_on_to_the_bit(saved: Saved) -> None:
    ranks = saved.resume(TP2_PP2)
    assert_ranks_hold(ranks, saved.wholes)
    assert ranks[0].losses == saved.losses[SAVED_AT:]
    assert {ran.notes for ran in ranks} == {()}


def test_a_shared_load_under_another_layout_reads_the_same(saved: Saved) -> None:
    saved.check({"dp": 2}, (("fully_parallel_load", True),))


LAYOUTS: dict[str, Sizes] = {
    "tp2 pp2": TP2_PP2,
    "dp4": {"dp": 4},
    "tp4": {"tp": 4},
    "pp4": {"pp": 4},
    "cp2 dp2": {"cp": 2, "dp": 2},
    "ep2 dp2": {"dp": 2, "ep": 2},
    "ep2 dp4": {"dp": 4, "ep": 2},
    "ep4 cp2 dp2": {"dp": 2, "cp": 2, "ep": 4},
    "tp2 dp2": {"tp": 2, "dp": 2},
    "tp2": {"tp": 2},
    "pp2": {"pp": 2},
    "cp2": {"cp": 2},
    "one": {"tp": 1},
}


@pytest.mark.long
@pytest.mark.parametrize("layout", LAYOUTS)
def test_two_stages_of_two_go_on_under_any_layout(saved: Saved, layout: str) -> None:
    saved.check(LAYOUTS[layout])


@pytest.mark.long
@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name != "tp2 pp2"])
def test_any_layout_goes_on_as_two_stages_of_two_and_as_another(tmp_path: Path, layout: str) -> None:
    before = Saved(tmp_path / "save", tmp_path / "memory", LAYOUTS[layout])
    before.check(TP2_PP2)
    before.check({"dp": 2, "ep": 2} if layout != "ep2 dp2" else {"cp": 2})


@pytest.mark.long
def test_four_data_parallel_ranks_share_the_load_of_two_stages_of_two(saved: Saved) -> None:
    saved.check({"dp": 4}, (("fully_parallel_load", True),))


@pytest.mark.long
@pytest.mark.parametrize("layout", ["dp4", "tp4", "ep2 dp2", "one"])
def test_zarr_goes_on_under_any_layout(zarr: Saved, layout: str) -> None:
    zarr.check(LAYOUTS[layout], (("fully_parallel_load", layout == "dp4"),))


@pytest.fixture(scope="module")
def zarr(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    options = (("ckpt_format", "zarr"),)
    return Saved(tmp_path_factory.mktemp("save"), tmp_path_factory.mktemp("memory"), TP2_PP2, options)


# -- a distributed optimizer ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def divided(tmp_path_factory: pytest.TempPathFactory) -> Saved:
    return Saved(tmp_path_factory.mktemp("save"), tmp_path_factory.mktemp("memory"), TP2_PP2, divided=True)


@pytest.mark.long
def test_a_distributed_optimizer_takes_the_steps_that_an_undivided_one_does(saved: Saved, divided: Saved) -> None:
    assert divided.losses == pytest.approx(saved.losses, abs=TOLERANCE)


@pytest.mark.long
@pytest.mark.parametrize("layout", ["tp2 pp2", "dp4", "ep2 dp2", "ep2 dp4", "pp4", "tp2 dp2", "cp2 dp2", "one"])
def test_a_distributed_optimizer_goes_on_under_any_layout(divided: Saved, layout: str) -> None:
    divided.check(LAYOUTS[layout])


@pytest.mark.long
@pytest.mark.parametrize("sizes", [{"dp": 4}, {"dp": 2, "ep": 2}, {"pp": 2, "dp": 2}, {"pp": 4}, {"dp": 4, "ep": 2}])
def test_any_layout_of_a_distributed_optimizer_goes_on_as_two_stages_of_two(tmp_path: Path, sizes: Sizes) -> None:
    """Among them a tied embedding that two stages train, each with two ranks that share its state."""
    before = Saved(tmp_path / "save", tmp_path / "memory", sizes, divided=True)
    before.check(TP2_PP2)
    before.check({"tp": 1})
