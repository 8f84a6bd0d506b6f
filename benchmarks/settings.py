"""How large and how long a run of the benchmarks is: one value that every process of it gets."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Final

__all__ = ["FULL", "QUICK", "RANKS", "Settings"]

#: Ranks of the save and restore benchmarks, each on a virtual node of its own.
RANKS: Final = 2


@dataclass(frozen=True)
class Settings:
    """Sizes and counts. The state is a model of `layers` weights of `rows` × `columns` float32 with Adam's two moments;

    it is equal on both ranks and split over them, so that each stores half.
    """

    layers: int
    rows: int
    columns: int
    rounds: int  # measured, after the warm-up
    warmups: int
    restores: int  # each one starts new processes
    boundary_processes: tuple[int, ...]
    boundary_steps: int
    planning_ranks: tuple[int, ...]
    imports: int
    timeout_s: float

    @property
    def shard_bytes(self) -> int:
        """Tensor bytes per rank after the split."""
        return 3 * self.layers * self.rows * self.columns * 4 // RANKS

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Settings:
        fields = json.loads(text)
        lists = {name: tuple(value) for name, value in fields.items() if isinstance(value, list)}
        return cls(**(fields | lists))


#: 2 ranks × 256 MB: 192 tensors of 2.7 MB.
FULL: Final = Settings(
    layers=64,
    rows=680,
    columns=1024,
    rounds=20,
    warmups=3,
    restores=7,
    boundary_processes=(2, 4, 8, 16),
    boundary_steps=200,
    planning_ranks=(4096, 8192, 16384),
    imports=7,
    timeout_s=300.0,
)

#: Everything once, small: to see that it runs. Its figures say nothing.
QUICK: Final = Settings(
    layers=4,
    rows=64,
    columns=64,
    rounds=2,
    warmups=1,
    restores=1,
    boundary_processes=(2,),
    boundary_steps=5,
    planning_ranks=(64, 128),
    imports=1,
    timeout_s=100.0,
)
