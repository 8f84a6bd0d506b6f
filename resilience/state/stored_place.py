"""What a tensor of the training state is called where alike tensors are stored as one: layers, experts.

Megatron Core stores one tensor per parameter, `decoder.layers.mlp.linear_fc2.weight`, with the layer's number as an
axis before the parameter's own. In the training state each layer's is a tensor of its own; so is its optimizer state.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from resilience.state.tree import path_component

__all__ = ["StackPlace", "StoredPlace", "StoredPlaces"]


@dataclass(frozen=True)
class StackPlace:
    """The key of what is stored, and which one of the alike this is: `index` of `counts`, along the first axes.

    Both are empty for what is stored by itself.
    """

    key: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True)
class StoredPlace:
    """The same with a tree path, or the beginning of one, in the key's stead."""

    path: str
    index: tuple[int, ...] = ()
    counts: tuple[int, ...] = ()


class StoredPlaces:
    """Of all tensors of one rank's training state whose place is known; of any other there is nothing to say."""

    def __init__(
        self, models: Mapping[str, tuple[StackPlace, tuple[int, ...]]], prefixes: Iterable[tuple[str, str]] = ()
    ) -> None:
        """`models`: tree path of a model's tensor → its place, and its whole shape without the axes of the stack.

        `prefixes`: what the paths of a parameter's optimizer state begin with, and the path of the parameter.
        """
        self._shapes: dict[str, tuple[int, ...]] = {}
        self.bases: dict[str, StoredPlace] = {}
        for path, (place, _) in models.items():
            # chunks of a pipeline count through, and have their keys in common
            self.bases[path] = StoredPlace(f"model/0/{path_component(place.key)}", place.index, place.counts)
        known: set[str] = set()
        for prefix, parameter in prefixes:
            if parameter in models:
                place, self._shapes[prefix] = models[parameter]
                # Megatron's optimizers have their keys in common; a parameter of two optimizers would be there twice
                optimizer = prefix.rpartition("/")[0] if parameter in known else "optimizer/0/state"
                known.add(parameter)
                self.bases[prefix] = StoredPlace(f"{optimizer}/{path_component(place.key)}", place.index, place.counts)

    def __bool__(self) -> bool:
        return bool(self.bases)

    def named(self, path: str) -> StoredPlace | None:
        """The same, whatever the tensor's shape."""
        if path in self.bases:
            return self.bases[path]
        prefix, _, moment = path.rpartition("/")
        place = self.bases.get(prefix)
        return place and StoredPlace(f"{place.path}/{moment}", place.index, place.counts)

    def of(self, path: str, global_shape: tuple[int, ...]) -> StoredPlace | None:
        """Where a tensor of the model, or of optimizer state in its parameter's shape, is stored."""
        if path.startswith("model/"):
            return self.bases.get(path)
        same = self._shapes.get(path.rpartition("/")[0]) == global_shape
        return self.named(path) if same else None
