"""How a `fsdp_dtensor` folder is read, ours or another program's: as any DCP folder, under other names.

A tensor may lie in any chunks; whoever asks for a part of it, at any mesh, gets it from those that have it.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from resilience.errors import CorruptCopyError
from resilience.formats.dcp_metadata import DcpIndex
from resilience.formats.fsdp_dtensor_beside import COMMON_OBJECT
from resilience.formats.fsdp_dtensor_keys import FOREIGN, tree_keys
from resilience.formats.torch_dist_reader import TorchDistReader

__all__ = ["FsdpDtensorReader"]

_SCHEDULER = "opt_param_scheduler"
_COUNTERS = ("checkpoint_version", "iteration")


class FsdpDtensorReader(TorchDistReader):
    """See `CheckpointReader`. Made by `FsdpDtensor.open`, which has checked that the folder is whole."""

    def _paths(self, stored: DcpIndex) -> Mapping[str, str]:
        ours = self.record is not None
        paths = tree_keys(stored.tensors, wrapped=not ours)
        # what ours keeps for other programs is a second copy of what a rank has
        return {key: path for key, path in paths.items() if not (ours and path.startswith(FOREIGN))}

    @cached_property
    def common(self) -> Mapping[str, Any]:
        if COMMON_OBJECT not in self._stored.objects:
            return self._foreign_common()
        common = self._object(COMMON_OBJECT)
        if not isinstance(common, dict):
            raise CorruptCopyError(f"The common state in {self.folder} is no dictionary.")
        return common

    def _foreign_common(self) -> dict[str, Any]:
        """Counters and the scheduler's state, as far as they are plain objects; their names keep their dots."""
        common: dict[str, Any] = {name: self._stored_object(name) for name in _COUNTERS if name in self._stored.objects}
        start = f"{_SCHEDULER}."
        scheduler = {
            key.removeprefix(start): self._stored_object(key) for key in self._stored.objects if key.startswith(start)
        }
        return common | ({_SCHEDULER: scheduler} if scheduler else {})
