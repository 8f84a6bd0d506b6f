"""What a rank's memory grows by while it saves and loads, seen from a process of its own; and the thread ahead."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from resilience.formats.read_ahead import read_ahead

_PROGRAM = """
import sys
from pathlib import Path
import torch
from benchmarks.memory import growth_of
from resilience.formats.protocol import Target
from resilience.formats.registry import open_checkpoint
from resilience.stores.filesystem import PosixFileSystem
from tests.formats.worlds import save, whole

torch.set_num_threads(1)
folder, form = Path(sys.argv[1]), sys.argv[2]
shapes = [(2000, 500)] * 25 + [(25000, 1000)]  # 100 MB in tensors of 4 MB, and 100 MB in one
tensors = [torch.full(shape, float(number)) for number, shape in enumerate(shapes)]
into = [torch.zeros(shape) for shape in shapes]

def write(folder, tensors):
    save(folder, lambda rank: [whole(f"model/0/{n}", tensor) for n, tensor in enumerate(tensors)], form=form)

def read():
    reader = open_checkpoint(folder, PosixFileSystem())
    reader.read([Target(f"model/0/{n}", out, (0, 0)) for n, out in enumerate(into)])
    reader.close()

write(folder.with_name("small"), [torch.ones(2, 2)])  # what is imported on the way does not count
print(growth_of(lambda: write(folder, tensors))[1], growth_of(read)[1])
assert all(torch.equal(one, other) for one, other in zip(tensors, into))
"""
_BOUND_BYTES = 64_000_000


@pytest.mark.parametrize("form", ["torch_dist", "fsdp_dtensor", "zarr"])
def test_saving_and_loading_200_mb_grows_a_rank_by_less_than_64(tmp_path: Path, repository: Path, form: str) -> None:
    command = [sys.executable, "-c", _PROGRAM, str(tmp_path / "checkpoint"), form]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    saving, loading = map(int, done.stdout.split())
    assert saving < _BOUND_BYTES
    assert loading < _BOUND_BYTES


_TRAINER = """
import sys
from pathlib import Path
import torch
from torch import nn
from benchmarks.memory import growth_of
from resilience import CheckpointConfig, ResiliencyConfig, ResilientTrainer

root, form, background, act = Path(sys.argv[1]), sys.argv[2], sys.argv[3] == "True", sys.argv[4]
torch.set_num_threads(1)
if form == "fsdp_dtensor":
    import torch.distributed as dist
    from torch.distributed.fsdp import fully_shard
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

def job(where, width, depth, steps):
    torch.manual_seed(1)
    model = nn.Sequential(*[nn.Linear(width, width, bias=False) for _ in range(depth)])
    if form == "fsdp_dtensor":
        fully_shard(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, foreach=False)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    resumes = (where / "ckpt").exists()
    checkpoint = CheckpointConfig(
        save=str(where / "ckpt"), load=str(where / "ckpt"), save_interval=2, ckpt_format=form, async_save=background
    )
    limits = ResiliencyConfig(memory_dir=str(where / "mem"), keep_persistent=1)
    made = lambda: ResilientTrainer(model, optimizer, checkpoint=checkpoint, resiliency=limits)
    trainer, grown = growth_of(made) if resumes else (made(), 0)
    def train():
        for _ in trainer.iterations(trainer.iteration + steps):
            optimizer.step()
        trainer.wait()
    if steps:
        train()
    trainer.close()
    return grown

job(root / "small", 8, 2, 2)
job(root / "small", 8, 2, 0)  # what is imported on the way does not count
print(job(root / "large", 1024, 16, 2 if act == "save" else 0))
"""


@pytest.mark.parametrize("form", ["torch_dist", "fsdp_dtensor", "zarr"])
def test_beside_the_state_a_trainers_resume_takes_its_shard_once_more_and_less_than_64_mb(
    memory_mount: Path, repository: Path, form: str
) -> None:
    """64 MB of weights, whose 128 MB of moments are not there yet; what is staged is a shard of 192 MB."""

    def start(act: str) -> int:
        command = [sys.executable, "-c", _TRAINER, str(memory_mount), form, "False", act]
        done = subprocess.run(command, cwd=repository, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr
        return int(done.stdout.split()[-1])

    start("save")
    grown, shard = start("load"), 3 * 16 * 1024 * 1024 * 4
    moments = 2 * shard // 3
    assert moments < grown < moments + shard + _BOUND_BYTES


def test_what_is_read_ahead_is_the_same_bytes_in_fewer_pieces() -> None:
    pieces = [bytes([number % 256]) * size for number, size in enumerate([3, 2 << 20, 1, 0, 70_000] * 40)]
    with read_ahead(memoryview(piece) for piece in pieces) as ahead:
        got = [bytes(piece) for piece in ahead]
    assert b"".join(got) == b"".join(pieces)
    assert len(got) < len(pieces) / 2


def test_large_pieces_are_made_one_ahead_and_no_further() -> None:
    size = 24 << 20
    made, taken, most = 0, 0, 0

    def counting() -> Iterator[memoryview]:
        nonlocal made, most
        for _ in range(8):
            made += 1
            most = max(most, made - taken)
            yield memoryview(bytes(size))

    with read_ahead(counting()) as ahead:
        for _ in ahead:
            taken += 1
            time.sleep(0.02)  # the writer is the slower one
    assert made == taken == 8
    assert most <= 3, "one is waiting, one is being made, one may just be changing hands"


def test_an_error_ahead_is_raised_where_the_pieces_are_awaited() -> None:
    def failing() -> Iterator[memoryview]:
        yield memoryview(bytes(2 << 20))
        raise ValueError("no more")

    got: list[int] = []

    def consume() -> None:
        with read_ahead(failing()) as ahead:
            for piece in ahead:
                got.append(len(piece))

    with pytest.raises(ValueError, match="no more"):
        consume()
    assert got == [2 << 20]


def test_a_writer_that_gives_up_leaves_no_thread_behind() -> None:
    def endless() -> Iterator[memoryview]:
        while True:
            yield memoryview(bytes(2 << 20))

    def give_up() -> None:
        with read_ahead(endless()) as ahead:
            next(ahead)
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        give_up()
    assert not [thread for thread in threading.enumerate() if thread.name == "resilience-read-ahead"]
