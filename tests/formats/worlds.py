"""Several ranks in one process, one thread each, and the checkpoints that they write."""

from __future__ import annotations

import json
import sys
import threading
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch

from resilience.formats.protocol import Chunk, RankShare, SaveMeta
from resilience.formats.registry import checkpoint_format
from resilience.stores.filesystem import FileSystem, PosixFileSystem

T = TypeVar("T")
RUN = "run-a"
ATTEMPT = "3f9ac01b" + "0" * 24
WAIT_S = 60


class ThreadAgreements:
    """`Agreements` over threads of one process."""

    def __init__(self, rank: int, size: int, barrier: threading.Barrier, slots: list[bytes]) -> None:
        self.rank = rank
        self.size = size
        self._barrier = barrier
        self._slots = slots

    def gather(self, payload: bytes) -> list[bytes]:
        self._slots[self.rank] = payload
        self._barrier.wait(WAIT_S)
        answers = list(self._slots)
        self._barrier.wait(WAIT_S)
        return answers

    def collect(self, payload: bytes) -> list[bytes]:
        told = self.gather(payload)
        return told if self.rank == 0 else []

    def broadcast(self, payload: bytes | None) -> bytes:
        return self.gather(payload or b"")[0]

    def maximum(self, values: Sequence[int]) -> list[int]:
        answers = [json.loads(answer) for answer in self.gather(json.dumps(list(values)).encode())]
        return [max(column) for column in zip(*answers, strict=True)]

    def barrier(self) -> None:
        self._barrier.wait(WAIT_S)

    def close(self) -> None:
        self._barrier.abort()


def on_all_ranks(size: int, work: Callable[[ThreadAgreements], T]) -> list[T | BaseException]:
    """What `work` returned or raised on each rank."""
    barrier, slots = threading.Barrier(size), [b""] * size
    results: list[Any] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(ThreadAgreements(rank, size, barrier, slots))
        except Exception as error:  # noqa: BLE001  (the tests look at what each rank raised)
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(WAIT_S)
        assert not thread.is_alive(), f"a rank stands still:\n{_stacks()}"
    return results


def _stacks() -> str:
    """Where every thread is."""
    return "\n".join("".join(traceback.format_stack(frame)[-8:]) for frame in sys._current_frames().values())


def meta(iteration: int = 7, world_size: int = 1, **fields: Any) -> SaveMeta:
    standard = {"run_id": RUN, "attempt": ATTEMPT, "generation": 2, "base": None, "fork": None}
    return SaveMeta(iteration=iteration, world_size=world_size, **{**standard, **fields})


def whole(key: str, tensor: torch.Tensor, *, per_rank: bool = False) -> Chunk:
    return Chunk(key, tensor, tuple(tensor.shape), (0,) * tensor.dim(), per_rank)


def rows(key: str, tensor: torch.Tensor, start: int, stop: int) -> Chunk:
    return Chunk(key, tensor[start:stop], tuple(tensor.shape), (start, *(0,) * (tensor.dim() - 1)), False)


def save(
    folder: Path,
    chunks_of: Callable[[int], Sequence[Chunk]],
    *,
    world_size: int = 1,
    iteration: int = 7,
    values: Callable[[int], bytes] = lambda rank: json.dumps({"rank": rank}).encode(),
    aliases: dict[str, str] | None = None,
    files: dict[int, dict[str, bytes]] | None = None,
    fs: FileSystem | None = None,
    form: str = "torch_dist",
    common: Mapping[str, Any] | None = None,
    **fields: Any,
) -> None:
    """Write a checkpoint of `world_size` ranks into `folder`; raises what rank 0 raised."""
    folder.mkdir(parents=True, exist_ok=True)
    about = meta(iteration, world_size, **fields)
    outcomes = on_all_ranks(
        world_size,
        lambda agreements: checkpoint_format(form).save(
            folder,
            RankShare(
                chunks_of(agreements.rank),
                values(agreements.rank),
                aliases or {},
                (files or {}).get(agreements.rank, {}),
                common or {},
            ),
            about,
            agreements,
            fs or PosixFileSystem(),
        ),
    )
    for outcome in outcomes:
        if isinstance(outcome, BaseException):
            raise outcome


def arena_of(*tensors: torch.Tensor) -> list[torch.Tensor]:
    """The same tensors as views into one buffer, as a snapshot has them."""
    nbytes = [tensor.numel() * tensor.element_size() for tensor in tensors]
    arena = torch.zeros(sum(nbytes) + 64, dtype=torch.uint8)
    views, start = [], 0
    for tensor, size in zip(tensors, nbytes, strict=True):
        view = arena[start : start + size].view(tensor.dtype).view(tensor.shape)
        view.copy_(tensor)
        views.append(view)
        start += size
    return views
