"""What of a module is state, under which names, and which of its entries can be filled in place.

State is what `state_dict()` says: parameters, persistent buffers, and what hooks and `get_extra_state` add. Wrappers
(DistributedDataParallel, torch.compile, activation checkpointing) leave no trace in the names, so that a run may be
resumed with or without them. A Megatron Core model's entries have names that are good for the whole model.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import torch

from resilience.errors import ConfigError, UnsupportedStateError
from resilience.state.megatron_model import megatron_places
from resilience.state.tensors import local_part

_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
#: Megatron Core's own, which its models are trained in; its FSDP is none of them.
_MEGATRON_WRAPPERS = {"DistributedDataParallel", "Float16Module"}


class ModelState:
    """One module (of a pipeline: one chunk) as a part of the training state."""

    def __init__(self, model: Any, position: int) -> None:
        if not isinstance(model, torch.nn.Module):
            raise ConfigError(
                f"model is a {type(model).__name__}; a torch.nn.Module is expected.",
                advice="Give the module, or a list of modules (one per pipeline chunk).",
            )
        for name, part in model.named_modules():
            kind = type(part)
            # Megatron's wrapper of the same name keeps its parameters apart, as DTensors.
            if kind.__name__ == "FullyShardedDataParallel" and not kind.__module__.startswith("megatron"):
                raise UnsupportedStateError(
                    f"model/{position}: {name or 'the model'} is wrapped by FullyShardedDataParallel, whose flattened "
                    f"parameters cannot be stored by name.",
                    advice="Use torch.distributed.fsdp.fully_shard (FSDP2).",
                )
        self.position = position
        self.module = unwrapped(model)
        self.places = megatron_places(self.module, f"model/{position}")
        self._raw_names: list[str] = []  # asked for last, and the clean ones
        self._clean_names: dict[str, str] = {}

    def collect(self) -> dict[str, Any]:
        """The entries of the state dict by clean name; tensors are live."""
        entries = self.module.state_dict()
        return {name: entries[raw] for name, raw in self._names(list(entries)).items()}

    def parameters(self) -> Iterator[tuple[str, torch.nn.Parameter]]:
        """Each parameter once, by clean name."""
        named = dict(self.module.named_parameters())
        for name, raw in self._names(list(named)).items():
            yield name, named[raw]

    def buffers(self) -> Iterator[str]:
        """The buffers by clean name."""
        yield from self._names([name for name, _ in self.module.named_buffers()])

    def tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        """The live parameters and buffers under every clean name that the state dict has them by."""
        named: dict[str, torch.Tensor] = dict(self.module.named_buffers(remove_duplicate=False))
        named.update(self.module.named_parameters(remove_duplicate=False))
        for name, raw in self._names(list(named)).items():
            yield name, named[raw]

    def storages(self) -> set[Hashable]:
        """What identifies the memory of the live parameters and buffers; see `storage_of`."""
        return {storage_of(tensor) for tensor in (*self.module.parameters(), *self.module.buffers())}

    def load_made_entries(self, made: dict[str, Any]) -> None:
        """Give back, through `load_state_dict`, entries that are no live tensors (extra state, what hooks made).

        The module gets a whole state dict, because its hooks may need more of it than these; what was filled in place
        is copied onto itself.
        """
        if not made:
            return
        entries = self.module.state_dict()
        for name, raw in self._names(list(entries)).items():
            if name in made:
                entries[raw] = made[name]
        self.module.load_state_dict(entries, strict=False)

    def _names(self, raw_names: list[str]) -> dict[str, str]:
        """Clean name → name in the module. Names that only their wrappers tell apart keep them."""
        if raw_names != self._raw_names:
            said = self.places.names
            clean = {said.get(raw) or _clean(raw): raw for raw in raw_names}
            self._clean_names = clean if len(clean) == len(raw_names) else {raw: raw for raw in raw_names}
            self._raw_names = raw_names
        return self._clean_names

    @property
    def devices(self) -> set[torch.device]:
        """The devices that the parameters lie on."""
        own = (part._parameters.values() for part in self.module.modules())
        return {parameter.device for each in own for parameter in each if parameter is not None}


def unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    """The module inside DistributedDataParallel, DataParallel, torch.compile and Megatron's wrappers, in any order."""
    inner: Any = module
    while True:
        if isinstance(inner, (torch.nn.parallel.DistributedDataParallel, torch.nn.DataParallel)):
            inner = inner.module
        elif type(inner).__name__ == "OptimizedModule":
            inner = inner._orig_mod
        elif type(inner).__name__ in _MEGATRON_WRAPPERS and type(inner).__module__.startswith("megatron.core."):
            inner = inner.module
        else:
            return inner  # type: ignore[no-any-return]


def storage_of(tensor: torch.Tensor) -> Hashable:
    """Equal for two tensors that are the same elements in memory."""
    local = local_part(tensor)
    return (local.data_ptr(), local.device, local.dtype, tuple(local.shape), local.stride())


def _clean(raw: str) -> str:
    if not any(wrapper in raw for wrapper in _WRAPPERS):
        return raw
    return ".".join(part for part in raw.split(".") if part not in _WRAPPERS)
