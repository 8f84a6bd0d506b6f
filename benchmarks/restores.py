"""What a restore costs a new process: from its own node's copies, or from a peer because its node came empty.

One crew saves and leaves; each measured restore is a crew of its own. The limits are measured in the same processes.
Every rank gets the whole replicated state back, which is two shards. Two states of equal size: `in_place`, all of it
parameters, whose memory a new process has touched; and `adam`, where two thirds are moments that a new process does not
have yet, so that their memory is touched for the first time (which the first step would do otherwise).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.limits import Limits
from benchmarks.rank import Place, timed
from benchmarks.saves import Saver
from benchmarks.state import OTHER, SAVED, Weights, adam_for
from resilience import TrainingState

__all__ = ["make"]


class _RestoresBench:
    """Takes a save of a state, or restores it into one with other values."""

    def __init__(self, place: Place) -> None:
        self._place = place
        self._limits = Limits(place)
        self._in_place = place.options["state"] == "in_place"
        self._saver: Saver | None = None

    def measures(self) -> dict[str, Callable[..., dict[str, Any]]]:
        return {"prepare": self._prepare, "limits": self._measure_limits, "restore": self._restore}

    def _prepare(self) -> dict[str, Any]:
        """Leave one replicated save behind."""
        model = Weights(self._place.settings, value=SAVED, whole=self._in_place)
        state = TrainingState(model, None if self._in_place else adam_for(model))
        self._saver = self._make_saver(state)
        self._saver.save()
        self._saver.settle()
        return {}

    def _measure_limits(self, repeat: int) -> dict[str, Any]:
        """The median of a few of each."""
        measures = self._limits.measures()
        return {
            name: statistics.median(measures[name]()["seconds"] for _ in range(repeat))
            for name in ("memcpy", "hash", "gloo_one_way")
        }

    def _restore(self) -> dict[str, Any]:
        """The whole of `ResiliencyController.restore`, and what of it lies between stock-taking and the last copy."""
        model = Weights(self._place.settings, value=OTHER, whole=self._in_place)
        optimizer = None if self._in_place else torch.optim.Adam(model.parameters(), lr=1e-3)
        state = TrainingState(model, optimizer)
        whole_s = timed(lambda: setattr(self, "_saver", self._make_saver(state)))
        if self._saver is None or self._saver.resume is None:
            raise RuntimeError("nothing was restored")
        self._check(model, optimizer)
        resume = self._saver.resume
        self._saver.settle()  # a node that came empty gets its copies back meanwhile
        return {"seconds": resume.seconds, "whole": whole_s, "retrieved_bytes": resume.retrieved_bytes}

    def _check(self, model: Weights, optimizer: torch.optim.Adam | None) -> None:
        """What was saved is here: a spot check, since other tests prove the rest."""
        saved = Weights(self._place.settings, value=SAVED, whole=self._in_place)
        moments = adam_for(saved).state[saved.layers[-1]] if optimizer is not None else {}
        same = torch.equal(model.layers[-1], saved.layers[-1])
        if optimizer is not None:
            same = same and torch.equal(optimizer.state[model.layers[-1]]["exp_avg"], moments["exp_avg"])
        if not same:
            raise RuntimeError("what was restored is not what was saved")

    def _make_saver(self, state: TrainingState) -> Saver:
        return Saver(self._place, "restores", state, replication=True)

    def close(self) -> None:
        if self._saver is not None:
            self._saver.controller.close()
        self._limits.close()


def make(place: Place) -> _RestoresBench:
    return _RestoresBench(place)
