"""What is attacked on one of two ranks, each a node of its own: replication, and a restore from the peer."""

from __future__ import annotations

import os
import secrets
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch.distributed as dist

from resilience.errors import ResilienceError
from resilience.explain import explain_paths
from tests.core.training import RUN, Act, Plan, Training, World
from tests.faults.edge import Edge
from tests.faults.leaks import Held
from tests.faults.loop import Place, together

__all__ = ["PeerRestore", "Replication"]

NODES = ("a", "b")
OLD, NEW, STEPS = 3, 6, 12
BOUND_S = 4.0  # of a peer's silence
MEET_S = 60  # for the training's own collectives


@dataclass(frozen=True)
class _Pair:
    """`victim`: the rank whose calls fail. `references`: digests by rank of an undisturbed run."""

    fields: Mapping[str, Any]
    victim: int
    references: tuple[str, ...] = ()

    def ready(self, home: Place) -> Any:
        """With the digests of a run that nothing disturbs. In the process that loops."""

        def undisturbed(rank: int) -> dict[str, Any]:
            return {"digest": self._training(rank, home, kind=None, resiliency={"events": None}).run().digest}

        return replace(self, references=tuple(told["digest"] for told in self._on_both(home, undisturbed)))

    def prepare(self, place: Place) -> None:
        self._on_both(place, lambda rank: self._training(rank, place, steps=OLD, settle=(OLD,)).run() and None)

    def _training(self, rank: int, place: Place, seed: int = 0, **more: Any) -> Training:
        fields = {**self.fields, "steps": STEPS, "seed": seed, "every": 3, **more}
        bound = {"exchange_timeout_s": BOUND_S, **fields.pop("resiliency", {})}
        return Training(rank, Plan(place.memory, place.disk, NODES, resiliency=bound, **fields))

    def _on_both(self, place: Place, work: Callable[[int], dict[str, Any] | None]) -> list[dict[str, Any]]:
        """`work(rank)` in one gloo world; nobody may fail."""
        told = self._both(place, work)
        for rank, each in enumerate(told):
            assert not each["error"], f"rank {rank}: {each['error']}"
        return told

    def _both(self, place: Place, work: Callable[[int], dict[str, Any] | None]) -> list[dict[str, Any]]:
        os.makedirs(place.memory, exist_ok=True)
        meeting = f"{place.memory}.meeting-{secrets.token_hex(4)}"

        def one(rank: int) -> dict[str, Any] | None:
            os.environ.update({"RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "GLOO_SOCKET_IFNAME": "lo"})
            store = dist.FileStore(meeting, 2)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=MEET_S))
            dist.barrier()
            return work(rank)

        try:
            return together([lambda rank=rank: one(rank) for rank in range(2)])  # type: ignore[misc]
        finally:
            Path(meeting).unlink(missing_ok=True)

    def elected(self, place: Place) -> int | None:
        base = place.disk if self.fields["kind"] == "disk" else place.memory
        nodes = [Path(base, node) for node in NODES]
        found = explain_paths([node for node in nodes if node.exists()], None, None, RUN, 2)
        return None if found is None else found["iteration"]

    def go_on(self, place: Place, seed: int, resumes: set[int | None]) -> None:
        """Both ranks start again, resume where they must, end as an undisturbed run, and every copy is where it was
        meant to be."""

        def one(rank: int) -> None:
            held = Held(place.roots)
            ran = self._training(rank, place, seed, settle=(STEPS - 1,)).run()
            assert ran.resumed is not None, "it began afresh"
            assert ran.resumed.iteration in resumes, f"resumed from {ran.resumed.iteration}, expected {resumes}"
            assert ran.digest == self.references[rank], "the end is not that of an undisturbed run"
            leaks = [each for each in held.leaks() if any(root in each for root in place.roots)]
            assert not leaks, leaks

        self._on_both(place, one)
        self.protected(place)

    def protected(self, place: Place) -> None:
        world = World(Path(place.memory), Path(place.disk))
        kind = self.fields["kind"]
        assert world.copies("a", kind)[STEPS] == {0: "primary", 1: "replica"}
        assert world.copies("b", kind)[STEPS] == {1: "primary", 0: "replica"}


def _outcome(told: list[dict[str, Any]], victim: int, edge: Edge) -> dict[str, Any]:
    struck = told[victim].get("struck", "")
    return {"seen": told[victim].get("seen", []), "struck": struck, "killed": told[victim]["killed"]}


@dataclass(frozen=True)
class Replication(_Pair):
    """The save of iteration 6 from its snapshot until both nodes hold both shards, or know why not."""

    def attempt(self, place: Place, edge: Edge) -> dict[str, Any]:
        def begin(training: Training) -> None:
            edge.armed = training.rank == self.victim

        def end(training: Training) -> None:
            training.trainer.wait()
            training.trainer._controller.wait_idle(60.0)
            edge.armed = False
            dist.barrier()
            if training.rank == 0:
                now = self.elected(place)
                assert now in (OLD, NEW), f"{now} would be elected"

        def one(rank: int) -> dict[str, Any]:
            acts = (Act(OLD, begin), Act(NEW, end))
            ran = self._training(rank, place, 1, acts=acts, settle=(7, 8, 10, 11)).run()
            assert ran.digest == self.references[rank], "training was not left alone"
            return {"seen": edge.seen, "struck": edge.struck}

        told = self._both(place, one)
        outcome = _outcome(told, self.victim, edge)
        if outcome["killed"]:
            survivor = told[1 - self.victim]["error"]
            # or it waited for the dead one where the tests let ranks meet
            ended = ("PeerLostError", "RuntimeError", "it did not happen")
            assert any(how in survivor for how in ended), f"the survivor: {survivor}"
            return outcome
        for rank, each in enumerate(told):
            assert not each["error"], f"rank {rank} ({outcome['struck']}): {each['error']}"
        self.protected(place)
        self.go_on(place, 2, {STEPS})
        return outcome

    def afterwards(self, place: Place) -> None:
        found = self.elected(place)
        assert found in (OLD, NEW), f"{found} would be elected"
        self.go_on(place, 2, {found})


@dataclass(frozen=True)
class PeerRestore(_Pair):
    """A start after node b was lost: rank 1 fetches its shard from node a. Both ranks start, or both hear why not."""

    def prepare(self, place: Place) -> None:
        super().prepare(place)
        shutil.rmtree(Path(place.memory, "b"))
        shutil.rmtree(Path(place.disk, "b"), ignore_errors=True)

    def attempt(self, place: Place, edge: Edge) -> dict[str, Any]:
        def one(rank: int) -> dict[str, Any]:
            held = Held(place.roots)
            training = self._training(rank, place, 1)
            edge.armed = rank == self.victim
            refused = ""
            try:
                trainer = training.start()
            except ResilienceError as error:
                refused = f"{type(error).__name__}: {error}"
            else:
                assert trainer.iteration == OLD, f"resumed from {trainer.iteration}"
                trainer.close(failed=True)
            edge.armed = False
            leaks = [each for each in held.leaks() if any(root in each for root in place.roots)]
            assert not leaks, leaks
            return {"seen": edge.seen, "struck": edge.struck, "refused": refused}

        told = self._both(place, one)
        outcome = _outcome(told, self.victim, edge)
        if outcome["killed"]:
            return outcome
        for rank, each in enumerate(told):
            assert not each["error"], f"rank {rank} ({outcome['struck']}): {each['error']}"
        refusals = [bool(each["refused"]) for each in told]
        assert refusals[0] == refusals[1], f"one rank goes on alone: {told[0]['refused']}; {told[1]['refused']}"
        assert not refusals[0] or outcome["struck"], "nothing was wrong"
        self.afterwards(place)
        return outcome

    def afterwards(self, place: Place) -> None:
        found = self.elected(place)
        assert found == OLD, f"{found} would be elected"
        self.go_on(place, 2, {OLD})
