"""What a save need not work out again when names, shapes and types are those of the save before.

The ranks then tell each other only how long their files became, and a digest of their structure; rank 0 puts the new
places into the plan that it has. A digest that is not known makes all ranks tell everything, so that a structure that
changed is planned afresh and never stored under an old plan.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata

from resilience.formats.dcp_assemble import WrittenFile, WrittenObject, plan_of
from resilience.formats.kept import Kept

__all__ = ["KeptPlan", "brief_of"]


@dataclass
class _Plan:
    """Both on rank 0 only."""

    files: Sequence[WrittenFile] = ()
    metadata: Metadata | None = None


class KeptPlan:
    """The last plans of one series of saves; the same ones on all ranks."""

    def __init__(self) -> None:
        self._kept: Kept[_Plan] = Kept()

    def knows(self, briefs: Sequence[Mapping[str, Any]]) -> bool:
        """Whether these ranks' files have a structure that is known. Equal on all ranks."""
        return self._kept.find(_structures(briefs)) is not None

    def remember(self, briefs: Sequence[Mapping[str, Any]], files: Sequence[WrittenFile]) -> None:
        """Keep what all ranks told; `files` on rank 0."""
        self._kept.remember(_structures(briefs), _Plan(files))

    def files(self, briefs: Sequence[Mapping[str, Any]]) -> list[WrittenFile]:
        """What the ranks wrote, from their briefs. Rank 0."""
        plan = self._known(briefs)
        return [_moved(file, brief) for file, brief in zip(plan.files, briefs, strict=True)]

    def plan(self, briefs: Sequence[Mapping[str, Any]]) -> Callable[[Sequence[WrittenFile]], Metadata]:
        """Gives the plan of such files, worked out only once. Rank 0."""
        kept = self._known(briefs)

        def once(files: Sequence[WrittenFile]) -> Metadata:
            if kept.metadata is None:
                kept.metadata = plan_of(files)
            return kept.metadata

        return once

    def _known(self, briefs: Sequence[Mapping[str, Any]]) -> _Plan:
        plan = self._kept.find(_structures(briefs))
        assert plan is not None, "asked for after `knows` or `remember`"
        return plan


def brief_of(file: WrittenFile) -> dict[str, Any]:
    """All that differs from save to save, and a digest of all that does not; as JSON."""
    base = _tensors_start(file)
    structure = [
        file.file,
        [[*list(vars(tensor).values())[:-2], tensor.start - base, tensor.nbytes] for tensor in file.tensors],
        [stored.key for stored in file.objects],
        sorted(file.aliases.items()),
    ]
    return {
        "structure": hashlib.sha256(json.dumps(structure).encode()).hexdigest(),
        "file_bytes": file.file_bytes,
        "sha256": file.sha256,
        "objects": [[stored.start, stored.nbytes] for stored in file.objects],
        "tensors_start": base,
    }


def _moved(file: WrittenFile, brief: Mapping[str, Any]) -> WrittenFile:
    """The same file with the places and digests of a later save."""
    shift = brief["tensors_start"] - _tensors_start(file)
    return replace(
        file,
        file_bytes=brief["file_bytes"],
        sha256=brief["sha256"],
        tensors=tuple(replace(tensor, start=tensor.start + shift) for tensor in file.tensors),
        objects=tuple(
            WrittenObject(stored.key, start, nbytes)
            for stored, (start, nbytes) in zip(file.objects, brief["objects"], strict=True)
        ),
    )


def _tensors_start(file: WrittenFile) -> int:
    return min((tensor.start for tensor in file.tensors), default=0)


def _structures(briefs: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    return tuple(brief["structure"] for brief in briefs)
