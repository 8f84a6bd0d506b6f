"""What one rank alone knew, as an object that loads with `weights_only=True`: its values and its own tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from resilience.errors import CorruptCopyError
from resilience.formats.protocol import Chunk, RankShare, RankState
from resilience.formats.torch_archive import archive_of, as_own_storage

__all__ = ["own_object", "rank_state_of"]


def own_object(alone: Sequence[Chunk], share: RankShare) -> list[memoryview]:
    """The pieces of its `torch.save` archive; `alone`: the tensors that go into it.

    A list of one: the form in which Megatron Core stores objects. Text, because a safe loader takes no bytes.
    """
    own = {chunk.key: as_own_storage(chunk.tensor) for chunk in alone}
    named = own | {alias: own[key] for alias, key in share.aliases.items() if key in own}
    return archive_of([{"values": share.values.decode(), "tensors": named}], own.values())


def rank_state_of(stored: Any, what: str) -> RankState:
    """What such an archive held; CorruptCopyError if it is anything else."""
    match stored:
        case [{"values": str() as values, "tensors": dict() as tensors}] if all(
            isinstance(path, str) and isinstance(tensor, torch.Tensor) for path, tensor in tensors.items()
        ):
            return RankState(values.encode(), tensors)
    raise CorruptCopyError(f"{what} does not hold a rank's values and tensors.")
