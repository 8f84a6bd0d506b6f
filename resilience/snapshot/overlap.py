"""`snapshot_mode="overlapped"`: parameters and optimizer state are copied while the next forward and backward run.

They change in an optimizer's step and nowhere else, as long as all goes by the book. So the copy is joined right before
any optimizer of the process steps (a hook of torch's on all of them), or at the next boundary. Who does not go by the
book is found out by a witness (`witness.py`): of every copy by the counts of writes, of the first and every hundredth
one by its bytes. A copy that no witness vouches for fails its save, and from then on copies are eager.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Sequence
from typing import Final, Protocol

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from resilience.errors import ConfigError
from resilience.snapshot.copying import DONE, Copy, Copying, Pair, Part, Witness
from resilience.snapshot.equality import Sample
from resilience.snapshot.layout import Layout
from resilience.snapshot.witness import Quick, Strict
from resilience.state.distributed_state import DistributedOptimizerState
from resilience.state.items import Item
from resilience.state.sharding import without_block
from resilience.state.training_state import TrainingState

__all__ = ["Overlap", "WatchSteps", "refuse_overlap", "watch_all"]

_STRICT_EVERY: Final = 100
_CLOSE_BOUND_S: Final = 2.0
#: Tensors below this are copied at the boundary: to hand them over would cost more. Not those of a device, which cross
#: together with others.
_SMALL_BYTES: Final = 4096
_KEY = 'resiliency.snapshot_mode: "overlapped"'
_EAGER = 'Use snapshot_mode="eager".'
_CAPTURED = "the optimizer's step was captured in a graph, whose replays tell nobody that they begin"


class Hook(Protocol):
    def remove(self) -> None:
        """May be called again."""
        ...


#: Has something called ahead of every step that may change what is copied.
WatchSteps = Callable[[Callable[[], None]], Hook]


def watch_all(before: Callable[[], None]) -> Hook:
    """Ahead of every step of any torch optimizer of this process, a compiled one too: it is called and not traced."""
    called = torch.compiler.disable(before)  # type: ignore[no-untyped-call]
    return register_optimizer_step_pre_hook(lambda *_: called())


def refuse_overlap(state: TrainingState) -> None:
    """ConfigError where nobody would hear that the parameters are about to change."""
    if not state.optimizers:
        raise ConfigError(f"{_KEY} needs an optimizer: before its step the copy must be over.", advice=_EAGER)
    for each in state.optimizers:
        steps = each.optimizer.inner if isinstance(each, DistributedOptimizerState) else each.optimizer
        if not isinstance(steps, torch.optim.Optimizer):
            raise ConfigError(
                f"{_KEY} cannot be used with optimizer/{each.position}, a {type(each.optimizer).__name__}: it is no "
                f"torch.optim.Optimizer, so that no hook is called before it steps.",
                advice=_EAGER,
            )
    for model in state.models:
        for name, parameter in model.parameters():
            if getattr(parameter, "_in_backward_optimizers", None):
                raise ConfigError(
                    f"{_KEY} cannot be used with an optimizer that steps in the backward pass, as that of {name} does: "
                    f"there is no time in which the parameters hold still.",
                    advice=_EAGER,
                )


class Overlap:
    """The overlapped copies of one rank: one under way at a time. For the training thread, unless it says otherwise."""

    def __init__(
        self,
        state: TrainingState,
        copying: Copying,
        tell: Callable[..., None],
        now: Callable[[], float],
        watch: WatchSteps = watch_all,
    ) -> None:
        """`state`: one that `refuse_overlap` lets pass. `close` takes the hook off again."""
        self._state = state
        self._copying = copying
        self._tell = tell
        self._now = now
        self._count = 0
        self._copy = DONE
        self._witness: Witness | None = None
        self._off = ""  # why copies are eager from now on
        self._told = False
        self._layout: Layout | None = None  # of which the keys are
        self._later: frozenset[str] = frozenset()
        self._hook = watch(self._before_a_step)
        self.waited_s = 0.0  # in joins, since it was last taken

    @property
    def works(self) -> bool:
        """Whether the next copy may be overlapped; tells once why not."""
        if self._off and not self._told:
            self._told = True
            self._tell("warning", what=f"snapshots are eager from now on: {self._off}", advice=_EAGER)
        return not self._off

    def start(
        self,
        parts: Sequence[Part],
        items: Sequence[Item],
        sample: Sample,
        pairs: Sequence[Pair],
        seal: Callable[[], None],
    ) -> Copy:
        """As `Copying.start`, but it goes on, from `go` on. The first of `parts` is this rank's shard of `items`."""
        self.join()
        later = self._keys(items, parts[0].layout)
        now_pairs = [pair for key, pair in zip(sample.keys, pairs, strict=True) if key not in later]
        later_pairs = [pair for key, pair in zip(sample.keys, pairs, strict=True) if key in later]
        self._witness = witness = self._make_witness(parts, later)
        now_pairs += witness.pairs
        self._copy = self._copying.start_overlapped(
            parts, now_pairs, later_pairs, seal, later=later, witness=self._witness, disproved=self._disproved
        )
        self._count += 1
        return self._copy

    def go(self) -> None:
        """The boundary is over: what is to be copied meanwhile may begin."""
        self._copying.go()

    def join(self) -> None:
        """Before anything may change that is being copied; at a boundary at the latest."""
        self._copying.go()
        if self._copy.pending:
            began = self._now()
            self._copy.join(self._witness)
            self.waited_s += self._now() - began
            self._witness = None

    def take_waited(self) -> float:
        """What joins have made the training thread wait since this was last asked, in seconds."""
        waited, self.waited_s = self.waited_s, 0.0
        return waited

    def close(self) -> None:
        """No step comes any more. May be repeated.

        What is nearly copied is joined, since it may be the newest save that there is; of anything else, and of what is
        compared byte by byte, nobody can say any more whether it is right.
        """
        self._hook.remove()
        self._copying.go()
        copy, witness, self._copy, self._witness = self._copy, self._witness, DONE, None
        joined = False
        if witness is not None and not witness.waits_for_join:
            with contextlib.suppress(RuntimeError):  # of a device that failed
                joined = copy.join(witness, _CLOSE_BOUND_S)
        if not joined:
            copy.abandon("training ended before the optimizer's next step")

    def _before_a_step(self) -> None:
        """Torch's hook on all optimizers; any thread that steps one."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():  # type: ignore[no-untyped-call]
            self._off = self._off or _CAPTURED
            self._copying.go()
            self._copy.abandon(_CAPTURED)
            return
        self.join()

    def _disproved(self, why: str) -> None:
        """In the lane that copies."""
        self._off = self._off or why

    def _make_witness(self, parts: Sequence[Part], later: Collection[str]) -> Quick | Strict:
        observed = _Deferred([(part, self._copying.deferred(part, later)) for part in parts])
        return Strict(observed) if self._count % _STRICT_EVERY == 0 else Quick(observed, self._count)

    def _keys(self, items: Sequence[Item], layout: Layout) -> frozenset[str]:
        """Keys of what is copied later: parameters and their optimizer state. Kept by layout."""
        if layout is not self._layout:
            names = frozenset(self._state.stepped_keys())
            worth_it = (item.key for item in items if item.tensor.is_cuda or item.tensor.nbytes >= _SMALL_BYTES)
            self._layout, self._later = layout, frozenset(key for key in worth_it if _stepped(key, names))
        return self._later


class _Deferred:
    """What of some parts is copied later."""

    def __init__(self, chosen: Sequence[tuple[Part, Sequence[int]]]) -> None:
        """`chosen`: positions of each part's pieces."""
        self._chosen = chosen
        self._sources: list[torch.Tensor] = []
        for part, positions in chosen:
            self._sources += map(part.sources.__getitem__, positions)

    @property
    def sources(self) -> Sequence[torch.Tensor]:
        return self._sources

    def name(self, number: int) -> str:
        part, position = self._place(number)
        return part.layout.placed[position].piece.key

    def view(self, number: int) -> torch.Tensor:
        part, position = self._place(number)
        return part.arena.views[position]

    def _place(self, number: int) -> tuple[Part, int]:
        for part, positions in self._chosen:
            if number < len(positions):
                return part, positions[number]
            number -= len(positions)
        raise IndexError(number)


def _stepped(key: str, names: frozenset[str]) -> bool:
    """Whether it is one of `names`, a block of such a tensor, or lies under one: an entry of a parameter's state."""
    key = without_block(key)
    return key in names or key.rpartition("/")[0] in names
