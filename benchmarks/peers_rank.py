"""Other packages' saves of the rank's half of the state, each by its quickest way on a CPU.

Runs in the peers' environment. The wait of an asynchronous save ends when the state may change again, as that of ours
does: where a package copies behind the training thread's back, the wait for that copy counts. Complete is what the
package itself calls so.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from typing import Any, Final

import torch

from benchmarks.folders import fresh_folder
from benchmarks.rank import Bench, Place, timed, waited
from benchmarks.state import Weights, adam_for, half_of

__all__ = ["lm_resiliency_manager", "make", "torch_checkpointing_manager"]

Half = dict[str, torch.Tensor]


def torch_checkpointing_manager(how: str) -> Any:
    """`how`: the name of one of its ready configurations."""
    from torch_checkpointing import CheckpointManager
    from torch_checkpointing.storage.filesystem import LocalFileSystemStorageConfig

    config: Any = getattr(CheckpointManager.Config, how)()
    config.storage_config = LocalFileSystemStorageConfig(use_direct_io=False)  # of no use on a memory mount
    return config.build()


def lm_resiliency_manager(place: Place) -> Any:
    from lm_resiliency.checkpointing import InMemoryCheckpointManager, InMemoryCkptConfig

    config = InMemoryCkptConfig(
        replication_jump=1,
        disk_flush_interval=0,
        disk_folder=str(place.node_directory / "lm-resiliency"),
        run_id="benchmark",
        pin_memory=False,
    )
    return InMemoryCheckpointManager(config)


class _TorchSnapshot:
    """Stages into memory before it returns, then writes a file for each tensor into one folder."""

    def __init__(self, place: Place, half: Half) -> None:
        from torchsnapshot import Snapshot, StateDict

        self._place, self._snapshot, self._state = place, Snapshot, {"half": StateDict(**half)}

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"torchsnapshot_async": self._async, "torchsnapshot_save": self._save}

    def _async(self) -> dict[str, Any]:
        with fresh_folder(self._place, "torchsnapshot") as folder:
            return waited(
                lambda: self._snapshot.async_take(str(folder / "save"), self._state), lambda pending: pending.wait()
            )

    def _save(self) -> dict[str, Any]:
        with fresh_folder(self._place, "torchsnapshot") as folder:
            return {"seconds": timed(lambda: self._snapshot.take(str(folder / "save"), self._state))}

    def close(self) -> None:
        """Nothing stays open."""


class _TorchCheckpointing:
    """A thread stages into shared memory, another process writes it; the manager's lock says when the state is free."""

    def __init__(self, place: Place, half: Half) -> None:
        self._place, self._half = place, {"half": half}
        self._async_manager = torch_checkpointing_manager("with_async_save")
        self._manager = torch_checkpointing_manager("with_sync_save")

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"torch_checkpointing_async": self._async, "torch_checkpointing_save": self._save}

    def _async(self) -> dict[str, Any]:
        """`call`: seconds until the call returned, when the state must not change yet."""
        with fresh_folder(self._place, "torch-checkpointing") as folder:
            call_s = 0.0

            def save() -> Any:
                nonlocal call_s
                began = time.perf_counter()
                written = self._async_manager.save(str(folder / "save"), self._half)
                call_s = time.perf_counter() - began
                with self._async_manager.lock():  # as around the optimizer's step
                    return written

            return waited(save, lambda written: written.result()) | {"call": call_s}

    def _save(self) -> dict[str, Any]:
        with fresh_folder(self._place, "torch-checkpointing") as folder:
            return {"seconds": timed(lambda: self._manager.save(str(folder / "save"), self._half))}

    def close(self) -> None:
        self._async_manager.close()
        self._manager.close()


class _LmResiliency:
    """Copies into the process's own memory, then exchanges copies with the peer's in the background. No file."""

    def __init__(self, place: Place, half: Half) -> None:
        self._manager = lm_resiliency_manager(place)
        self._tensors = list(half.values())
        self._step = 0

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"lm_resiliency_async": self._async}

    def _async(self) -> dict[str, Any]:
        self._step += 1
        return waited(lambda: self._manager.save_tensors(self._tensors, self._step), lambda _: self._replicated())

    def _replicated(self) -> None:
        if not self._manager.finalize_replication():
            raise RuntimeError("the peer's copy did not arrive")

    def close(self) -> None:
        self._manager.close()


def _ml_flashpoint(place: Place, half: Half) -> Bench:
    os.environ["MLFLASHPOINT_LOG_LEVEL"] = "WARNING"  # read while it is imported
    from benchmarks.ml_flashpoint_rank import MlFlashpointSaves

    return MlFlashpointSaves(place, half)


_BENCHES: Final[dict[str, Callable[[Place, Half], Bench]]] = {
    "torchsnapshot": _TorchSnapshot,
    "torch_checkpointing": _TorchCheckpointing,
    "lm_resiliency": _LmResiliency,
    "ml_flashpoint": _ml_flashpoint,
}


class _PeersBench:
    """Each of `place.options["peers"]`, by its module, over one half."""

    def __init__(self, place: Place) -> None:
        model = Weights(place.settings)
        half = half_of(model, adam_for(model), place.rank)
        place.node_directory.mkdir(exist_ok=True)
        self._benches = [_BENCHES[module](place, half) for module in place.options["peers"]]

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {name: measure for bench in self._benches for name, measure in bench.measures().items()}

    def close(self) -> None:
        for bench in self._benches:
            bench.close()


def make(place: Place) -> Bench:
    return _PeersBench(place)
