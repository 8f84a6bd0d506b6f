"""What a rank gives to a persistent checkpoint beside its tensors, for other programs and other layouts to find.

The place in the data goes into a file per data-parallel rank; the tokenizer's files and what of the values is plain
(scheduler, hyperparameters) come from rank 0; what Megatron stores as objects, from the ranks that have them there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from resilience.formats.loader_files import encode_loader, loader_file
from resilience.formats.megatron_objects import extra_states, megatron_rng
from resilience.formats.optimizer_common import FULLY_RESHARDABLE, optimizer_common
from resilience.formats.torch_archive import as_own_storage
from resilience.state.plain import plain_parts

__all__ = ["Extras", "extras_of"]

TOKENIZER = "tokenizer"


@dataclass(frozen=True)
class Extras:
    """`files` by name relative to the checkpoint's folder; `common`: entries of `common.pt`; `objects` by key."""

    files: Mapping[str, bytes] = field(default_factory=dict)
    common: Mapping[str, Any] = field(default_factory=dict)
    objects: Mapping[str, Any] = field(default_factory=dict)


def extras_of(
    values: bytes,
    tensor_of: Callable[[str], torch.Tensor | None],
    *,
    loader_rank: int | None,
    leads: bool,
    rng: str | None = None,
    extra_state: Sequence[Mapping[str, str]] = (),
    tokenizer: Callable[[], Mapping[str, bytes]],
    sharding_type: str = FULLY_RESHARDABLE,
    experts: Collection[str] = frozenset(),
) -> Extras:
    """What this rank gives, from the values of its save.

    `loader_rank`: the data-parallel rank whose loader's state this rank writes (None: another does). `leads`: rank 0.
    `rng`: the key of the random state that this rank writes for Megatron (None: another does). `extra_state`: of each
    model, the entries that this rank writes as objects, and their keys. `tokenizer`: its files by name; called by rank
    0 alone. `sharding_type`: how the state of divided optimizers lies. `experts`: see `optimizer_common`.
    """
    files: dict[str, bytes] = {}
    if loader_rank is not None:
        loader = plain_parts(values, ("dataloader",), tensor_of).get("dataloader")
        if loader is not None:
            files[loader_file(loader_rank)] = encode_loader(_for_others(loader))

    def own_tensor_of(key: str) -> torch.Tensor | None:
        found = tensor_of(key)
        return None if found is None else as_own_storage(found)

    objects = extra_states(values, own_tensor_of, extra_state)
    state = megatron_rng(values, own_tensor_of) if rng is not None else {}
    if rng is not None and state:
        objects[rng] = [state]
    if not leads:
        return Extras(files, objects=objects)
    files |= {f"{TOKENIZER}/{name}": content for name, content in tokenizer().items()}
    parts = plain_parts(values, ("scheduler", "optimizer"), tensor_of)
    common: dict[str, Any] = {}
    if isinstance(parts.get("scheduler"), dict):
        common["opt_param_scheduler"] = parts["scheduler"]
    told = optimizer_common(parts.get("optimizer", ()), sharding_type, experts)
    return Extras(files, common if told is None else {**common, "optimizer": told}, objects)


def _for_others(loader: Mapping[str, Any]) -> Any:
    """A loader that keeps its own state is understood by whoever knows such loaders; of another, our count of it."""
    return loader["loader"] if loader.get("loader") is not None else loader
