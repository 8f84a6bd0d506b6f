"""The shipped job scripts on a real cluster: nodes die, time runs out, and the run goes on from where it was."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from resilience.observe.events import read_events
from tests.slurm.cluster import Cluster, cluster, missing, wait_until

pytestmark = [pytest.mark.slurm, pytest.mark.long, pytest.mark.timeout(900)]
WAIT_S = 240.0  # for anything that is sure to come: starts of torch on a busy machine, ping rounds of Slurm


@pytest.fixture(scope="module")
def slurm() -> Iterator[Cluster]:
    if why := missing():
        pytest.skip(why)
    root = Path(tempfile.mkdtemp(prefix="resilience-slurm-", dir="/tmp"))
    try:
        with cluster(root) as made:
            yield made
    finally:
        shutil.rmtree(root, ignore_errors=True)


@dataclass
class Job:
    """One run: its directories, and what is asked of it."""

    slurm: Cluster
    repository: Path
    root: Path
    memory: Path
    number: int = 0

    @property
    def variables(self) -> dict[str, str]:
        search = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        return {
            "PATH": search, "PYTHONPATH": str(self.repository), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo",
            "HEAD": "127.0.0.1", "HEAD_ADDR": "127.0.0.1", "LOCAL_ADDR": "127.0.0.1",
            "SAVE": str(self.root / "save"), "LOCAL": str(self.memory), "PAYLOAD_PACE_S": "0.3",
            "RESILIENCE_CHECKPOINT__SAVE_INTERVAL": "1000",
            "RESILIENCE_CHECKPOINT__NON_PERSISTENT_CKPT_TYPE": "local",
            "RESILIENCE_CHECKPOINT__NON_PERSISTENT_SAVE_INTERVAL": "5",
            "RESILIENCE_RESILIENCY__EVENTS": str(self.root / "events"),
        }  # fmt: skip

    def submit(self, script: str, *options: str, iterations: int, **variables: str) -> None:
        (self.root / "events").mkdir(exist_ok=True)
        environment = {**self.slurm.env, **self.variables, **variables}
        output = self.root / "out.txt"
        command = ["sbatch", "--parsable", "--export=ALL", f"--output={output}", *options]
        command += [str(self.repository / "slurm" / script), str(self.repository / "tests" / "slurm" / "payload.py")]
        command += ["--train-iters", str(iterations), "--batch", "2"]
        told = subprocess.run(
            command, env=environment, cwd=self.repository, capture_output=True, text=True, timeout=60, check=True
        )
        self.number = int(told.stdout)

    def events(self, name: str, **wanted: Any) -> list[dict[str, Any]]:
        found = [each for each in read_events([self.root / "events"]) if each["event"] == name]
        return [each for each in found if all(each.get(key) == value for key, value in wanted.items())]

    def protected(self, iteration: int) -> bool:
        return any(each["iteration"] >= iteration for each in self.events("protected"))

    def nodes(self) -> list[str]:
        named = self.slurm.job(self.number)["NodeList"]
        return self.slurm.ask("scontrol", "show", "hostnames", named).split()

    def other_node(self) -> str:
        """One on which the batch script does not run."""
        head = self.slurm.job(self.number)["BatchHost"]
        return next(node for node in self.nodes() if node != head)

    def lose(self, node: str) -> None:
        self.slurm.lose(node)
        shutil.rmtree(self.memory / node, ignore_errors=True)

    def hurry(self) -> None:
        """Slurm lets a requeued job wait for two minutes; a few seconds do.

        None do not: a node on which the job ended in the same second refuses to start it ("Job credential revoked").
        """
        wait_until(lambda: self.slurm.state(self.number) == "PENDING", WAIT_S, "the job is back in the queue")
        self.slurm.ask("scontrol", "update", f"jobid={self.number}", "StartTime=now+5seconds")

    def finished(self) -> None:
        """Until Slurm calls it completed."""
        ended = ("COMPLETED", "FAILED", "CANCELLED", "NODE_FAIL", "TIMEOUT")
        wait_until(lambda: self.slurm.state(self.number) in ended, WAIT_S, f"job {self.number} ends")
        assert self.slurm.state(self.number) == "COMPLETED", self.output()

    def output(self) -> str:
        return (self.root / "out.txt").read_text(errors="replace")


@pytest.fixture
def job(slurm: Cluster, repository: Path, tmp_path: Path, memory_mount: Path) -> Iterator[Job]:
    tmp_path.chmod(0o755)
    made = Job(slurm, repository, tmp_path, memory_mount)
    try:
        yield made
    finally:
        if made.number:
            subprocess.run(["scancel", str(made.number)], env=slurm.env, capture_output=True, timeout=60)
        for node in slurm.nodes:  # a machine that was lost is repaired
            if slurm.processes[node].poll() is not None:
                slurm.start_node(node)
                subprocess.run(
                    ["scontrol", "update", f"nodename={node}", "state=resume"], env=slurm.env, capture_output=True,
                    timeout=60,
                )  # fmt: skip
        wait_until(lambda: all(slurm.node_state(node) == "idle" for node in slurm.nodes), WAIT_S, "all nodes are idle")


REPLICATED = {"RESILIENCE_CHECKPOINT__REPLICATION": "true"}


def test_a_lost_node_puts_the_job_back_into_the_queue_and_it_resumes_from_replicas(job: Job) -> None:
    # three of four nodes, so that the job gets those back that are left: on other ones there is nothing to resume from
    job.submit("requeue.sbatch", "--nodes=3", iterations=120, **REPLICATED)
    wait_until(lambda: job.protected(10), WAIT_S, "a save is protected")
    lost = job.other_node()
    job.lose(lost)
    wait_until(lambda: "down" in job.slurm.node_state(lost), WAIT_S, f"{lost} is down")
    job.hurry()
    job.finished()
    told = job.slurm.job(job.number)
    assert told["Restarts"] == "1"
    assert lost not in job.nodes()
    (resumed,) = job.events("resume", rank=0)
    assert (resumed["tier"], resumed["iteration"] >= 10) == ("local", True)
    assert resumed["retrieved_bytes"] > 0, "from the copies of the node that is left"


@pytest.mark.parametrize("form", ["B:USR2@60", "USR2@60"])
def test_before_the_time_limit_the_job_saves_stops_and_goes_back_into_the_queue(job: Job, form: str) -> None:
    job.submit("requeue.sbatch", "--nodes=1", "--time=3", f"--signal={form}", iterations=100_000)
    wait_until(lambda: job.events("stop_requested"), WAIT_S, "the signal reaches a worker")
    job.hurry()
    assert job.slurm.job(job.number)["Restarts"] == "1"
    outcome = subprocess.run(
        [sys.executable, "-m", "resilience.cli", "outcome", "--save", str(job.root / "save")],
        cwd=job.repository, capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert outcome.returncode in (75, 3), "it was stopped on request, or is under way again"
    wait_until(lambda: job.events("resume", rank=0), WAIT_S, "it goes on")
    assert job.events("resume", rank=0)[0]["iteration"] == job.events("stopped", rank=0)[0]["iteration"]


def test_a_hot_spare_takes_a_lost_node_s_place_and_the_job_goes_on(job: Job) -> None:
    job.submit("spares.sbatch", "--nodes=3", iterations=120, SPARES="1", **REPLICATED)
    wait_until(lambda: job.protected(10), WAIT_S, "a save is protected")
    training = {each["node"] for each in job.events("protected")}
    head = job.slurm.job(job.number)["BatchHost"]
    (lost,) = training - {head}
    job.lose(lost)
    job.finished()
    assert job.slurm.job(job.number)["Restarts"] == "0", "the job itself was not started again"
    (resumed,) = job.events("resume", rank=0)
    assert resumed["tier"] == "local"
    assert resumed["retrieved_bytes"] > 0
    assert len({each["node"] for each in job.events("protected")}) == 3, "the spare trained"
