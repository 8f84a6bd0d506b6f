"""`resilience convert`: the same bits in another format, with little memory, and nothing half made."""

from __future__ import annotations

import itertools
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
import zarr
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from resilience import load_checkpoint
from resilience.errors import SaveFailedError, StoreError
from resilience.formats.convert import convert
from resilience.formats.convert_parts import parts_of
from resilience.formats.convert_ranks import in_turn
from resilience.formats.protocol import Chunk
from resilience.formats.registry import format_name, open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from tests.cli.stores import ask, ask_json
from tests.core.training import World, reference
from tests.formats.jobs import Job, Net, equal
from tests.formats.worlds import arena_of, rows, save, whole
from tests.ranks import values

FS = PosixFileSystem()
BOUND_S = 280.0  # of a world of ranks: no matter how busy the machine is
FORMATS = ("torch_dist", "zarr", "fsdp_dtensor")
EMBEDDING = torch.arange(40, dtype=torch.float32).view(10, 4)
BIAS = torch.arange(6).to(torch.bfloat16)
MOMENT = torch.randn(10, 4, generator=torch.Generator().manual_seed(1))
TIED = {"model/0/head.weight": "model/0/embedding.weight"}
COMMON = {
    "opt_param_scheduler": {"last_epoch": 3},
    "optimizer": {"param_groups": [{"lr": 0.1, "params": ["embedding.weight"]}]},
}
FILES = {
    0: {"tokenizer/vocab.txt": b"a\nb", "dataloader_state/train_dataloader_dprank000.pt": b"first"},
    1: {"dataloader_state/train_dataloader_dprank001.pt": b"second"},
}


def chunks_of_two(rank: int) -> list[Chunk]:
    embedding, moment, running, generator = arena_of(
        EMBEDDING, MOMENT, torch.full((5,), float(rank)), torch.arange(8, dtype=torch.uint8) + rank
    )
    bounds = [(0, 7), (7, 10)][rank]
    chunks = [
        rows("model/0/embedding.weight", embedding, *bounds),
        rows("optimizer/0/state/embedding.weight/exp_avg", moment, *bounds),
        whole("model/0/bn.running_mean", running, per_rank=True),
        whole("rng/torch", generator, per_rank=True),
        whole("extra/twice/0", generator, per_rank=True),
    ]
    if rank == 1:
        chunks += [whole("model/0/bias", BIAS), whole("model/0/scalar", torch.tensor(3.0))]
        chunks += [whole("model/0/only", torch.ones(2), per_rank=True), whole("model/0/empty", torch.zeros(0, 3))]
        chunks += [whole("extra/ema", torch.ones(2, 2, dtype=torch.complex64))]
    return chunks


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base directory with one checkpoint of two ranks."""
    root = tmp_path_factory.mktemp("source") / "ckpt"
    save(
        root / "iter_0000007",
        chunks_of_two,
        world_size=2,
        values=lambda rank: json.dumps({"rank": rank}).encode(),
        aliases={**TIED, "extra/twice/0": "rng/torch"},
        files=FILES,
        common=COMMON,
        run_config={"model": {"hidden": 4}},
        train_state={"consumed_train_samples": 70},
        tp=2,
        save_rng=False,
    )
    return root


def contents(folder: Path) -> dict[str, Any]:
    """Everything that a reader gives, comparable."""
    reader = open_checkpoint(folder, FS)
    reader.verify()
    states = [reader.rank_state(rank) for rank in range(2)]
    found = {
        "model": {name: (str(each.dtype), each.tolist()) for name, each in load_checkpoint(folder).items()},
        "index": {path: (str(each.dtype), each.global_shape) for path, each in reader.index.items()},
        "aliases": dict(reader.aliases),
        "common": dict(reader.common),
        "record": None if reader.record is None else (reader.record.run_id, reader.record.save, reader.record.base),
        "ranks": [state and (state.values, {k: v.tolist() for k, v in state.tensors.items()}) for state in states],
        "files": {
            str(path.relative_to(folder)): path.read_bytes()
            for part in ("tokenizer", "dataloader_state")
            for path in (folder / part).rglob("*")
            if path.is_file()
        },
        "train_state": {k: v.item() for k, v in torch.load(folder / "train_state.pt", weights_only=True).items()},
        "run_config": (folder / "run_config.yaml").read_text(),
    }
    reader.close()
    return found


def test_everything_comes_along_through_all_formats_and_back(capsys: Any, source: Path, tmp_path: Path) -> None:
    expected = contents(source / "iter_0000007")
    before = source
    for name in ("zarr", "fsdp_dtensor", "zarr", "torch_dist", "fsdp_dtensor", "torch_dist"):
        made = tmp_path / f"{len(list(tmp_path.iterdir()))}-{name}"
        told = ask_json(capsys, "convert", before, made, "--to", name)
        assert (told["items"], told["iteration"], told["path"]) == (9, 7, str(made / "iter_0000007"))
        assert told["bytes"] == sum(path.stat().st_size for path in made.rglob("*") if path.is_file())
        assert format_name(made / "iter_0000007", FS) == name
        assert contents(made / "iter_0000007") == expected, name
        assert (made / "latest_checkpointed_iteration.txt").read_text() == "7"
        (listed,) = ask_json(capsys, "ls", "--save", made)["saves"]
        assert (listed["iteration"], listed["complete"], listed["world_size"]) == (7, True, 2)
        assert ask_json(capsys, "verify", "--deep", "--save", made)["damaged"] == []
        before = made


def test_what_others_read_is_there_after_a_conversion(capsys: Any, source: Path, tmp_path: Path) -> None:
    ask_json(capsys, "convert", source / "iter_0000007", tmp_path / "z", "--to", "zarr")
    arrays = zarr.open(tmp_path / "z" / "iter_0000007" / "tensors.zarr", mode="r")
    assert arrays["embedding.weight"][...].tolist() == EMBEDDING.tolist()
    ask_json(capsys, "convert", tmp_path / "z", tmp_path / "t", "--to", "torch_dist")
    state = {"head.weight": torch.zeros(10, 4), "optimizer.state.exp_avg.embedding.weight": torch.zeros(10, 4)}
    dcp.load(state, checkpoint_id=tmp_path / "t" / "iter_0000007", no_dist=True)
    assert torch.equal(state["head.weight"], EMBEDDING)
    assert torch.equal(state["optimizer.state.exp_avg.embedding.weight"], MOMENT)


def test_a_resume_from_a_converted_one_is_bit_identical(tmp_path: Path, memory_mount: Path) -> None:
    world = World(memory_mount, tmp_path)
    fields = {"kind": None, "save": True}
    first = {"save_interval": 3, "ckpt_format": "torch_dist", "load": str(tmp_path / "save")}
    values(world.run(world.plan("a", "b", steps=6, checkpoint=first, **fields), timeout_s=BOUND_S))
    made = tmp_path / "save"
    for name in ("zarr", "fsdp_dtensor", "zarr"):
        convert(made, tmp_path / "other", name, FS)
        shutil.rmtree(made)
        (tmp_path / "other").rename(made)
    again = world.plan("a", "b", steps=12, checkpoint={**first, "ckpt_format": "zarr"}, **fields)
    resumed = values(world.run(again, timeout_s=BOUND_S))
    assert [ran.resumed.iteration for ran in resumed] == [6, 6]
    assert tuple(ran.digest for ran in resumed) == reference(2, 12)


@pytest.mark.parametrize("to", FORMATS)
def test_what_another_program_wrote_stays_another_programs(to: str, tmp_path: Path) -> None:
    folder = tmp_path / "other" / "iter_0000004"
    model = Net()
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    dcp.save(state, checkpoint_id=folder, no_dist=True)
    torch.save({"dataloader_state_dict": {"at": 3}}, folder / "train_dataloader_dprank000.pt")
    convert(folder, tmp_path / "made", to, FS)
    made = tmp_path / "made" / "iter_0000004"
    reader = open_checkpoint(made, FS)
    assert (reader.record, reader.rank_state(0)) == (None, None)
    reader.verify()
    assert (made / "dataloader_state" / "train_dataloader_dprank000.pt").exists()
    job = Job(tmp_path / "mine", seed=1, options={"load": str(tmp_path / "made")}).run()
    assert job.step == 4
    assert equal(job.loaded, model.state_dict())


# -- safetensors ------------------------------------------------------------------------------------------------------


def test_safetensors_opens_what_was_made(capsys: Any, source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    told = ask_json(capsys, "convert", source, tmp_path / "s", "--to", "safetensors")
    assert told["path"] == str(tmp_path / "s")
    model = load_file(tmp_path / "s" / "model.safetensors")
    assert equal(
        model,
        {
            "embedding.weight": EMBEDDING,
            "bias": BIAS,
            "scalar": torch.tensor(3.0),
            "only": torch.ones(2),
            "empty": torch.zeros(0, 3),
            "bn.running_mean": torch.zeros(5),
        },
    )
    with safe_open(tmp_path / "s" / "model.safetensors", "pt") as opened:
        assert opened.metadata() == {"format": "pt", "head.weight": "embedding.weight"}
    assert load_file(tmp_path / "s" / "optimizer.safetensors").keys() == {"optimizer.state.exp_avg.embedding.weight"}
    assert torch.equal(
        load_file(tmp_path / "s" / "extra.safetensors")["resilience/extra/ema"], torch.ones(2, 2, dtype=torch.complex64)
    )

    monkeypatch.setattr("resilience.formats.convert_safetensors._FILE_BYTES", 180)
    ask_json(capsys, "convert", source, tmp_path / "several", "--to", "safetensors")
    index = json.loads((tmp_path / "several" / "model.safetensors.index.json").read_text())
    files = set(index["weight_map"].values())
    assert files == {path.name for path in (tmp_path / "several").glob("model-*.safetensors")}
    assert files == {f"model-{number:05d}-of-00002.safetensors" for number in (1, 2)}
    joined = {key: load_file(tmp_path / "several" / file)[key] for key, file in index["weight_map"].items()}
    assert equal(joined, model)
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in model.values())


def test_a_dtype_that_safetensors_lacks_is_stored_as_bytes_and_named(tmp_path: Path) -> None:
    tensor = torch.arange(3).to(torch.complex128)
    save(tmp_path / "src" / "iter_0000007", lambda rank: [whole("model/0/w", tensor)])
    convert(tmp_path / "src", tmp_path / "s", "safetensors", FS)
    with safe_open(tmp_path / "s" / "model.safetensors", "pt") as opened:
        assert opened.metadata()["dtype:w"] == "complex128"
        assert torch.equal(opened.get_tensor("w").view(torch.complex128).reshape(3), tensor)


# -- little memory ----------------------------------------------------------------------------------------------------

_CHILD = """
import re, sys
from pathlib import Path
from resilience.formats.convert import convert
from resilience.stores.filesystem import PosixFileSystem

def peak():  # of this program alone: `ru_maxrss` begins with the peak of whoever started it
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) << 10

warm, source, destination, to = sys.argv[1:]
convert(Path(warm), Path(destination + "-warm"), to, PosixFileSystem())  # what is imported and allocated once
before = peak()
convert(Path(source), Path(destination), to, PosixFileSystem())
print(peak() - before)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """480 MiB of tensors, 120 in each shard, in boxes of at most 12 MiB; one of the tensors alone is 240 MiB."""
    root = tmp_path_factory.mktemp("large")

    def chunks(rank: int) -> list[Chunk]:
        huge = torch.full((20 << 10, 3072), float(rank))
        parts = [rows("model/0/huge", huge, start, start + 1024) for start in range(rank * 1024, 20 << 10, 4096)]
        return parts + [whole(f"model/0/w{rank}.{n}", torch.full((1024, 3072), float(n))) for n in range(5)]

    save(root / "src" / "iter_0000001", chunks, world_size=4, iteration=1)
    save(root / "warm" / "iter_0000001", lambda rank: [whole("model/0/w", torch.ones(2))], iteration=1)
    return root


@pytest.mark.parametrize("to", ["zarr", "torch_dist", "fsdp_dtensor", "safetensors"])
def test_the_memory_of_a_conversion_is_a_fraction_of_the_checkpoint(large: Path, tmp_path: Path, to: str) -> None:
    words = [str(large / "warm"), str(large / "src"), str(tmp_path / "made"), to]
    ran = subprocess.run([sys.executable, "-c", _CHILD, *words], capture_output=True, text=True, timeout=280)
    assert ran.returncode == 0, ran.stderr
    stored = sum(path.stat().st_size for path in (large / "src").rglob("*") if path.is_file())
    made = sum(path.stat().st_size for path in (tmp_path / "made").rglob("*") if path.is_file())
    assert min(stored, made) >= 480 << 20
    grown = int(ran.stdout)
    assert grown < 160 << 20, f"{grown >> 20} MiB for a checkpoint of {stored >> 20} MiB"


@given(
    st.integers(1, 60),
    st.lists(st.integers(1, 59), max_size=6),
    st.integers(1, 5),
    st.booleans(),
    st.integers(1, 400),
)
def test_parts_cover_a_tensor_once_and_cut_no_stored_box(
    length: int, cuts: list[int], width: int, columns: bool, most: int
) -> None:
    ends = [0, *sorted({cut for cut in cuts if cut < length}), length]
    spans = [(start, stop - start) for start, stop in itertools.pairwise(ends)]
    split = [(0, width)] if not columns or width == 1 else [(0, 1), (1, width - 1)]
    boxes = [((start, at), (count, size)) for start, count in spans for at, size in split]
    seen = torch.zeros(length, width, dtype=torch.int64)
    for (row, column), (count, size) in parts_of((length, width), boxes, 1, most):
        seen[row : row + count, column : column + size] += 1
        for (start, at), (rows_, columns_) in boxes:
            meets = row < start + rows_ and start < row + count and column < at + columns_ and at < column + size
            inside = row <= start and start + rows_ <= row + count and column <= at and at + columns_ <= column + size
            assert inside or not meets, "a stored box is read in one go"
        assert count * size <= most or ((row, column), (count, size)) in boxes
    assert bool((seen == 1).all())


# -- failing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", [*FORMATS, "safetensors"])
def test_a_conversion_that_fails_leaves_nothing(source: Path, tmp_path: Path, to: str) -> None:
    class Full(PosixFileSystem):
        def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
            if path.name in ("run_config.yaml", "optimizer.safetensors"):
                raise StoreError("no space")
            super().write_file(path, chunks)

    with pytest.raises((SaveFailedError, StoreError), match="no space"):
        convert(source, tmp_path / "made", to, Full())
    assert list(tmp_path.iterdir()) == []


def test_before_its_end_nothing_is_at_the_destination(source: Path, tmp_path: Path) -> None:
    class Looking(PosixFileSystem):
        renamed: list[Path] = []

        def write_file(self, path: Path, chunks: Iterator[memoryview]) -> None:
            assert not (tmp_path / "made").exists()
            super().write_file(path, chunks)

        def rename(self, source: Path, target: Path) -> None:
            self.renamed.append(target)
            super().rename(source, target)

    convert(source, tmp_path / "made", "torch_dist", Looking())
    assert Looking.renamed == [tmp_path / "made"]
    assert [path.name for path in tmp_path.iterdir()] == ["made"]


def test_a_damaged_source_is_not_converted(source: Path, tmp_path: Path, capsys: Any) -> None:
    copied = shutil.copytree(source, tmp_path / "src")
    data = copied / "iter_0000007" / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    answer = ask(capsys, "convert", copied / "iter_0000007", tmp_path / "made", "--to", "zarr")
    assert answer.status == 3
    assert "SHA-256" in answer.err
    assert not (tmp_path / "made").exists()


def test_a_destination_that_is_not_empty_and_a_source_without_checkpoints_are_refused(
    source: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "note").touch()
    told = ask_json(capsys, "convert", source, tmp_path / "there", "--to", "zarr", status=2)
    assert "is no empty directory" in told["error"]["message"]
    assert ask(capsys, "convert", tmp_path / "nothing", tmp_path / "made", "--to", "zarr").status == 2
    assert ask(capsys, "convert", source, tmp_path / "made", "--to", "hdf5").status == 2
    (tmp_path / "empty").mkdir()
    assert ask(capsys, "convert", source, tmp_path / "empty", "--to", "zarr").status == 0
    assert load_checkpoint(tmp_path / "empty").folder.name == "iter_0000007"


def test_ranks_in_turn_hear_each_other_and_end_when_one_gives_up() -> None:
    heard: dict[int, Sequence[bytes]] = {}

    def work(ranks: Any) -> None:
        assert ranks.broadcast(b"x" if ranks.rank == 0 else None) == b"x"
        assert ranks.maximum([ranks.rank, 5]) == [6, 5]
        heard[ranks.rank] = ranks.gather(bytes([ranks.rank]))

    in_turn(7, work)
    assert heard == {rank: [bytes([each]) for each in range(7)] for rank in range(7)}

    def gives_up(ranks: Any) -> None:
        ranks.barrier()
        if ranks.rank == 3:
            raise StoreError("gone")
        ranks.barrier()
        raise AssertionError("nobody gets here")

    with pytest.raises(StoreError, match="gone"):
        in_turn(7, gives_up)
