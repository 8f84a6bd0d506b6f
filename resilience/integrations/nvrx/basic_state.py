"""A nested dictionary as a state that knows its tensors, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from resilience.integrations.nvrx.names import LocalCheckpointError, TensorAwareStateDict

__all__ = ["BasicTensorAwareStateDict"]


@dataclass(frozen=True)
class _Place:
    """Where a tensor was taken out."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: str


class BasicTensorAwareStateDict(TensorAwareStateDict):
    """`state_dict`: dictionaries and lists, nested; tensors inside other objects, and in tuples, are left alone.

    As NVRx's class of this name, for tensors on any device: each goes back to where it was.
    """

    def __init__(self, state_dict: dict[Any, Any]) -> None:
        self.state_dict = state_dict
        self._is_hollow = False
        self._devices: list[str] | None = None  # of the tensors, in order, before they were copied to the host

    @property
    def tensors(self) -> list[torch.Tensor]:
        self._expect(hollow=False)
        return [each for each in _leaves(self.state_dict) if isinstance(each, torch.Tensor)]

    @property
    def is_hollow(self) -> bool:
        return self._is_hollow

    def pop_tensors(self) -> list[torch.Tensor]:
        popped = self.tensors
        self._replace(torch.Tensor, lambda each: _Place(tuple(each.shape), each.dtype, str(each.device)))
        self._is_hollow = True
        return popped

    def insert_tensors(self, tensor_data: Iterable[torch.Tensor]) -> None:
        self._expect(hollow=True)
        tensors = list(tensor_data)
        places = sum(isinstance(each, _Place) for each in _leaves(self.state_dict))
        if len(tensors) != places:
            raise LocalCheckpointError(f"{len(tensors)} tensors were given for {places} places.")
        rest = iter(tensors)
        self._replace(_Place, lambda _: next(rest))
        self._is_hollow = False

    def init_tensors(self) -> None:
        self._expect(hollow=True)
        self._replace(_Place, lambda each: torch.empty(each.shape, dtype=each.dtype, device=each.device))
        self._is_hollow = False

    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        tensors = self.tensors
        if self._devices is None:
            self._devices = [str(each.device) for each in tensors]
            self._replace(torch.Tensor, lambda each: each.detach().to("cpu", non_blocking=non_blocking, copy=True))

    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        self._expect(hollow=False)
        devices, self._devices = self._devices, None
        if devices is not None:
            rest = iter(devices)
            self._replace(torch.Tensor, lambda each: each.to(next(rest), non_blocking=non_blocking))

    def _expect(self, *, hollow: bool) -> None:
        if self._is_hollow != hollow:
            raise LocalCheckpointError("its tensors were taken out." if self._is_hollow else "it has its tensors.")

    def _replace(self, kind: type, by: Callable[[Any], Any]) -> None:
        self.state_dict = _replaced(self.state_dict, kind, by)


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _leaves(each)
    else:
        yield value


def _replaced(value: Any, kind: type, by: Callable[[Any], Any]) -> Any:
    """The caller's dictionaries and lists stay as they are."""
    if isinstance(value, dict):
        return {key: _replaced(each, kind, by) for key, each in value.items()}
    if isinstance(value, list):
        return [_replaced(each, kind, by) for each in value]
    return by(value) if isinstance(value, kind) else value
