"""What users of NVIDIA's Resiliency Extension know by name: its own classes where it is installed, else ours.

Code that catches its exceptions, or asks whether something is one of its state dicts, must find ours to be those.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import distributed as dist

from resilience.errors import ResilienceError

__all__ = [
    "AsyncRequest",
    "CheckpointingException",
    "LocalCheckpointError",
    "NoReplicasAvailableError",
    "SameMachineReplicationException",
    "TensorAwareStateDict",
]


class _TensorAwareStateDict(ABC):
    """A state whose tensors can be moved between devices, or taken out, without knowing what else is in it."""

    @abstractmethod
    def pop_tensors(self) -> list[torch.Tensor]:
        """Take the tensors out, which leaves it hollow."""

    @property
    @abstractmethod
    def tensors(self) -> Iterable[torch.Tensor]:
        """Of a state that is not hollow."""

    @property
    @abstractmethod
    def is_hollow(self) -> bool:
        """Whether its tensors were taken out."""

    @abstractmethod
    def insert_tensors(self, tensor_data: Iterable[torch.Tensor]) -> None:
        """Put them back, in the order in which they were taken out."""

    @abstractmethod
    def init_tensors(self) -> None:
        """Put empty ones in their place."""

    @abstractmethod
    def copy_tensors_to_cpu(self, non_blocking: bool = False) -> None:
        """Replace the tensors by copies in host memory; where they were is remembered."""

    @abstractmethod
    def restore_tensor_device(self, non_blocking: bool = True) -> None:
        """Move the tensors to where they were."""


class _CheckpointingException(Exception):
    """A local checkpoint could not be saved or loaded."""


class _SameMachineReplicationException(_CheckpointingException):
    """Of NVRx: a file is there already. Never raised here."""


class _NoReplicasAvailableError(Exception):
    """Of NVRx: nobody has what is asked for. Never raised here: `find_latest` finds only what can be had."""


class _AsyncRequest(NamedTuple):
    """What is to be done in the background, and what on all ranks when that is done everywhere.

    The fields, in this order, are NVRx's, and Megatron's queues rebuild a request from them.
    """

    async_fn: Callable[..., Any] | None
    async_fn_args: tuple[Any, ...]
    finalize_fns: list[Callable[[], Any]]
    async_fn_kwargs: dict[str, Any] = {}  # noqa: RUF012 - as NVRx's; ours is always given one
    preload_fn: Callable[[], Any] | None = None
    is_frozen: bool = False
    call_idx: int = 0

    def add_finalize_fn(self, fn: Callable[[], Any]) -> None:
        """One more, to be called after the others. RuntimeError once it is frozen."""
        if self.is_frozen:
            raise RuntimeError("this request is frozen: it was scheduled already.")
        self.finalize_fns.append(fn)

    def execute_sync(self) -> None:
        """Do all of it now. Collective."""
        if self.async_fn is not None:
            self.async_fn(*self.async_fn_args, **self.async_fn_kwargs)
        if dist.is_initialized():
            dist.barrier()
        self.execute_finalize_fns(validate_matching_call_idx=False)

    def freeze(self) -> _AsyncRequest:
        """The same, to which nothing can be added."""
        return self._replace(is_frozen=True)

    def execute_finalize_fns(self, validate_matching_call_idx: bool = True) -> int:
        """Call them in order; returns `call_idx`. Collective. `validate_matching_call_idx` is of no use here:

        what is finalized is agreed by all ranks anyway.
        """
        for finalize in self.finalize_fns:
            finalize()
        return self.call_idx


if TYPE_CHECKING:
    AsyncRequest = _AsyncRequest
    CheckpointingException = _CheckpointingException
    NoReplicasAvailableError = _NoReplicasAvailableError
    SameMachineReplicationException = _SameMachineReplicationException
    TensorAwareStateDict = _TensorAwareStateDict
else:
    try:
        from nvidia_resiliency_ext.checkpointing.async_ckpt.core import AsyncRequest
        from nvidia_resiliency_ext.checkpointing.local.base_state_dict import TensorAwareStateDict
        from nvidia_resiliency_ext.checkpointing.local.ckpt_managers.base_manager import (
            CheckpointingException,
            SameMachineReplicationException,
        )
        from nvidia_resiliency_ext.checkpointing.local.replication.strategies import NoReplicasAvailableError
    except ImportError:
        AsyncRequest = _AsyncRequest
        CheckpointingException = _CheckpointingException
        NoReplicasAvailableError = _NoReplicasAvailableError
        SameMachineReplicationException = _SameMachineReplicationException
        TensorAwareStateDict = _TensorAwareStateDict


class LocalCheckpointError(CheckpointingException, ResilienceError):
    """What this package raises: also caught as NVRx's `CheckpointingException`. On all ranks, or on none."""

    def __init__(self, message: str, *, advice: str = "") -> None:
        ResilienceError.__init__(self, message, advice=advice)
