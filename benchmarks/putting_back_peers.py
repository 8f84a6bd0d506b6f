"""Other packages' ways to put the whole state back from what lies on the own node.

Runs in the peers' environment.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from benchmarks.peers_rank import lm_resiliency_manager, torch_checkpointing_manager
from benchmarks.putting_back import PuttingBack, State, Way, fill
from benchmarks.rank import Bench, Place

__all__ = ["make"]


class _TorchSnapshot:
    """A file per tensor in one folder; equal tensors of both ranks once."""

    def __init__(self, place: Place) -> None:
        self._folder = str(place.directory / "torchsnapshot")

    def save(self, state: State) -> None:
        from torchsnapshot import Snapshot, StateDict

        Snapshot.take(self._folder, {"state": StateDict(**state)}, replicated=["**"])

    def load(self, state: State) -> None:
        from torchsnapshot import Snapshot, StateDict

        Snapshot(self._folder).restore({"state": StateDict(**state)})  # in place, where the tensors fit


class _TorchCheckpointing:
    """One file per rank, in one folder."""

    def __init__(self, place: Place) -> None:
        self._manager = torch_checkpointing_manager("with_sync_save")
        self._folder = str(place.directory / "torch-checkpointing")

    def save(self, state: State) -> None:
        self._manager.save(self._folder, {"state": state})
        self._manager.close()

    def load(self, state: State) -> None:
        self._manager.load(self._folder, into={"state": state})
        self._manager.close()


class _LmResiliency:
    """Its buffers end with the process, which writes them down while it ends."""

    def __init__(self, place: Place) -> None:
        self._manager = lm_resiliency_manager(place)

    def save(self, state: State) -> None:
        self._manager.save_tensors(list(state.values()), 1)
        if not self._manager.finalize_replication() or self._manager.flush_for_restart() != 1:
            raise RuntimeError("the save was not written down")
        self._manager.close()

    def load(self, state: State) -> None:
        loaded = self._manager.load_tensors()
        if loaded is None:
            raise RuntimeError("the save is not found")
        fill(state, dict(zip(state, loaded[0], strict=True)))
        self._manager.close()


_WAYS: Final[dict[str, Callable[[Place], Way]]] = {
    "torchsnapshot": _TorchSnapshot,
    "torch_checkpointing": _TorchCheckpointing,
    "lm_resiliency": _LmResiliency,
}


def make(place: Place) -> Bench:
    """Of `place.options["peers"]`, by their modules."""
    return PuttingBack(place, {module: _WAYS[module] for module in place.options["peers"]})
