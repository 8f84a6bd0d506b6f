"""Where this rank stands in tensor, pipeline, data, context and expert parallelism.

Ranks that differ only in their data- or context-parallel place hold equal parameters: that is what lets a save be split
among them. (Expert parameters differ within data parallelism too; the equality check keeps them per rank.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from resilience.errors import ConfigError, CorruptCopyError

_SIZES = ("tp", "pp", "dp", "cp", "ep")


@dataclass(frozen=True)
class ParallelLayout:
    """Sizes of the parallel dimensions and this rank's place in each.

    `dp=None` stands for all ranks that the others leave; a place of None is worked out from the rank, in Megatron's
    order: tensor parallelism fastest, then context, data, pipeline. `resolve` fills both in.
    """

    tp: int = 1
    pp: int = 1
    dp: int | None = None
    cp: int = 1
    ep: int = 1
    tp_rank: int | None = None
    pp_rank: int | None = None
    dp_rank: int | None = None
    cp_rank: int | None = None
    ep_rank: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            size, place = getattr(self, name), getattr(self, f"{name}_rank")
            if size is None and name == "dp":
                size = place + 1 if _is_count(place) else None  # any place fits until the size is known
            elif not _is_count(size) or size < 1:
                raise ConfigError(f"ParallelLayout.{name} is {size!r}; a size is a whole number from 1 on.")
            if place is not None and (not _is_count(place) or not 0 <= place < (size or 0)):
                raise ConfigError(f"ParallelLayout.{name}_rank is {place!r}; with {name}={size} it lies below {size}.")

    @classmethod
    def default(cls, rank: int, world_size: int) -> ParallelLayout:
        """All ranks data-parallel: what plain DDP and FSDP2 jobs are."""
        return cls().resolve(rank, world_size)

    def resolve(self, rank: int, world_size: int) -> ParallelLayout:
        """The same layout with its size and all places filled in; ConfigError when it does not make up the world."""
        model = self.tp * self.pp * self.cp
        dp = self.dp if self.dp is not None else world_size // model
        if dp * model != world_size:
            raise ConfigError(
                f"ParallelLayout tp={self.tp} × cp={self.cp} × dp={self.dp} × pp={self.pp} does not make up the "
                f"{world_size} ranks of this job.",
                advice=f"tp × cp × pp has to divide {world_size}; leave dp=None to take the rest.",
            )
        if (self.tp * self.cp * dp) % self.ep:
            raise ConfigError(
                f"ParallelLayout.ep is {self.ep}; it has to divide tp × cp × dp = {self.tp * self.cp * dp}."
            )
        derived = {
            "tp_rank": rank % self.tp,
            "cp_rank": rank // self.tp % self.cp,
            "dp_rank": rank // (self.tp * self.cp) % dp,
            "pp_rank": rank // (self.tp * self.cp * dp),
            "ep_rank": rank // self.tp % self.ep,
        }
        places = {
            name: place if getattr(self, name) is None else getattr(self, name) for name, place in derived.items()
        }
        return replace(self, dp=dp, **places)

    def to_dict(self) -> dict[str, int | None]:
        """Sizes and places by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, written: object) -> ParallelLayout:
        """What `to_dict` gave for a resolved layout; CorruptCopyError for anything else."""
        names = [field.name for field in fields(cls)]
        if not isinstance(written, Mapping) or sorted(written) != sorted(names):
            raise CorruptCopyError("The layout in the save does not name the sizes and places of one.")
        if not all(_is_count(written[name]) for name in names):
            raise CorruptCopyError(f"The layout in the save is {dict(written)!r}.")
        try:
            return cls(**written)
        except ConfigError as error:
            raise CorruptCopyError(f"The layout in the save cannot be: {error}") from error

    @property
    def is_resolved(self) -> bool:
        """Whether the size and all places are known."""
        return None not in self.to_dict().values()

    @property
    def world_size(self) -> int:
        """Ranks in all, of a resolved layout."""
        return self.tp * self.pp * self.cp * (self.dp or 1)

    def same_sizes(self, other: ParallelLayout, *names: str) -> bool:
        """Whether these sizes (default: all) are equal."""
        return all(getattr(self, name) == getattr(other, name) for name in names or _SIZES)

    def in_words(self) -> str:
        """`tp=2, pp=2, dp=1, cp=1, ep=1`."""
        return ", ".join(f"{name}={getattr(self, name)}" for name in _SIZES)

    @property
    def shard_coordinate(self) -> tuple[int, int]:
        """(tp_rank, pp_rank): ranks with an equal coordinate are data-parallel replicas of each other.

        Of a resolved layout; an open place counts as 0.
        """
        return (self.tp_rank or 0, self.pp_rank or 0)


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
