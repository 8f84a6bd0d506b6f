"""Overlapped snapshots on the device: the state at the boundary, bit for bit, whatever the streams do meanwhile."""

from __future__ import annotations

import gc
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from resilience.snapshot import copying as copying_module
from resilience.snapshot.device import SideStreams
from tests.cuda.jobs import OPTIMIZERS, Job

STEPS = 8


def slow_copies(monkeypatch: pytest.MonkeyPatch, cycles: int = 100_000_000) -> None:
    """Each overlapped copy begins late on its stream: whoever does not wait for it writes first."""
    begin = SideStreams.begin

    def late(self: SideStreams, devices: Any) -> None:
        begin(self, devices)
        for device in devices:
            with self.on(device):
                torch.cuda._sleep(cycles)

    monkeypatch.setattr(SideStreams, "begin", late)


def crash_in(job: Job, iteration: int) -> None:
    with job.trainer as trainer:
        for number in trainer.iterations(STEPS):
            if number == iteration:
                trainer.wait()
                raise RuntimeError("a crash")
            job.step(number)
            job.digests[number] = job.digest()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("mode", ["eager", "overlapped"])
def test_a_resumed_job_has_the_bits_of_the_boundary_and_ends_in_those_of_an_undisturbed_one(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch, optimizer: str, mode: str
) -> None:
    undisturbed = Job(memory_mount / "undisturbed", optimizer=optimizer, mode="eager", every=1000)
    undisturbed.run(STEPS)
    if mode == "overlapped":
        slow_copies(monkeypatch)
    first = Job(memory_mount / "job", optimizer=optimizer, mode=mode)
    with pytest.raises(RuntimeError, match="a crash"):
        crash_in(first, 6)
    assert first.trainer.status()["failed_saves"] == 0
    second = Job(memory_mount / "job", optimizer=optimizer, mode=mode, seed=1)
    resumed = second.trainer.resumed_from
    assert resumed is not None
    assert resumed.iteration == 5
    assert second.digest() == first.digests[5]
    second.run(STEPS)
    assert second.end == undisturbed.end


def test_gradients_are_accumulated_while_the_copy_goes_on(memory_mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow_copies(monkeypatch)
    job = Job(memory_mount, accumulate=4)
    job.run(5)
    resumed = Job(memory_mount, accumulate=4, seed=1)
    assert resumed.trainer.resumed_from is not None
    assert resumed.digest() == job.digests[resumed.trainer.resumed_from.iteration]
    resumed.trainer.close()


def test_the_host_goes_on_at_once_and_the_step_waits_on_the_device(
    memory_mount: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    job = Job(memory_mount, every=1)
    with job.trainer as trainer:
        batches = trainer.iterations(6)
        for _ in range(3):  # arenas are made, the strict witness was heard
            job.step(next(batches))
        trainer.wait()
        slow_copies(monkeypatch, 3_000_000_000)  # over a second
        number = next(batches)  # the boundary: a copy begins
        done = torch.cuda.Event()
        began = time.perf_counter()
        job.step(number)
        done.record()
        enqueued_s = time.perf_counter() - began
        assert not done.query(), "the step's kernels wait for the copy"
        done.synchronize()
        waited_s = time.perf_counter() - began
        assert enqueued_s < waited_s / 4, "and the host does not"
        assert trainer._controller.status()["failed_saves"] == 0


def test_a_write_that_no_hook_sees_fails_the_save_and_ends_overlapping(memory_mount: Path) -> None:
    told: list[dict[str, Any]] = []
    job = Job(memory_mount, every=1)
    emit = job.trainer._controller.events.emit
    job.trainer._controller.events.emit = lambda event, **fields: (told.append({"event": event, **fields}),
                                                                  emit(event, **fields))  # fmt: skip
    with job.trainer as trainer:
        for number in trainer.iterations(4):
            if number == 2:  # the first copy, of iteration 1, goes on
                job.model.halved.data.add_(1)
            job.step(number)
        trainer.wait()
        assert trainer.status()["failed_saves"] == 1
        assert [each["iteration"] for each in trainer.status()["saves"]] == [3, 4]
    words = [str(each.get("what")) + str(each.get("error")) for each in told]
    assert any("model/0/halved changed between" in each for each in words), words
    assert any("eager from now on" in each for each in words), words


def test_a_captured_step_ends_overlapping_in_words(memory_mount: Path) -> None:
    told: list[str] = []
    job = Job(memory_mount, optimizer="capturable", every=1)
    controller = job.trainer._controller
    emit = controller.events.emit
    controller.events.emit = lambda event, **fields: (told.append(str(fields.get("what"))), emit(event, **fields))
    static = torch.randn(64, 1024, device="cuda")
    with job.trainer as trainer:
        batches = trainer.iterations(7)
        for _ in range(3):
            job.step(next(batches))
        trainer.wait()
        controller.wait_idle(30)  # registering pages in the background would spoil the capture
        gc.collect()
        graph = torch.cuda.CUDAGraph()
        job.optimizer.zero_grad(set_to_none=True)
        with torch.cuda.graph(graph):
            job.model(static).backward()
            job.optimizer.step()
        digests = {}
        for number in batches:
            graph.replay()
            trainer._stepped = True  # a replay calls no hook: whoever replays owns the loop
            digests[number] = job.digest()
        trainer.wait()
        assert trainer.status()["failed_saves"] == 0
    assert any("captured in a graph" in each for each in told), told
    resumed = Job(memory_mount, optimizer="capturable", seed=1)
    assert resumed.digest() == digests[7]
    resumed.trainer.close()


def test_an_error_while_it_crosses_fails_the_save(memory_mount: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job, cross = Job(memory_mount, every=1), copying_module._cross

    def broken_in_the_lane(*given: Any) -> None:
        if threading.current_thread().name == "resilience-copy":
            raise RuntimeError("CUDA error: something")
        cross(*given)

    with job.trainer as trainer:
        for number in trainer.iterations(5):
            if number == 2:
                trainer.wait()
                monkeypatch.setattr(copying_module, "_cross", broken_in_the_lane)
            if number == 3:  # the boundary of iteration 2 has come
                trainer._controller.wait_idle(20)
                monkeypatch.undo()
            job.step(number)
        trainer.wait()
        assert trainer.status()["failed_saves"] == 1
        assert [each["iteration"] for each in trainer.status()["saves"]] == [4, 5]
