"""What a save costs here: the training thread's wait, and the time until it is committed on every node.

Two controllers save the same live state: one keeps saves on its own node, one replicates them. They stand in the same
processes as the limits and the others, which take turns with them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Final

import torch.distributed as dist

from benchmarks.limits import Limits
from benchmarks.rank import Place, timed
from benchmarks.rivals import Rivals
from benchmarks.state import Weights, adam_for, changes, half_of
from benchmarks.told import told_at
from resilience import CheckpointConfig, ResiliencyConfig, ResiliencyController, TrainingState

__all__ = ["Saver", "make"]

_INTERVAL: Final = 10
_BOUND_S: Final = 60.0
_STEP_S: Final = 0.02  # of the device-bound loop


class Saver:
    """A controller whose boundaries are at our command."""

    def __init__(
        self,
        place: Place,
        name: str,
        state: TrainingState,
        *,
        replication: bool,
        change: Callable[[], None] = lambda: None,
    ) -> None:
        """Collective; elects and restores. `change`s the state before each save."""
        self._change = change
        self._events = place.directory / f"events-{name}"
        self._node = f"node{place.rank}"
        checkpoint = CheckpointConfig(
            non_persistent_ckpt_type="local",
            non_persistent_save_interval=_INTERVAL,
            non_persistent_local_ckpt_dir=str(place.node_directory / name),
            replication=replication,
        )
        resiliency = ResiliencyConfig(
            run_id=name,
            memory_dir=str(place.node_directory / name),
            events=str(self._events),
            max_restarts_without_progress=1_000_000,
        )
        self.controller = ResiliencyController(state, checkpoint, resiliency)
        self.resume = self.controller.restore()

    def save(self) -> float:
        """A boundary at which a save is due. Returns the seconds that it took the training thread."""
        iteration = (self.controller.iteration // _INTERVAL + 1) * _INTERVAL
        while self.controller.iteration < iteration - 1:
            self.controller.after_step(self.controller.iteration + 1)
        self._change()
        return timed(lambda: self.controller.after_step(iteration))

    def settle(self) -> None:
        """Boundaries without a save until the save is known everywhere and what it replaces is recycled."""
        for _ in range(3):
            self.controller.wait_idle(_BOUND_S)
            dist.barrier()
            self.controller.after_step(self.controller.iteration + 1)
        self.controller.wait_idle(_BOUND_S)

    def train(self, steps: int) -> None:
        """Steps that leave the CPU alone, as a device-bound loop does."""
        for _ in range(steps):
            time.sleep(_STEP_S)
            self.controller.after_step(self.controller.iteration + 1)

    def protected_at(self, iteration: int) -> float:
        """Unix seconds at which this node held all its copies of a save, as its event says."""
        return told_at(self._events / f"{self._node}.jsonl", "protected", iteration)


class OurSaves:
    """The measures of our saves."""

    def __init__(self, place: Place, state: TrainingState, change: Callable[[], None]) -> None:
        self._alone = Saver(place, "alone", state, replication=False, change=change)
        self._replicated = Saver(place, "replicated", state, replication=True, change=change)

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {
            "ours_local": lambda: self._committed(self._alone),
            "ours_replicated": lambda: self._committed(self._replicated),
            "ours_device_bound": self._device_bound,
            "ours_in_flight": self._in_flight,
        }

    def _committed(self, saver: Saver) -> dict[str, Any]:
        """One save with the training thread asleep afterwards."""
        began = time.time()
        stall_s = saver.save()
        saver.controller.wait_idle(_BOUND_S)
        seconds = saver.protected_at(saver.controller.iteration) - began
        saver.settle()
        return {"stall": stall_s, "seconds": seconds}

    def _device_bound(self) -> dict[str, Any]:
        """One save with steps and boundaries going on, none of which needs the CPU for long."""
        saver = self._replicated
        began = time.time()
        saver.save()
        iteration = saver.controller.iteration
        saver.train(_INTERVAL - 1)
        saver.controller.wait_idle(_BOUND_S)
        seconds = saver.protected_at(iteration) - began
        saver.settle()
        return {"seconds": seconds}

    def _in_flight(self) -> dict[str, Any]:
        """The second of two saves at consecutive boundaries: the first is being hashed and sent."""
        saver = self._replicated
        saver.save()
        stall_s = saver.save()
        saver.settle()
        return {"stall": stall_s}

    def close(self) -> None:
        self._alone.controller.close()
        self._replicated.controller.close()


class _SavesBench:
    """Limits, others and ours, in one pair of processes."""

    def __init__(self, place: Place) -> None:
        model = Weights(place.settings)
        optimizer = adam_for(model)
        place.node_directory.mkdir(exist_ok=True)
        self._limits = Limits(place)
        self._rivals = Rivals(place, half_of(model, optimizer, place.rank))
        self._ours = OurSaves(place, TrainingState(model, optimizer), changes(model, optimizer))

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return self._limits.measures() | self._rivals.measures() | self._ours.measures()

    def close(self) -> None:
        self._ours.close()
        self._limits.close()


def make(place: Place) -> _SavesBench:
    return _SavesBench(place)
