"""Which array has which grid, and who writes which chunk: from what all ranks have, or as it was the last time.

With `ckpt_assume_constant_structure` ranks tell each other a digest of what they have. If these are known, so is the
plan; if not, everything is told: a structure that changed is planned afresh and never stored under an old plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from resilience.errors import LayoutMismatchError, SaveFailedError
from resilience.formats.collective import exchange
from resilience.formats.kept import Kept
from resilience.formats.keys import stored_key
from resilience.formats.protocol import Chunk
from resilience.formats.zarr_chunks import Given, Plan, plan_chunks
from resilience.formats.zarr_grid import Box
from resilience.formats.zarr_metadata import ZarrArray, folder_of, storage_dtype
from resilience.replication.communicator import Agreements
from resilience.state.tensors import dtype_name

__all__ = ["Planned", "plan_grids"]


@dataclass(frozen=True)
class Planned:
    """What this rank writes, every array by key, and second names: alias -> key."""

    plan: Plan
    arrays: Mapping[str, ZarrArray]
    aliases: Mapping[str, str]


def plan_grids(
    shared: Sequence[Chunk], aliases: Mapping[str, str], agreements: Agreements, kept: Kept[Planned] | None
) -> Planned:
    """Collective. SaveFailedError on all ranks if the parts do not fit together; then nothing is remembered."""
    own_aliases = {stored_key(alias): stored_key(root) for alias, root in aliases.items()}
    mine = {"parts": [_told(chunk) for chunk in shared], "aliases": own_aliases}
    structures: tuple[str, ...] = ()
    if kept is not None:
        digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
        structures = tuple(one["structure"] for one in exchange(agreements, lambda: {"structure": digest}, "structure"))
        known = kept.find(structures)
        if known is not None:
            return known
    told = exchange(agreements, lambda: mine, "plan")
    plan = _plan([one["parts"] for one in told], agreements.rank)
    arrays = {key: _array(key, plan) for key in plan.grids}
    planned = Planned(plan, arrays, _aliases([one["aliases"] for one in told], arrays))
    if kept is not None:
        kept.remember(structures, planned)
    return planned


def _told(chunk: Chunk) -> list[Any]:
    dtype = chunk.dtype
    shapes = [*chunk.global_shape], [*chunk.offsets], [*chunk.sizes]
    return [stored_key(chunk.key), dtype_name(dtype), dtype.itemsize, *shapes]


def _plan(parts: Sequence[Sequence[Any]], rank: int) -> Plan:
    """From the same facts on all ranks, so that all raise if the parts do not fit."""
    given = [
        _given(owner, number, told) for owner, all_told in enumerate(parts) for number, told in enumerate(all_told)
    ]
    try:
        return plan_chunks(given, rank)
    except LayoutMismatchError as error:
        raise SaveFailedError(f"The checkpoint could not be written (plan): {error}") from error


def _given(rank: int, number: int, told: Sequence[Any]) -> Given:
    key, dtype, itemsize, shape, offsets, sizes = told
    return Given(key, dtype, itemsize, tuple(shape), Box(rank, tuple(offsets), tuple(sizes)), number)


def _array(key: str, plan: Plan) -> ZarrArray:
    dtype = plan.dtypes[key]
    return ZarrArray(key, folder_of(key), dtype, storage_dtype(dtype), plan.grids[key])


def _aliases(told: Sequence[Mapping[str, str]], arrays: Mapping[str, ZarrArray]) -> dict[str, str]:
    """A second name of a tensor that all ranks share; of what is per rank, the rank's object has both names."""
    found = {alias: key for aliases in told for alias, key in aliases.items()}
    return {alias: key for alias, key in found.items() if key in arrays and alias not in arrays}
