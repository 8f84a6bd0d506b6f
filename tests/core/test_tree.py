"""Agreements of more ranks than a group holds: the words of one group, and an end for all when somebody dies."""

from __future__ import annotations

import functools
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

import resilience.replication.gloo
from resilience.errors import DivergedRanksError, PeerLostError
from resilience.planning.control import ControlReport, merge
from resilience.planning.fan_in import connections, fan_in
from resilience.replication.conversation import Conversation
from resilience.replication.gloo import TorchCommunicator
from resilience.replication.tree import Stage, Tree
from tests.core.training import Training, World, reference
from tests.ranks import killed, run_ranks, values

WIDEST = 2
NODES = ["a", "a", "b", "b", "c"]  # control: pairs on a and b; their leaders and c's rank in two more levels


def agree_on_everything(rank: int) -> dict[str, Any]:
    communicator = TorchCommunicator(20.0, WIDEST)
    everybody = communicator.agreements("all")
    others = communicator.agreements("others", [1, 2, 3, 4]) if rank else None
    seen: dict[str, Any] = {
        "gathered": everybody.gather(f"payload {rank}".encode() * rank),
        "nothing": everybody.gather(b""),
        "collected": everybody.collect(f"payload {rank}".encode() * rank),
        "nothing collected": everybody.collect(b""),
        "told": everybody.broadcast(b"from the leader" if rank == 0 else None),
        "told nothing": everybody.broadcast(b"" if rank == 0 else None),
        "highest": everybody.maximum([rank, -rank, (1 << 62) - rank, -(1 << 62)]),
        "others": None if others is None else (others.rank, others.size, others.gather(bytes([rank]))),
    }
    everybody.barrier()
    control = communicator.control("control", NODES)
    seen["control"] = []
    for turn in range(5):
        control.start(functools.partial(list, [turn * 10 + rank, -rank]))
        time.sleep(0.01 * rank)
        seen["control"].append(control.result())
    assert control.result() == seen["control"][-1]
    everybody.barrier()
    control.close()
    everybody.close()
    communicator.close()
    return seen


def test_a_tree_gives_every_member_what_one_group_would() -> None:
    for rank, seen in enumerate(values(run_ranks(5, agree_on_everything))):
        assert seen["gathered"] == [f"payload {each}".encode() * each for each in range(5)]
        assert seen["nothing"] == [b""] * 5
        assert seen["collected"] == ([] if rank else seen["gathered"])
        assert seen["nothing collected"] == ([] if rank else seen["nothing"])
        assert (seen["told"], seen["told nothing"]) == (b"from the leader", b"")
        assert seen["highest"] == [4, 0, 1 << 62, -(1 << 62)]
        assert seen["control"] == [merge([[turn * 10 + each, -each] for each in range(5)]) for turn in range(5)]
        if rank:
            assert seen["others"] == (rank - 1, 4, [bytes([each]) for each in range(1, 5)])


def speak_of_different_iterations(rank: int) -> str:
    communicator = TorchCommunicator(20.0, WIDEST)
    conversation = Conversation(communicator.control("control", NODES))
    heard = []
    for iteration in (1, 2, 3 + rank // 4):
        conversation.speak(ControlReport(iteration), [])
        try:
            agreed = conversation.hear()
            heard.append(agreed is not None and agreed[0].iteration == iteration)
        except DivergedRanksError as error:
            return f"{heard} {error}"
    return f"{heard} nothing was noticed"


def test_ranks_at_different_iterations_raise_the_same_error_through_a_tree() -> None:
    (message,) = set(values(run_ranks(5, speak_of_different_iterations)))
    assert message.startswith("[True, True] ")
    assert "nothing was noticed" not in message


def lose_one(rank: int, victim: int, how: str, what: str) -> str:
    """All but the victim, which says nothing any more, wait for each other until they know."""
    communicator = TorchCommunicator(2.0, WIDEST)
    everybody = communicator.agreements("all")
    control = communicator.control("control", NODES)
    control.start(lambda: [rank])
    assert control.result() == [4]
    pids = [int(pid) for pid in everybody.gather(str(os.getpid()).encode())]
    dist.barrier()
    if rank == victim:
        os.kill(os.getpid(), signal.SIGKILL if how == "killed" else signal.SIGSTOP)
    acts: dict[str, Callable[[], Any]] = {
        "control": lambda: (control.start(lambda: [rank]), control.result()),
        "maximum": lambda: everybody.maximum([rank]),
        "gather": lambda: everybody.gather(b"x"),
        "collect": lambda: everybody.collect(b"x"),
    }
    with pytest.raises(PeerLostError) as caught:
        acts[what]()
    with pytest.raises(PeerLostError):
        acts[what]()
    control.close()
    everybody.close()
    communicator.close()
    if dist.distributed_c10d._get_default_store().add("survivors", 1) == len(pids) - 1 and how == "stopped":
        os.kill(pids[victim], signal.SIGKILL)
    return str(caught.value)


@pytest.mark.parametrize("what", ["control", "maximum", "gather", "collect"])
@pytest.mark.parametrize(("victim", "how"), [(0, "killed"), (1, "killed"), (2, "stopped"), (4, "killed")])
def test_when_one_rank_is_lost_every_other_one_hears_of_it(victim: int, how: str, what: str) -> None:
    outcomes = run_ranks(5, lose_one, victim, how, what)
    for rank, outcome in enumerate(outcomes):
        if rank == victim:
            assert killed(outcome)
        else:
            assert not outcome.error, f"rank {rank}: {outcome.trace or outcome.message}"
            assert "lost" in outcome.value or "gone" in outcome.value or "no sign of life" in outcome.value


class _Broken:
    """A group whose peer is lost; counts what is still asked of it."""

    rank, size, asked = 0, 2, 0

    def maximum(self, values: Any) -> list[int]:
        self.asked += 1
        raise PeerLostError("a peer is gone", rank=7)

    def gather(self, payload: bytes) -> list[bytes]:
        self.asked += 1
        raise PeerLostError("a peer is gone", rank=7)

    collect = gather


class _Heard:
    """A group that works: what was said in it, by this rank."""

    def __init__(self) -> None:
        self.said: list[Any] = []

    def maximum(self, values: Any) -> list[int]:
        self.said.append(list(values))
        return list(values)

    def gather(self, payload: bytes) -> list[bytes]:
        self.said.append(payload)
        return [payload, b"+"]

    collect = gather

    def broadcast(self, payload: bytes | None) -> bytes:
        self.said.append(payload)
        return payload or b""


@pytest.mark.parametrize("what", ["maximum", "gather", "collect"])
def test_a_leader_that_loses_somebody_hands_that_on_up_and_down_and_then_says_no_more(what: str) -> None:
    lowest, broken, top = _Heard(), _Broken(), _Heard()
    groups: list[Any] = [lowest, broken, top]
    tree = Tree("a tree", 0, 8, [Stage(group, True, group is top) for group in groups])
    act: dict[str, Callable[[], Any]] = {
        "maximum": lambda: tree.maximum([3]),
        "gather": lambda: tree.gather(b"word"),
        "collect": lambda: tree.collect(b"word"),
    }
    for _ in range(2):
        with pytest.raises(PeerLostError) as caught:
            act[what]()
        assert caught.value.rank == 7
    word: Any = [7 + 2, 3] if what == "maximum" else b"-7"
    # what was collected went no further than the first, so that the others of the last group are told besides
    assert top.said == ([word, word] if what == "collect" else [word])
    assert lowest.said[1:] == [word], "those below it hear who was lost"
    assert len(lowest.said) == 2
    assert broken.asked == 1


def count_connections(rank: int, widest: int) -> int:
    """Sockets that a control exchange costs this rank, on nodes of four."""
    communicator = TorchCommunicator(30.0, widest)
    before = _sockets()
    control = communicator.control("control", [f"n{each // 4}" for each in range(dist.get_world_size())])
    control.start(lambda: [rank])
    control.result()
    counted = _sockets() - before
    dist.barrier()
    control.close()
    communicator.close()
    return counted


def _sockets() -> int:
    links = [Path("/proc/self/fd", fd) for fd in os.listdir("/proc/self/fd")]
    return sum(os.readlink(link).startswith("socket:") for link in links if link.is_symlink())


def test_a_rank_that_leads_nothing_is_connected_to_its_own_node_only() -> None:
    flat = values(run_ranks(8, count_connections, 8))
    tree = values(run_ranks(8, count_connections, 4))
    levels = fan_in(range(8), ["n0"] * 4 + ["n1"] * 4, 4)
    assert [connections(levels, rank) for rank in range(8)] == [4, 3, 3, 3, 4, 3, 3, 3]
    for rank in (1, 2, 3, 5, 6, 7):
        assert flat[rank] - tree[rank] == 7 - 3


def narrow_groups(training: Training) -> None:
    """All that the job agrees on goes through trees."""
    narrow: Any = functools.partial(TorchCommunicator, widest=WIDEST)
    resilience.replication.gloo.TorchCommunicator = narrow  # type: ignore[misc]


def test_training_through_trees_ends_in_the_same_bits_with_the_same_copies(world: World) -> None:
    plan = world.plan("a", "a", "b", "b", save=True, make=narrow_groups, resiliency={"keep_after_success": True})
    results = values(world.run(plan))
    assert tuple(ran.digest for ran in results) == reference(4)
    assert results[0].status["failed_saves"] == 0
    assert world.copies("a")[12] == {0: "primary", 1: "primary", 2: "replica", 3: "replica"}
    assert (world.disk / "save" / "iter_0000012").is_dir()
