"""The large parts of a training state, written once and taken again for as long as they would be written alike.

Of two saves, nearly all that is written is equal: thousands of tensors have the names, dtypes and memory that they had
before. To walk over them one by one costs more than to copy small ones. So a model's entries and an optimizer's state
are kept as JSON and items, and held against the live objects in a few sweeps, each over all tensors at once: the keys,
the types, the dtypes, and that each tensor is the same elements of the same memory (`Tensor.is_set_to`). What has no
tensors (an optimizer's param groups) is held against a mark of its values. Whatever differs is written anew.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from operator import attrgetter
from typing import Any, Final

import torch

from resilience.state.items import Item, Place, items_of
from resilience.state.marks import SCALARS, NotPlainError, mark_of
from resilience.state.sharding import Shardings, may_be_cut, sayings
from resilience.state.tensors import is_dtensor
from resilience.state.tree import Written, encode_part

__all__ = ["KeptSections"]

_PLAIN: Final = frozenset((torch.Tensor, torch.nn.Parameter))
_KIND: Final = attrgetter("dtype", "requires_grad")
Found = Sequence[tuple[str, torch.Tensor | Written]]


class _Section(Written):
    """One part as it was written: what it was written of, and the items that it made."""

    def __init__(self, path: str, depth: int, value: dict[Any, Any], keys: list[Any], leaves: list[Any]) -> None:
        """Raises what `encode_part` raises."""
        text, self.tensors = encode_part(value, path, depth)
        super().__init__(text)
        self.items: tuple[Item, ...] = ()
        self._keys = keys
        self._types = list(map(type, leaves))
        self._scalars = [(place, mark_of(leaf)) for place, leaf in enumerate(leaves) if type(leaf) in SCALARS]
        self._distributed = any(map(is_dtensor, leaves))
        tensors = self._tensors_of(leaves)
        self._kinds, self._specs = list(map(_KIND, tensors)), self._specs_of(tensors)
        self._memory = [each.detach() for each in self._local(tensors)]

    def still(self, keys: list[Any], leaves: list[Any]) -> bool:
        """Whether it would be written alike now."""
        if keys != self._keys or list(map(type, leaves)) != self._types:
            return False
        if any(mark_of(leaves[place]) != mark for place, mark in self._scalars):
            return False
        tensors = self._tensors_of(leaves)
        if list(map(_KIND, tensors)) != self._kinds:
            return False
        if self._specs_of(tensors) != self._specs:
            return False
        return all(map(torch.Tensor.is_set_to, self._local(tensors), self._memory))

    def _tensors_of(self, leaves: list[Any]) -> list[Any]:
        return [leaf for leaf in leaves if type(leaf) not in SCALARS] if self._scalars else leaves

    def _specs_of(self, tensors: list[Any]) -> list[Any]:
        """Mesh and placements of those that have any."""
        return [each._spec for each in tensors if is_dtensor(each)] if self._distributed else []

    def _local(self, tensors: list[Any]) -> list[Any]:
        return [each._local_tensor if is_dtensor(each) else each for each in tensors] if self._distributed else tensors


class _Values(Written):
    """One part without tensors as it was written: what it was written of."""

    def __init__(self, path: str, depth: int, value: Any, mark: Hashable) -> None:
        """Raises what `encode_part` raises."""
        text, _ = encode_part(value, path, depth)
        super().__init__(text)
        self.mark = mark


class KeptSections:
    """The kept parts of one training state. `take` each in the order of the tree, then `items` once."""

    def __init__(self) -> None:
        self._sections: dict[str, _Section] = {}
        self._values: dict[str, _Values] = {}
        self._fresh = True  # whether a section came, changed or went since the last items
        self._of: tuple[object, ...] = ()  # of which sections, and after which sayings, the items are
        self._memory: dict[Hashable, str] = {}  # which key came first with it, among the sections' items

    def take(self, path: str, value: Any, depth: int) -> Any:
        """`value`, which stands at `path` under `depth` containers, or what it was written as before."""
        if type(value) is not dict:
            return value
        keys, leaves = _flat(value)
        section = self._sections.get(path)
        if section is not None and section.still(keys, leaves):
            return section
        if not _may_be_kept(leaves):
            self._fresh = self._sections.pop(path, None) is not None or self._fresh
            return value
        self._fresh = True
        self._sections[path] = _Section(path, depth, value, keys, leaves)
        return self._sections[path]

    def take_values(self, path: str, value: Any, depth: int) -> Any:
        """As `take`, of what has no tensors in it; with tensors it is `value`."""
        try:
            mark = mark_of(value)
        except NotPlainError:
            return value
        kept = self._values.get(path)
        if kept is None or kept.mark != mark:
            kept = self._values[path] = _Values(path, depth, value, mark)
        return kept

    def items(
        self, found: Found, places: dict[Hashable, Place], shardings: Callable[[], Shardings]
    ) -> tuple[Item, ...]:
        """The items of what `encode_around` found, in its order."""
        found = [pair for pair in found if not isinstance(pair[1], _Values)]
        of = (*(id(each) for _, each in found if isinstance(each, _Section)), sayings())
        if self._fresh or of != self._of:
            self._make_items(found, places, shardings())
            self._of = of
        said = Shardings((), ())
        if any(may_be_cut(path) for path, each in found if not isinstance(each, _Section)):
            said = shardings()
        known = dict(self._memory)
        items: list[Item] = []
        for path, each in found:
            items += each.items if isinstance(each, _Section) else items_of([_one(path, each)], places, said, known)
        return tuple(items)

    def _make_items(self, found: Found, places: dict[Hashable, Place], shardings: Shardings) -> None:
        """Those of the sections. Who came first with some memory is told in the order of all."""
        known: dict[Hashable, str] = {}
        for path, each in found:
            if isinstance(each, _Section):
                each.items = items_of(each.tensors, places, shardings, known)
            else:
                items_of([_one(path, each)], places, shardings, known)
        made = [item for _, each in found if isinstance(each, _Section) for item in each.items]
        keys = {item.key for item in made}
        self._memory = {memory: key for memory, key in known.items() if key in keys}
        # an alias of something outside of the sections is looked at again at every save
        self._fresh = not all(item.alias_of is None or item.alias_of in keys for item in made)


def _one(path: str, found: torch.Tensor | Written) -> tuple[str, torch.Tensor]:
    assert isinstance(found, torch.Tensor)
    return path, found


def _flat(value: dict[Any, Any]) -> tuple[list[Any], list[Any]]:
    """Keys and leaves of a dict, and of the dicts in it."""
    leaves = list(value.values())
    if dict not in set(map(type, leaves)):
        return list(value), leaves
    keys: list[Any] = []
    leaves = []
    for key, part in value.items():
        if type(part) is dict:
            keys.append([key, *part])  # no key of a dict is a list
            leaves += part.values()
        else:
            keys.append(key)
            leaves.append(part)
    return keys, leaves


def _may_be_kept(leaves: Sequence[Any]) -> bool:
    """Not where memory does not say what a tensor's values are (a conjugate view), nor other containers' content."""
    return all(type(leaf) in SCALARS or _is_plain(leaf) for leaf in leaves)


def _is_plain(leaf: Any) -> bool:
    return (type(leaf) in _PLAIN or is_dtensor(leaf)) and not (leaf.is_complex() or leaf.is_neg())
