"""The counters of a run: what Megatron Bridge keeps in `train_state.pt`, under the same names."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from resilience.errors import CorruptCopyError


@dataclass
class TrainState:
    """How far the run has come. Mutable: the trainer counts `step`; samples and operations are the user's to count."""

    step: int = 0
    consumed_train_samples: int = 0
    skipped_train_samples: int = 0
    consumed_valid_samples: int = 0
    floating_point_operations_so_far: float = 0.0
    do_train: bool = False
    do_valid: bool = False
    do_test: bool = False

    def to_dict(self) -> dict[str, int | float | bool]:
        """The eight counters by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @classmethod
    def from_dict(cls, counters: Mapping[str, Any]) -> TrainState:
        """The counters that `to_dict` wrote. Raises CorruptCopyError when one is missing or no number of its kind."""
        state = cls()
        state.update(counters)
        return state

    def update(self, counters: Mapping[str, Any]) -> None:
        """Take over all eight counters, or none of them when one is wrong."""
        found: dict[str, Any] = {}
        for field in fields(self):
            kind = type(field.default)
            value = counters.get(field.name) if isinstance(counters, Mapping) else None
            if kind is float and type(value) is int:
                value = float(value)
            if type(value) is not kind:
                raise CorruptCopyError(
                    f"Counter train_state/{field.name} is {value!r} in the save, no {kind.__name__}."
                )
            found[field.name] = value
        for name, value in found.items():
            setattr(self, name, value)
