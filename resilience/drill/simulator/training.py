"""The job that runs on a simulated rank: a tiny state that knows its whole past, driven as a user's own loop would be.

What a step adds depends on the start, the iteration and, for a part of it, the rank: two starts that pass the same
iteration are in different states there, so that a state tells exactly which save it came from.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

import torch
import xxhash

from resilience.controller import ResiliencyController
from resilience.reports import Resume
from resilience.state.training_state import TrainingState

__all__ = ["Observer", "SimController", "Training"]


class Observer(Protocol):
    """Who is told what this rank does; see `truth`."""

    def told(self, rank: int, event: str, fields: Mapping[str, Any]) -> None: ...
    def loading(self, rank: int) -> None: ...
    def resumed(self, rank: int, attempt: str, resume: Resume | None, iteration: int, digest: str) -> None: ...
    def boundary(self, rank: int, attempt: str, iteration: int, digest: str) -> None: ...


class SimController(ResiliencyController):
    """The real controller; its events are heard by the simulator instead of being written and said."""

    hear: Callable[[str, Mapping[str, Any]], None] = staticmethod(lambda event, fields: None)

    def tell(self, event: str, **fields: Any) -> None:
        self.hear(event, fields)


class _Model(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(256, 16), requires_grad=False)
        self.base = torch.nn.Parameter(torch.ones(256, 16), requires_grad=False)
        self.mean: torch.Tensor
        self.register_buffer("mean", torch.zeros(16))


_THAWS_EVERY = 24  # iterations


def _change(weight: torch.Tensor, base: torch.Tensor, iteration: int, all_rows: float, one_row: float) -> None:
    """`base` is as it was in nearly all steps, so that it need not travel."""
    weight.mul_(0.5).add_(all_rows)
    weight[iteration % 256] += one_row
    if iteration % _THAWS_EVERY == 0:
        base[iteration % 256] += one_row


class _Steps(torch.optim.Optimizer):
    """Changes the weights as it is told."""

    def __init__(self, parameters: Iterable[torch.Tensor]) -> None:
        super().__init__(list(parameters), {})

    def step(self, change: Any = None) -> None:  # type: ignore[override]
        with torch.no_grad():
            _change(*self.param_groups[0]["params"], *change)

    def watch(self, before: Callable[[], None]) -> Any:
        return self.register_step_pre_hook(lambda *_: before())


class _Own:
    """What this rank alone has: it tells rank, start and all iterations so far."""

    def __init__(self, rank: int, loading: Callable[[], None]) -> None:
        self.past = torch.full((2048,), float(rank), dtype=torch.float64)
        self.samples = 0
        self._loading = loading

    def state_dict(self) -> dict[str, Any]:
        return {"past": self.past, "samples": self.samples}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._loading()
        self.past = state["past"].clone()
        self.samples = state["samples"]


class Training:
    """The training state of one rank in one start."""

    def __init__(
        self, rank: int, salt: str, observer: Observer, healthy: Callable[[], bool], *, overlapped: bool = False
    ) -> None:
        """`overlapped`: snapshots are, and the weights change in the step of an optimizer."""
        self._rank = rank
        self._salt = salt
        self._observer = observer
        self._model = _Model()
        self._own = _Own(rank, lambda: observer.loading(rank))
        self._optimizer = _Steps(self._model.parameters()) if overlapped else None
        self.state = TrainingState(self._model, self._optimizer, extra_state={"own": self._own}, healthy=healthy)

    def step(self, iteration: int) -> None:
        shared = random.Random(f"{self._salt}/{iteration}")
        change = (iteration, shared.random(), shared.random())
        with torch.no_grad():
            if self._optimizer is None:
                _change(self._model.weight, self._model.base, *change)
            self._model.mean.mul_(0.9).add_(shared.random())
            self._own.past.mul_(0.5).add_(random.Random(f"{self._salt}/{iteration}/{self._rank}").random())
        self._own.samples += 1 + self._rank
        if self._optimizer is not None:
            self._optimizer.step(change)

    def digest(self) -> str:
        hasher = xxhash.xxh3_128()
        model = self._model
        for tensor in (model.weight.detach(), model.base.detach(), model.mean, self._own.past):
            hasher.update(tensor.numpy().tobytes())
        hasher.update(str(self._own.samples).encode())
        return hasher.hexdigest()

    def run(
        self, controller: SimController, steps: int, step_s: Callable[[], float], phase: Callable[[str], None]
    ) -> None:
        """Resume, train to the end, finish. Raises what the controller raises."""
        rank, observer = self._rank, self._observer
        controller.hear = lambda event, fields: observer.told(rank, event, fields)
        if self._optimizer is not None:  # its own: a hook on all would hear of the other ranks' steps
            controller.watch_steps = self._optimizer.watch
        phase("start")
        resume = controller.restore()
        observer.resumed(rank, controller.events.attempt, resume, controller.iteration, self.digest())
        phase("train")
        while controller.iteration < steps:
            iteration = controller.iteration + 1
            at_once = self._optimizer is not None and iteration % 2 == 1  # nothing else runs before the weights change
            if not at_once:
                controller.clock.sleep(step_s())
            self.step(iteration)
            if at_once:
                controller.clock.sleep(step_s())
            observer.boundary(rank, controller.events.attempt, iteration, self.digest())
            controller.after_step(iteration, last=iteration == steps)
        phase("finish")
        controller.finish()
