"""What a persistent checkpoint costs to write and to read, in each format, and what others take for the same bytes.

All write and read the same half of the state per rank, cut out beforehand: ours through `CheckpointFormat.save` and
`CheckpointReader`, the others through their own calls. Two controllers save the whole live state beside that, for what
the training thread waits.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final
from unittest import mock

import torch

from benchmarks.folders import fresh_folder
from benchmarks.limits import Limits
from benchmarks.memory import growth_of
from benchmarks.persistent_figures import FORMATS
from benchmarks.persistent_rivals import PersistentRivals
from benchmarks.rank import Place, timed
from benchmarks.state import Weights, adam_for, half_of
from resilience import CheckpointConfig, ResiliencyConfig, ResiliencyController, TrainingState
from resilience.formats import torch_dist_writer, zarr_writer
from resilience.formats.protocol import Chunk, RankShare, SaveMeta, Target
from resilience.formats.registry import checkpoint_format, open_checkpoint
from resilience.replication.gloo import TorchCommunicator
from resilience.stores.filesystem import PosixFileSystem

__all__ = ["make"]

_INTERVAL: Final = 10
_BOUND_S: Final = 120.0
_ATTEMPT: Final = "b" * 32


class _OurFormats:
    """Save, proof and load of one rank's half in each format."""

    def __init__(self, place: Place, half: dict[str, torch.Tensor], into: dict[str, torch.Tensor]) -> None:
        self._place = place
        self._half = half
        self._into = into
        self._fs = PosixFileSystem()
        self._communicator = TorchCommunicator(_BOUND_S)
        self._agreements = self._communicator.agreements("benchmark-formats")
        chunks = [
            Chunk(f"model/0/{key}", tensor, tuple(tensor.shape), (0,) * tensor.dim(), per_rank=False)
            for key, tensor in half.items()
        ]
        self._share = RankShare(chunks, b"{}")
        self._meta = SaveMeta(10, "bench", _ATTEMPT, 1, None, None, place.size)
        self._targets = [Target(f"model/0/{key}", out, (0,) * out.dim(), tuple(out.shape)) for key, out in into.items()]

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        found: dict[str, Callable[..., dict[str, Any]]] = {
            f"ours_{name}": lambda name=name: self._both(name) for name in FORMATS
        }
        return found | {f"undigested_{name}": lambda name=name: self._undigested(name) for name in FORMATS}

    def _both(self, name: str) -> dict[str, Any]:
        """Seconds of the `save`, of the `proof` by digests before a load (each rank the files that it reads), of the

        `load` after it; and the bytes by which the process grew in a save, and in a proof or load.
        """
        with fresh_folder(self._place, f"ours-{name}") as folder:
            save_s, save_bytes = growth_of(lambda: timed(lambda: self._save(name, folder)))
            proof_s, proof_bytes = growth_of(lambda: timed(lambda: self._prove(folder)))
            for tensor in self._into.values():
                tensor.zero_()
            load_s, load_bytes = growth_of(lambda: timed(lambda: self._load(folder)))
        if not all(torch.equal(tensor, self._half[key]) for key, tensor in self._into.items()):
            raise RuntimeError(f"what {name} read is not what it wrote")
        return {
            "save": save_s, "proof": proof_s, "load": load_s,
            "save_bytes": save_bytes, "load_bytes": max(proof_bytes, load_bytes),
        }  # fmt: skip

    def _undigested(self, name: str) -> dict[str, Any]:
        """The save as it would be without the digest of the data."""
        nothing = SimpleNamespace(update=lambda content: None, hexdigest=lambda: "0" * 64)
        without = SimpleNamespace(sha256=lambda *content: nothing)
        with (
            fresh_folder(self._place, f"undigested-{name}") as folder,
            mock.patch.object(torch_dist_writer, "hashlib", without),
            mock.patch.object(zarr_writer, "hashlib", without),
        ):
            return {"save": timed(lambda: self._save(name, folder))}

    def _save(self, name: str, folder: Path) -> None:
        checkpoint_format(name).save(folder, self._share, self._meta, self._agreements, self._fs)

    def _prove(self, folder: Path) -> None:
        reader = open_checkpoint(folder, self._fs)
        try:
            reader.verify(reader.files(self._targets))
        finally:
            reader.close()

    def _load(self, folder: Path) -> None:
        reader = open_checkpoint(folder, self._fs)
        try:
            reader.read(self._targets)
        finally:
            reader.close()

    def close(self) -> None:
        self._agreements.close()
        self._communicator.close()


class _Saver:
    """A controller that writes `torch_dist` only, at our command."""

    def __init__(self, place: Place, name: str, state: TrainingState, *, in_background: bool) -> None:
        self._controller = ResiliencyController(
            state,
            CheckpointConfig(
                save=str(place.directory / name), save_interval=_INTERVAL, async_save=in_background,
                ckpt_assume_constant_structure=True,
            ),
            ResiliencyConfig(
                run_id=name, memory_dir=str(place.node_directory / name), keep_persistent=1,
                max_restarts_without_progress=1_000_000,
            ),
        )  # fmt: skip
        self._controller.restore()

    def save(self) -> dict[str, Any]:
        """What the training thread waits (`stall`), and the time until the checkpoint is there (`seconds`)."""
        controller = self._controller
        iteration = (controller.iteration // _INTERVAL + 1) * _INTERVAL
        while controller.iteration < iteration - 1:
            controller.after_step(controller.iteration + 1)
        began = time.perf_counter()
        stall_s = timed(lambda: controller.after_step(iteration))
        controller.wait_idle(_BOUND_S)
        seconds = time.perf_counter() - began
        controller.after_step(iteration + 1)
        controller.wait_idle(_BOUND_S)
        return {"stall": stall_s, "seconds": seconds}

    def close(self) -> None:
        self._controller.close()


class _PersistentBench:
    """Limits, others and ours, in one pair of processes; with the option `alone`, ours alone."""

    def __init__(self, place: Place) -> None:
        model = Weights(place.settings)
        optimizer = adam_for(model)
        half = half_of(model, optimizer, place.rank)
        into = {key: torch.zeros_like(tensor) for key, tensor in half.items()}
        place.node_directory.mkdir(exist_ok=True)
        self._formats = _OurFormats(place, half, into)
        self._measures = self._formats.measures()
        self._closing: list[Callable[[], None]] = [self._formats.close]
        if place.options.get("alone"):
            return
        limits, state = Limits(place), TrainingState(model, optimizer)
        waited, background = (_Saver(place, name, state, in_background=name == "later") for name in ("now", "later"))
        self._closing += [limits.close, waited.close, background.close]
        self._measures |= PersistentRivals(place, half, into).measures()
        self._measures |= {"memcpy": limits.memcpy, "ours_waited": waited.save, "ours_async": background.save}

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return self._measures

    def close(self) -> None:
        for close in reversed(self._closing):
            close()


def make(place: Place) -> _PersistentBench:
    return _PersistentBench(place)
