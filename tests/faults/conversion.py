"""What is attacked: a conversion of a checkpoint of two ranks into another format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from resilience.errors import ResilienceError
from resilience.formats.convert import convert
from resilience.formats.load import load_checkpoint
from resilience.formats.protocol import Chunk
from resilience.stores.filesystem import PosixFileSystem
from tests.faults.edge import Edge
from tests.faults.leaks import Held
from tests.faults.loop import Place
from tests.formats.worlds import arena_of, rows, save, whole

__all__ = ["Conversion"]

WEIGHT = torch.arange(40, dtype=torch.float32).view(10, 4)


def chunks(rank: int) -> list[Chunk]:
    (weight, generator) = arena_of(WEIGHT, torch.arange(8, dtype=torch.uint8) + rank)
    return [rows("model/0/w", weight, 5 * rank, 5 * rank + 5), whole("rng/torch", generator, per_rank=True)]


@dataclass(frozen=True)
class Conversion:
    """From torch_dist `to` another format: the destination is there and whole, or not there at all."""

    to: str

    def ready(self, home: Place) -> Conversion:
        return self

    def prepare(self, place: Place) -> None:
        save(
            Path(place.disk, "source", "iter_0000007"),
            chunks,
            world_size=2,
            values=lambda rank: json.dumps({"rank": rank}).encode(),
            files={0: {"tokenizer/vocab.txt": b"a\nb"}},
        )

    def attempt(self, place: Place, edge: Edge) -> None:
        held = Held(place.roots)
        before = self._source(place)
        edge.armed = True
        try:
            self._convert(place)
        except ResilienceError:
            edge.armed = False
            assert edge.struck, "nothing was wrong"
            if not self._made(place):
                self._convert(place)
        edge.armed = False
        assert self._source(place) == before, "the source was touched"
        self._good(place)
        leaks = held.leaks()
        assert not leaks, leaks

    def afterwards(self, place: Place) -> None:
        if not self._made(place):
            self._convert(place)
        self._good(place)

    def _source(self, place: Place) -> dict[str, bytes]:
        found = Path(place.disk, "source").rglob("*")
        return {str(path): path.read_bytes() for path in found if path.is_file()}

    def _made(self, place: Place) -> bool:
        destination = Path(place.disk, "made")
        return destination.exists() and any(destination.iterdir())

    def _convert(self, place: Place) -> None:
        convert(Path(place.disk, "source"), Path(place.disk, "made"), self.to, PosixFileSystem())

    def _good(self, place: Place) -> None:
        loaded = load_checkpoint(Path(place.disk, "made"))
        assert torch.equal(loaded["w"], WEIGHT)
        there = {path.name for path in Path(place.disk).iterdir()}
        assert there == {"source", "made"}, there
