"""A series of saves of one structure is planned once; one whose structure changes all the same is never mis-saved."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

import resilience.formats.kept_plan as kept_plan
import resilience.formats.zarr_plan as zarr_plan
from resilience.errors import SaveFailedError
from resilience.formats.protocol import CheckpointFormat, Chunk, RankShare
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from resilience.testing.ranks import ThreadAgreements, on_all_ranks
from tests.formats.jobs import Job, equal
from tests.formats.worlds import meta, rows, whole

FS = PosixFileSystem()
RANKS = 3


class Series:
    """One series of saves on three ranks; counts what was planned and what crossed ranks."""

    def __init__(self, form: str, monkeypatch: pytest.MonkeyPatch, *, keep: bool = True) -> None:
        base = checkpoint_format(form)
        self.forms: list[CheckpointFormat] = [base.keeping_plans() if keep else base for _ in range(RANKS)]
        self.planned = 0
        self.told = 0
        plan_of = kept_plan.plan_of

        def planning(ranks: Any) -> Any:
            self.planned += 1
            return plan_of(ranks)

        plan_chunks = zarr_plan.plan_chunks

        def planning_grids(given: Any, rank: int) -> Any:
            self.planned += rank == 0
            return plan_chunks(given, rank)

        monkeypatch.setattr(kept_plan, "plan_of", planning)
        monkeypatch.setattr(zarr_plan, "plan_chunks", planning_grids)

    def save(self, folder: Path, chunks: Callable[[int], Sequence[Chunk]], values: bytes = b"{}") -> list[Any]:
        folder.mkdir()
        self.told = 0

        def work(agreements: ThreadAgreements) -> None:
            gather = agreements.gather

            def counting(payload: bytes) -> list[bytes]:
                self.told += len(payload)
                return gather(payload)

            agreements.gather = counting  # type: ignore[method-assign]
            share = RankShare(chunks(agreements.rank), values)
            self.forms[agreements.rank].save(folder, share, meta(7, RANKS), agreements, FS)

        return on_all_ranks(RANKS, work)


def state(seed: int, names: int = 20, columns: int = 4) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {f"layer{n}.weight": torch.randn(9, columns, generator=generator) for n in range(names)}


def chunks_of(tensors: dict[str, torch.Tensor]) -> Callable[[int], list[Chunk]]:
    return lambda rank: [
        *(rows(f"model/0/{name}", tensor, 3 * rank, 3 * rank + 3) for name, tensor in tensors.items()),
        whole("rng/torch", torch.full((rank + 1,), float(rank)), per_rank=True),
    ]


def loaded(folder: Path, prefix: str, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As plain DCP reads it."""
    found = {f"{prefix}{name}": torch.zeros_like(tensor) for name, tensor in like.items()}
    with pytest.warns(UserWarning, match=r"torch\.distributed"):
        dcp.load(found, checkpoint_id=folder, no_dist=True)
    return {name.removeprefix(prefix): tensor for name, tensor in found.items()}


@pytest.mark.parametrize(("form", "prefix"), [("torch_dist", ""), ("fsdp_dtensor", "model.")])
def test_the_second_save_is_not_planned_and_says_little_and_is_what_plain_dcp_reads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, prefix: str
) -> None:
    series = Series(form, monkeypatch)
    told = []
    for number in range(3):
        content = state(number)
        # what each rank alone has grows from save to save: everything behind it moves
        values = json.dumps({"model": "x" * 1000 * number}).encode()
        assert series.save(tmp_path / str(number), chunks_of(content), values) == [None] * RANKS
        told.append(series.told)
        assert equal(loaded(tmp_path / str(number), prefix, content), content)
        reader = open_checkpoint(tmp_path / str(number), FS)
        reader.verify()
        own = reader.rank_state(2)
        assert own is not None
        assert (own.values, own.tensors["rng/torch"].tolist()) == (values, [2.0, 2.0, 2.0])
    assert series.planned == 1
    assert told[1] < told[0] / 3
    assert told[1:] == pytest.approx([told[1]] * 2, rel=0.1)


def in_zarr(folder: Path, like: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """As plain zarr reads it."""
    import zarr

    group = zarr.open_group(folder / "tensors.zarr", mode="r")
    return {name: torch.as_tensor(group[name][:]) for name in like}  # type: ignore[index]


def test_the_second_save_in_zarr_is_not_planned_and_says_less_and_plain_zarr_reads_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: dict[bool, list[int]] = {}
    for keep in (False, True):
        series = Series("zarr", monkeypatch, keep=keep)
        told[keep] = []
        for number in range(3):
            content, folder = state(number), tmp_path / f"{keep}-{number}"
            assert series.save(folder, chunks_of(content)) == [None] * RANKS
            told[keep].append(series.told)
            assert equal(in_zarr(folder, content), content)
            open_checkpoint(folder, FS).verify()
        assert series.planned == (1 if keep else 3)
    assert told[True][0] > told[True][1] == told[True][2], "what is left are the files and their digests"
    assert told[True][1] < told[False][1]


#: How others read what was written.
READ: dict[str, Callable[[Path, dict[str, torch.Tensor]], dict[str, torch.Tensor]]] = {
    "torch_dist": lambda folder, like: loaded(folder, "", like),
    "zarr": in_zarr,
}


@pytest.mark.parametrize("form", READ)
@pytest.mark.parametrize("change", [{"names": 21}, {"names": 19}, {"columns": 5}], ids=["more", "fewer", "wider"])
def test_a_structure_that_changed_is_planned_afresh(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, int], form: str
) -> None:
    series = Series(form, monkeypatch)
    for number, options in enumerate([{}, change, change, {}]):
        content = state(number, **options)
        assert series.save(tmp_path / str(number), chunks_of(content)) == [None] * RANKS
        assert equal(READ[form](tmp_path / str(number), content), content)
        open_checkpoint(tmp_path / str(number), FS).verify()
    assert series.planned == 2, "both plans are kept"


@pytest.mark.parametrize("form", READ)
def test_a_dtype_that_changed_on_one_rank_fails_the_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    series = Series(form, monkeypatch)
    first = state(0)
    series.save(tmp_path / "0", chunks_of(first))
    odd = {name: tensor.double() for name, tensor in first.items()}
    outcomes = series.save(tmp_path / "1", lambda rank: chunks_of(odd if rank == 1 else first)(rank))
    assert all(isinstance(outcome, SaveFailedError) and "disagree on" in str(outcome) for outcome in outcomes)
    outcomes = series.save(tmp_path / "2", lambda rank: chunks_of(odd if rank == 1 else first)(rank))
    assert all(isinstance(outcome, SaveFailedError) for outcome in outcomes), "nor when it is tried again"
    assert series.save(tmp_path / "3", chunks_of(first)) == [None] * RANKS


def test_without_the_option_every_save_tells_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    series = Series("torch_dist", monkeypatch, keep=False)
    told = []
    for number in range(2):
        series.save(tmp_path / str(number), chunks_of(state(number)))
        told.append(series.told)
    assert told[1] == pytest.approx(told[0], rel=0.1)


def test_a_run_with_the_option_resumes_from_its_last_save(tmp_path: Path) -> None:
    options = {"ckpt_assume_constant_structure": True, "save_interval": 2}
    first = Job(tmp_path / "ckpt", options=options).run(6)
    second = Job(tmp_path / "ckpt", seed=1, options=options).run()
    assert second.step == 6
    assert equal(second.loaded, first.model.state_dict())
    assert equal(second.moments, first.moments)
