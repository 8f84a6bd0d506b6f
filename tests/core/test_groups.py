"""Groups over gloo between real processes: agreements, the control exchange, links; what a peer's end does to them."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist

from resilience.errors import PeerLostError
from resilience.replication.gloo import TorchCommunicator
from tests.ranks import killed, run_ranks, values


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
    control = communicator.control("control")
    for turn in range(3):
        control.start([turn * 10 + rank, -rank])
        time.sleep(0.01 * rank)
        seen.append(control.result())
    everybody.barrier()
    for group in (everybody, control):
        group.close()
    communicator.close()
    return seen


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


def wait_for_a_message(rank: int, how: str) -> float:
    """Rank 0 waits; rank 1 ends in one way or another. How long rank 0 waited."""
    communicator = TorchCommunicator(8.0)
    links = communicator.links("clique", (0, 1))
    dist.barrier()
    if rank == 1:
        time.sleep(0.2)
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        elif how == "gives up":
            links.close(failed=True)
        time.sleep(9)  # its process lives on
        return 0.0
    began = time.monotonic()
    content = torch.zeros(64 << 20, dtype=torch.uint8)
    with pytest.raises(PeerLostError):
        links.wait(links.receive(content, 1, 1))
    waited = time.monotonic() - began
    with pytest.raises(PeerLostError):
        links.send(content, 1, 1)
    links.close()
    return waited


@pytest.mark.parametrize(("how", "bound_s"), [("killed", 3.0), ("gives up", 3.0)])
def test_a_peer_that_dies_or_gives_up_is_noticed_at_once(how: str, bound_s: float) -> None:
    first, second = run_ranks(2, wait_for_a_message, how, timeout_s=6)
    assert not first.error, first.trace
    assert first.value < bound_s
    assert killed(second) or second.error == "TimeoutError"


def wait_in_vain(rank: int) -> tuple[float, str]:
    communicator = TorchCommunicator(1.0)
    links = communicator.links("clique", (0, 1))
    dist.barrier()
    began = time.monotonic()
    message = ""
    if rank == 0:
        try:
            links.wait(links.receive(torch.zeros(8), 1, 1))
        except PeerLostError as error:
            message = str(error)
    waited = time.monotonic() - began
    dist.barrier()
    links.close(failed=True)
    return waited, message


def test_a_peer_that_says_nothing_is_waited_for_no_longer_than_the_bound() -> None:
    (waited, message), _ = values(run_ranks(2, wait_in_vain))
    assert 1.0 <= waited < 5.0
    assert "nothing moved for 1 s" in message


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
    communicator = TorchCommunicator(1.0)
    group = communicator.agreements("all")
    group.barrier()
    if rank == 1:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        group.close()
        communicator.close()
        if how == "stopped":  # its heart does not beat, its sockets stay open
            time.sleep(5)
        return ""
    try:
        group.maximum([1])
    except PeerLostError as error:
        return str(error)
    return "nothing was noticed"


@pytest.mark.parametrize("how", ["killed", "closed", "stopped"])
def test_an_agreement_with_a_rank_that_is_gone_ends_with_an_error_that_says_so(how: str) -> None:
    first, _ = run_ranks(2, agree_with_one_who_left, how, timeout_s=20)
    assert not first.error, first.trace
    assert "gone" in first.value or "no sign of life from rank(s) [1]" in first.value


def come_together(rank: int) -> str:
    communicator = TorchCommunicator(1.0)
    if rank == 0:
        try:
            communicator.agreements("nobody else comes")
        except PeerLostError as error:
            return str(error)
    time.sleep(2)
    return ""


def test_a_group_to_which_not_all_come_is_given_up_within_the_bound() -> None:
    first, _ = values(run_ranks(2, come_together))
    assert "did not come together" in first
