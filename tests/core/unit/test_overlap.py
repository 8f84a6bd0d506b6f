"""Overlapped snapshots: what lands in the arena is the state at the boundary, or nobody believes it."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from resilience import TrainingState
from resilience.errors import ConfigError, SaveFailedError
from resilience.runtime.worker import Lane
from resilience.snapshot import copying as copying_module
from resilience.snapshot import memory_copy
from resilience.snapshot import overlap as overlap_module
from resilience.snapshot import witness as witness_module
from resilience.snapshot.arena import Arena
from resilience.snapshot.copying import Copy, Copying, Part
from resilience.snapshot.equality import RotatingShare, Sample, hash_tensor
from resilience.snapshot.layout import Layout, Piece, plan_layout
from resilience.snapshot.overlap import Overlap
from resilience.snapshot.pieces import pieces_of
from resilience.snapshot.sources import Cut, Sources
from resilience.snapshot.streaming import Streaming
from resilience.snapshot.witness import Strict
from resilience.state.tensors import memory_of
from tests.core.shards import FS

COPYING = "resilience-copying"
BOUND_S = 20.0


class Net(nn.Module):
    """Parameters of several kinds, and a buffer that every forward changes."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(40, 30)
        self.norm = nn.BatchNorm1d(30)
        self.two = nn.Linear(30, 50)
        self.halved = nn.Parameter(torch.randn(50, 20).bfloat16())

    def forward(self, batch: torch.Tensor) -> torch.Tensor:
        return (self.two(self.norm(self.one(batch))).bfloat16() @ self.halved).float().square().mean()


OPTIMIZERS: dict[str, Callable[[nn.Module], Any]] = {
    "foreach": lambda net: torch.optim.AdamW(net.parameters(), foreach=True),
    "fused": lambda net: torch.optim.AdamW(net.parameters(), fused=True),
    "for loop": lambda net: torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9, foreach=False),
    "several": lambda net: [
        torch.optim.AdamW(net.one.parameters()),
        torch.optim.SGD([*net.two.parameters(), net.halved, *net.norm.parameters()], lr=0.1, momentum=0.9),
    ],
    "compiled hyperparameters": lambda net: torch.optim.AdamW(net.parameters(), lr=torch.tensor(1e-3)),
}


@dataclass
class Rig:
    """One rank's overlapped snapshots, driven by hand. `delay_s`: how late each copy begins."""

    directory: Path
    optimizer: str = "foreach"
    delay_s: float = 0.0
    told: list[str] = field(default_factory=list)
    closed: bool = False

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.net = Net()
        self.optimizers = OPTIMIZERS[self.optimizer](self.net)
        self.all = self.optimizers if isinstance(self.optimizers, list) else [self.optimizers]
        self.state = TrainingState(self.net, self.optimizers)
        self.lane = Lane("copying", lambda what, error: self.told.append(repr(error)))
        self.copying = Copying(self.lane)
        self.overlap = Overlap(
            self.state, self.copying, lambda event, **fields: self.told.append(fields["what"]), time.monotonic
        )
        self.sources = Sources()
        self.layouts: list[Layout] = []
        self.count = 0

    def forward_and_backward(self) -> None:
        self.net(torch.randn(8, 40)).backward()

    def step(self, which: int = 0) -> None:
        self.all[which % len(self.all)].step()

    def snapshot(self) -> tuple[Copy, Arena, dict[str, bytes]]:
        """Begin one; what it must hold."""
        collected = self.state.collect()
        truth = {item.key: bytes_of(item.tensor) for item in collected.items}
        pieces = pieces_of(collected.items, {item.key for item in collected.items if item.replicated},
                           part=0, parts=1, split=False)  # fmt: skip
        layout = plan_layout(pieces, {}, len(collected.values), [0])
        layout = next((known for known in self.layouts if known == layout), layout)
        self.layouts.append(layout)
        self.count += 1
        arena = Arena(FS.create_mapping(self.directory / f"arena{self.count}", layout.nbytes))
        arena.use(layout)
        part = Part(arena, layout, self.sources.of(collected.items, layout))
        copy = self.overlap.start([part], collected.items, Sample((), ()), (), lambda: None)
        self.overlap.go()
        return copy, arena, truth

    def close(self) -> None:
        self.overlap.close()
        assert self.lane.close(BOUND_S)

    def hold_next(self) -> None:
        """Have the next snapshot's copy wait for what begins it."""
        self.overlap.go = lambda: None  # type: ignore[method-assign]


@pytest.fixture
def rig(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Rig]]:
    """Makes rigs whose copies of anything large come late, and closes them."""
    made: list[Rig] = []
    late(monkeypatch, made)

    def make(**given: Any) -> Rig:
        directory = tmp_path / f"rig{len(made)}"
        directory.mkdir()
        made.append(Rig(directory, **given))
        return made[-1]

    yield make
    for each in made:
        each.close()


def late(monkeypatch: pytest.MonkeyPatch, rigs: list[Rig]) -> None:
    copy = copying_module._copy_host

    def slowly(*given: Any, **named: Any) -> None:
        if threading.current_thread().name == COPYING:
            time.sleep(rigs[-1].delay_s)
        copy(*given, **named)

    monkeypatch.setattr(copying_module, "_copy_host", slowly)
    monkeypatch.setattr(overlap_module, "_SMALL_BYTES", 1000)


def bytes_of(tensor: torch.Tensor) -> bytes:
    return memory_of(tensor).tobytes()


def held_by(arena: Arena) -> dict[str, bytes]:
    assert arena.layout is not None
    return {placed.piece.key: bytes_of(view) for placed, view in zip(arena.layout.placed, arena.views, strict=True)}


ACTIONS = ("forward", "snapshot", "step", "other step", "move", "pause")


@settings(max_examples=40)
@given(
    actions=st.lists(st.sampled_from(ACTIONS), min_size=3, max_size=14),
    optimizer=st.sampled_from(sorted(OPTIMIZERS)),
    delay_ms=st.sampled_from([0, 0, 2, 10]),
    compiled=st.booleans(),
)
def test_an_overlapped_snapshot_is_the_eager_one_whatever_comes_between(
    tmp_path_factory: pytest.TempPathFactory, actions: list[str], optimizer: str, delay_ms: int, compiled: bool
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        rigs: list[Rig] = []
        late(patch, rigs)
        if not compiled:
            patch.setattr(memory_copy, "STREAMING", Streaming(None))
        rig = Rig(tmp_path_factory.mktemp("rig"), optimizer=optimizer, delay_s=delay_ms / 1000)
        rigs.append(rig)
        rig.forward_and_backward()
        for number in range(len(rig.all)):
            rig.step(number)
        begun = []
        try:
            for action in actions:
                match action:
                    case "forward":
                        rig.forward_and_backward()
                    case "step":
                        rig.step()
                    case "other step":
                        rig.step(1)
                    case "snapshot":
                        begun.append(rig.snapshot())
                    case "move":  # other memory, the same values: what is being copied is not touched
                        rig.net.one.weight.data = rig.net.one.weight.data.clone()
                    case "pause":
                        time.sleep(0.004)
            rig.overlap.join()
            for copy, arena, truth in begun:
                assert copy.wait() == ""
                assert held_by(arena) == truth
        finally:
            rig.close()
        assert rig.told == []


def test_without_the_join_the_property_above_does_not_hold(rig: Callable[..., Rig], monkeypatch: Any) -> None:
    late_rig = rig(delay_s=1.0)
    late_rig.forward_and_backward()
    late_rig.step()
    late_rig.snapshot()
    late_rig.overlap.join()  # the first one, which is compared byte by byte
    monkeypatch.setattr(Overlap, "join", lambda self: None)
    copy, arena, truth = late_rig.snapshot()
    late_rig.step()
    assert "changed between" in copy.wait(), "torch counted the writes"
    assert held_by(arena) != truth


def test_only_what_a_step_changes_is_copied_later(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=1.5)
    slow.forward_and_backward()
    slow.step()
    _, arena, truth = slow.snapshot()
    here = held_by(arena)
    waits = {key for key, content in truth.items() if here[key] != content}
    large = {"model/0/one.weight", "model/0/two.weight", "model/0/halved"}
    moments = {f"optimizer/0/state/{key.rpartition('/')[2]}/{m}" for key in large for m in ("exp_avg", "exp_avg_sq")}
    assert waits == large | moments, "buffers, counters, random states and small tensors are there at once"


def test_the_step_waits_for_the_copy_and_the_wait_is_counted(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=1.0)
    slow.forward_and_backward()
    slow.step()
    copy, _, _ = slow.snapshot()
    slow.forward_and_backward()
    assert copy.pending
    slow.step()
    assert not copy.pending
    assert slow.overlap.take_waited() > 0.1
    assert slow.overlap.take_waited() == 0.0


def test_an_optimizer_that_nobody_told_of_waits_too(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=0.2)
    stranger = torch.optim.SGD(slow.net.parameters(), lr=1.0)
    slow.forward_and_backward()
    slow.step()
    copy, arena, truth = slow.snapshot()
    stranger.step()
    assert copy.wait() == ""
    assert held_by(arena) == truth


def test_a_step_that_was_compiled_waits_too(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=0.05)
    slow.forward_and_backward()
    step = torch.compile(slow.all[0].step, backend="eager")
    step()
    for _ in range(3):  # compiled with nothing to wait for, and run with something
        copy, arena, truth = slow.snapshot()
        slow.forward_and_backward()
        step()
        assert copy.wait() == ""
        assert held_by(arena) == truth
        step()


def test_gradients_are_accumulated_meanwhile(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=0.1)
    slow.forward_and_backward()
    slow.step()
    copy, arena, truth = slow.snapshot()
    for _ in range(4):
        slow.forward_and_backward()
    slow.step()
    assert copy.wait() == ""
    assert held_by(arena) == truth


def add_counted(net: Net) -> None:
    with torch.no_grad():
        net.halved.add_(1)


def add_to_data(net: Net) -> None:
    net.one.weight.data.add_(1)


def add_in_numpy(net: Net) -> None:
    view = net.one.weight.detach().numpy()
    view += 1


@pytest.mark.parametrize("write", [add_counted, add_to_data, add_in_numpy])
def test_the_first_copy_is_compared_byte_by_byte(rig: Callable[..., Rig], write: Callable[[Net], None]) -> None:
    slow = rig()
    slow.forward_and_backward()
    slow.step()
    copy, _, _ = slow.snapshot()
    write(slow.net)
    slow.step()
    assert "changed between the boundary and the optimizer's next step" in copy.wait()
    assert not slow.overlap.works
    assert not slow.overlap.works
    assert [what.startswith("snapshots are eager from now on: model/0/") for what in slow.told] == [True]


def test_every_copy_is_compared_by_the_counts_and_every_hundredth_by_its_bytes(
    rig: Callable[..., Rig], monkeypatch: Any
) -> None:
    monkeypatch.setattr(overlap_module, "_STRICT_EVERY", 5)
    slow = rig(delay_s=0.02)
    slow.forward_and_backward()
    slow.step()
    for number in range(11):
        copy, arena, truth = slow.snapshot()
        if number == 10:  # the third strict one: 0, 5, 10
            add_to_data(slow.net)
        slow.step()
        if number < 10:
            assert copy.wait() == ""
            assert held_by(arena) == truth
    assert "model/0/one.weight" in copy.wait()


def test_weights_that_are_exchanged_for_a_while_are_found_by_the_probes_of_any_copy(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=0.5)
    slow.forward_and_backward()
    slow.step()
    slow.snapshot()
    slow.step()
    copy, _, _ = slow.snapshot()
    own = [parameter.detach().clone() for parameter in slow.net.parameters()]
    for parameter in slow.net.parameters():
        parameter.data.mul_(0.5)  # as an average is put in their place for an evaluation
    slow.lane.wait(BOUND_S)
    for parameter, before in zip(slow.net.parameters(), own, strict=True):
        parameter.data.copy_(before)
    slow.step()
    assert "changed between" in copy.wait()
    assert not slow.overlap.works


def test_probes_are_other_ones_in_each_copy_and_wait_for_nothing() -> None:
    sources = [torch.randn(100) for _ in range(50)]
    drawn = [witness_module._draw_probes(sources, turn) for turn in (1, 1, 2)]
    chosen = [[(probe.number, probe.start) for probe in probes] for probes in drawn]
    assert chosen[0] == chosen[1] != chosen[2]
    assert len(chosen[0]) == 16
    assert witness_module._draw_probes([torch.randn(0), torch.randn(5, 4).t()], 1) == []


@pytest.mark.parametrize(
    "source", [torch.randn(40), torch.randn(40, dtype=torch.complex64).conj()], ids=["block", "conj"]
)
def test_a_probe_of_any_kind_tells_another_value_from_its_own(source: torch.Tensor) -> None:
    (probe,) = witness_module._draw_probes([source], 1)
    for kept, elements in probe.pairs:
        kept.copy_(elements)
    copied = source.clone() if not source.is_conj() else source.resolve_conj()
    assert probe.agrees(copied)
    copied[probe.start] += 1
    assert not probe.agrees(copied)


def test_a_counted_write_while_it_is_copied_fails_any_copy(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=1.0)
    slow.forward_and_backward()
    slow.step()
    slow.snapshot()
    slow.step()
    copy, _, _ = slow.snapshot()
    add_counted(slow.net)
    assert "model/0/halved" in copy.wait(), "not even the step had to come"


def test_an_error_of_the_copy_is_that_save_s_and_the_next_one_goes_on(
    rig: Callable[..., Rig], monkeypatch: Any
) -> None:
    slow = rig()

    def broken(*_: object) -> None:
        raise RuntimeError("no such memory")

    with monkeypatch.context() as patch:
        patch.setattr(Copying, "_copy_later", broken)
        copy, _, _ = slow.snapshot()
        assert copy.wait() == "the overlapped copy failed: no such memory"
    slow.step()
    copy, arena, truth = slow.snapshot()
    slow.step()
    assert copy.wait() == ""
    assert held_by(arena) == truth
    assert slow.overlap.works


@pytest.mark.parametrize("whose", [lambda net: net.one.weight, lambda net: net.turned], ids=["a block", "strided"])
@pytest.mark.parametrize("strict", [True, False])
def test_memory_that_is_given_back_while_it_is_copied_costs_that_save_and_no_process(
    rig: Callable[..., Rig], strict: bool, whose: Callable[[Net], torch.Tensor]
) -> None:
    slow = rig(delay_s=0.2)
    slow.net.turned = nn.Parameter(torch.randn(60, 40).t())
    if not strict:
        slow.snapshot()
        slow.overlap.join()
    copy, _, _ = slow.snapshot()
    storage = whose(slow.net).untyped_storage()
    kept, content = storage.nbytes(), bytes(storage)
    storage.resize_(0)
    slow.overlap.join()
    assert "no memory" in copy.wait()
    storage.resize_(kept)
    storage.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8).untyped_storage())
    copy, arena, truth = slow.snapshot()
    slow.overlap.join()
    assert copy.wait() == ""
    assert held_by(arena) == truth


@pytest.mark.parametrize("tensor", [torch.randn(60, 40), torch.randn(40, 60).t()], ids=["a block", "strided"])
def test_an_eager_copy_of_what_has_no_memory_is_an_error(tmp_path: Path, tensor: torch.Tensor) -> None:
    layout = plan_layout([Piece("x", tensor.dtype, (60, 40), (0, 0), (60, 40), shared=False, item=0)], {}, 2, [0])
    arena = Arena(FS.create_mapping(tmp_path / "arena", layout.nbytes))
    arena.use(layout)
    part = Part(arena, layout, Cut([tensor], object()))
    Copying().start([part], (), lambda: None)
    assert held_by(arena) == {"x": bytes_of(tensor)}
    tensor.untyped_storage().resize_(0)
    with pytest.raises(SaveFailedError, match="no memory"):
        Copying().start([part], (), lambda: None)
    with pytest.raises(SaveFailedError, match="no memory"):
        hash_tensor(tensor)


def test_an_end_in_the_middle_keeps_nobody_waiting(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=0.1)
    copy, _, _ = slow.snapshot()  # the strict witness waits for the join
    slow.close()
    assert "training ended" in copy.wait()
    slow.close()


def test_what_is_nearly_copied_when_training_ends_is_a_save(rig: Callable[..., Rig]) -> None:
    slow = rig(delay_s=0.1)
    slow.snapshot()
    slow.step()
    copy, arena, truth = slow.snapshot()
    slow.close()
    assert copy.wait() == ""
    assert held_by(arena) == truth


def test_what_was_joined_when_training_ends_is_a_save(rig: Callable[..., Rig], monkeypatch: Any) -> None:
    slow, agrees = rig(), Strict.agrees

    def late(self: Strict) -> str:
        time.sleep(0.2)  # as the copy of a device may be
        return agrees(self)

    monkeypatch.setattr(Strict, "agrees", late)
    copy, arena, truth = slow.snapshot()
    slow.step()
    slow.close()
    assert copy.wait() == ""
    assert held_by(arena) == truth


def test_what_is_far_from_copied_when_training_ends_is_given_up(rig: Callable[..., Rig], monkeypatch: Any) -> None:
    monkeypatch.setattr(overlap_module, "_CLOSE_BOUND_S", 0.05)
    slow = rig(delay_s=2.0)
    slow.snapshot()
    slow.step()
    copy, _, _ = slow.snapshot()
    slow.close()
    assert "training ended" in copy.wait()


def test_parameters_that_were_made_in_inference_mode_are_copied_too(rig: Callable[..., Rig]) -> None:
    slow = rig()
    with torch.inference_mode():
        frozen = torch.randn(40, 40)
    slow.net.register_parameter("frozen", nn.Parameter(frozen, requires_grad=False))
    slow.snapshot()
    slow.step()
    copy, arena, truth = slow.snapshot()
    slow.step()
    assert copy.wait() == ""
    assert held_by(arena)["model/0/frozen"] == truth["model/0/frozen"]


def test_a_closed_one_hears_of_no_step_any_more(rig: Callable[..., Rig], monkeypatch: Any) -> None:
    calls: list[int] = []
    monkeypatch.setattr(Overlap, "_before_a_step", lambda self: calls.append(1))
    slow = rig()
    slow.step()
    assert calls == [1]
    slow.close()
    slow.step()
    assert calls == [1]


def test_the_sample_is_of_the_boundary_too(rig: Callable[..., Rig], tmp_path: Path) -> None:
    slow = rig(delay_s=0.1)
    slow.forward_and_backward()
    slow.step()
    collected = slow.state.collect()
    shared = {item.key for item in collected.items if item.replicated}
    layout = plan_layout(pieces_of(collected.items, shared, part=0, parts=1, split=False), {}, 100_000, [0])
    arena = Arena(FS.create_mapping(tmp_path / "arena", layout.nbytes))
    arena.use(layout)
    sample, pairs = RotatingShare(collected.items, shared).choose(collected.items, 0)
    expected = Sample(sample.keys, tuple(source.clone() for _, source in pairs)).fingerprint()
    part = Part(arena, layout, slow.sources.of(collected.items, layout))
    copy = slow.overlap.start([part], collected.items, sample, pairs, lambda: None)
    slow.overlap.go()
    slow.forward_and_backward()  # changes the buffers of the sample
    slow.step()  # and this the rest
    assert copy.wait() == ""
    assert sample.fingerprint() == expected


class OfItsOwn:
    """An optimizer of nobody's kind."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [(None, "needs an optimizer"), (OfItsOwn(), "OfItsOwn, it is no torch.optim.Optimizer")],
)
def test_where_no_hook_is_called_it_is_refused(optimizer: Any, words: str) -> None:
    with pytest.raises(ConfigError) as refused:
        overlap_module.refuse_overlap(TrainingState(Net(), optimizer))
    assert words.split(",", maxsplit=1)[0] in str(refused.value)
    assert 'snapshot_mode="eager"' in str(refused.value)


def test_an_optimizer_in_the_backward_is_refused() -> None:
    from torch.distributed.optim import _apply_optimizer_in_backward

    net = Net()
    _apply_optimizer_in_backward(torch.optim.SGD, net.two.parameters(), {"lr": 0.1})
    with pytest.raises(ConfigError, match=r"backward pass, as that of two\."):
        overlap_module.refuse_overlap(TrainingState(net, torch.optim.SGD(net.one.parameters(), lr=0.1)))


def test_a_copy_begins_when_the_boundary_is_over_or_is_waited_for(rig: Callable[..., Rig]) -> None:
    held = rig()
    first, _, _ = held.snapshot()
    held.overlap.join()
    assert first.wait() == ""
    held.hold_next()
    copy, _, _ = held.snapshot()
    time.sleep(0.2)
    assert copy.pending
    assert held.lane.wait(0)  # nothing is under way, nor queued
    held.step()  # which waits for it
    assert copy.wait() == ""
    other, _, _ = held.snapshot()
    held.overlap.close()
    assert other.wait() == ""
