"""Groups over gloo between real processes: agreements, the control exchange, links; what a peer's end does to them."""

from __future__ import annotations

import os
import signal
import threading
import time
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from resilience.errors import PeerLostError
from resilience.replication import liveness
from resilience.replication.gloo import TorchCommunicator
from tests.ranks import TIMEOUT_S, killed, run_ranks, values


def agree_on_everything(rank: int) -> list[Any]:
    communicator = TorchCommunicator(10.0)
    everybody = communicator.agreements("all")
    seen: list[Any] = [
        everybody.gather(f"payload {rank}".encode() * rank),
        everybody.gather(b""),
        everybody.broadcast(b"from the leader" if rank == 0 else None),
        everybody.broadcast(b"" if rank == 0 else None),
        everybody.maximum([rank, -rank, (1 << 62) - rank, -(1 << 62)]),
    ]
    everybody.barrier()
    if rank > 0:  # a group over some: nobody else need know
        some = communicator.agreements("some", [1, 2])
        seen.append((some.rank, some.size, some.maximum([10 * rank])))
    alone = communicator.agreements("alone", [rank])
    seen.append((alone.size, alone.gather(b"mine"), alone.maximum([rank])))
    control = communicator.control("control", ["a", "b", "c"])
    for turn in range(3):
        control.start(partial(list, [turn * 10 + rank, -rank]))
        time.sleep(0.01 * rank)
        seen.append(control.result())
    everybody.barrier()
    for group in (everybody, control):
        group.close()
    communicator.close()
    return seen


def fail_in_an_exchange(rank: int) -> list[str]:
    communicator = TorchCommunicator(10.0)
    control = communicator.control("control", ["a", "b"])
    threads: list[str] = []

    def say() -> list[int]:
        threads.append(threading.current_thread().name)
        return [rank]

    def refuse(merged: list[int]) -> None:
        raise ValueError(f"{merged} cannot be read")

    control.start(say, refuse)
    with pytest.raises(ValueError, match=r"\[1\] cannot be read"):
        control.result()
    control.start(say)
    said = [str(control.result()), *threads]
    dist.barrier()
    control.close()
    communicator.close()
    return said


def test_what_cannot_be_read_of_an_exchange_is_raised_where_it_is_heard_and_the_next_one_goes_on() -> None:
    for said in values(run_ranks(2, fail_in_an_exchange)):
        assert said == ["[1]", "resilience-control", "resilience-control"]


def test_agreements_give_every_member_the_same() -> None:
    ranks = values(run_ranks(3, agree_on_everything))
    for rank, seen in enumerate(ranks):
        assert seen[0] == [b"", b"payload 1", b"payload 2payload 2"]
        assert seen[1:5] == [[b""] * 3, b"from the leader", b"", [2, 0, 1 << 62, -(1 << 62)]]
        if rank:
            assert seen[5] == (rank - 1, 2, [20])
        assert seen[-4] == (1, [b"mine"], [rank])
        assert seen[-3:] == [[2, 0], [12, 0], [22, 0]]


def pass_bytes_around(rank: int) -> bool:
    """Every member sends to every other, several messages of several tags, received out of turn."""
    communicator = TorchCommunicator(10.0)
    members = (0, 2, 3) if rank != 1 else (1,)
    if len(members) == 1:
        return True
    links = communicator.links("clique", members)
    peers = [peer for peer in members if peer != rank]
    incoming = {
        (peer, tag): [torch.zeros(5000, dtype=torch.uint8) for _ in range(3)] for peer in peers for tag in (1, 2)
    }
    receives = {key: [links.receive(each, key[0], key[1]) for each in buffers] for key, buffers in incoming.items()}
    sends = [
        links.send(torch.full((5000,), 10 * rank + 3 * tag + turn, dtype=torch.uint8), peer, tag)
        for turn in range(3)
        for tag in (1, 2)
        for peer in peers
    ]
    for (peer, tag), transfers in reversed(receives.items()):
        for turn, transfer in enumerate(transfers):
            links.wait(transfer)
            assert incoming[peer, tag][turn].unique().tolist() == [10 * peer + 3 * tag + turn]
    for transfer in sends:
        links.wait(transfer)
    links.close()
    communicator.close()
    return True


def test_links_carry_messages_in_order_by_peer_and_tag() -> None:
    assert values(run_ranks(4, pass_bytes_around)) == [True] * 4


def close_at_once_after_the_last_byte(rank: int) -> int:
    """The receiver closes as soon as it has everything; the sender is slow to look at what it sent."""
    communicator = TorchCommunicator(10.0)
    for turn in range(30):
        links = communicator.links(f"turn{turn}", (0, 1))
        if rank == 0:
            sent = [links.send(torch.full((50_000,), turn, dtype=torch.uint8), 1, 1) for _ in range(8)]
            time.sleep(0.002 * (turn % 3))
            for transfer in sent:
                links.wait(transfer)
        else:
            buffers = [torch.zeros(50_000, dtype=torch.uint8) for _ in range(8)]
            for transfer in [links.receive(each, 0, 1) for each in buffers]:
                links.wait(transfer)
            assert all(each.unique().tolist() == [turn] for each in buffers)
        links.close(linger_s=0.0)
    communicator.close()
    return turn + 1


def test_a_peer_that_closes_in_peace_fails_nothing_that_is_on_its_way() -> None:
    assert values(run_ranks(2, close_at_once_after_the_last_byte)) == [30, 30]


def close_long_before_the_peer(rank: int) -> list[str]:
    """The threads of links that are left when all is closed."""
    communicator = TorchCommunicator(10.0)
    links = communicator.links("one", (0, 1))
    dist.barrier()
    time.sleep(0.5 * rank)
    links.close(linger_s=0.0)
    communicator.close()
    return [each.name for each in threading.enumerate() if each.name.startswith("resilience-")]


def test_nothing_closes_before_the_threads_of_closed_links_have_ended() -> None:
    """One that is still in gloo when the interpreter ends is SIGABRT."""
    assert values(run_ranks(2, close_long_before_the_peer)) == [[], []]


BOUND_S_OF_ONE_WHO_DIES = 100.0


def wait_for_a_message(rank: int, how: str) -> float:
    """Rank 0 waits; rank 1 ends in one way or another. How long rank 0 waited."""
    communicator = TorchCommunicator(BOUND_S_OF_ONE_WHO_DIES)
    links = communicator.links("clique", (0, 1))
    dist.barrier()
    if rank == 1:
        time.sleep(0.2)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        links.close(failed=True)
        dist.barrier()  # its process lives on
        return 0.0
    began = time.monotonic()
    content = torch.zeros(64 << 20, dtype=torch.uint8)
    with pytest.raises(PeerLostError) as caught:
        links.wait(links.receive(content, 1, 1))
    waited = time.monotonic() - began
    assert caught.value.rank == 1
    with pytest.raises(PeerLostError):
        links.send(content, 1, 1)
    links.close()
    if how == "gives up":
        dist.barrier()
    return waited


@pytest.mark.parametrize("how", ["killed", "gives up"])
def test_a_peer_that_dies_or_gives_up_is_noticed_at_once(how: str) -> None:
    first, second = run_ranks(2, wait_for_a_message, how)
    assert not first.error, first.trace
    assert first.value < BOUND_S_OF_ONE_WHO_DIES, "long before its bound"
    assert killed(second) or not second.error


FEW_BOUNDS = 2  # instead of ten, where a test sees somebody given up that lives
BOUND_S = 2.0  # of silence: a heart that beats is seen within it, also where the machine is busy with other things


def wait_in_vain(rank: int, answers_after_s: float) -> tuple[float, str, int | None]:
    """Rank 1 lives, and its lane answers late or never."""
    if not answers_after_s:
        liveness.STALL_BOUNDS = FEW_BOUNDS  # type: ignore[misc]
    communicator = TorchCommunicator(BOUND_S)
    links = communicator.links("clique", (0, 1))
    dist.barrier()
    began = time.monotonic()
    message, lost = "", None
    if rank == 0:
        try:
            links.wait(links.receive(torch.zeros(8), 1, 1))
        except PeerLostError as error:
            message, lost = str(error), error.rank
    elif answers_after_s:
        time.sleep(answers_after_s)
        links.wait(links.send(torch.ones(8), 0, 1))
    waited = time.monotonic() - began
    dist.barrier()
    links.close(failed=True)
    communicator.close()
    return waited, message, lost


def test_a_peer_that_lives_but_moves_nothing_is_given_up_in_the_end() -> None:
    (waited, message, lost), _ = values(run_ranks(2, wait_in_vain, 0.0))
    assert waited >= FEW_BOUNDS * BOUND_S
    assert "live, but nothing moved" in message
    assert lost == 1


def test_a_peer_that_is_slow_and_lives_breaks_no_transfer() -> None:
    (_, message, lost), _ = values(run_ranks(2, wait_in_vain, 1.5 * BOUND_S))
    assert (message, lost) == ("", None)


def wait_for_a_stopped_process(rank: int) -> tuple[str, int | None]:
    """Rank 1 stops as a whole: its sockets stay open, its heart does not beat."""
    communicator = TorchCommunicator(BOUND_S)
    group = communicator.agreements("all")
    links = communicator.links("clique", (0, 1))
    pid = int(group.gather(str(os.getpid()).encode())[1])
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    with pytest.raises(PeerLostError) as caught:
        links.wait(links.receive(torch.zeros(8), 1, 1))
    with pytest.raises(PeerLostError):
        group.barrier()
    links.close()
    group.close()
    del links, group  # the end of a group's last reference waits for nobody
    communicator.close()
    os.kill(pid, signal.SIGKILL)
    return str(caught.value), caught.value.rank


def test_a_peer_that_stands_still_as_a_whole_is_given_up_and_its_groups_can_be_closed() -> None:
    first, second = run_ranks(2, wait_for_a_stopped_process)
    assert not first.error, first.trace or first.message
    message, lost = first.value
    assert "no sign of life from rank(s) [1]" in message
    assert lost == 1
    assert killed(second)


LINGER_S = 90.0


def leave_early(rank: int, size: int) -> tuple[float, bool]:
    """Rank 1 leaves while the others go on for long and send each other more. How long its leave took."""
    communicator = TorchCommunicator(10.0)
    members = tuple(range(size))
    links = communicator.links("clique", members)
    content = torch.full((1 << 20,), rank, dtype=torch.uint8)
    arrived = {peer: torch.zeros(1 << 20, dtype=torch.uint8) for peer in members if peer != rank}
    for transfer in [
        *(links.receive(into, peer, 1) for peer, into in arrived.items()),
        *(links.send(content, peer, 1) for peer in arrived),
    ]:
        links.wait(transfer)
    began = time.monotonic()
    refused = False
    if rank == 1:
        links.close(linger_s=LINGER_S)
        left_s = time.monotonic() - began
        dist.barrier()
        return left_s, refused
    dist.barrier()  # only now do the others look up
    others = [peer for peer in arrived if peer != 1]
    for transfer in [
        *(links.receive(arrived[peer], peer, 2) for peer in others),
        *(links.send(content, peer, 2) for peer in others),
    ]:
        links.wait(transfer)
    try:
        links.send(content, 1, 2)
    except PeerLostError as error:
        refused = error.rank == 1 and "has left" in str(error)
    links.close()
    communicator.close()
    return 0.0, refused


@pytest.mark.parametrize("size", [2, 3])
def test_who_leaves_in_peace_is_answered_at_once_whatever_its_peers_do(size: int) -> None:
    outcomes = values(run_ranks(size, leave_early, size))
    assert outcomes[1][0] < LINGER_S, "it did not linger for its whole bound"
    assert all(refused for rank, (_, refused) in enumerate(outcomes) if rank != 1)


def leave_one_who_waits(rank: int) -> tuple[float, str]:
    """Rank 1 leaves in peace; rank 0 waits for what it will never send."""
    communicator = TorchCommunicator(120.0)
    links = communicator.links("clique", (0, 1))
    transfer = links.receive(torch.zeros(8), 1, 1) if rank == 0 else None
    dist.barrier()
    began, message = time.monotonic(), ""
    if transfer is not None:
        with pytest.raises(PeerLostError) as caught:
            links.wait(transfer)
        message = str(caught.value)
        dist.barrier()
        links.close()
    else:
        links.close(linger_s=LINGER_S)
    took = time.monotonic() - began
    if rank == 1:
        dist.barrier()
    communicator.close()
    return took, message


def test_who_waits_for_one_that_left_hears_so_and_holds_up_nobody() -> None:
    (_, message), (took, _) = values(run_ranks(2, leave_one_who_waits))
    assert "rank 1" in message
    assert "has left" in message
    assert took < LINGER_S, "it did not linger for its whole bound"


def rebuild(rank: int) -> bool:
    """A failed group stays failed; another of a new name works, and the default group was never touched."""
    communicator = TorchCommunicator(5.0)
    for epoch in range(4):
        links = communicator.links(f"epoch{epoch}", (0, 1))
        content = torch.full((1000,), float(epoch)) if rank == epoch % 2 else torch.zeros(1000)
        other = 1 - rank
        links.wait(links.send(content, other, 1) if rank == epoch % 2 else links.receive(content, other, 1))
        assert content.unique().tolist() == [float(epoch)]
        dist.barrier()
        links.close(failed=True)
        with pytest.raises(PeerLostError):
            links.send(content, other, 1)
    tensor = torch.ones(1)
    dist.all_reduce(tensor)
    communicator.close()
    return tensor.item() == 2.0


def test_groups_are_rebuilt_under_new_names_as_often_as_need_be() -> None:
    assert values(run_ranks(2, rebuild)) == [True, True]


def agree_with_one_who_left(rank: int, how: str) -> str:
    communicator = TorchCommunicator(BOUND_S)
    group = communicator.agreements("all")
    group.barrier()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        group.close()
        communicator.close()
        if how == "stopped":  # its heart does not beat, its sockets stay open
            time.sleep(TIMEOUT_S)
        return ""
    try:
        group.maximum([1])
    except PeerLostError as error:
        return str(error)
    finally:
        group.close()  # the end of its last reference would wait for what is under way
    return "nothing was noticed"


@pytest.mark.parametrize("how", ["killed", "closed", "stopped"])
def test_an_agreement_with_a_rank_that_is_gone_ends_with_an_error_that_says_so(how: str) -> None:
    first, _ = run_ranks(2, agree_with_one_who_left, how, until=(0,))
    assert not first.error, first.trace
    assert "gone" in first.value or "no sign of life from rank(s) [1]" in first.value


def come_together(rank: int, comes_after_s: float) -> tuple[str, int | None]:
    if not comes_after_s:
        liveness.STALL_BOUNDS = FEW_BOUNDS  # type: ignore[misc]
    communicator = TorchCommunicator(BOUND_S)
    dist.barrier()
    try:
        if rank == 0 or comes_after_s:
            time.sleep(comes_after_s * rank)
            group = communicator.agreements("all")
            group.barrier()
            group.close()
        if rank == 0 and not comes_after_s:
            return "it came together", None
    except PeerLostError as error:
        return str(error), error.rank
    finally:
        dist.barrier()
        communicator.close()
    return "", None


def test_a_group_to_which_not_all_come_is_given_up_and_says_who_is_missing() -> None:
    (message, lost), _ = values(run_ranks(2, come_together, 0.0))
    assert "did not come together, [1] not being there" in message
    assert lost == 1


def test_a_group_waits_for_a_rank_that_is_late_and_lives() -> None:
    assert values(run_ranks(2, come_together, 1.5 * BOUND_S)) == [("", None)] * 2


def open_what_nobody_wants(rank: int) -> str:
    communicator = TorchCommunicator(60.0)
    dist.barrier()
    message = ""
    if rank == 0:
        until = time.monotonic() + 0.3
        with pytest.raises(PeerLostError) as caught:
            communicator.links("late", (0, 1), wanted=lambda: time.monotonic() < until)
        message = str(caught.value)
    dist.barrier()
    communicator.close()
    return message


def test_links_that_are_no_longer_wanted_are_not_waited_for() -> None:
    message, _ = values(run_ranks(2, open_what_nobody_wants))
    assert "not wanted any more" in message
